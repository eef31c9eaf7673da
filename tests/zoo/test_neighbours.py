"""Files of one name in several folders, each with neighbours of its own."""

import sys

import pytest

from skipway.zoo import ModelRequest, load_model

FILES = {
    "blocks.py": "from torch import nn\nLayer = lambda: nn.Linear({width}, 1)\n",
    "parts/layer.py": "from blocks import Layer\n",
    "net.py": "import torch\nfrom parts.layer import Layer\n\n\ndef make():\n    from blocks import Layer as same\n"
    "    assert same is Layer\n    return Layer(), torch.zeros(2, {width})\n",
}


@pytest.fixture
def folders(tmp_path):
    """Two versions of a network, whose folder of parts is a package without `__init__.py`."""
    for width, version in ((3, "a"), (5, "b")):
        for name, text in FILES.items():
            file = tmp_path / version / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(width=width))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("blocks", "parts")]:
        del sys.modules[name]


def test_every_file_has_its_own_neighbours(folders):
    for version, width in (("a", 3), ("b", 5), ("a", 3)):
        made = load_model(f"{folders / version / 'net.py'}:make", ModelRequest()).model
        assert made.in_features == width


def test_what_was_loaded_stays_loaded(folders, monkeypatch):
    monkeypatch.syspath_prepend(folders / "a")
    import blocks  # type: ignore[import-not-found]

    before = {name for name in sys.modules if not name.startswith("skipway_source_")}
    assert load_model(f"{folders / 'b' / 'net.py'}:make", ModelRequest()).model.in_features == 5
    assert sys.modules["blocks"] is blocks
    assert {name for name in sys.modules if name in before} == before
    assert blocks.Layer().in_features == 3
