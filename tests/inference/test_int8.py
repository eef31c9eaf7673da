"""Post-training quantisation: answers kept or the layers that cost them left in float, refusals, files."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.cli import main
from skipway.errors import MissingExtraError, SkipwayError
from skipway.inference import int8_file, optimized_model
from skipway.inference.answer_check import AnswerChange, AnswerCheck, paired_interval
from skipway.inference.backend_search import BackendSearch
from skipway.inference.backend_selection import BackendComparison, BackendResult
from skipway.inference.backends import BACKENDS, Choice, send_no_statistics
from skipway.inference.int8_file import write_int8
from skipway.inference.optimized_model import optimize
from skipway.inference.quantization import convert_any_batch
from skipway.inference.quantized_model import explain_precision, quantize
from skipway.inference.run_images import RunImages
from skipway.recipe import Recipe
from skipway.training.loop import train

needs_nncf = pytest.mark.skipif(
    find_spec("nncf") is None or find_spec("openvino") is None, reason="nncf or openvino is not installed"
)
CLASSES = 6


class Small(nn.Module):
    """Three convolutions; behind the second, one channel that nothing depends on may be as large as wanted."""

    def __init__(self, outlier: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 1)
        self.third = nn.Conv2d(12, 16, 3, stride=2)
        self.classifier = nn.Linear(16 * 9, CLASSES)
        with torch.no_grad():
            self.second.bias[-1] += outlier
            self.third.weight[:, -1] = 0

    def features(self, x):
        return self.third(self.second(self.first(x).relu()).relu()).relu().flatten(1)

    def forward(self, x):
        return self.classifier(self.features(x))


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pattern for each class, and noise."""
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % CLASSES
    return patterns[labels] + 0.5 * torch.randn(count, 3, 8, 8), labels


@torch.no_grad()
def fitted(model: nn.Module) -> nn.Module:
    """The network with the classifier that least squares gives for the patterns."""
    images, labels = samples(600)
    features = model.features(images)
    ones = torch.cat([features, torch.ones(len(features), 1)], 1)
    eye = 0.1 * torch.eye(ones.shape[1])
    solution = torch.linalg.solve(ones.T @ ones + eye, ones.T @ nn.functional.one_hot(labels, CLASSES).float())
    model.classifier.weight.copy_(solution[:-1].T)
    model.classifier.bias.copy_(solution[-1])
    return model.eval()


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    model = fitted(Small())
    images, _ = samples(32)
    return model, optimize(
        model, images[:4], precisions="int8", calibration=images, check=samples(300), seconds=3, progress=print
    )


@needs_nncf
def test_a_network_that_keeps_its_answers(quantized):
    model, fast = quantized
    images, labels = samples(64)
    assert fast.precision == "int8"
    assert fast.float_layers == ()
    assert fast.answer.images == 300
    assert fast.answer.kept
    assert fast.answer.before >= 290
    with torch.no_grad():
        expected, found = model(images), fast(images)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()  # of integers, and not the model itself
    assert (found.argmax(1) == labels).float().mean() > 0.95
    assert "0 of 4 layers in float" in str(fast)
    assert "top-1" in str(fast)


@needs_nncf
def test_other_batches_and_threads(quantized):
    _, fast = quantized
    images, _ = samples(24)
    whole = fast(images)
    for size in (2, 3, 4, 8):
        torch.testing.assert_close(fast(images[:size]), whole[:size])
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(each, whole) for each in pool.map(fast, [images] * 8))


@needs_nncf
def test_a_file_gives_the_same_outputs(quantized, tmp_path):
    _, fast = quantized
    loaded = sw.load_optimized(fast.save(tmp_path / "fast.pt"))
    images, _ = samples(8)
    assert torch.equal(loaded(images), fast(images))
    assert (loaded.choice, loaded.float_layers, loaded.answer) == (fast.choice, fast.float_layers, fast.answer)


