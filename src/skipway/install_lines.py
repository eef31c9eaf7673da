"""The lines that install what is optional. Nothing in them replaces the PyTorch that is installed.

torchvision requires one exact release of PyTorch, and timm requires torchvision. With their dependencies, `pip` would
replace a CPU build by one for CUDA; so these two are installed without, and what else they need beside them.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["EXTRAS", "LIBRARIES", "library_line"]

# extra → what it is for
EXTRAS = {
    "digits": "scikit-learn's bundled digits: skipway train without a folder, the studies, the guide",
    "plot": "figures of a diagnosis as .png or .pdf",
    "onnx": "skipway export --onnx, and ONNX Runtime as a backend of sw.optimize",
    "openvino": "OpenVINO as a backend of sw.optimize",
    "int8": "sw.quantize and skipway export --int8: networks in 8-bit integers, by NNCF on OpenVINO",
    "hub": "weights by hf:ORG/NAME",
    "transformers": "networks by hf:CLASS, language models in folders of transformers",
    "datasets": "images and texts by hf:NAME",
    "tokenizers": "texts in the tokens of a tokenizer.json",
    "parquet": "image lists and texts as .parquet; texts compressed by Zstandard before Python 3.14",
    "jpeg": "JPEGs decoded about a fifth faster",
    "heif": "photographs in HEIC and HEIF",
    "optimizers": "optimizers beyond SGD, AdamW, Lion, LAMB and Muon",
    "tensorboard": "skipway train --tensorboard",
    "triton": "GPU kernels under Triton's interpreter, on a CPU build of PyTorch",
}
# library without an extra → what it is for
LIBRARIES = {
    "timm": "networks and published weights by timm:NAME",
    "torchvision": "networks and published weights by torchvision:NAME",
}


def library_line(package: str) -> str:
    """The line that installs a library and keeps the PyTorch that is there.

    >>> library_line("transformers")
    "pip install 'skipway[transformers]'"
    >>> library_line("timm").partition("torchvision")[0]
    'pip install pyyaml huggingface_hub && pip install --no-deps timm '
    """
    if package == "torchvision":
        return f"pip install --no-deps {torchvision_release()}"
    if package == "timm":
        return f"pip install pyyaml huggingface_hub && pip install --no-deps timm {torchvision_release()}"
    return f"pip install 'skipway[{package}]'" if package in EXTRAS else f"pip install --no-deps {package}"


def torchvision_release() -> str:
    """The torchvision that goes with the installed PyTorch, as pip takes it: 0.25 goes with 2.10, and so on."""
    try:
        release = re.match(r"2\.(\d+)", version("torch"))
    except PackageNotFoundError:
        release = None
    return "torchvision" if release is None else f"torchvision==0.{int(release[1]) + 15}.*"
