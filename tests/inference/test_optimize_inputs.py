"""What people give to `optimize`: outputs in containers, code that decides by values, writes into the input, NaN."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skipway.errors import SkipwayError
from skipway.inference.answer_check import AnswerCheck
from skipway.inference.backend_search import BackendSearch
from skipway.inference.backend_selection import BackendComparison
from skipway.inference.backends import BACKENDS, LAYOUTS, Backend, Choice
from skipway.inference.optimized_model import assemble, load_optimized, optimize, watch_answers
from skipway.inference.outputs import in_type, output_difference
from skipway.tracing.containers import tensors_in
from skipway.tracing.module_state import copy_module, differing_state, is_changed
from skipway.tracing.watch import watch

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
    assert [name for name, backend in BACKENDS.entries.items() if backend.keeps_path] == ["openvino", "fused", "eager"]


@pytest.mark.parametrize(
    ("before", "reads"),
    [
        (lambda x: x / 255 if max(x.flatten().tolist()) > 50 else x, True),
        (lambda x: x / 255 if x.numpy().max() > 50 else x, True),
        (lambda x: x / 255 if np.asarray(x).max() > 50 else x, True),
        (lambda x: x * len(x[x > 3]), True),
        (lambda x: x * len(x.masked_select(x > 3)), True),
        (lambda x: x * len(x.round().unique()), True),
        (lambda x: x[:, torch.arange(x.shape[1]) >= 0], False),
        (lambda x: x[torch.ones_like(x, dtype=torch.bool)].view(x.shape), False),
        (lambda x: x.masked_select(torch.ones(x.shape[1]) > 0).view(x.shape), False),
        (lambda x: x[x.argsort(0)[:, 0]], False),
        (lambda x: x.masked_fill(x > 3, 0), False),
        (lambda x: x.clone().index_put_((x > 3,), x.new_zeros(())), False),
        (lambda x: x * torch.arange(x.shape[1]).tolist()[-1], False),
    ],
)
def test_what_a_model_may_decide_by(before, reads):
    """Values that leave torch, and numbers of rows: not those that follow from shapes alone."""
    model = Net()
    model.before = before
    assert (BackendComparison(model, X).reader is not None) == reads


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


def test_a_model_that_writes_into_its_input_is_not_quantized():
    comparison = BackendComparison(Net(before=lambda x: x.sub_(0.5)), X.clone())
    comparison.check = AnswerCheck(X, torch.zeros(3, dtype=torch.long))
    with torch.no_grad():
        comparison.quantize(X, print)
    assert comparison.refusal.startswith("precision='int8': the model writes into its arguments, which is lost")
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
        ({"backends": []}, r"backends=\[\]: the rule is some of openvino, fused, eager"),
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
    assert "a call writes into calls: what is returned may depend on the calls before" in str(fast)
    assert "a call writes" not in str(optimize(Net(), X, backends="torch", cache=False))


class Streams(nn.Module):
    """Keeps what it computed before in a buffer that begins as None, in an attribute, a list and a number."""

    def __init__(self):
        super().__init__()
        self.cell, self.inner, self.seen, self.last = nn.GRUCell(4, 4), nn.Identity(), [], None
        self.inner.steps = 0
        self.register_buffer("h", None)

    def forward(self, x):
        self.last = self.h = self.cell(x, self.h)
        self.seen.append(self.last)
        self.inner.steps += 1
        return self.h + self.inner.steps


@pytest.mark.parametrize("backend", ["torch", "original"])
def test_a_result_starts_with_the_state_of_the_model(backend, tmp_path):
    """A stream by the result, from the first call on, is the model's; so it is from a file."""
    model = Streams().eval()
    comparison = BackendComparison(model, X)
    choice = Choice(backend)
    if backend != "original":
        comparison.add(choice)
    comparison.time(2)
    fast = assemble(comparison, choice)
    assert "a call writes into h: " in fast.remark
    assert (model.h, model.last, model.seen, model.inner.steps) == (None, None, [], 0)
    loaded = load_optimized(fast.save(tmp_path / "fast.pt"))
    assert loaded.remark == fast.remark
    with torch.no_grad():
        for x in (X, 2 * X, X):
            expected = model(x)
            for each in (fast, loaded):
                torch.testing.assert_close(each(x), expected)