@needs_nncf
def test_a_file_says_what_was_found_elsewhere(quantized, tmp_path, monkeypatch):
    """Remarks are kept, and accuracies are those of the processor that they were measured on."""
    _, fast = quantized
    monkeypatch.setattr(fast, "remark", "8 held-out images are calibration images, too")
    path, here = fast.save(tmp_path / "fast.pt"), optimized_model.describe_machine_and_versions()
    assert sw.load_optimized(path).remark == fast.remark
    other = {**here, "processor": ["Another", ""]}
    monkeypatch.setattr(optimized_model, "describe_machine_and_versions", lambda: other)
    loaded = sw.load_optimized(path)
    assert loaded.remark.startswith(f"{fast.remark}; chosen with another processor; ")
    assert loaded.remark.endswith(f"its answers were checked on {here['processor'][0]}, not on this processor")
    assert sw.load_optimized(loaded.save(tmp_path / "again.pt")).remark == loaded.remark


@needs_nncf
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["avx2"], "products overflow on this one, an x86 without VNNI; optimize"),
        ([], "products overflow on an x86 without VNNI, which this one may be: only Linux says"),
    ],
    ids=["without", "not known"],
)
def test_weights_of_8_bits_are_not_loaded_where_their_sums_overflow(quantized, tmp_path, monkeypatch, flags, message):
    _, fast = quantized
    monkeypatch.setattr(optimized_model, "saturates", lambda: True)
    monkeypatch.setattr(optimized_model, "cpu_flags", lambda: flags)
    for fits in (False, True):
        monkeypatch.setattr(fast, "quantized", replace(fast.quantized, fits_any=fits))
        path = fast.save(tmp_path / "fast.pt")
        if fits:
            assert sw.load_optimized(path).precision == "int8"
        else:
            with pytest.raises(SkipwayError, match=message):
                sw.load_optimized(path)


@needs_nncf
@pytest.mark.parametrize("units", [(), ("avx512_vnni",)])
def test_a_file_of_an_older_version_is_judged_by_where_it_was_made(quantized, tmp_path, monkeypatch, units):
    """On a processor without VNNI weights got 7 bits there, too; on one with it, 8."""
    _, fast = quantized
    path = fast.save(tmp_path / "fast.pt")
    stored = torch.load(path, weights_only=False)
    del vars(stored["quantized"])["fits_any"]
    stored["machine"]["processor"] = ["somebody's", *units]
    torch.save(stored, path)
    monkeypatch.setattr(optimized_model, "saturates", lambda: True)
    if units:
        with pytest.raises(SkipwayError, match="products overflow on this one"):
            sw.load_optimized(path)
    else:
        assert sw.load_optimized(path).precision == "int8"


@needs_nncf
def test_a_file_holds_no_images_but_the_example(quantized, tmp_path):
    """300 held-out images are 230 kB; a batch of 4, which is stored with its outputs, is 3 kB."""
    _, fast = quantized
    for held in (fast.example, fast.quantized.example, fast.quantized.outputs):
        assert held.untyped_storage().nbytes() == held.nbytes
    model = tmp_path / "model.pt"
    torch.save(fast.original, model)
    weights = model.stat().st_size + len(fast.quantized.xml) + len(fast.quantized.weights)
    assert fast.save(tmp_path / "fast.pt").stat().st_size < weights + 300 * 3 * 64 * 4 / 4


@needs_nncf
def test_a_layer_that_breaks_stays_in_float_and_no_other():
    """All inputs of a layer share a scale: one channel of 10,000 leaves the others a step of 80, so nothing of them."""
    model, (images, _) = fitted(Small(outlier=1e4)), samples(32)
    fast = optimize(
        model, images[:4], precisions="int8", calibration=images, check=samples(300), seconds=2, progress=print
    )
    assert fast.float_layers == ("third",)
    assert fast.answer.kept


@needs_nncf
def test_layers_are_sent_back_for_so_long_and_no_longer():
    model, (images, _), said = fitted(Small(outlier=1e4)), samples(32), []
    options = {"check": samples(300), "seconds": 2, "backends": ["openvino"], "progress": said.append}
    fast = quantize(model, images, patience=0, **options)
    assert fast.precision != "int8"
    assert "which of them to return to float was not known after 0 s; patience=60 " in fast.remark
    assert sum("pass" in line for line in said) == 4  # one batch, float, integers, the first of the search
    with pytest.raises(SkipwayError, match="patience=-1: the rule is"):
        quantize(model, images, patience=-1, **options)


