"""What the studies measure, against closed forms and published definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from skipway.errors import SkipwayError
from skipway.models import build
from skipway.nn.join import LowRankMap
from skipway.studies.catalogue.layerscale import build_layerscale_network
from skipway.studies.catalogue.stream_decay import carried_bits
from skipway.studies.cell import Choices
from skipway.studies.chains import block_chain, cross
from skipway.studies.fit import FitSettings, data_of, dataset_name, fit
from skipway.studies.study import find_study
from skipway.studies.table import merge_rows
from skipway.tracing.chain import chain


def bits(scheme: str, depth: int, **how: object) -> tuple[float, float]:
    """Forward and backward, the mean of five draws at width 128."""
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        found.append(cross(block_chain(scheme, depth, width=128, **how), seed=seed, batch=64))
    return sum(each.forward for each in found) / 5, sum(each.backward for each in found) / 5


def test_variance_doubles_without_norm():
    """2^l (De & Smith 2020), forward and backward."""
    forward, backward = bits("identity", 40)
    assert forward == pytest.approx(40, rel=0.06)
    assert backward == pytest.approx(40, rel=0.06)


def test_variance_grows_by_one_with_norm():
    """1 + l (De & Smith 2020); the gradient by the telescoping product of 1 + 1/(1 + l)."""
    forward, backward = bits("identity", 63, norm="layer")
    assert forward == pytest.approx(6, abs=0.25)
    assert backward == pytest.approx(6, abs=0.35)


def test_norm_free_grows_by_alpha_squared():
    """1 + α² l (Brock et al. 2021)."""
    assert bits("normfree(gain=1.0)", 75)[0] == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(
    ("exponent", "expected"), [(0.25, 64 * math.log2(1.125)), (0.5, math.log2(math.e)), (1.0, 0.02)]
)
def test_branches_scaled_by_depth(exponent, expected):
    """(1 + L^(-2β))^L (Marion et al. 2022)."""
    assert bits(f"depthscaled(exponent={exponent})", 64)[0] == pytest.approx(expected, abs=0.3, rel=0.08)


@pytest.mark.parametrize("scheme", ["rezero", "fixup", "skipinit(init=0.0, norm='remove')"])
def test_silent_schemes_are_the_identity_at_depth_500(scheme):
    found = cross(block_chain(scheme, 500, width=16), batch=4)
    assert found.forward == pytest.approx(0, abs=1e-3)
    assert found.backward == pytest.approx(0, abs=1e-3)


def test_plain_batch_norm_explodes_backward():
    """π/(π-1) a layer, two layers to a block (Yang et al. 2019)."""
    forward, backward = bits("plain", 40, norm="batch")
    assert forward == pytest.approx(0, abs=0.3)
    assert 2 ** (backward / 80) == pytest.approx(math.pi / (math.pi - 1), rel=0.06)


def test_nothing_overflows_at_a_depth_where_float32_would():
    found = cross(block_chain("identity", 600, width=16), batch=4)
    assert 300 < found.forward < 800


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize(
    "scheme", ["dyt", "gtrxl", "mhc", "hyperconnections(2)", "gatedstreams", "attentionresiduals", "siamesenorm"]
)
def test_growth_is_that_of_the_whole_network(scheme, norm):
    """Whatever a block is (bounded, gated, of several streams), autograd over all at once agrees."""
    if scheme == "siamesenorm" and norm == "none":
        pytest.skip("its streams are told apart by norms")
    torch.manual_seed(0)
    network = block_chain(scheme, 6, width=16, norm=norm)
    found, double = cross(network, batch=8), network.double()
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(8, 16, generator=generator).double() for _ in range(2))
    x = (x / x.square().mean().sqrt()).requires_grad_()
    out = double(x)
    (reached,) = torch.autograd.grad(out, x, gradient)
    expected = [out.detach().square().mean(), reached.square().mean() / gradient.square().mean()]
    assert (found.forward, found.backward) == pytest.approx([float(each.log2()) for each in expected], abs=1e-4)


def test_equal_streams_grow_as_one():
    """Zhu et al. 2025, eq. 14: hyper-connections start as the network with one stream, at any number of samples."""
    found = []
    for scheme in ("identity", "hyperconnections(4)"):
        torch.manual_seed(0)
        found.append(cross(block_chain(scheme, 20, width=16, norm="layer"), batch=3))
    assert found[1].forward == pytest.approx(found[0].forward, abs=1e-4)
    assert found[1].backward == pytest.approx(found[0].backward, abs=1e-4)


def test_the_branches_dropped_forward_are_those_dropped_backward():
    """y = x + b x / (1 - p) for one sample multiplies stream and gradient by the same number."""
    network = block_chain("stochasticdepth(0.5)", 12, width=4, place="transformer")
    for block in network:
        block.branch = torch.nn.Linear(4, 4, bias=False)
        torch.nn.init.eye_(block.branch.weight)
    before = torch.random.get_rng_state()
    found = cross(network, batch=1)
    assert found.forward == pytest.approx(found.backward, abs=1e-4)
    assert found.forward > 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_stream_that_vanishes_is_refused():
    dead = block_chain("plain", 2, width=4)
    torch.nn.init.zeros_(dead[0].branch.path()[-1].weight)
    with pytest.raises(SkipwayError, match="the stream after block 0 of 2 has the size 0"):
        cross(dead)


def test_tokens_collapse_without_skips_only():
    """Dong et al. 2021: attention alone loses rank faster than exponentially, with skips it does not."""
    study = find_study("skipless-vit")
    cells = [cell for cell in study.cells("cpu", Choices(seeds=(0,))) if cell["kind"] == "start" and cell["depth"] <= 8]
    apart = {(cell["scheme"], cell["depth"]): study.measure(cell)["distinct"] for cell in cells}
    pure = [math.log10(apart["attention alone, no skip", depth]) for depth in (1, 2, 3)]
    assert pure[2] - pure[1] < pure[1] - pure[0] < -1
    assert apart["both skips", 8] > 0.1
    assert apart["no skip", 8] < 0.1 * apart["both skips", 8]
    assert apart["no skip, tokens look at themselves", 8] > 10 * apart["no skip", 8]


def test_a_training_that_diverges_is_a_result():
    data = data_of(None)
    torch.manual_seed(0)
    model = build(
        "resnet-cifar", depth=8, width=4, stem_width=4, channels=1, scheme="skipinit(init=1.0, norm='remove')"
    )
    row = fit(model, data, FitSettings(epochs=1, lr=1e6, warmup=0.0))
    assert row["diverged"]
    assert row["train_error"] == pytest.approx(0.9)
    assert 0.5 < row["test_error"] <= 1.0


def test_a_training_is_the_same_twice_and_learns():
    data, rows = data_of(None), []
    for _ in range(2):
        torch.manual_seed(0)
        model = build("resnet-cifar", depth=8, width=4, stem_width=4, channels=1)
        rows.append(fit(model, data, FitSettings(epochs=2, lr=0.1, batch_size=64)))
    first, second = ({name: value for name, value in row.items() if name != "seconds_per_step"} for row in rows)
    assert first == second
    assert first["test_error"] < first["first_test_error"] < 0.9
    assert first["dataset"] == "digits"


def row(study: str, **values: object) -> dict:
    return {"study": study, "key": str(values), "error": None, **values}


def errors(scheme: str, depth: int, values: tuple[float, ...]) -> list[dict]:
    return [
        row("degradation", scheme=scheme, depth=depth, seed=seed, train_error=value, test_error=value)
        for seed, value in enumerate(values)
    ]


def test_degradation_is_judged_by_more_than_the_spread():
    study = find_study("degradation")
    good = errors("plain", 8, (0.1, 0.12)) + errors("identity", 8, (0.1, 0.11)) + errors("identity", 56, (0.05, 0.1))
    worse = merge_rows([good, errors("plain", 56, (0.5, 0.7))])
    overlapping = merge_rows([good, errors("plain", 56, (0.11, 0.7))])
    assert [verdict.answer for verdict in study.conclude(worse)] == ["holds"] * 3
    assert study.conclude(overlapping)[0].answer == "does not hold"
    assert study.published[0].measured_values(worse) is None
    cifar = [row("degradation", scheme="identity", depth=20, seed=0, test_error=0.0875, dataset="cifar10", width=16)]
    assert study.published[0].measured_values(cifar).mean == study.published[0].value


def norms(module: torch.nn.Module) -> int:
    return sum(isinstance(each, torch.nn.LayerNorm) for each in module.modules())


def test_variants_of_convnext_have_their_norms_where_they_say():
    from skipway.studies.catalogue.convnext import AFTER, BEFORE, NO_NORM, VARIANTS
    from skipway.tracing.chain import chain

    places = {}
    for name, variant in VARIANTS.items():
        model = build("convnext", depth=4, width=8, kernel=variant.kernel, scheme=variant.scheme, classes=3)
        if variant.change is not None:
            variant.change(model)
        residuals = [connection.residual for connection in chain(model)]
        places[name] = tuple(sum(norms(getattr(r, slot)) for r in residuals) for slot in ("pre", "branch", "post"))
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert (places.pop(BEFORE), places.pop(AFTER), places.pop(NO_NORM)) == ((4, 0, 0), (0, 0, 4), (0, 0, 0))
    assert set(places.values()) == {(0, 4, 0)}


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
def test_layerscale_starts_where_its_name_says(family):
    from skipway.studies.catalogue.layerscale import NONE, STARTS, build_layerscale_network
    from skipway.tracing.chain import chain

    for name in (NONE, *STARTS):
        cell = find_study("layerscale").cell(family=family, scheme=name, depth=4, width=16)
        scales = [connection.residual.scale for connection in chain(build_layerscale_network(cell, data_of(None)))]
        assert len(scales) == (8 if family == "vit" else 4)
        starts = {float(each) for scale in scales for gain in scale.parameters() for each in gain.detach()}
        assert sorted(starts) == pytest.approx([] if name == NONE else [STARTS[name]])


def test_every_scheme_is_compared_with_and_without_norm():
    """All in the table, the twelve that have to do with depth without norm, too, of which none is left then."""
    from skipway.schemes import all_schemes
    from skipway.studies.catalogue.comparison import FREE, NORMLESS, SCHEMES, build_resnet

    table = find_study("scheme-table").cells("cpu", Choices())
    assert {cell["scheme"] for cell in table if cell["family"] == "resnet"} == set(all_schemes("conv"))

    study = find_study("schemes")
    cells = study.cells("cpu", Choices())
    assert {cell["scheme"] for cell in cells if cell["kind"] == "as it is"} == set(SCHEMES)
    for name in SCHEMES:
        bare = name if name in FREE else NORMLESS.get(name, f"{name} + skipinit(init=1.0, norm='remove')")
        model = build_resnet(bare, study.cell(depth=8, width=4), 1, 10)
        assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in model.modules()), name


def test_permutations_are_doubly_stochastic_and_few_iterations_of_sinkhorn_are_not():
    """mHC-lite's mixing is exact by construction; two iterations on large logits leave the sums off by 5 %."""
    study = find_study("sinkhorn")
    settings = {"scheme": "alike", "spread": 4.0, "depth": 60, "seed": 0, "draws": 16}
    assert study.measure(study.cell(**settings, iterations=0))["farthest"] < 1e-5
    few = study.measure(study.cell(**settings, iterations=2))
    assert few["farthest"] > 0.05 > 1e-4 > few["farthest_received"]