class Answers(dict):
    """Whatever attribute it is asked for, it answers: a configuration as people write them."""

    __getattr__ = dict.get


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (3, 4),
        (False, True),
        ("first", "second"),
        (0, torch.ones(2)),
        (None, torch.ones(2)),
        (torch.ones(2), None),
        (torch.ones(2), torch.zeros(2)),
        ([torch.ones(2)], [torch.ones(2)] * 2),
        ({"a": (1, None)}, {"a": (1, torch.ones(2))}),
        (SimpleNamespace(h=torch.ones(2)), SimpleNamespace(h=torch.zeros(2))),
        ([SimpleNamespace(h=[1])], [SimpleNamespace(h=[2])]),
        (deque([1]), deque([2])),
        ({1}, {1, 2}),
        (np.ones(2), np.zeros(2)),
        (np.array([1, [2]], dtype=object), np.array([1, [3]], dtype=object)),
        (bytearray(b"a"), bytearray(b"b")),
        (Answers(h=1), Answers(h=2)),
        ([nn.Linear(2, 2)], [nn.Linear(2, 2)]),
    ],
)
def test_what_counts_as_state(old, new):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].held = old
    other = copy_module(model)
    assert differing_state(model, other) == []
    other[0].held = new
    assert differing_state(model, other) == ["0.held"]


def test_what_is_the_same_in_a_copy():
    """NaN is not equal to itself, and keys that are modules are others in a copy."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].held = [math.nan, torch.tensor([math.nan, 1]), {model[0]: 1}, {model[0], model}, print, model]
    model[0].rows = np.array([SimpleNamespace(h=1), [math.nan]], dtype=object)
    assert differing_state(model, copy_module(model)) == []


def test_tensors_of_a_graph_in_objects_are_copied():
    layer = nn.Linear(2, 2)
    layer.kept = SimpleNamespace(h=[layer(torch.ones(1, 2))])
    assert not copy_module(layer).kept.h[0].requires_grad


class Keys(nn.Module):
    """Attention's keys of a fixed length, written in place as static caches are."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x, keys, place):
        keys.index_copy_(2, place, self.project(x))
        return keys.sum(2)


@pytest.mark.parametrize(("backend", "precision"), [("eager", "float32"), ("torch", "bfloat16")])
def test_what_a_model_writes_into_its_arguments_is_compared(backend, precision):
    """Channels-last and bfloat16 make copies of the keys, and a copy is lost."""
    x, keys, place = torch.randn(2, 3, 1, 4), torch.zeros(2, 3, 5, 4), torch.tensor([3])
    with pytest.raises(SkipwayError, match="the model writes into its arguments, and this choice writes something"):
        optimize(Keys(), (x, keys, place), backends=backend, precisions=precision, cache=False)
    model = Keys()
    fast = optimize(model, (x, keys, place), backends="torch", cache=False)
    mine, theirs = keys.clone(), keys.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mine, place), model(x, theirs, place))
    torch.testing.assert_close(mine, theirs)
    assert mine.any()


def test_a_batch_that_is_written_into_is_not_cut():
    """A last piece would be filled up, which makes a copy."""
    comparison = BackendComparison(Net(before=lambda x: x.mul_(0.5)), X)
    assert comparison.axes is None
    with pytest.raises(SkipwayError, match=r"cannot be taken alone \(the model writes into its arguments\); the rule"):
        optimize(Net(before=lambda x: x.mul_(0.5)), X, goal="latency", backends="torch", cache=False)


def test_a_backend_of_one_tensor_is_not_given_what_is_written_into(one_tensor):
    with pytest.raises(SkipwayError, match="writes into its arguments, which is lost in this backend; if that is not"):
        optimize(Net(before=lambda x: x.mul_(0.5)), X, backends="eager", cache=False)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_float64_is_not_computed_in_float32(name, one_tensor):
    """And what can compute in it agrees to its precision."""
    build = BACKENDS["torch"].build
    one_tensor.setitem(BACKENDS.entries, name, Backend(build))
    double, said = X.double(), "is in float64: this backend computes in float32 at most"
    with pytest.raises(SkipwayError, match=said):
        optimize(Net().double(), double, backends=name, cache=False)
    for model in (Net(before=lambda x: x.double()).double(), Net(lambda y: y.double())):
        with pytest.raises(SkipwayError, match=said):
            optimize(model, X, backends=name, cache=False)
    assert BACKENDS["eager"].obstacle(X, Choice("eager"), others=[double]) is not None
    assert BACKENDS["torch"].obstacle(double, Choice("torch")) is None