class Alternating(Small):
    """Computes the same by other operators every other time, which a tracer refuses."""

    calls = 0

    def forward(self, x):
        Alternating.calls += 1
        return super().forward(x) * 2 if Alternating.calls % 2 else super().forward(x) + super().forward(x)


@needs_nncf
@pytest.mark.parametrize("size", [1, 4])
def test_a_network_that_is_traced_differently_every_time_is_converted(size):
    import openvino

    model, images = Alternating().eval(), samples(6)[0]
    network = convert_any_batch(model, images[:size])
    assert [side.is_static for side in network.input(0).partial_shape] == [False, True, True, True]
    found = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([images.numpy()])[0]
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(images), atol=1e-5)


@needs_nncf
@torch.no_grad()
def test_where_no_answer_may_fall_probabilities_may():
    """Of the clearest images, whose answers 8-bit integers keep; their probabilities fall a little."""
    model, (images, _), (held, _) = fitted(Small()), samples(32), samples(300)
    first, second = model(held).topk(2).values.T
    held = held[(first - second).argsort(descending=True)[:100]]
    comparison = BackendComparison(model, images[:4])
    comparison.check = AnswerCheck(held, model(held).argmax(1), limit=0, batch=4)
    comparison.check.watch(model)
    comparison.quantize(images, print)
    assert comparison.quantized.answer.broken == 0
    assert comparison.quantized.float_layers == ()


@needs_nncf
def test_a_network_that_cannot_keep_its_answers_stays_in_float():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(3 * 64, CLASSES)

        def features(self, x):
            return x.flatten(1)

        def forward(self, x):
            return self.classifier(self.features(x))

    model, (images, _) = fitted(One()), samples(32)
    with torch.no_grad():
        model.classifier.weight[:, 0] = 0
    images[:, 0, 0, 0] = 1e4
    held, labels = samples(300)
    held[:, 0, 0, 0] = 1e4
    fast = quantize(model, images, check=(held, labels), seconds=1, backends=["torch", "openvino"], progress=print)
    assert fast.precision != "int8"
    assert "not int8: precision='int8': no layer keeps the answers" in fast.remark
    assert fast.answer.kept


@needs_nncf
@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4), nn.Softmax(1)), False),
        (lambda: sw.build("vit-tiny-16", image=8, patch=4, dim=16, heads=2, depth=1, classes=4), True),
        (lambda: WrittenOut(), True),
    ],
)
def test_attention_is_found_by_its_softmax(network, expected):
    from skipway.inference.quantization import convert_any_batch, has_attention

    assert has_attention(convert_any_batch(network().eval(), torch.randn(2, 3, 8, 8))) == expected


class WrittenOut(nn.Module):
    """Attention of pixels in plain products."""

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        weights = (rows @ rows.transpose(1, 2)).softmax(2)
        return (weights @ rows).mean(1)


IMAGES = torch.zeros(8, 3, 8, 8)
LABELS = torch.arange(8) % CLASSES
BROKEN = torch.zeros(8, 3, 8, 8).index_fill(0, torch.tensor([5]), float("nan"))


@needs_nncf
@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (IMAGES, {}, "check=None: the rule is held-out images with their classes"),
        (IMAGES, {"check": IMAGES}, "check=Tensor: the rule is held-out images"),
        (IMAGES, {"check": [IMAGES, IMAGES]}, r"check: labels of shape \(8, 3, 8, 8\) in float32 for 8 images"),
        (IMAGES, {"check": iter([(IMAGES,)])}, "check: a batch without labels"),
        (IMAGES, {"check": (IMAGES, LABELS[:3])}, r"check: labels of shape \(3,\)"),
        (IMAGES, {"check": (IMAGES, LABELS + 3)}, "labels from 3 to 8, and the model has 6 classes"),
        (IMAGES, {"check": (IMAGES[:0], LABELS[:0])}, "check: it holds no image"),
        (IMAGES, {"check": (IMAGES, LABELS)}, "which may be guessing among 6 classes"),
        (IMAGES, {"check": (IMAGES[..., :4], LABELS)}, r"check: images of shape \(3, 8, 4\), and the example has"),
        (IMAGES, {"check": (BROKEN, LABELS)}, "check: 1 image of 8 with values that are not finite, the first at 5"),
        (BROKEN, {"check": (IMAGES, LABELS)}, "calibration: 1 image of 8 with values that are not finite"),
        (IMAGES[:0], {"check": (IMAGES, LABELS)}, "calibration: it holds no image"),
        (iter([]), {"check": (IMAGES, LABELS)}, "calibration: it holds no image"),
        (3, {"check": (IMAGES, LABELS)}, "calibration=int: the rule is a tensor"),
        (IMAGES, {"check": (IMAGES, LABELS), "limit": 0.5}, "limit=0.5: the rule is a share from 0 to 0.1"),
    ],
)
def test_what_is_refused(calibration, options, message):
    with pytest.raises(SkipwayError, match=message):
        quantize(Small(), calibration, **options)


