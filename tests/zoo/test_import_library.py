"""A library whose compiled half fits this PyTorch, one whose half does not, and one that fails for another reason."""

import sys

import pytest
import torch

from skipway.zoo.sources import import_declaring

HALF = 'import torch\nLIBRARY = torch.library.Library("{name}", "DEF")\nLIBRARY.define("nms(Tensor dets) -> Tensor")\n'
SHAPES = 'import torch, {name}.half\n@torch.library.register_fake("{name}::nms")\ndef nms(dets):\n    return dets\n'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package whose second file registers shape functions for operators that its first one may define."""

    def write(name, half, shapes=SHAPES):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text(f"from {name} import half, shapes\n")
        (folder / "half.py").write_text(half.format(name=name))
        (folder / "shapes.py").write_text(shapes.format(name=name))
        monkeypatch.syspath_prepend(tmp_path)
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("pretended")]:
        del sys.modules[name]


def test_operators_of_a_compiled_half_that_loads_are_its_own(package):
    """Declared by us before, the definition by the library itself would raise, and one in C++ ends the process."""
    found = import_declaring(package("pretended_whole", HALF), {"nms": "nms(Tensor dets) -> Tensor"})
    assert found.half.LIBRARY.kind == "DEF"
    assert hasattr(torch.ops.pretended_whole, "nms")


def test_operators_of_a_compiled_half_that_does_not_load_are_declared(package):
    name = package("pretended_half", "")
    found = import_declaring(name, {"nms": "nms(Tensor dets) -> Tensor"})
    assert found.shapes.nms(3) == 3
    assert found.half is sys.modules[f"{name}.half"]


def test_another_error_of_the_library_stays_its_own(package):
    broken = "raise RuntimeError('compiled with different CUDA major versions')"
    with pytest.raises(RuntimeError, match="different CUDA"):
        import_declaring(package("pretended_broken", HALF, broken), {"nms": "nms(Tensor dets) -> Tensor"})
