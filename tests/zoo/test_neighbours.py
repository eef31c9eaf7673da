"""Files of one name in several folders, each with neighbours of its own."""

import importlib
import pickle
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
    """Versions of a network, the last one below another, whose folder of parts is a package without `__init__.py`."""
    for width, version in ((3, "a"), (5, "b"), (7, "b/old")):
        for name, text in FILES.items():
            file = tmp_path / version / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(width=width))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("blocks", "parts")]:
        del sys.modules[name]


@pytest.mark.parametrize("versions", [["a", "b", "a"], ["b", "b/old", "b"], ["b/old", "b", "b/old"]])
def test_every_file_has_its_own_neighbours(folders, versions):
    for version in versions:
        made = load_model(f"{folders / version / 'net.py'}:make", ModelRequest()).model
        assert made.in_features == {"a": 3, "b": 5, "b/old": 7}[version]


def test_what_was_loaded_stays_loaded(folders, monkeypatch):
    monkeypatch.syspath_prepend(folders / "a")
    import blocks  # type: ignore[import-not-found]

    before = {name for name in sys.modules if not name.startswith("skipway_source_")}
    assert load_model(f"{folders / 'b' / 'net.py'}:make", ModelRequest()).model.in_features == 5
    assert sys.modules["blocks"] is blocks
    assert {name for name in sys.modules if name in before} == before
    assert blocks.Layer().in_features == 3


def test_what_others_import_later_is_theirs(folders, monkeypatch):
    """A name that can be imported without the file's folder is not taken by the file's neighbour."""
    monkeypatch.syspath_prepend(folders / "a")
    assert load_model(f"{folders / 'b' / 'net.py'}:make", ModelRequest()).model.in_features == 5
    assert importlib.import_module("blocks").Layer().in_features == 3
    assert importlib.import_module("parts.layer").Layer().in_features == 3


def test_networks_of_two_files_of_one_name_are_pickled(folders):
    text = "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__({}, 1)\n"
    made = []
    for width, version in ((3, "a"), (5, "b")):
        (folders / version / "own.py").write_text(text.format(width))
        made.append(load_model(f"{folders / version / 'own.py'}:Net", ModelRequest()).model)
    assert [pickle.loads(pickle.dumps(each)).in_features for each in made] == [3, 5]
