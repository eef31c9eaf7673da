"""Which weights are the classifier's, for optimizers and clippers that treat it apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipway as sw
from skipway.optim.clip import AdaptiveClip
from skipway.optim.optimizers import OPTIMIZERS

GPT = {"depth": 2, "dim": 8, "heads": 2, "vocab": 9, "context": 8}


class Tied(nn.Module):
    """A decoder of somebody's own, whose head is registered before its body."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(x + self.body(x))


def names(model: nn.Module, mark: str, example: torch.Tensor | None = None) -> set[str]:
    """The names that a mark of the groups stands for."""
    paths = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = sw.param_groups(model, example, lr=1.0)
    return {paths[id(group["params"][place])] for group in groups for place in group[mark]}


def maps(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    ("options", "classifier"),
    [
        ({"tied": True}, {"stem.token"}),
        ({"tied": True, "position": "rotary", "rms": True, "gated": True}, {"stem.token"}),
        ({"tied": False}, {"head.classifier.weight"}),
    ],
)
def test_a_tied_head_is_the_stems_table(options, classifier):
    """No matrix of the last block is taken for it."""
    model = sw.build("gpt", **GPT, **options)
    assert names(model, "classifier") == classifier
    assert names(model, "matrices") == maps(model) - classifier


@pytest.mark.parametrize("tied", [True, False])
def test_in_a_network_of_others_it_is_seen(tied):
    """By what the scores are computed with, whatever the order of registration."""
    model, ids = Tied(tied=tied), torch.zeros(2, 3, dtype=torch.long)
    classifier = {"table.weight"} if tied else {"head.weight"}
    assert names(model, "classifier", ids) == classifier
    assert names(model, "matrices", ids) == {"body.0.weight", "body.2.weight"}


def test_a_trunk_has_none():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    assert names(model, "classifier", torch.zeros(2, 4)) == set()
    assert names(model, "matrices", torch.zeros(2, 4)) == {"0.weight"}


class Block(nn.Module):
    """x + b(relu(a(x))), written by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.a(x).relu())


def test_a_trunk_of_vectors_has_none():
    """A stream is a sum of two axes, too, and no sum of scores: none of its maps makes scores."""
    model = nn.Sequential(nn.Linear(4, 8), Block(), Block())
    assert names(model, "classifier", torch.zeros(2, 4)) == set()
    assert names(model, "matrices", torch.zeros(2, 4)) == maps(model)


def test_scores_that_are_added_have_several():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + self.second(x.relu())

    assert names(Two(), "classifier", torch.zeros(2, 4)) == {"first.weight", "second.weight"}


def test_a_classifier_within_a_larger_network_is_a_matrix():
    """The scores are those of the map behind it."""
    own = sw.build("resnet-cifar", depth=8, width=4)
    model = nn.Sequential(own, nn.Linear(10, 2))
    assert names(model, "classifier") == {"1.weight"}
    assert "0.head.classifier.weight" in names(model, "matrices")
    features = nn.Sequential(sw.nn.Classifier(4, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(features, "classifier", torch.zeros(2, 4)) == {"2.weight"}


def test_two_heads_in_a_row_are_two_classifiers():
    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([sw.nn.Classifier(8, 3), sw.nn.Classifier(8, 5)]))
    assert names(model, "classifier") == {"1.0.weight", "1.1.weight"}


def test_without_an_example_it_is_the_last_map_outside_of_connections():
    own = nn.Sequential(nn.Linear(4, 8), sw.Residual(nn.Linear(8, 8)), nn.Linear(8, 3))
    assert names(own, "classifier") == {"2.weight"}
    assert names(own[:2], "classifier") == {"0.weight"}
    assert names(own[1], "classifier") == set()


@pytest.mark.parametrize("example", [None, torch.zeros(2, 4)])
def test_a_frozen_classifier_is_no_other_matrix(example):
    """It stands in no group, and the last matrix that does is none."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[-1].requires_grad_(False)
    assert names(model, "classifier", example) == set()
    assert names(model, "matrices", example) == {"0.weight", "2.weight"}


def test_kernels_are_stacks_of_matrices_by_their_groups():
    """Muon would make the rows of (out, in / g · k²) orthogonal across groups: in the map that they belong to, which is
    block-diagonal, they are so whatever the weights. A kernel of one input channel mixes channels without groups, and
    is a matrix; no weight of one axis is.
    """
    stem, depthwise, grouped = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2)
    transposed, whole = nn.ConvTranspose2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(stem, depthwise, grouped, transposed, whole, nn.Flatten(), nn.Linear(16, 3))
    model.register_parameter("row", nn.Parameter(torch.ones(4)))
    model.role = sw.nn.Role("weight", decay=True)
    assert names(model, "matrices") == {"0.weight", "4.weight"}
    assert names(model, "classifier") == {"6.weight"}


