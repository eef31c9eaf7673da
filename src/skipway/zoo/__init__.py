"""Models by name: Skipway's own, timm, torchvision, transformers or a Python file."""

from skipway.zoo.sources import (
    FIRST_LAYER,
    SOURCES,
    LoadedModel,
    ModelRequest,
    Source,
    config_file,
    depth_argument,
    import_library,
    input_shape_of,
    load_model,
    source_of,
)

__all__ = [
    "FIRST_LAYER",
    "SOURCES",
    "LoadedModel",
    "ModelRequest",
    "Source",
    "config_file",
    "depth_argument",
    "import_library",
    "input_shape_of",
    "load_model",
    "source_of",
]