def test_whole_numbers_agree_or_not():
    """A class is as wrong beside the right one as far from it, and no amount; above 2^24 floats would merge them."""
    classes = torch.tensor([49999, 281])
    assert output_difference(classes, torch.tensor([49999, 285])) == 0.5
    assert output_difference(classes + 2**24, classes + 2**24 + torch.tensor([0, 1])) == 0.5
    assert output_difference((X, classes > 300), (X, classes > 0)) == 0.5
    assert output_difference((X, classes), (X * 1.001, classes)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_other_whole_numbers_are_said_or_refused(wrong, one_tensor):
    """As for amounts, the limit is the tolerance, 1e-3."""
    right = torch.arange(2000)
    model = Net(lambda y: right + 0 * y.sum().long())

    def build(network, example, choice):
        return lambda x: network(x) + (right < wrong)

    one_tensor.setitem(BACKENDS.entries, "eager", Backend(build, any_call=True))
    if wrong < 2:
        remark = optimize(model, X, backends="eager", cache=False).remark
        assert remark == "0.05% of the whole numbers that it returns (classes, tokens) are not the original's" * wrong
    else:
        with pytest.raises(
            SkipwayError, match=r"0\.[12]% of the whole numbers .* are not the original's, more than 0\.1%"
        ):
            optimize(model, X, backends="eager", cache=False)


class Features(nn.Module):
    """Returns the maps of all its layers on demand."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        nn.init.normal_(self.body[1].running_mean)

    def forward(self, x, features=False):
        maps = [x]
        for layer in self.body:
            maps.append(layer(maps[-1]))
        return maps if features else maps[-1]


def test_calls_of_another_kind_are_the_models(tmp_path):
    """Folded into the convolution, the norm would be in its output, which nobody compared."""
    model, x = Features().eval(), torch.randn(2, 3, 5, 5)
    fast = optimize(model, x, backends="torch", cache=False)
    for each in (fast, load_optimized(fast.save(tmp_path / "fast.pt"))):
        with pytest.warns(UserWarning, match="run in plain torch"):
            found = each(x, features=True)
        torch.testing.assert_close(found, model(x, features=True), rtol=0, atol=0)


class Filled:
    """A cache of somebody's own, as transformers has them; it begins empty."""

    def __init__(self):
        self.items = []


class Appends(nn.Linear):
    def forward(self, x, cache):
        (cache if isinstance(cache, list) else cache.items).append(x)
        return super().forward(torch.stack(cache if isinstance(cache, list) else cache.items).sum(0))


@pytest.mark.parametrize("make", [Filled, list])
def test_an_empty_cache_of_an_example_stays_empty(make, recwarn):
    model, cache = Appends(4, 2), make()
    fast = optimize(model, {"x": X, "cache": cache}, backends="torch", cache=False)
    held = fast.example["cache"]
    assert not (cache if make is list else cache.items) + (held if make is list else held.items)
    assert held is not cache
    assert fast.axes is None
    with torch.no_grad():
        for given in (make(), make()):
            found = fast(x=X, cache=given)
            torch.testing.assert_close(found, nn.functional.linear(X, model.weight, model.bias))
            assert len(given if make is list else given.items) == 1
    assert not [each for each in recwarn.list if "plain torch" in str(each.message)]


class Recorder:
    def __init__(self):
        self.seen = []

    def record(self, module, given, output):
        self.seen.append(output)


@pytest.mark.parametrize("pre", [False, True])
def test_hooks_are_called_or_said(pre, one_tensor):
    """A method of an object of the caller's records in that object, and not in a copy."""
    model, recorder = nn.Sequential(Net(), nn.Tanh()), Recorder()
    if pre:
        model[1].register_forward_pre_hook(lambda module, given: recorder.record(module, given, given[0]))
    else:
        model[0].register_forward_hook(recorder.record)
    fast = optimize(model, X, backends="torch", cache=False)
    recorder.seen.clear()
    found = fast(2 * X)
    assert len(recorder.seen) == 1
    torch.testing.assert_close(recorder.seen[0].tanh(), found)
    assert fast.axes is None
    with pytest.raises(SkipwayError, match=rf"{int(pre)} has a forward hook, which is lost in this backend; remove it"):
        optimize(model, X, backends="eager", cache=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 1)],
)
def test_hooks_of_torch_itself_are_part_of_a_network(wrap, one_tensor):
    assert optimize(nn.Sequential(wrap(nn.Linear(4, 2))), X, backends="eager", cache=False).backend == "eager"


def test_a_hook_that_is_a_method_of_the_network_stays_the_copys():
    class Own(Net):
        def __init__(self):
            super().__init__()
            self.seen = 0
            self.register_forward_hook(self.count)

        def count(self, *given):
            self.seen += 1

    model = Own()
    fast = optimize(model, X, backends="torch", cache=False)
    fast(X)
    assert (model.seen, fast.original.seen) == (0, 0)