def test_a_difference_counts_if_its_interval_excludes_zero():
    """Student's t with 2 degrees of freedom: 4.303 standard errors."""
    from skipway.studies.statistics import pair_by_seed

    first = [{"seed": seed, "loss": value} for seed, value in enumerate((1.0, 2.0, 3.0))]
    near = [{"seed": seed, "loss": value + 0.1 * seed} for seed, value in enumerate((1.0, 2.0, 3.0))]
    found = pair_by_seed(first, near, "loss")
    assert found.differences.values == pytest.approx((0.0, -0.1, -0.2))
    assert found.bound == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert found.sign == 0
    far = [{"seed": seed, "loss": value + 1 + 0.1 * seed} for seed, value in enumerate((1.0, 2.0, 3.0))]
    assert pair_by_seed(first, far, "loss").sign == -1
    assert pair_by_seed(far, first, "loss").sign == 1
    assert pair_by_seed(first[:1], far, "loss").sign == 0


@pytest.mark.parametrize("name", ["post-norm", "DeepNorm", "Keel"])
def test_skips_of_post_norm_schemes_pass_what_theory_says(name):
    """log₂ of the squared gradient along the skips alone: -L log₂(1 + v / α²), v the branch's second moment."""
    study = find_study("keel")
    row = study.measure(study.cell(kind="skips", scheme=name, depth=32, seed=0, width=128))
    factor = {"post-norm": 2.0, "DeepNorm": 1 / (8 * 32 * 32**0.5), "Keel": 2 / 32**2}[name]
    assert row["backward"] == pytest.approx(-32 * math.log2(1 + factor), rel=0.05, abs=0.05)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_variants_keep_the_start_of_their_scheme(family):
    """The start is drawn before the scheme takes its step: branches that start at zero stay silent."""
    from skipway.studies.variants import NetworkVariant, build_network
    from skipway.tracing.chain import chain

    model = build_network(family, NetworkVariant("zeroinit"), 4, 8, data_of(None)).eval()
    assert len(chain(model)) == (8 if family == "vit" else 4)
    for connection in chain(model):
        assert not connection.path[-1].weight.any() or not connection.residual.branch.closing_norm().weight.any()