@needs_nncf
def test_a_bfloat16_network_is_told_that_int8_is_not_for_it():
    model, (images, _) = fitted(Small()).bfloat16(), samples(40)
    images = images.bfloat16()
    with torch.no_grad():
        labels = model(images).argmax(1)
    fast = optimize(
        model,
        images[:4],
        precisions="any",
        calibration=images,
        check=(images[:20], labels[:20]),
        backends=["torch", "openvino"],
        seconds=1,
    )
    notes = [each.note for each in fast.report if each.precision == "int8"]
    assert notes == ["precision='int8': the rule is a model and images in float32, and they are in bfloat16"]
    assert "20 of 20 held-out images are calibration images, too" in fast.remark


@needs_nncf
def test_int8_in_a_search_needs_its_images():
    with pytest.raises(SkipwayError, match="precision='int8': the rule is calibration="):
        optimize(Small(), IMAGES, precisions="int8")
    with pytest.raises(SkipwayError, match="precision='int8': the rule is calibration="):
        optimize(Small(), IMAGES, precisions="any", calibration=IMAGES)
    with pytest.raises(SkipwayError, match="offers float32, bfloat16"):
        optimize(Small(), IMAGES, precisions="int8", calibration=IMAGES, check=(IMAGES, LABELS), backends=["eager"])


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("skipway.inference.quantization.find_spec", lambda name: None)
    line = r"^int8 needs nncf, which is not installed: pip install 'skipway\[int8\]'$"
    with pytest.raises(MissingExtraError, match=line):
        quantize(Small(), IMAGES, check=(IMAGES, LABELS))


def test_the_interval_of_a_fall_holds_in_95_of_100_samples():
    """Pairs of two networks that change 3 and 2 of 100 answers for the worse and the better: the fall is one point."""
    pairs = torch.distributions.Multinomial(400, torch.tensor([0.03, 0.02, 0.95])).sample((4000,)).int()
    held = [low <= 0.01 <= high for low, high in (paired_interval(*pair[:2].tolist(), 400) for pair in pairs)]
    assert 0.94 <= sum(held) / len(held) <= 0.97


def test_too_few_images_are_told_and_how_many_would_do():
    few, many = AnswerChange(100, 90, 0, 0, 0.005), AnswerChange(5000, 4500, 20, 15, 0.005)
    assert few.doubt == (
        "100 held-out images cannot exclude a fall of more than 0.50 points: the 95 % interval reaches 1.92 points; "
        "some 400 could"
    )
    assert paired_interval(0, 0, few.needed)[1] <= 0.005
    assert not many.doubt
    assert "top-1 90.00 % → 89.90 % of 5,000 held-out images: it falls by 0.10 points" in str(many)
    assert not AnswerChange(1000, 900, 6, 0, 0.005).kept
    assert AnswerChange(1000, 900, 5, 0, 0.005).kept
    assert AnswerChange(1000, 900, 5, 0, 0.005).needed == 0


@pytest.mark.parametrize(
    ("seconds", "note", "chosen", "text"),
    [
        (0.1, "", "int8", "int8 keeps the answers: 40 images/s against 20 images/s of openvino bfloat16, the fastest"),
        (
            0.4,
            "",
            "bfloat16",
            "not int8, which keeps the answers but is no faster here: 10 images/s against 20 images/s",
        ),
        (0.1, "top-1 falls", "bfloat16", "not int8: top-1 falls"),
    ],
)
def test_why_it_is_int8_or_is_not(seconds, note, chosen, text):
    rows = [
        BackendResult(Choice("original"), 1.0),
        BackendResult(Choice("openvino", "bfloat16"), 0.2),
        BackendResult(Choice("openvino", "int8"), seconds, note=note),
    ]
    fast = SimpleNamespace(
        axes=SimpleNamespace(size=4), report=rows, precision=chosen, choice=Choice("openvino", chosen), example=None
    )
    assert text in explain_precision(fast)