class Lazy(nn.Linear):
    """A table made in the first pass, which a flag tells; a mapping that a part of the network reads; a counter."""

    def __init__(self):
        super().__init__(4, 2)
        self.ready, self.table, self.shared, self.part, self.calls = False, None, {}, nn.Identity(), 0
        self.part.shared = self.shared

    def forward(self, x):
        if not self.ready:
            self.ready, self.table = True, torch.ones(2)
        self.calls += 1
        self.shared["scale"] = x.abs().mean()
        return super().forward(x) * self.table * self.part.shared["scale"]


def test_state_is_put_back_with_what_tells_of_it():
    model = Lazy().eval()
    fast = optimize(model, X, backends="torch", cache=False)
    assert (fast.original.ready, fast.original.table) == (False, None)
    assert fast.original.shared is fast.original.part.shared is not model.shared
    for x in (2 * X, X):
        torch.testing.assert_close(fast(x), model(x))


def test_hooks_whose_object_the_network_reads_stay_the_copys():
    """timm's FeatureHookNet: its hooks are partials of a method of an object that the network holds and reads."""

    class Features(Net):
        def __init__(self):
            super().__init__()
            self.kept = Recorder()
            self.body = nn.Linear(4, 4)
            self.body.register_forward_hook(partial(Recorder.record, self.kept))
            self.body.register_forward_hook(partial(self.kept.record))

        def forward(self, x):
            self.kept.seen.clear()
            self.body(x)
            return self.kept.seen[-1] * 2

    model = Features().eval()
    with torch.no_grad():
        model(X)
    fast = optimize(model, X, backends="torch", cache=False)
    torch.testing.assert_close(fast(3 * X), 2 * model.body(3 * X))


def test_a_hook_of_an_object_that_has_no_hash():
    recorder = dataclass(type("Rows", (Recorder,), {"__annotations__": {"seen": list}}))([])
    model = nn.Sequential(Net())
    model[0].register_forward_hook(recorder.record)
    fast = optimize(model, X, backends="torch", cache=False)
    recorder.seen.clear()
    fast(X)
    assert len(recorder.seen) == 1


def test_numbers_in_a_list_are_no_cache():
    class Sized(nn.Linear):
        def forward(self, x, size):
            return super().forward(x) * size[0]

    comparison = BackendComparison(Sized(4, 2), (X, [3, 4]))
    assert comparison.axes is not None
    assert BackendComparison(Sized(4, 2), (X, {0: 3})).axes is not None


def test_rows_that_a_mask_selects_bar_backends_that_keep_shapes_and_no_operation():
    """A classifier of the last token of each text selects by a mask; none of its code decides by the number of rows."""

    class Last(nn.Linear):
        def forward(self, x):
            return super().forward(x)[x[:, 0] > -2]

    program = watch(Last(4, 2).eval(), X)
    assert (program.readers, program.selectors) == ([], [""])
    assert BackendComparison(Last(4, 2), X).reader == "the model (Last)"


class Head(nn.Linear):
    """Divides by a temperature that its mode decides; it may count its calls."""

    temperature = 1.0

    def __init__(self, counts=False):
        super().__init__(4, 2)
        self.counts, self.calls = counts, 0

    def train(self, mode=True):
        super().train(mode)
        self.temperature = 2.0 if mode else 1.0
        return self

    def forward(self, x):
        self.calls += self.counts
        return super().forward(x) / self.temperature


def optimized(model, example, backend):
    """The model as it is, or built by one backend, after it was timed."""
    comparison, choice = BackendComparison(model, example), Choice(backend)
    if backend != "original":
        comparison.add(choice)
    comparison.time(2)
    return assemble(comparison, choice)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("backend", ["torch", "original"])
def test_what_the_mode_decides_is_that_of_inference(counts, backend):
    model = Head(counts).train()
    fast = optimized(model, X, backend)
    assert bool(fast.remark) == counts
    assert model.temperature == 2.0
    torch.testing.assert_close(fast(X), nn.functional.linear(X, model.weight, model.bias))


class Sends(nn.Module):
    """Writes into an object that another module reads, and counts its calls."""

    def __init__(self, held):
        super().__init__()
        self.held, self.calls = held, 0

    def forward(self, x):
        self.calls += 1
        self.held.scale = x.abs().mean()
        return x


class Receives(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return x * self.held.scale


@pytest.mark.parametrize("backend", ["torch", "original"])
def test_objects_that_modules_share_are_shared_in_the_result(backend):
    held = SimpleNamespace(scale=1.0)
    model = nn.Sequential(Sends(held), Receives(held), nn.Linear(4, 2))
    fast = optimized(model, X, backend)
    assert (held.scale, model[0].calls) == (1.0, 0)
    for x in (X, 5 * X):
        torch.testing.assert_close(fast(x), model(x))


class Adapt(nn.Linear):
    """Centres by a mean that each call moves by a thousandth, which is within the tolerance."""

    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean += 1e-3 * (x.mean(0) - self.mean)
        return super().forward(x - self.mean)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "inductor"])
