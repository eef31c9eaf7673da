"""Kind: a choice that changes a pixel, or the meaning of an output, and is not stored with the weights.

| trial | input | right value |
|---|---|---|
| B10 | 16-bit images around 2,000, trained with `grey16="minmax"` | one accuracy in training, evaluation, prediction |
| every field | a value that is not the default for each field of `Preprocessing` | every file and reader has it |
| A9 | weights whose file, folder or library states mean and deviation | inputs are scaled by them, and it is said |
| A9 | weights equal to the fresh ones, as gains of norms often are | they count as loaded |
| A9 | weights by a name on the hub, whose folder there states them | as of a folder |
| A9 | the weights of a run of other choices | every field is followed, but for the crops of the training |
| A9 | weights about which nothing is stated | a remark that names the options |
| ONNX | the file's metadata alone, read with NumPy and Pillow | the inputs that the network was trained with |
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import skipway as sw
from skipway.data.data_config import WeightsDescription, find_data_config
from skipway.data.preprocessing import Preprocessing
from skipway.errors import CheckpointError
from skipway.inference.predict import Predictor
from skipway.inference.publish import write_hub_folder, write_onnx, write_program
from skipway.inference.run_evaluation import evaluate_images, evaluate_run
from skipway.training.reporter import SilentReporter
from skipway.weights import hub, read_weights

pytestmark = pytest.mark.filterwarnings("ignore:the run was tested with the mean of the logits:UserWarning")
SPECIAL = {
    "channels": 1,
    "size": 24,
    "mean": "0.25",
    "std": "0.125",
    "crop": "none",
    "grey16": "minmax",
    "fit": "pad",
    "crop_share": 0.75,
    "resample": "bilinear",
    "flip_test": True,
}
"""A value of each field that is not its default."""


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def message(self, label: str, text: str) -> None:
        self.notes.append(text)


def stripes(root: Path, count: int = 16) -> Path:
    """16-bit images in a narrow range, with stripes across or down."""
    rng = np.random.default_rng(0)
    for name in ("across", "down"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            values = 2000 + rng.normal(0, 20, (32, 48))
            values += 130 * np.sign(np.sin(np.arange(32) * 0.8 + number))[:, None] * (name == "across")
            values += 130 * np.sign(np.sin(np.arange(48) * 0.8 + number))[None, :] * (name == "down")
            Image.fromarray(values.astype(np.uint16)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def special(tmp_path_factory) -> tuple[Path, Path]:
    """A run whose preprocessing differs from the default in every field, and its images."""
    root = tmp_path_factory.mktemp("special")
    images = stripes(root / "images")
    recipe = sw.Recipe(
        images, model="resnet", depth=8, width=4, epochs=3, batch_size=8, lr=0.1, seed=1, flip=False, ema=0.5, **SPECIAL
    )
    sw.train(recipe, root / "run")
    return root / "run", images


def expected(name: str):
    value = SPECIAL[name]
    return (float(value),) if name in ("mean", "std") else value


def test_every_field_of_the_preprocessing_has_a_value_to_test():
    """A new field cannot be forgotten here."""
    assert {field.name for field in dataclasses.fields(Preprocessing)} == {"classes", *SPECIAL}
    for field in dataclasses.fields(Preprocessing):
        if field.default is not dataclasses.MISSING:
            assert SPECIAL[field.name] != field.default


def readers(run: Path, folder: Path):
    """Every place that a preprocessing is read from."""
    yield "run", sw.from_pretrained(run).preprocessing
    yield "last", sw.from_pretrained(run / "last.safetensors").preprocessing
    yield "config.json", Preprocessing.from_json(json.loads((run / "config.json").read_text())["preprocessing"], "")
    write_hub_folder(run, folder / "hub")
    yield "hub", sw.from_pretrained(folder / "hub").preprocessing
    yield (
        "hub's config",
        Preprocessing.from_json(json.loads((folder / "hub/config.json").read_text())["preprocessing"], ""),
    )
    extra = {"preprocessing": ""}
    write_program(run, folder / "net.pt2")
    torch.export.load(folder / "net.pt2", extra_files=extra)
    yield "torch.export", Preprocessing.from_json(json.loads(extra["preprocessing"]), "")
    recipe = sw.Recipe.from_json(json.loads((run / "config.json").read_text())["recipe"], "")
    from skipway.data import load

    yield "the recipe", load(recipe.data, **recipe.data_choices()).preprocessing


def test_every_reader_has_every_field(special, tmp_path):
    run, _ = special
    for reader, found in readers(run, tmp_path):
        assert found.classes == ("across", "down"), reader
        for name in SPECIAL:
            if (reader, name) == ("the recipe", "flip_test"):  # a choice of the evaluation, which data do not know
                continue
            assert getattr(found, name) == expected(name), f"{reader}: {name}"


def test_averaged_weights_are_named_in_the_header(special):
    from skipway.checkpoint.files import read_tensors

    run, _ = special
    assert read_tensors(run / "best.safetensors")[1]["ema"] == 0.5


def test_one_image_is_one_input_for_every_reader(special):
    """B10: evaluation of the run, evaluation of a folder and prediction agree image by image."""
    run, images = special
    own = evaluate_run(run).evaluation
    names = json.loads((run / "split.json").read_text())["test"]
    model = sw.from_pretrained(run)
    predictions = Predictor(model).predict([images / name for name in names])
    correct = sum(each.label == Path(name).parent.name for each, name in zip(predictions, names, strict=True))
    assert correct == own.correct
    every = evaluate_images(run, images).evaluation
    files = sorted(images.rglob("*.png"))
    labels = [each.label for each in Predictor(model).predict(files)]
    assert every.correct == sum(label == file.parent.name for label, file in zip(labels, files, strict=True))


def test_weights_of_another_preprocessing_are_refused_for_the_images_of_the_run(special, tmp_path):
    import shutil

    run, _ = special
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["recipe"]["grey16"] = "range"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expect another preprocessing"):
        evaluate_run(copy)


def rebuild_input(file: Path, stated: dict) -> np.ndarray:
    """An input by the metadata alone, with NumPy and Pillow, for grey images that are padded to a square."""
    values = np.asarray(Image.open(file)).astype(np.float64)
    assert stated["grey16"] == "minmax"
    low, high = values.min(), values.max()
    grey = np.floor((values - low) * 255 / (high - low) + 0.5).astype(np.uint8)
    assert stated["fit"] == "pad"
    side = max(grey.shape)
    square = np.full((side, side), 128, np.uint8)
    top, left = ((side - length) // 2 for length in grey.shape)
    square[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    margin = side * (1 - stated["crop_share"]) / 2
    box = (margin, margin, side - margin, side - margin)
    size = (stated["size"], stated["size"])
    scaled = Image.fromarray(square).resize(size, Image.Resampling[stated["resample"].upper()], box=box)
    return ((np.asarray(scaled) / 255 - stated["mean"][0]) / stated["std"][0]).astype(np.float32)[None, None]


def test_an_onnx_file_is_used_by_its_metadata_alone(special, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run, images = special
    write_onnx(run, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    stated = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    predictor = Predictor(sw.from_pretrained(run))
    for file in sorted(images.rglob("*.png"))[::5]:
        (logits,) = session.run(None, {session.get_inputs()[0].name: rebuild_input(file, stated)})
        own = predictor.predict([file])[0]
        assert predictor.classes[int(logits.argmax())] == own.label
        shifted = np.exp(logits[0] - logits.max())
        # the edge of the padding is scaled with the image here and beside it there: up to two steps of 255 differ
        assert abs(shifted.max() / shifted.sum() - own.probability) < 0.1


SHAPE = {"depth": 8, "width": 4}


def train_from(weights: Path | str, folder: Path, **options):
    """A short run from weights; returns its preprocessing and its notes."""
    images = folder / "images"
    if not images.exists():
        stripes(images, 6)
    notes = Notes()
    recipe = sw.Recipe(images, model="resnet20", **SHAPE, size=16, channels=3, epochs=1, start=weights, **options)
    sw.train(recipe, folder / "run", reporter=notes, overwrite=True)
    return sw.from_pretrained(folder / "run").preprocessing, notes.notes


def weights(folder: Path, header: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    network = sw.build("resnet20", **SHAPE, classes=2)
    metadata = {name: json.dumps(value) for name, value in (header or {}).items()}
    save_file(dict(network.state_dict()), folder / "w.safetensors", metadata)
    return folder / "w.safetensors"


HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
TIMM = {**HALF, "crop_pct": 0.9, "interpolation": "bicubic"}
HUGGING_FACE = {
    "image_mean": HALF["mean"],
    "image_std": HALF["std"],
    "resample": 2,
    "do_center_crop": True,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 24, "width": 24},
}


@pytest.mark.parametrize(
    ("header", "beside", "share", "resample"),
    [
        ({"preprocessing": {**HALF, "crop_share": 0.75, "resample": "bilinear"}}, {}, 0.75, "bilinear"),
        (None, {"preprocessor_config.json": HUGGING_FACE}, 0.75, "bilinear"),
        (
            None,
            {"config.json": {"pretrained_cfg": TIMM}},
            0.9,
            "bicubic",
        ),
    ],
    ids=["our header", "transformers", "timm's hub"],
)
def test_inputs_are_scaled_as_the_weights_expect(tmp_path, header, beside, share, resample):
    file = weights(tmp_path / "weights", header)
    for name, content in beside.items():
        (file.parent / name).write_text(json.dumps(content))
    found, notes = train_from(file, tmp_path)
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    assert (found.crop_share, found.resample) == (share, resample)
    assert any("as stated by" in note and "mean='0.5,0.5,0.5'" in note for note in notes)


def test_what_the_hub_states_is_followed(tmp_path, monkeypatch):
    file = weights(tmp_path / "weights")
    folder, asked = file.parent, set()
    file.rename(folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(HUGGING_FACE))

    def download(name, others=()):
        asked.update(others)
        return {"hf:me/net": folder}[name]

    monkeypatch.setattr(hub, "download", download)
    found, notes = train_from("hf:me/net", tmp_path)
    assert found.mean == found.std == (0.5, 0.5, 0.5)
    assert (found.crop_share, found.resample) == (0.75, "bilinear")
    assert {"config.json", "preprocessor_config.json"} <= asked
    assert not any("nothing beside the weights" in note for note in notes)


def test_a_start_from_a_run_is_followed_in_every_field(special, tmp_path):
    """A network trained on stretched 16-bit images sees such images when it is trained further."""
    run, images = special
    notes = Notes()
    recipe = sw.Recipe(images, model="resnet", depth=8, width=4, epochs=1, batch_size=8, flip=False, start=run)
    sw.train(recipe, tmp_path / "run", reporter=notes)
    found = sw.from_pretrained(tmp_path / "run").preprocessing
    for name in SPECIAL.keys() - {"crop", "flip_test"}:  # choices of the training, and of its evaluation
        assert getattr(found, name) == expected(name), name
    (said,) = [note for note in notes.notes if "as stated by" in note]
    assert all(part in said for part in ("grey16='minmax'", "fit='pad'", "size=24"))
    evaluate_run(tmp_path / "run")  # its recipe has them, too
    sw.train(dataclasses.replace(recipe, epochs=2), tmp_path / "run", resume=True)
    assert sw.from_pretrained(tmp_path / "run").preprocessing == found
    chosen = {"grey16": "range", "fit": "squeeze", "size": 16}
    sw.train(dataclasses.replace(recipe, **chosen), tmp_path / "other")
    other = sw.from_pretrained(tmp_path / "other").preprocessing
    assert {name: getattr(other, name) for name in chosen} == chosen


def test_options_go_before_what_the_weights_state(tmp_path):
    file = weights(tmp_path / "weights", {"preprocessing": {**HALF, "crop_share": 0.75}})
    found, _ = train_from(file, tmp_path, mean="0.1,0.2,0.3", std="0.25")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.25, 0.25, 0.25))
    assert found.crop_share == 0.75


def test_weights_that_state_nothing_are_remarked_upon(tmp_path):
    _, notes = train_from(weights(tmp_path / "weights"), tmp_path)
    assert any("nothing beside the weights states the mean and deviation" in note for note in notes)


def test_timm_states_those_of_its_weights():
    from skipway.zoo import import_library

    pytest.importorskip("safetensors")
    try:
        timm = import_library("timm")
    except sw.SkipwayError:
        pytest.skip("timm is not installed")
    for name in ("vit_tiny_patch16_224", "convnext_tiny", "vit_base_patch16_clip_224"):
        found, own = find_data_config("w.pth", "timm", name), timm.get_pretrained_cfg(name)
        assert (found.mean, found.std, found.crop_share) == (own.mean, own.std, own.crop_pct)


def test_a_damaged_description_is_named(tmp_path):
    file = weights(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is damaged"):
        find_data_config(file, "huggingface", None)
    own = weights(tmp_path / "own", {"preprocessing": {**HALF, "classes": ["a", "b"]}})
    for name in ("preprocessor_config.json", "config.json"):
        (own.parent / name).write_text("{")
    described = WeightsDescription(own)  # the header says it all
    assert (described.data_config.mean, described.classes) == ((0.5, 0.5, 0.5), ("a", "b"))
    train_from(own, tmp_path)


def test_the_preprocessing_is_of_the_file_that_weights_are_read_from(tmp_path):
    for name, mean in (("model.safetensors", 0.25), ("best.safetensors", 0.75)):
        stated = json.dumps({"mean": [mean], "std": [0.5]})
        save_file({"w": torch.full((1,), mean)}, tmp_path / name, {"preprocessing": stated})
    assert find_data_config(tmp_path, "skipway", None).mean == (read_weights(tmp_path)["w"].item(),)
    (tmp_path / "alone").mkdir()
    (tmp_path / "best.safetensors").rename(tmp_path / "alone/net.safetensors")
    assert find_data_config(tmp_path / "alone", "skipway", None).mean == (0.75,)


@pytest.mark.parametrize(
    ("field", "value", "filter_name"),
    [
        ("resample", 3, "bicubic"),
        ("resample", 2, "bilinear"),
        ("resample", [3], None),
        ("image_std", [float("nan")], 0),
    ],
)
def test_a_value_that_cannot_be_counts_as_not_stated(tmp_path, field, value, filter_name):
    stated = {"image_mean": [0.5], "image_std": [0.5], field: value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    found = find_data_config(weights(tmp_path), "huggingface", None)
    assert found is None if filter_name == 0 else found.resample == filter_name


@pytest.mark.parametrize("text", ["x", "0.5,", "", "0.5 0.5", "nan", "2"])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_numbers_that_cannot_be_are_refused(name, text, tmp_path):
    with pytest.raises(sw.SkipwayError, match=f"{name}="):
        sw.Recipe(stripes(tmp_path / "images", 4), **{name: text}).data_choices() and sw.data.load(
            tmp_path / "images", **{name: sw.Recipe(**{name: text}).numbers(name)}
        )


def test_equal_values_count_as_loaded():
    from skipway.weights import load_state

    network = sw.build("vit-tiny-16", image=32, classes=2)
    report = load_state(network, network.state_dict(), names="skipway")
    assert set(report.tensors) == set(network.state_dict())
    assert report.fresh == []