def test_no_statistics_are_sent_within(monkeypatch):
    monkeypatch.setenv("CI", "no")
    monkeypatch.delenv("NNCF_CI", raising=False)
    with send_no_statistics():
        assert (os.environ["CI"], os.environ["NNCF_CI"]) == ("true", "1")
    assert (os.environ["CI"], os.environ.get("NNCF_CI")) == ("no", None)


def test_int8_is_offered_where_a_backend_builds_it():
    assert [name for name in BACKENDS if BACKENDS[name].build_quantized] == ["openvino"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = Recipe(depth=8, width=4, epochs=2, batch_size=64, device="cpu", precision="float32")
    return train(recipe, tmp_path_factory.mktemp("digits") / "run").folder.path


@needs_nncf
def test_a_run_is_written_for_openvino(run, tmp_path, capsys, monkeypatch):
    import openvino

    monkeypatch.setattr(BackendSearch, "climb", lambda self, whole: None)  # no pieces, for time
    compiled, calls, lost = int8_file.compile_openvino, [], []

    def compile_with_a_fault(network, *given):
        """One answer of the first held-out batch is wrong in the file alone; it comes third, after the example."""
        run_file = compiled(network, *given)

        def run_once(x):
            calls.append(x)
            outputs = run_file(x)
            if len(calls) == 3:
                lost.append(int((outputs.argmax(1) == labels[: len(x)]).nonzero()[0]))
                outputs[lost[0]] *= -1
            return outputs

        return run_once

    monkeypatch.setattr(int8_file, "compile_openvino", compile_with_a_fault)
    images, labels = RunImages(run).held_out()
    file = tmp_path / "model.xml"
    assert main(["export", str(run), "--int8", str(file), "--limit", "0.02"]) == 0
    shown = capsys.readouterr()
    assert f"of {len(images)} held-out images" in shown.out
    assert "cannot exclude a fall of more than 2.00 points" in shown.err
    network = openvino.Core().read_model(file)
    stored = json.loads(network.get_rt_info(["skipway", "preprocessing"]).astype(str))
    assert tuple(stored["classes"]) == RunImages(run).preprocessing.classes
    hint = {"INFERENCE_PRECISION_HINT": network.get_rt_info(["skipway", "precision"]).astype(str)}
    assert f"checked   with INFERENCE_PRECISION_HINT={hint['INFERENCE_PRECISION_HINT']}\n" in shown.out
    kinds = {each.get_element_type().to_string() for each in network.get_ops() if each.get_type_name() == "Constant"}
    assert "i8" in kinds
    with torch.no_grad():
        expected = (sw.from_pretrained(run)(images).argmax(1) == labels).float().mean()
    for count in (1, 3, len(images)):  # batches of any size
        answers = openvino.compile_model(network, "CPU", hint)([images[:count].numpy()])[0].argmax(1)
    assert (torch.from_numpy(answers) == labels).float().mean() >= expected - 0.02
    right = int((torch.from_numpy(answers) == labels).sum()) - len(lost)
    assert f"→ {100 * right / len(images):.2f} % of" in shown.out


def test_weights_of_something_else_are_not_overwritten(tmp_path):
    other = tmp_path / "model.bin"
    other.write_bytes(b"mine")
    with pytest.raises(SkipwayError, match=r"model\.bin is there without model\.xml, and would be overwritten"):
        write_int8(tmp_path / "run", tmp_path / "model.xml")
    assert other.read_bytes() == b"mine"


@needs_nncf
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int8", "model.onnx"], "the rule is the suffix .xml"),
        (["--limit", "0.01", "--onnx", "model.onnx"], "--limit 0.01 has no effect without --int8"),
    ],
)
def test_exports_that_are_refused(run, options, message, capsys):
    assert main(["export", str(run), *options]) == 2
    assert message in capsys.readouterr().err