def test_a_network_with_a_state_is_given_to_no_backend_that_makes_constants_of_it(name):
    model = Adapt()
    comparison, choice = BackendComparison(model, X), Choice(name)
    if problem := BACKENDS[name].obstacle(X, choice):
        pytest.skip(str(problem))
    comparison.add(choice)
    assert comparison.results[choice].note.startswith("a call writes into mean, ")
    assert comparison.axes is None  # two streams would write into it at once
    assert torch.equal(comparison.folded.mean, model.mean)
    comparison.check = AnswerCheck(X, torch.zeros(3, dtype=torch.long))
    comparison.quantize(X, print)
    assert comparison.refusal.startswith("precision='int8': a call writes into mean, which is lost in this backend; ")


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_a_state_that_moves_slowly_is_followed(backend):
    model = Adapt().eval()
    fast = optimize(model, X + 5, backends=backend, cache=False)
    with torch.no_grad():
        for _ in range(500):
            found, expected = fast(X + 5), model(X + 5)
    torch.testing.assert_close(found, expected)
    assert model.mean.mean() > 1


class Kept(nn.Linear):
    """Adds what the call before was given, kept in an object that is no module."""

    def __init__(self, kept, step):
        super().__init__(4, 2)
        self.kept, self.step = kept, step

    def forward(self, x):
        return super().forward(x + self.step(self.kept, x))


def step_deque(kept, x):
    kept.append(x)
    return kept[0]


def step_object(kept, x):
    before, kept.x = kept.x, x
    return before


@dataclass
class Memory:
    x: object = 0.0


@pytest.mark.parametrize(
    ("kept", "step"),
    [
        (deque([torch.zeros(3, 4)], maxlen=2), step_deque),
        (SimpleNamespace(x=0.0), step_object),
        (Memory(), step_object),
    ],
)
def test_a_state_in_an_object_is_one(kept, step):
    model = Kept(kept, step).eval()
    fast = optimize(model, X, backends="torch", cache=False)
    assert "a call writes into kept: " in fast.remark
    with torch.no_grad():
        for x in (X, 2 * X, X, 3 * X):
            torch.testing.assert_close(fast(x), model(x))


