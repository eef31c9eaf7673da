"""`sw.fit` and the classifier that it returns."""

from __future__ import annotations

import dataclasses
import inspect
import os
import random
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import skipway as sw
from skipway.checkpoint.files import read_tensors
from skipway.recipe import Recipe

TINY = {"model": "resnet8", "width": 4, "epochs": 2, "batch_size": 256, "workers": 0, "health": 0.0}


def process_state() -> dict[str, object]:
    """What a call must leave as it was."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "filters": list(warnings.filters),
        "variables": dict(os.environ),
        "folder": os.getcwd(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return sw.fit(out=tmp_path_factory.mktemp("runs") / "digits", quiet=True, **TINY)


def test_what_comes_back_is_used(fitted, tmp_path):
    assert fitted.accuracy == fitted.evaluate().evaluation.accuracy
    assert fitted.recipe.model == "resnet8"
    assert fitted.report.exists()
    assert "10 classes" in repr(fitted)
    picture = Image.fromarray(np.full((8, 8), 200, np.uint8))
    picture.save(tmp_path / "grey.png")
    in_memory, on_disk = fitted.predict(picture)[0], fitted.predict(tmp_path / "grey.png")[0]
    assert in_memory.probabilities == on_disk.probabilities
    again = sw.TrainedClassifier(fitted.folder)
    assert again.predict(picture)[0].probabilities == in_memory.probabilities
    loaded = sw.from_pretrained(fitted.export(tmp_path / "hub-v1.0"))
    assert torch.equal(loaded.head.classifier.weight, fitted.model.head.classifier.weight)
    with pytest.raises(sw.SkipwayError, match=r"FILE\.onnx"):
        fitted.export(tmp_path / "network.tflite")


def test_the_process_is_as_before(tmp_path):
    before = process_state()
    sw.fit(out=tmp_path / "run", quiet=True, **{**TINY, "epochs": 1, "deterministic": True})
    after = process_state()
    assert [name for name in before if before[name] != after[name]] == []


def test_fit_is_the_command(fitted, tmp_path):
    outcome = sw.train(Recipe(**TINY), tmp_path / "run")
    ours, theirs = read_tensors(fitted.files.best)[0], read_tensors(outcome.folder.best)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupt() -> None:
    """What Ctrl-C calls: a real signal may also end the worker of pytest that the test runs in."""
    handle = signal.getsignal(signal.SIGINT)
    assert callable(handle)
    handle(signal.SIGINT, None)


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_bits(fitted, tmp_path, monkeypatch):
    from skipway.training import step

    calls = []
    backward = step.backward

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            interrupt()
        return backward(*args)

    monkeypatch.setattr(step, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        sw.fit(out=tmp_path / "run", quiet=True, **TINY)
    resumed = sw.fit(out=tmp_path / "run", resume=True, quiet=True)
    ours, theirs = read_tensors(resumed.files.last)[0], read_tensors(fitted.files.last)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(calls) == 2 * 5  # 1,295 images in batches of 256, twice; the rest of an epoch is left out


def test_ctrl_c_during_the_test_is_an_interrupt(tmp_path, monkeypatch):
    from skipway.training.loop import Trainer

    evaluate = Trainer.evaluate

    def interrupted(trainer, split, observe=None):
        if split == "test":
            interrupt()
        return evaluate(trainer, split, observe)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        sw.fit(out=tmp_path / "run", quiet=True, **{**TINY, "epochs": 1})


def test_another_thread_may_train(tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(sw.fit(out=tmp_path / "run", quiet=True, **{**TINY, "epochs": 1}))
    )
    thread.start()
    thread.join()
    assert found[0].accuracy > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"data": torch.zeros(3, 3, 8, 8)}, "data=Tensor"),
        ({"data": ([], [])}, "data=tuple"),
        ({"resume": True}, "name the folder"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"out": 3}, "out=3"),
        ({"model": torch.nn.Linear(2, 2)}, r"model=Linear.*FILE\.py:NAME"),
        ({"optimizer": 0.1}, "optimizer=float"),
    ],
)
def test_wrong_arguments(given, words):
    with pytest.raises(sw.SkipwayError, match=words):
        sw.fit(**given)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (2, 8, 8, 3)])
def test_arrays_are_refused_with_a_way_out(fitted, shape):
    """A sequence is read element by element, and the rows of an array are no paths."""
    for images in (np.zeros(shape, np.uint8), [np.zeros(shape, np.uint8)]):
        with pytest.raises(sw.DataError, match=r"ndarray: the rule is .* PIL\.Image\.fromarray"):
            fitted.predict(images)


def test_an_unfinished_run_is_no_classifier(tmp_path):
    with pytest.raises(sw.CheckpointError, match="no finished run"):
        sw.TrainedClassifier(tmp_path)


def test_every_choice_is_in_the_signature():
    names = set(inspect.signature(sw.fit).parameters)
    assert {field.name for field in dataclasses.fields(Recipe)} <= names
