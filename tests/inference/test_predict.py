"""A trained run, used: the same answers as in its test, from every form of it; hostile weights refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.checkpoint.files import read_tensors, write_tensors
from skipway.data import load
from skipway.data.preprocessing import Preprocessing
from skipway.errors import CheckpointError, DataError, SkipwayError
from skipway.inference.predict import Predictor, from_pretrained, image_files
from skipway.inference.publish import write_hub_folder, write_onnx, write_program
from skipway.inference.run_evaluation import evaluate_images, evaluate_run
from skipway.recipe import Recipe
from skipway.training.loop import train
from skipway.training.run import Outcome

TINY = Recipe(depth=8, width=4, epochs=2, batch_size=256, device="cpu", precision="float32")


def photos(root: Path, parts: tuple[str, ...] = ("train", "test"), each: int = 8, side: int = 8) -> Path:
    """Two classes that differ in brightness."""
    noise = np.random.default_rng(0)
    for part in parts:
        for label, name in enumerate(("dark", "light")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = noise.integers(0, 100, (side, side + 5, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Outcome:
    return train(dataclasses.replace(TINY, ema=0.9), tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Outcome:
    """A run whose images are cut out of larger ones."""
    data = photos(tmp_path_factory.mktemp("photos"), side=20)
    recipe = dataclasses.replace(TINY, data=data, batch_size=8, size=12, crop="resized", channels=3, epochs=3)
    return train(recipe, tmp_path_factory.mktemp("runs") / "run")


def test_it_says_what_the_run_said_in_its_test(digits):
    data = load(None)
    predictions = Predictor.load(digits.folder.path).predict(data.test.images.permute(0, 3, 1, 2))
    right = [told.label == data.classes[label] for told, label in zip(predictions, data.test.labels, strict=True)]
    assert sum(right) == digits.evaluation.correct
    judgement = evaluate_run(digits.folder.path, device="cpu")
    assert torch.equal(judgement.evaluation.confusion, digits.evaluation.confusion)
    assert judgement.evaluation.loss == pytest.approx(digits.evaluation.loss, abs=1e-6)


def test_it_says_so_of_files_too(folder):
    """Decoded, cut and normalised as in the test; in any batches and threads."""
    predictor = Predictor.load(folder.folder.last)
    files = image_files([folder.recipe.data / "test"])[0]
    assert len(files) == 16
    predictions = predictor.predict(files, top=None)
    right = sum(told.label == Path(told.file).parent.name for told in predictions)
    assert right == folder.evaluation.correct
    assert predictor.preprocessing.crop_share == 224 / 256
    again = predictor.predict(files, top=None, batch_size=3, workers=3)
    for one, other in zip(predictions, again, strict=True):
        assert (one.file, one.label) == (other.file, other.label)
        assert one.probability == pytest.approx(other.probability, abs=1e-6)
        assert sum(one.probabilities.values()) == pytest.approx(1)
        assert list(one.probabilities.values()) == sorted(one.probabilities.values(), reverse=True)
    pictures = predictor.predict([Image.open(file) for file in files])
    assert [told.probability for told in pictures] == pytest.approx(
        [told.probability for told in predictions], abs=1e-6
    )
    assert pictures[0].file == str(files[0])
    judgement = evaluate_images(folder.folder.path, folder.recipe.data, device="cpu")
    assert torch.equal(judgement.evaluation.confusion, folder.evaluation.confusion)


def test_a_network_in_training_is_asked_and_left_as_it_is(digits):
    """By its running statistics, which stay, as do modes and the layout of the weights."""
    images = torch.rand(8, 1, 8, 8)
    expected = [told.probability for told in Predictor(from_pretrained(digits.folder.path)).predict(images)]
    model = from_pretrained(digits.folder.path).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predictor = Predictor(model)
    assert [told.probability for told in predictor.predict(images)] == pytest.approx(expected, abs=1e-6)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert predictor.device == torch.device("cpu")


def test_mirror_images_are_seen_on_request(folder):
    predictor = Predictor.load(folder.folder.path)
    file = image_files([folder.recipe.data / "test"])[0][0]
    image = Image.open(file)
    both = predictor.predict([image], flip=True)[0].probability
    mirrored = predictor.predict(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flip=True)[0].probability
    assert both == pytest.approx(mirrored, abs=1e-5)


def test_a_run_that_was_tested_on_mirror_images_predicts_from_them(tmp_path):
    """And evaluates other images so, unless it is told otherwise."""
    data = photos(tmp_path / "photos", each=12)
    out = train(dataclasses.replace(TINY, data=data, flip_test=True, epochs=1), tmp_path / "run")
    predictor, files = Predictor.load(out.folder.path), image_files([data / "test"])[0]
    found = {flip: [each.probability for each in predictor.predict(files, flip=flip)] for flip in (None, True, False)}
    assert found[None] == found[True] != found[False]
    judged = {flip: evaluate_images(out.folder.path, data, device="cpu", flip=flip) for flip in (None, True, False)}
    losses = {flip: each.evaluation.loss for flip, each in judged.items()}
    assert losses[None] == losses[True] != losses[False]
    assert losses[None] == pytest.approx(out.evaluation.loss, rel=1e-5)
    assert torch.equal(evaluate_run(out.folder.path, device="cpu").evaluation.confusion, out.evaluation.confusion)


def test_images_that_cannot_be_read_are_told_in_their_place(folder, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    good = image_files([folder.recipe.data / "test"])[0][0]
    files = [tmp_path / "page.png", good, tmp_path / "none.png"]
    told = Predictor.load(folder.folder.path).predict(files)
    assert [each.error for each in told] == ["not an image but HTML", "", "no such file"]
    assert told[0].label == ""
    assert math.isnan(told[0].probability)
    assert told[1].label


def test_what_is_given_has_to_fit(folder, tmp_path):
    predictor = Predictor.load(folder.folder.path)
    with pytest.raises(DataError, match=r"the rule is \(N, 3, 12, 12\)"):
        predictor.predict(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match="from 0 to 1"):
        predictor.predict(torch.full((1, 3, 12, 12), 2.0))
    with pytest.raises(DataError, match="give one of the two"):
        predictor.predict([Image.new("L", (9, 9)), "a.png"])
    with pytest.raises(DataError, match="float"):
        predictor.predict(Image.new("F", (9, 9)))
    with pytest.raises(SkipwayError, match="has no preprocessing"):
        Predictor(sw.build("resnet20"))
    with pytest.raises(DataError, match="does not exist"):
        image_files([tmp_path / "none"])
    with pytest.raises(DataError, match="contains no images"):
        image_files([tmp_path])
    assert predictor.predict([]) == []
    uint8 = predictor.predict(torch.full((1, 3, 12, 12), 51, dtype=torch.uint8))[0]
    assert uint8.probability == pytest.approx(predictor.predict(torch.full((1, 3, 12, 12), 0.2))[0].probability)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_images_of_pillow_are_treated_as_files(folder, tmp_path, mode):
    predictor = Predictor.load(folder.folder.path)
    image = Image.open(image_files([folder.recipe.data / "test"])[0][0])
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "x.tiff")
    one, other = predictor.predict(image)[0], predictor.predict(tmp_path / "x.tiff")[0]
    assert one.probability == pytest.approx(other.probability, abs=1e-6)


def test_every_form_of_a_run_loads(digits, tmp_path):
    last = from_pretrained(digits.folder.path).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in read_tensors(digits.folder.last)[0].items())
    best = sw.from_pretrained(str(digits.folder.best))
    assert not best.training
    assert best.preprocessing.classes == digits.classes
    write_hub_folder(digits.folder.path, tmp_path / "hub")
    write_hub_folder(digits.folder.path, tmp_path / "hub")
    hub = from_pretrained(tmp_path / "hub").state_dict()
    assert all(torch.equal(value, hub[name]) for name, value in last.items())
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert Preprocessing.from_json(config["preprocessing"], "here") == best.preprocessing
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"{100 * digits.evaluation.accuracy:.1f} % of 359 test images" in card
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "novel.txt").write_text("mine")
    with pytest.raises(SkipwayError, match="contains other files"):
        write_hub_folder(digits.folder.path, tmp_path / "other")
    assert (tmp_path / "other" / "novel.txt").exists()


def test_while_there_are_no_last_weights_the_best_are_taken(digits, tmp_path):
    (tmp_path / "best.safetensors").write_bytes(digits.folder.best.read_bytes())
    assert from_pretrained(tmp_path)
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no trained network"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        from_pretrained(tmp_path / "none")


def test_the_card_quotes_hostile_names():
    from skipway.inference.publish import model_card

    made = Preprocessing(("a`\n---\n# b", "<script>"), 1, 8, (0.5,), (0.5,), "none")
    card = model_card({"model": {"name": "x\n---\nlicense: mit"}}, made, None)
    head = card.split("---")[1]
    assert "license: mit" not in head
    assert "`a'\\n---\\n# b`, `<script>`" in card


def header(file: Path) -> dict:
    return json.loads(json.dumps(read_tensors(file)[1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda about: about.pop("model"), "does not describe its network"),
        (lambda about: about.pop("preprocessing"), "does not describe its network"),
        (lambda about: about.update(model=[]), "names no network"),
        (lambda about: about["model"].update(name="os.system"), "cannot be built"),
        (lambda about: about["model"].update(name="resnet100000000000001", depth=None), "cannot be built|does not fit"),
        (lambda about: about["model"].update(depth=6_000_002), "describes a network that does not fit"),
        (lambda about: about["model"].update(depth="8"), "cannot be built"),
        (lambda about: about["model"].update(width=64), "the tensors do not fit"),
        (lambda about: about["model"].update(width=10**9), "cannot be built|do not fit"),
        (lambda about: about["model"].update(width=10**30), "cannot be built|do not fit"),
        (lambda about: about["model"].update(width=-1), "cannot be built|do not fit"),
        (lambda about: about["model"].update(device="meta"), "'device'"),
        (lambda about: about["model"].update(dtype="float64"), "'dtype'"),
        (lambda about: about["model"].update(scheme={"a": 1}), "'scheme'"),
        (lambda about: about["model"].update(scheme="__import__('os')"), "cannot be built"),
        (lambda about: about["model"].update(nonsense=1), "cannot be built"),
        (lambda about: about["preprocessing"].update(classes=["a", "b"]), "classes or channels of the network differ"),
        (lambda about: about["preprocessing"].update(classes="abcdefghij"), "classes"),
        (lambda about: about["preprocessing"].update(size=10**9), "size"),
        (lambda about: about["preprocessing"].update(size=True), "size"),
        (lambda about: about["preprocessing"].update(std=[0.0]), "std"),
        (lambda about: about["preprocessing"].update(mean=[float("nan")]), "mean"),
        (lambda about: about["preprocessing"].update(mean=["0.5"]), "mean"),
        (lambda about: about["preprocessing"].update(crop="eval"), "crop"),
        (lambda about: about["preprocessing"].update(more=1), "nothing else"),
        (lambda about: about["preprocessing"].pop("mean"), "and nothing else"),
    ],
)
def test_a_header_that_lies_is_refused(digits, tmp_path, change, reason):
    tensors, _ = read_tensors(digits.folder.last)
    about = header(digits.folder.last)
    change(about)
    write_tensors(tmp_path / "x.safetensors", tensors, about)
    with pytest.raises(CheckpointError, match=reason):
        from_pretrained(tmp_path / "x.safetensors")


def test_a_file_that_is_damaged_or_no_run_is_refused(digits, tmp_path):
    file = tmp_path / "last.safetensors"
    content = digits.folder.last.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        from_pretrained(tmp_path)
    tensors, about = read_tensors(digits.folder.last)
    write_tensors(file, {name: value for name, value in tensors.items() if "head" not in name}, about)
    with pytest.raises(CheckpointError, match="the tensors do not fit"):
        from_pretrained(file)
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a file of torch.save; the rule is the safetensors file of a run"):
        from_pretrained(tmp_path / "x.pt")


def test_other_images_are_judged_by_the_stored_classes(folder, tmp_path):
    data = photos(tmp_path / "more", parts=("",), each=2, side=20)
    (data / "dark" / "broken.png").write_bytes(b"")
    judgement = evaluate_images(folder.folder.path, data, device="cpu")
    assert judgement.evaluation.total == 4
    assert judgement.unreadable == (("dark/broken.png", "an empty file"),)
    (data / "light").rename(data / "purple")
    with pytest.raises(DataError, match="class 'purple'"):
        evaluate_images(folder.folder.path, data, device="cpu")


def test_a_run_whose_images_have_changed_is_not_judged_on_them(tmp_path):
    data = photos(tmp_path / "data")
    outcome = train(dataclasses.replace(TINY, data=data, batch_size=8, epochs=1), tmp_path / "run")
    assert evaluate_run(tmp_path / "run", device="cpu").evaluation.total == 16
    (data / "test" / "dark" / "0.png").unlink()
    with pytest.raises(DataError, match="have changed"):
        evaluate_run(tmp_path / "run", device="cpu")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "last.safetensors").write_bytes(outcome.folder.last.read_bytes())
    with pytest.raises(CheckpointError, match="does not exist"):
        evaluate_run(tmp_path / "alone", device="cpu")


def test_exports_compute_the_same_and_carry_the_preprocessing(digits, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    made = from_pretrained(digits.folder.path).preprocessing
    assert write_onnx(digits.folder.path, tmp_path / "m.onnx") < 1e-4
    onnx.checker.check_model(tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert Preprocessing.from_json(json.loads(about["preprocessing"]), "the file") == made
    assert write_program(digits.folder.path, tmp_path / "m.pt2") < 1e-4
    extra = {"preprocessing": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert Preprocessing.from_json(json.loads(extra["preprocessing"]), "the file") == made
    with pytest.raises(SkipwayError, match=r"\.pt2"):
        write_program(digits.folder.path, tmp_path / "m.pth")
    with pytest.raises(SkipwayError, match="there is no folder"):
        write_program(digits.folder.path, tmp_path / "none" / "m.pt2")


def test_an_image_that_is_known_by_its_suffix_is_read_from_an_archive_too(tmp_path):
    """TGA without a footer has neither a signature nor a trace of one."""
    content = bytes([0, 0, 2, *[0] * 9, 16, 0, 16, 0, 24, 0]) + bytes(range(256)) * 3
    inputs = Preprocessing(("a", "b"), 3, 4, (0.5,) * 3, (0.5,) * 3, "none")
    predictor = SimpleNamespace(preprocessing=inputs, max_megapixels=64.0)
    (tmp_path / "x.tga").write_bytes(content)
    there = Predictor.decode(predictor, str(tmp_path / "x.tga"), Path)
    assert torch.equal(Predictor.decode(predictor, "photos/x.tga", lambda name: content), there)
    assert isinstance(Predictor.decode(predictor, "photos/x.png", lambda name: content), str)