@pytest.mark.parametrize(
    ("resample", "classifier"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), "2.weight"),
        (nn.Upsample(scale_factor=2), "2.weight"),
        (nn.ConvTranspose2d(5, 5, 2, 2), "3.weight"),
    ],
    ids=["bilinear", "nearest", "learned"],
)
def test_scores_of_pixels_may_be_resampled(resample, classifier):
    """As in FCN: a 1 × 1 convolution makes them; a transposed convolution behind it has weights, and is a map, too."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), resample)
    images = torch.zeros(2, 3, 4, 4)
    assert names(model, "classifier", images) == {classifier}
    kernels = {name for name in model.state_dict() if name.endswith("weight")}
    assert names(model, "matrices", images) == kernels - {classifier}


class Experts(nn.Module):
    """Two maps in one parameter, (E, in, out), and the mean of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked, self.head = nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x @ self.stacked).mean(0).relu())


def test_experts_are_no_matrix():
    """Of (E, in · out) Muon would make the experts orthogonal to each other, and nothing of each of them."""
    model, x = nn.Sequential(nn.Linear(4, 8), Experts()), torch.zeros(5, 4)
    assert names(model, "matrices", x) == {"0.weight"}
    assert names(model, "classifier", x) == {"1.head.weight"}
    groups = sw.param_groups(model, x, lr=1.0, weight_decay=0.5)
    (decayed,) = [group for group in groups if any(each is model[1].stacked for each in group["params"])]
    assert decayed["weight_decay"] == 0.5


def test_muons_step_is_moonlights():
    """Liu et al. 2025, arXiv 2502.16982: w moves by lr (0.2 √max(out, in) O + λ w). The singular values of O are 1 as
    far as Newton-Schulz gets, which leaves 0.7 to 1.2, so the root mean square of the first part is about 0.2.
    """
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    spec, rate, decay = OPTIMIZERS["muon"](), 0.1, 0.5
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False), nn.Linear(8, 3, bias=False))
    optimizer = spec.build(sw.param_groups(model, lr=rate, weight_decay=decay, eps=spec.eps))
    before = [layer.weight.detach().clone() for layer in model[:2]]
    for layer in model:
        layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    for old, layer in zip(before, model[:2], strict=True):
        update = (old - layer.weight.detach()) / rate - decay * old
        sizes = torch.linalg.svdvals(update) / (0.2 * 32**0.5)
        assert 0.6 < sizes.min() < sizes.max() < 1.3
        assert 0.14 < update.square().mean().sqrt() < 0.26


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_all_matrices_but_the_classifiers(tied):
    pytest.importorskip("pytorch_optimizer")
    model, spec = sw.build("gpt", **GPT, tied=tied), OPTIMIZERS["muon"]()
    optimizer = spec.build(sw.param_groups(model, lr=1e-2, eps=spec.eps, adaptive=spec.adaptive))
    paths = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {paths[id(each)] for group in optimizer.param_groups if group["use_muon"] for each in group["params"]}
    assert taken == maps(model) - {"head.classifier.weight"}
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(paths)


def test_muon_goes_on_where_a_stored_run_trained_a_matrix_otherwise():
    """Its moments begin anew, and those of the others are kept."""
    pytest.importorskip("pytorch_optimizer")
    model, spec = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)), OPTIMIZERS["muon"]()
    optimizer = spec.build(sw.param_groups(model, lr=1e-2, eps=spec.eps, adaptive=spec.adaptive))
    weights, kept = [layer.weight for layer in model], torch.ones(4, 4)
    optimizer.state[weights[0]] = {"exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.ones(4, 4)}
    optimizer.state[weights[1]] = {"momentum_buffer": kept}
    optimizer.state[weights[2]] = {"momentum_buffer": torch.ones(3, 4)}
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    held = [set(optimizer.state[weight]) & {"exp_avg", "momentum_buffer"} for weight in weights]
    assert held == [{"momentum_buffer"}, {"momentum_buffer"}, {"exp_avg"}]
    assert optimizer.state[weights[1]]["momentum_buffer"] is kept


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False}])
def test_adaptive_clipping_leaves_the_classifier_alone(options, optimizer):
    """Brock et al. 2021: every unit to a share of its norm, but not those of the last linear layer."""
    if optimizer == "muon":
        pytest.importorskip("pytorch_optimizer")
    model, spec = sw.build("gpt", **GPT, **options), OPTIMIZERS[optimizer]()
    groups = spec.build(sw.param_groups(model, lr=1e-2, eps=spec.eps, adaptive=spec.adaptive)).param_groups
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    AdaptiveClip(0.01)(list(model.parameters()), groups)
    whole = {name for name, each in model.named_parameters() if torch.equal(each.grad, torch.ones_like(each))}
    assert whole == {"stem.token" if options["tied"] else "head.classifier.weight"}


def test_lamb_is_the_papers_step():
    """You et al. 2020, algorithm 2: w moves by lr · |w| along r + λ w, decay included, at every step."""
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    spec, rate, decay = OPTIMIZERS["lamb"](), 0.1, 0.5
    model = nn.Linear(4, 3, bias=False)
    optimizer = spec.build(sw.param_groups(model, lr=rate, weight_decay=decay, eps=spec.eps))
    m, v, w = (torch.zeros_like(model.weight) for _ in range(3))
    for _ in range(4):
        w = model.weight.detach().clone()
        model.weight.grad = g = torch.randn(3, 4)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        u = m / (v.sqrt() + spec.eps) + decay * w
        torch.testing.assert_close(model.weight.detach(), w - rate * w.norm() * u / u.norm(), rtol=1e-4, atol=1e-6)