class Tires(nn.Linear):
    """Gives no answers any more after 40 calls."""

    def __init__(self):
        super().__init__(4, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (self.calls <= 40)


def test_answers_are_those_of_a_network_that_was_not_timed():
    model, images = Tires(), torch.randn(40, 4)
    labels = nn.functional.linear(images, model.weight, model.bias).argmax(1)
    comparison, choice = BackendComparison(model, X), Choice("torch")
    watch_answers(comparison, (images, labels), 0.0)
    comparison.add(choice)
    for _ in range(5):
        comparison.time(5)
    assert comparison.keeps_answers(choice)
    assert model.calls == 0


class Alternates(nn.Linear):
    """Changes its sign with every call, which a flag tells."""

    def __init__(self):
        super().__init__(4, 2)
        self.flag = False

    def forward(self, x):
        self.flag = not self.flag
        return super().forward(x) * (1 if self.flag else -1)


class Draws(nn.Linear):
    """Adds random numbers of its own generator, whose state is no attribute."""

    def __init__(self):
        super().__init__(4, 2)
        self.generator = random.Random(0)

    def forward(self, x):
        return super().forward(x) + self.generator.random()


class FirstInput(nn.Linear):
    """Scales by the first input that it is ever given."""

    def __init__(self):
        super().__init__(4, 2)
        self.scale = None

    def forward(self, x):
        self.scale = x.abs().mean() if self.scale is None else self.scale
        return super().forward(x) / self.scale


class Last(nn.Linear):
    """Adds the last input, in the first call its own."""

    def __init__(self):
        super().__init__(4, 2)
        self.last = None

    def forward(self, x):
        last, self.last = x if self.last is None else self.last, x
        return super().forward(x + last)


class Floats(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("x", [X, torch.arange(12).view(3, 4)], ids=["floating", "whole"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Alternates, "a call writes into 1.flag"),
        (Draws, "a second call with one input returns something else"),
        (FirstInput, "a call writes into 1.scale"),
        (Last, "a call writes into 1.last"),
    ],
)
def test_every_kind_of_state_is_found(kind, said, x):
    model = nn.Sequential(Floats(), kind()).eval()
    comparison = BackendComparison(model, x)
    assert comparison.state == said
    assert comparison.axes is None
    comparison.add(Choice("torch"))
    fast = assemble(comparison, Choice("torch"))
    for given in (2 * x, x, x, 2 * x):
        torch.testing.assert_close(fast(given), model(given))


class Tables(nn.Linear):
    """Fills a mapping by the first call, and writes NaN into a buffer by every one; keys are modules."""

    def __init__(self):
        super().__init__(4, 2)
        self.tables, self.names, self.part = {}, {}, nn.Identity()
        self.names[self.part] = "part"
        self.register_buffer("unknown", torch.zeros(1))

    def forward(self, x):
        if "cpu" not in self.tables:
            self.tables["cpu"] = self.weight.detach() * 2
        self.unknown.fill_(math.nan)
        return nn.functional.linear(x, self.tables["cpu"], self.bias)


def stale():
    """A weight that `torch.nn.utils.weight_norm` computes in the next pass, after a step of an optimizer."""
    layer = nn.utils.weight_norm(nn.Linear(4, 2))
    with torch.no_grad():
        layer.weight_g *= 2
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", [Tables, stale])
@pytest.mark.parametrize("named", [False, True])
def test_what_any_call_would_write_is_no_state(make, named):
    model = make().eval()
    example = {"x" if make is Tables else "input": X} if named else X
    comparison = BackendComparison(model, example)
    assert not comparison.state
    assert comparison.axes is not None
    comparison.add(Choice("torch"))
    fast = assemble(comparison, Choice("torch"))
    assert not fast.remark
    torch.testing.assert_close(fast(**example) if named else fast(X), model(X))


def test_a_missing_value_in_the_example_is_nothing_written():
    holed = X.clone()
    holed[0, 0] = math.nan
    comparison = BackendComparison(Net(before=torch.nan_to_num), holed)
    assert not comparison.writes
    assert comparison.axes is not None


class Scale:
    def __init__(self, gate):
        self.gates = [gate]

    def __call__(self, module, given, output):
        return output * self.gates[0](output)


def scale_by(gate, module, given, output):
    return output * gate(output)


def hook_with_default(gate):
    return lambda module, given, output, gate=gate: output * gate(output)


@pytest.mark.parametrize(
    "hook_of",
    [
        lambda gate: partial(scale_by, gate),
        lambda gate: partial(Scale.__call__, Scale(gate)),
        Scale,
        lambda gate: lambda module, given, output: output * gate(output),
        hook_with_default,
    ],
    ids=["partial", "partial of an object", "object", "closure", "default"],
)
def test_hooks_that_compute_with_a_part_of_the_network_take_that_of_the_copy(hook_of):
    """A gate of the caller's would run in training mode in every call of the search, and its statistics would move."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.body.register_forward_hook(hook_of(self.gate))

        def forward(self, x):
            return self.head(self.body(x))

    model = Gated().train()
    fast = optimize(model, X, backends="torch", cache=False)
    found = fast(X)
    assert model.gate.num_batches_tracked == 0
    torch.testing.assert_close(found, model.eval()(X))


class Remembers(nn.Linear):
    """Keeps what it computed for others to look at, and reads it in no other call."""

    def __init__(self):
        super().__init__(4, 4)
        self.attention = None

    def forward(self, x):
        self.attention = super().forward(x).softmax(-1)
        return self.attention @ self.weight


class Resets(nn.Module):
    """Runs a cell over the columns; its state begins anew in every call."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(1, 4)
        self.register_buffer("hidden", None)

    def forward(self, x):
        self.hidden = x.new_zeros(len(x), 4)
        for column in x.split(1, 1):
            self.hidden = self.cell(column, self.hidden)
        return self.hidden


@pytest.mark.parametrize("kind", [Remembers, Resets])
def test_what_every_call_overwrites_is_no_state(kind):
    model = kind().eval()
    comparison = BackendComparison(model, X)
    assert not comparison.state
    assert comparison.axes is not None
    name = "attention" if kind is Remembers else "hidden"
    assert comparison.overwritten == [name]
    assert comparison.remarks(Choice("torch")) == [f"every call writes into {name}: one thread at a time may call it"]
    assert not comparison.remarks(Choice("openvino"))
    fast = optimize(model, X, goal="latency", backends="torch", cache=False)
    with torch.no_grad():
        for x in (X[:1], 3 * X, X[:2]):
            torch.testing.assert_close(fast(x), model(x))


def test_what_every_call_overwrites_bars_no_backend_of_constants():
    comparison, choice = BackendComparison(Remembers().eval(), X), Choice("openvino")
    if problem := BACKENDS["openvino"].obstacle(X, choice):
        pytest.skip(str(problem))
    comparison.add(choice)
    assert not comparison.results[choice].note


def test_threads_of_streams_share_nothing_that_a_call_writes():
    """One would read what another has just written; pieces one after the other, and what runs no Python, are right."""
    comparison = BackendComparison(Remembers().eval(), torch.randn(4, 4))
    for choice in (Choice("torch", pieces=2, streams=2), Choice("torch", pieces=2)):
        comparison.add(choice)
    refused, right = list(comparison.results.values())[1:]
    assert refused.note.startswith("a call writes into attention, which the threads of streams would share; ")
    assert not right.note
    search = BackendSearch(comparison, ["torch", "openvino"], ("float32",), math.inf)
    assert {choice.streams for choice in search.cuts(Choice("torch"))} == {1}
    assert not comparison.shares_state(Choice("openvino"))


class Slightly(nn.Linear):
    """Adds a little of the last input, within rounding: where two histories end with one call, outputs tell."""

    def __init__(self):
        super().__init__(4, 2)
        self.last = torch.zeros(3, 4)

    def forward(self, x):
        last, self.last = self.last, x
        return super().forward(x + 1e-5 * last)


def test_a_state_within_rounding_is_found():
    assert BackendComparison(Slightly(), X).state == "a call writes into last"


class Table(nn.Module):
    """Makes a table in the first call, as memos of position biases are made; `first` of the first input."""

    def __init__(self, first=False):
        super().__init__()
        self.embed, self.first, self.table = nn.Embedding(9, 4), first, None

    def forward(self, x):
        if self.table is None:
            self.table = self.embed.weight.sum(0) + (x.float().mean() if self.first else 0)
        return (self.embed(x) if not x.is_floating_point() else x) * self.table


@pytest.mark.parametrize(
    "example",
    [torch.zeros(3, 4), torch.full((3, 4), 5), torch.zeros(3, 4, dtype=torch.long)],
    ids=["zeros", "fives", "whole zeros"],
)
def test_a_constant_example_makes_no_state_of_a_table(example):
    comparison = BackendComparison(Table(), example)
    assert not comparison.state
    assert comparison.axes is not None
    assert BackendComparison(Table(first=True), example).state == "a call writes into table"


def test_an_empty_tensor_beside_the_example_is_no_state():
    class Prompted(Table):
        def forward(self, x, prompt):
            return super().forward(torch.cat([prompt, x], 1))

    comparison = BackendComparison(Prompted(), (torch.arange(6).view(2, 3), torch.zeros(2, 0, dtype=torch.long)))
    assert not comparison.state


class Learns(nn.Linear):
    """Moves its weight in every call."""

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        self.weight.data.mul_(0.9)
        return super().forward(x)


def test_packed_weights_are_refused_where_calls_write_into_them():
    comparison, choice = BackendComparison(Learns(), X), Choice("eager")
    comparison.add(choice)
    assert comparison.results[choice].note.startswith("a call writes into weight, and this backend makes constants")


class Stores:
    """A hook that computes with a part of the network, and fills a list of the caller's."""

    def __init__(self, gate, seen):
        self.gates, self.seen = [gate], seen

    def __call__(self, module, given, output):
        self.seen.append(output)
        return output * self.gates[0](output)


def store(gate, seen, module, given, output):
    seen.append(output)
    return output * gate(output)


@pytest.mark.parametrize(
    "hook_of",
    [
        Stores,
        lambda gate, seen: partial(store, gate, seen),
        lambda gate, seen: partial(Stores.__call__, Stores(gate, seen)),
    ],
    ids=["object", "partial", "partial of an object"],
)
def test_hooks_with_a_part_of_the_network_fill_the_lists_of_the_caller(hook_of):
    seen, model = [], nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[0].register_forward_hook(hook_of(model[1], seen))
    fast = optimize(model, X, backends="torch", cache=False)
    seen.clear()
    found = fast(X)
    assert len(seen) == 1
    assert model[1].num_batches_tracked == 0
    torch.testing.assert_close(found, model.eval()(X))
    torch.testing.assert_close(seen[0], seen[1])


class Skips:
    """A hook on two modules: what the first returns is added to what the second returns."""

    def __init__(self, network):
        self.first, self.held = network[0], {"network": network}

    def __call__(self, module, given, output):
        if module is self.first:
            self.held["kept"] = output
            return None
        return output + self.held["kept"]


def skip(held, module, given, output):
    if module is held["network"][0]:
        held["kept"] = output
        return None
    return output + held["kept"]


@pytest.mark.parametrize("hook_of", [Skips, lambda network: partial(skip, {"network": network})])
@pytest.mark.parametrize("called", [True, False])
def test_hooks_on_several_modules_share_what_they_hold(hook_of, called):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    hook = hook_of(model)
    for number in (0, 2):
        model[number].register_forward_hook(hook)
    if called:
        with torch.no_grad():
            model(X + 1)
    fast = optimize(model, X, backends="torch", cache=False)
    torch.testing.assert_close(fast(2 * X), model(2 * X).detach())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_nested_tensors_are_compared(layout):
    rows = [torch.ones(2, 4), torch.ones(3, 4)]
    one, same = (torch.nested.nested_tensor(rows, layout=layout) for _ in range(2))
    assert not is_changed(one, same)
    assert is_changed(one, torch.nested.nested_tensor([rows[0], 2 * rows[1]], layout=layout))
    assert is_changed(one, torch.nested.nested_tensor(rows[::-1], layout=layout))
    assert is_changed(one, rows[0])


class Pools(nn.Linear):
    def forward(self, x, rows):
        return super().forward(x) * sum(row.mean() for row in rows.unbind())


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_nested_arguments_beside_a_dense_one():
    model, rows = Pools(4, 2), torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    fast = optimize(model, (X, rows), backends="torch", cache=False)
    torch.testing.assert_close(fast(2 * X, rows), model(2 * X, rows))


def test_a_list_that_modules_share_until_one_replaces_it():
    shared = []
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[0].seen = model[1].seen = shared
    after = copy_module(model)
    after[1].seen = [1]
    assert differing_state(model, after) == ["1.seen"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("backend", ["fused", "eager"])
def test_a_network_that_writes_zeros_where_a_mask_hides(backend):
    """torch.nn.TransformerEncoder does, in a fast path that other backends do not take, and not for a mask of zeros."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    example = {"src": torch.randn(3, 5, 8), "src_key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}
    with pytest.raises(SkipwayError, match="differs by .*, where a mask ends otherwise than the example's"):
        optimize(nn.TransformerEncoder(layer, 2).eval(), example, backends=backend, cache=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    fast = optimize(model, example, backends=backend, cache=False)
    given = {**example, "src_key_padding_mask": torch.arange(5).expand(3, 5) > torch.tensor([[4], [2], [1]])}
    with torch.no_grad():
        assert torch.allclose(fast(**given), model(**given), atol=1e-5)


def test_a_dict_for_a_network_that_takes_one():
    model = Net(lambda y: y, lambda given: given["pixels"])
    with pytest.raises(SkipwayError, match=r"one for a network that takes a dict is \(dict,\)"):
        optimize(model, {"pixels": X}, backends="eager", cache=False)
    fast = optimize(model, ({"pixels": X},), backends="eager", cache=False)
    with torch.no_grad():
        assert torch.allclose(fast({"pixels": X}), model({"pixels": X}))


@dataclass
class Options:
    """Arguments in an object, whose == asks for the truth of tensors."""

    shift: torch.Tensor
    twice: bool = False


class WithOption(nn.Linear):
    """A map that another argument decides about."""

    def forward(self, x, option):
        y = super().forward(x)
        if isinstance(option, Options):
            return y * 2 + option.shift if option.twice else y + option.shift
        return y if isinstance(option, bool) else y * torch.as_tensor(option).float().sum()


@pytest.mark.filterwarnings("ignore:arguments of other shapes")
@pytest.mark.parametrize(
    ("option", "others"),
    [
        (True, (1, 1.0, 2)),
        (1, (True, 1.0)),
        (np.ones(3), (np.ones(3), np.arange(3.0), np.ones(2))),
        (Options(torch.ones(2)), (Options(torch.zeros(2)), Options(torch.ones(2), twice=True))),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_other_options_of_a_call(backend, option, others):
    model = WithOption(4, 2)
    if backend == "fused" and not isinstance(option, int):
        with pytest.raises(SkipwayError, match="failed: ValueError: Unsupported input type"):
            optimize(model, (X, option), backends=backend, cache=False)
        return
    fast = optimize(model, (X, option), backends=backend, cache=False)
    with torch.no_grad():
        for each in (option, *others):
            assert torch.allclose(fast(X, each), model(X, each), atol=1e-6)


def test_integers_of_more_than_32_bits_are_refused_by_openvino():
    pytest.importorskip("openvino")
    model = Net(lambda y: y, lambda x: (x % 1009).float())
    x = torch.randint(0, 2**20, (4, 4))
    fast = optimize(model, x, backends="openvino", cache=False)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-2)
    with pytest.raises(SkipwayError, match="OpenVINO has 32 bits for them"):
        fast(x + 2**40)
