"""What people give to `optimize`: outputs in containers, code that decides by values, writes into the input, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.inference.answer_check import AnswerCheck
from skipway.inference.backend_selection import BackendComparison
from skipway.inference.backends import BACKENDS, LAYOUTS, Backend, Choice
from skipway.inference.optimized_model import assemble, optimize
from skipway.inference.outputs import in_type, output_difference
from skipway.tracing.containers import tensors_in

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Linear):
    """A map whose output a function puts into something."""

    def __init__(self, out=lambda y: y, before=lambda x: x):
        super().__init__(4, 2)
        self.out, self.before = out, before

    def forward(self, x):
        return self.out(super().forward(self.before(x)))


@pytest.fixture
def one_tensor(monkeypatch):
    """A backend that returns one tensor, whatever the network puts it into; the clock stands."""
    monkeypatch.setattr(BackendComparison, "time", lambda self, *given: None)

    def build(model, example, choice):
        return lambda x: next(tensors_in(model(x)))

    monkeypatch.setitem(BACKENDS.entries, "eager", Backend(build, any_size=True))
    return monkeypatch


@pytest.mark.parametrize(
    "put",
    [lambda y: {"logits": y}, lambda y: (y,), lambda y: [y, "name", 3], lambda y: ({"a": (y,)}, None)],
    ids=["dict", "tuple", "list with more", "nested"],
)
def test_one_tensor_comes_back_in_its_containers(one_tensor, put):
    model = Net(put)
    for x in (X, X[:2]):
        expected, found = model(x), optimize(model, X, backends="eager")(x)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)
        torch.testing.assert_close(next(tensors_in(found)), next(tensors_in(expected)))


@pytest.mark.parametrize(("put", "said"), [(lambda y: (y, y), "returns 2 tensors"), (lambda y: [], "no tensor")])
def test_a_backend_of_one_tensor_refuses_several(one_tensor, put, said):
    with pytest.raises(SkipwayError, match=said):
        optimize(Net(put), X, backends="eager")


def test_another_container_is_no_agreement():
    assert output_difference({"a": X}, {"a": X}) == 0
    with pytest.raises(SkipwayError, match="it returns a tuple for the original's dict"):
        output_difference({"a": X}, (X,))


def test_a_backend_that_keeps_a_path_needs_a_network_of_one_path(one_tensor):
    eager = BACKENDS["eager"]
    one_tensor.setitem(BACKENDS.entries, "eager", Backend(eager.build, keeps_path=True))
    decides = Net(lambda y: -y if y.mean() > 3 else y)
    with pytest.raises(SkipwayError, match=r"the model \(Net\) reads values of its input, and this backend keeps"):
        optimize(decides, X, backends="eager")
    fixed = Net()
    fixed.before = lambda x: x * float(fixed.bias.sum() > 100)  # a value, but none of the input's
    assert optimize(fixed, X, backends="eager").backend == "eager"
    assert [name for name, backend in BACKENDS.entries.items() if backend.keeps_path] == ["openvino", "eager"]


def test_a_model_that_writes_into_its_input_leaves_the_example():
    example = X.clone()
    fast = optimize(Net(before=lambda x: x.mul_(0.5)), example, backends="torch", cache=False)
    assert torch.equal(example, X)
    assert not any(each.note for each in fast.report)


def test_a_model_that_writes_into_its_input_leaves_the_held_out_images():
    """And every check is made on them, not on what the calls before left of them."""
    model, images = Net(before=lambda x: x.sub_(0.5)), torch.randn(40, 4)
    given = images.clone()
    labels = model(images.clone()).argmax(1)
    comparison = BackendComparison(model, X)
    check = comparison.check = AnswerCheck(images, labels)
    check.watch(comparison.original)
    assert check.correct.all()
    assert check.change(comparison.original).broken == 0
    assert torch.equal(images, given)


def test_a_model_that_writes_into_its_input_is_quantized_with_a_copy_of_the_example(monkeypatch):
    def trace(model, example, *given):
        model(example)
        raise SkipwayError("traced")

    monkeypatch.setattr("skipway.inference.backend_selection.quantize_checked", trace)
    comparison = BackendComparison(Net(before=lambda x: x.sub_(0.5)), X.clone())
    comparison.check = AnswerCheck(X, torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        comparison.quantize(X, print)
    assert comparison.refusal == "traced"
    assert torch.equal(comparison.example, X)


@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize("given", [lambda x: x, lambda x: {"x": x}], ids=["tensor", "keyword"])
def test_a_file_holds_the_example_and_not_what_it_is_part_of(goal, given, tmp_path):
    images = torch.randn(10_000, 4)
    fast = optimize(Plain(), given(images[:3]), goal=goal, backends="torch", cache=False)
    assert fast.save(tmp_path / "fast.pt").stat().st_size < images.nbytes / 2


class Plain(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_a_model_that_takes_no_random_numbers_is_compared_on_its_example(backend):
    """Floating indices, as a table of features holds them."""
    if BACKENDS[backend].obstacle(X, Choice(backend)):
        pytest.skip("not installed")
    table = nn.Embedding(3, 4)
    model, example = Net(before=lambda x: table(x.long()).flatten(1)[:, :4]), torch.tensor([[0.0, 1], [2, 1], [1, 0]])
    with pytest.raises(IndexError):
        model(torch.full((3, 2), -1.0))
    fast = optimize(model, example, backends=backend, cache=False)
    torch.testing.assert_close(fast(example), model(example))
    with pytest.raises(SkipwayError, match=r"this Net fails on its example of shape \(3, 2\): IndexError"):
        optimize(model, example - 1, backends=backend, cache=False)


@pytest.mark.parametrize("choice", [Choice("torch", layout=each) for each in LAYOUTS] + [Choice("eager", pieces=2)])
def test_images_that_come_back_can_be_viewed_as_the_models(choice):
    """Channels-last is a matter of the choice, and not of the network."""
    model, x = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6)
    comparison = BackendComparison(model, x)
    comparison.add(choice)
    fast = assemble(comparison, choice)
    for images in (x, x[:1], torch.cat([x, x])):
        torch.testing.assert_close(fast(images).view(-1), model(images).view(-1))


def test_outputs_keep_the_order_that_the_models_have():
    turned = in_type(X.t(), lambda x: x.t())
    assert turned(X).data_ptr() == X.data_ptr()
    sparse = X.to_sparse()
    assert in_type(sparse, lambda x: x)(sparse) is sparse


def test_not_a_number():
    """Where the original has it, it is no difference; where the original has none, or nothing else, it is."""
    holed = X.clone()
    holed[0] = math.nan
    assert output_difference(holed, holed) == 0
    assert output_difference(X, holed) == output_difference(holed, X) == math.inf
    assert output_difference(holed, holed + 1) == 1
    with pytest.raises(SkipwayError, match="returns no values, or nothing but NaN, on its"):
        optimize(Net(lambda y: y * math.nan), X, backends="torch")
    fast = optimize(Net(before=torch.sqrt), X.abs(), backends="torch", cache=False)  # NaN for random numbers
    assert fast.backend == "torch"


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"backends": []}, r"backends=\[\]: the rule is some of openvino, eager"),
        ({"tolerance": -1.0}, "tolerance=-1.0: the rule is a number of at least 0"),
        ({"seconds": "60"}, "seconds='60': the rule is a number, seconds > 0"),
    ],
)
def test_choices_that_are_none(choices, said):
    with pytest.raises(SkipwayError, match=said):
        optimize(Net(), X, **choices)


class Scaled(nn.Linear):
    def forward(self, x, table, scale=1.0):
        return super().forward(x) @ table * scale


@pytest.mark.parametrize("example", [(X, torch.eye(2)), {"x": X, "table": torch.eye(2)}], ids=["position", "name"])
def test_arguments_by_position_or_name(example, recwarn):
    """Whole batches and parts of them run in what was chosen, with the axes that the example's order has."""
    model, table = Scaled(4, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    fast = optimize(model, example, backends="torch", cache=False)
    for count in (3, 2):
        x = X[:count]
        for args, kwargs in (((x, table), {}), ((x,), {"table": table}), ((), {"table": table, "x": x})):
            torch.testing.assert_close(fast(*args, **kwargs), model(x, table))
    assert not [each for each in recwarn.list if "plain torch" in str(each.message)]
    with pytest.warns(UserWarning, match="run in plain torch"):
        torch.testing.assert_close(fast(X, table, 2.0), model(X, table, 2.0))
    for args, kwargs in (((X, table, 1.0, 1.0), {}), ((X, table), {"x": X}), ((X,), {"tables": table})):
        with pytest.raises(TypeError):
            fast(*args, **kwargs)


def test_a_state_is_said():
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    fast = optimize(Counts(), X, backends="torch", cache=False)
    assert "a call writes into calls, and those of the search did" in str(fast)
    assert "a call writes" not in str(optimize(Net(), X, backends="torch", cache=False))
