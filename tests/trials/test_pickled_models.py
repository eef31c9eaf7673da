"""Kind: what was made while the program ran, a class or a function, has no name by which pickle would find it again.

The outputs and gradients of the model before it was written are the right value.

| trial | input | right value |
|---|---|---|
| pickle | every operation, `pickle.loads(pickle.dumps(model))` | equal outputs, gradients and classes |
| pickle | two operations on one model, in both orders | equal outputs |
| copy | `copy.deepcopy` after every operation | equal outputs and gradients; the original keeps its weights |
| file | `torch.save`, then `torch.load(weights_only=False)` in another process | equal outputs |
| own reduction | a network with a `__reduce__` of its own | equal outputs, class and slots |
| metaclass | a network whose class has a metaclass (`abc.ABC`) | equal outputs |
| outputs | a network of a library whose first output is taken (`inference.network`) | equal outputs |
| operations | the `Operation` itself, pickled and copied | same words and outputs; undoing it is refused |
| diagnoses | a `Diagnosis` and a `Treatment`, for every kind of loss | equal verdict, table and range test |
| transformers | Llama, deepened, shortened, rows of blocks, with a cache | equal outputs |
"""

from __future__ import annotations

import abc
import copy
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.surgery.test_depth import Net, X
from tests.surgery.test_survival import OPERATIONS
from torch import Tensor, nn

import skipway as sw
from benchmarks.peers import import_transformers
from skipway.diagnosis.remedies import Damp
from skipway.inference.network import with_logits
from skipway.surgery import checkpointed, deepen, fold_gains, remove_norm, rescheme, reversible, shorten, skip_compute

ALL = {
    **OPERATIONS,
    "accelerate": lambda m, x: sw.accelerate(m, x),
    "skipinit": lambda m, x: remove_norm(m, x),
    "fold_gains": lambda m, x: (rescheme(m, x, "skipinit"), fold_gains(m, x)),
    "classifier": lambda m, x: sw.surgery.replace_classifier(m, x, 3),
    "square roots": lambda m, x: checkpointed(m, x, "squareroot"),
    "gains, then kernels": lambda m, x: (rescheme(m, x, "layerscale"), sw.accelerate(m, x)),
    "kernels, then gains": lambda m, x: (sw.accelerate(m, x), rescheme(m, x, "layerscale")),
    "copies, then samples": lambda m, x: (deepen(m, x, 1), skip_compute(m, x, 0.5)),
    "copies, then segments": lambda m, x: (deepen(m, x, 1), checkpointed(m, x, 2)),
}


def operated(name: str) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    ALL[name](model, X)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    loss = model.train()(X).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.eval()
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("write", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", ALL)
def test_what_is_read_computes_what_was_written(name, write):
    model = operated(name)
    expected, twin = model(X), write(model)
    assert torch.equal(twin(X), expected)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert list(twin.state_dict()) == list(model.state_dict())
    mine, others = gradients(model), gradients(twin)
    assert len(mine) == len(others)
    assert all(torch.equal(one, other) for one, other in zip(mine, others, strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    model.load_state_dict(operated(name).state_dict())  # statistics, which training updated
    assert torch.equal(model(X), expected)


READER = """
import sys, torch
for path in sys.argv[1:]:
    model, x, expected = torch.load(path, weights_only=False)
    print(torch.equal(model(x), expected))
"""


def test_another_process_reads_them(tmp_path):
    paths = []
    for number, name in enumerate(ALL):
        paths.append(str(tmp_path / f"{number}.pt"))
        model = operated(name)
        torch.save((model, X, model(X).detach()), paths[-1])
    command = [sys.executable, "-c", READER, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.split() == ["True"] * len(ALL), done.stderr


@pytest.mark.parametrize("write", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", ALL)
def test_an_operation_is_written_with_its_model(name, write):
    torch.manual_seed(0)
    model = Net().eval()
    done = ALL[name](model, X)
    operation = done[-1] if isinstance(done, tuple) else done
    after, twin = model(X), write(operation)
    assert torch.equal(twin.model(X), after)
    assert (twin.touched, twin.refused, twin.report) == (operation.touched, operation.refused, operation.report)
    assert str(twin).splitlines()[:-1] == str(operation).splitlines()[:-1]
    with pytest.raises(sw.SkipwayError, match="copy of an operation"):
        twin.undo(force=True)
    assert torch.equal(twin.model(X), after)
    operation.undo()
    assert write(operation).undone


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean()


class OwnLoss(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"logits": y, "loss": y.square().mean()}


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        (Net, {"targets": torch.arange(8) % 3}),
        (Net, {"targets": torch.zeros(8, 5), "loss": squares}),
        (Net, {}),
        (OwnLoss, {}),
    ],
    ids=["labels", "given loss", "random labels", "own loss"],
)
def test_a_diagnosis(kind, choices):
    torch.manual_seed(0)
    model, images = kind().eval(), torch.randn(8, *X.shape[1:])
    diagnosis = sw.diagnose(model, images, **choices, allowance=0.0)
    twin = pickle.loads(pickle.dumps(diagnosis))
    assert twin.table() == diagnosis.table()
    assert twin.to_json() == diagnosis.to_json()
    rates = [0.01]
    assert twin.range_test(rates) == diagnosis.range_test(rates)
    treated = diagnosis.fix(Damp())
    assert str(pickle.loads(pickle.dumps(treated))) == str(treated)


class Reduced(Net):
    """Says itself how it is taken apart."""

    def __reduce__(self):
        return rebuilt, (len(self.blocks),), vars(self)


def rebuilt(blocks: int) -> Reduced:
    return Reduced(blocks)


def test_a_class_with_a_reduction_of_its_own():
    model = Reduced(2).eval()
    sw.accelerate(model, X)
    rescheme(model, X, "skipinit")
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(X), model(X))
    assert type(twin) is type(model) is not Reduced
    assert list(twin.state_dict()) == list(model.state_dict())


class Abstract(Net, abc.ABC):
    pass


def test_a_metaclass():
    model = Abstract().eval()
    sw.accelerate(model, X)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


class Pairs(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"aux": y + 1, "logits": y}


def test_an_output_taken_by_its_name():
    model = with_logits(Pairs().eval(), None, X, "nets.py:Pairs").eval()
    rescheme(model, X, "layerscale")
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(X), model(X))
    assert torch.equal(copy.deepcopy(twin)(X), model(X))


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    "operate",
    [
        lambda m, x: deepen(m, x, 2),
        lambda m, x: shorten(m, x, 2),
        lambda m, x: skip_compute(m, x, 0.5),
        lambda m, x: checkpointed(m, x, 2),
        lambda m, x: reversible(m, {**x, "use_cache": False}),
    ],
    ids=["deepen", "shorten", "skip_compute", "checkpointed", "reversible"],
)
def test_language_models(operate):
    transformers = import_transformers()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    tokens = {"input_ids": torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))}
    operate(model, tokens)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**tokens).logits, model(**tokens).logits)
    assert torch.equal(copy.deepcopy(model)(**tokens).logits, model(**tokens).logits)