def test_a_comparison_is_paired_and_at_each_variants_best_rate():
    from skipway.studies.variants import compare

    def trained(scheme, rate, losses):
        common = {"kind": "train", "family": "vit", "depth": 6, "scheme": scheme, "lr": rate}
        return [{**common, "seed": seed, "train_loss": loss, "test_loss": loss} for seed, loss in enumerate(losses)]

    low, high = trained("a", 0.1, (1.0, 2.0, 3.0)), trained("b", 0.1, (1.5, 2.6, 3.4))
    assert compare("", low + high, "a", "b").answer == "holds"
    assert compare("", low + high, "b", "a").answer == "does not hold"
    assert compare("", low + high + trained("b", 0.2, (0.1, 1.1, 2.1)), "a", "b").answer == "does not hold"
    assert compare("", low + trained("b", 0.1, (1.5, 1.5, 3.4)), "a", "b").answer == "open"
    assert compare("", low, "a", "b").answer == "open"


@pytest.mark.parametrize(("family", "scheme"), [("vit", "fixup"), ("convnext", "fixup"), ("vit", "laurel")])
def test_schemes_of_others_keep_their_start(family, scheme):
    """Fixup's zeros and its factor L^(-1/2) on Xavier's (ConvNeXt: fan-in) start; LAuReL's orthogonal A and zero B."""
    torch.manual_seed(0)
    cell = find_study("layerscale").cell(family=family, scheme=scheme, depth=4, seed=0, width=32)
    model = build_layerscale_network(cell, data_of(None))
    connections = chain(model)
    if scheme == "laurel":
        low_ranks = [module for module in model.modules() if isinstance(module, LowRankMap)]
        assert low_ranks
        assert not any(bool(each.up.weight.any()) for each in low_ranks)
        for each in low_ranks:
            a = each.down.weight.detach().double()
            square = a @ a.mT if a.shape[0] < a.shape[1] else a.mT @ a
            torch.testing.assert_close(square, torch.eye(len(square)).double() * square[0, 0], rtol=1e-4, atol=1e-5)
        return
    assert not model.head.classifier.weight.any()
    for connection in connections:
        *others, last = connection.path
        assert not last.weight.any()
        for each in (each for each in others if isinstance(each.module, torch.nn.Linear)):
            out, dim = each.module.weight.shape
            expected = (2 / (out + dim)) ** 0.5 * len(connections) ** (-1 / (2 * len(others)))
            assert float(each.weight.detach().std()) == pytest.approx(expected, rel=0.1)


def test_a_published_dataset_is_known_by_its_dimensions_and_not_by_its_name():
    def named(name, **sizes):
        shape = {"train": range(50_000), "test": range(10_000), "classes": range(10), "size": 32, "channels": 3}
        return dataset_name(SimpleNamespace(name=name, **shape | sizes))

    assert named("images") == "cifar10"
    assert named("cifar10", train=range(100)) == "another cifar10"
    assert named("imagenet") == "cifar10"
    assert named("imagenet", size=224) == "another imagenet"
    large = {"train": range(1_281_167), "test": range(50_000), "classes": range(1000), "size": 224}
    assert named("ILSVRC2012", **large) == "imagenet"
    assert named("mine", size=64) == "mine"


def test_what_skips_carry_is_computed_with_the_weights_kind_and_place():
    model = build("vit", depth=2, dim=8, heads=2, patch=2, image=8, channels=1, scheme="hyperconnections(2)")
    assert carried_bits(model.double()) == pytest.approx(carried_bits(model.float()))
