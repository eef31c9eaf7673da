"""Inputs made by our pipeline, beside those of the transforms that timm and torchvision state for their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from skipway.data.data_config import DataConfig, find_data_config
from skipway.data.loader import IMAGENET_MEAN
from skipway.data.preprocessing import Preprocessing
from skipway.errors import SkipwayError
from skipway.inference.published_weights import published
from skipway.inference.weight_libraries import LIBRARIES
from skipway.zoo import ModelRequest, import_library, load_model


@pytest.fixture(scope="module")
def photo():
    folder = pytest.importorskip("sklearn.datasets").__path__[0]
    return Image.open(Path(folder) / "images" / "china.jpg").convert("RGB")


def require(library):
    try:
        return import_library(library)
    except SkipwayError as error:
        pytest.skip(str(error))


def ours(config: DataConfig, size: int, photo: Image.Image) -> torch.Tensor:
    assert config.crop_share is not None
    assert config.resample is not None
    preprocessing = Preprocessing(
        *(("a", "b"), 3, size, config.mean, config.std, "resized"),
        crop_share=config.crop_share,
        resample=config.resample,
    )
    return preprocessing.of_tensor(preprocessing.of_picture(photo)[None].permute(0, 3, 1, 2))[0]


def assert_alike(first: torch.Tensor, second: torch.Tensor) -> None:
    """Equal but for a shift by parts of a pixel: the libraries round the size before they crop."""
    assert first.shape == second.shape
    gap = (first - second).abs()
    assert gap.mean() < 0.12 * second.std()
    blurred = [torch.nn.functional.avg_pool2d(each[None], 16) for each in (first, second)]
    assert (blurred[0] - blurred[1]).abs().max() < 0.15 * second.std()


TIMM = [
    *("resnet50.a1_in1k", "resnet50.tv_in1k", "inception_v3.tv_in1k", "efficientnet_b1.ft_in1k"),
    *("tf_efficientnet_lite0.in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "convnext_atto.d2_in1k"),
]


@pytest.mark.parametrize("name", TIMM)
def test_timm(photo, name):
    timm = require("timm")
    stated = timm.get_pretrained_cfg(name)
    from timm.data import create_transform, resolve_data_config

    options = resolve_data_config(pretrained_cfg=stated.to_dict())
    theirs = create_transform(**options)(photo)
    config = find_data_config(None, "timm", name)
    assert config is not None
    assert_alike(ours(config, options["input_size"][-1], photo), theirs)


@pytest.mark.parametrize(
    "name", ["resnet50", "inception_v3", "efficientnet_b0", "efficientnet_v2_s", "swin_t", "vit_b_16"]
)
def test_torchvision(photo, name):
    models = require("torchvision").models
    transform = models.get_model_weights(name).DEFAULT.transforms()
    config = find_data_config(None, "torchvision", name)
    assert config is not None
    assert_alike(ours(config, transform.crop_size[0], photo), transform(photo))


def test_a_file_of_torchvision_has_the_transform_of_its_own_weights():
    require("torchvision")
    for file, share in (
        ("resnet50-0676ba61.pth", 224 / 256),
        ("resnet50-11ad3fa6.pth", 224 / 232),
        ("of-somebody.pth", 224 / 232),
    ):
        config = find_data_config(Path("weights") / file, "torchvision", "resnet50")
        assert config is not None
        assert config.crop_share == pytest.approx(share)


def test_what_a_library_states_does_not_depend_on_the_folder_of_the_process(tmp_path, monkeypatch):
    require("torchvision")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    monkeypatch.chdir(tmp_path)
    config = find_data_config(None, "torchvision", "resnet50", file="resnet50-0676ba61.pth")
    assert config is not None
    assert (config.mean, config.crop_share) == (IMAGENET_MEAN, 224 / 256)
    assert published(LIBRARIES["torchvision"], "resnet50", {}, "").config.mean == IMAGENET_MEAN


@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_b1", "test_vit"])
def test_sizes_of_timm_are_those_that_it_states(name):
    stated = require("timm").get_pretrained_cfg(name).input_size
    assert load_model(f"timm:{name}", ModelRequest()).shape == tuple(stated)


def test_sizes_of_torchvision_are_those_of_its_transforms():
    transform = require("torchvision").models.get_model_weights("inception_v3").DEFAULT.transforms()
    assert load_model("torchvision:inception_v3", ModelRequest()).shape == (3, *transform.crop_size * 2)
