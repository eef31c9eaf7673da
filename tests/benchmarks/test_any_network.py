"""A sample of `benchmarks.any_network`, in this process: killed by an exception where the benchmark sends SIGKILL."""

from __future__ import annotations

import pytest
from tests.training.test_any_network import write_images

from benchmarks.any_network import (
    equal_weights,
    find_faults,
    train_command,
    train_until_killed,
    write_configs,
    write_own,
)


class Killed(BaseException):
    pass


def die():
    raise Killed


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_a_network_is_trained_killed_resumed_and_used_by_commands(tmp_path, kind):
    if kind == "transformers":
        pytest.importorskip("transformers")
    images = tmp_path / "images"
    images.mkdir()
    write_images(images)
    name = write_own(tmp_path)[1] if kind == "own" else write_configs(tmp_path)[0]
    train_command(name, images, 32, tmp_path / "whole", batch=4)
    with pytest.raises(Killed):
        train_until_killed(name, images, 32, tmp_path / "killed", kill=die, batch=4)
    assert find_faults(name, images, 32, tmp_path, batch=4, onnx=False) == []


def test_other_weights_are_seen(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, value in (("first", 0.0), ("second", -0.0)):
        save_file({"weight": torch.tensor([value])}, tmp_path / name)
    assert equal_weights(tmp_path / "first", tmp_path / "first")
    assert not equal_weights(tmp_path / "first", tmp_path / "second")
