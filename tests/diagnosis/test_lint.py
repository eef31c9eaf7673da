"""Lint: each rule finds its mistake in a small network in plain PyTorch, and is silent where there is none."""

from __future__ import annotations

import random
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import skipway as sw
from benchmarks.peers import import_timm
from skipway.diagnosis.findings import LEVELS, Finding
from skipway.diagnosis.lint import RULES, lint
from skipway.diagnosis.remedies import Case, Revive
from skipway.diagnosis.settings import Settings
from skipway.schemes import all_schemes

DIM = 16
TOKENS = torch.zeros(2, 3, DIM)
IMAGES = torch.zeros(2, 4, 6, 6)
TINY = {"depth": 2, "dim": 16, "heads": 2, "patch": 8, "image": 32, "classes": 5}


class Scale(nn.Module):
    """A scale by another name, of any shape."""

    def __init__(self, init: float, shape: tuple[int, ...] = (DIM,), restart: float | None = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full(shape, float(init)))
        self.restart = init if restart is None else restart

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.restart)

    def forward(self, x):
        return x * self.alpha


class Block(nn.Module):
    """y = post(x + drop(scale(end(fc2(relu(fc1(pre(x))))))))."""

    def __init__(self, *, pre=None, end=None, scale=None, post=None, drop=None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.pre, self.end, self.scale, self.post, self.drop = (
            nn.Identity() if part is None else part for part in (pre, end, scale, post, drop)
        )

    def forward(self, x):
        return self.post(x + self.drop(self.scale(self.end(self.fc2(self.fc1(self.pre(x)).relu())))))


class Conv(nn.Module):
    """y = relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))


def net(depth: int, **parts) -> nn.Sequential:
    """Blocks with parts made anew for each: `pre=lambda: nn.LayerNorm(DIM)`."""
    return nn.Sequential(*(Block(**{name: make() for name, make in parts.items()}) for _ in range(depth)))


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(DIM)


def zero(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        nn.init.zeros_(parameter)


def by(number: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.rule == number]


def levels(number: str, findings: list[Finding]) -> list[str]:
    return [finding.level for finding in by(number, findings)]


def sgd(groups, **options) -> torch.optim.SGD:
    return torch.optim.SGD(groups, **{"lr": 0.1, **options})


def test_rules_say_what_why_and_where_from():
    assert {rule.number for rule in RULES} >= {f"P{number}" for number in (1, 2, 4, 5, 6, 7, 8, 9, 13, 15, 19, 21)}
    assert all(rule.title and rule.why and rule.source and rule.check.__doc__ for rule in RULES)
    assert len({rule.title for rule in RULES}) == len(RULES)


def test_every_rule_is_in_the_document():
    """Rows as `| P13 | title | level | what to do | source |`, in the order of `RULES`."""
    lines = (Path(__file__).parents[2] / "docs/lint.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [[rule.number, rule.title, rule.level] for rule in RULES]
    for (*_, advice, cited), rule in zip(rows, RULES, strict=True):
        assert advice
        assert re.findall(r"\((https://[^)]+)\)", cited) == re.findall(r"https://[^\s;,]+", rule.source), rule.title


# ------------------------------------------------------------------------------------------------------ well-made nets


@pytest.mark.parametrize("watch", [False, True], ids=["typed", "watched"])
@pytest.mark.parametrize("scheme", list(all_schemes()))
@pytest.mark.parametrize("name", ["resnet8", "resnet56", "vit-tiny-16"])
def test_ours_are_clean_in_every_scheme(name, scheme, watch):
    if name.startswith("resnet") and scheme not in all_schemes("conv"):
        pytest.skip("refused for convolutional branches")
    model = sw.build(name, scheme=scheme, **(TINY if name.startswith("vit") else {}))
    optimizer = torch.optim.AdamW(sw.param_groups(model, lr=1e-3, weight_decay=0.05))
    size = 32 if name.startswith("vit") else 8
    findings = lint(model, torch.zeros(2, 3, size, size) if watch else None, optimizer)
    if (name, scheme) == ("resnet56", "dyt"):  # deep, and a tanh is no norm: P6 says what its authors say of BatchNorm
        findings = [finding for finding in findings if finding.rule != "P6"]
    assert [str(finding) for finding in findings if finding.level != "note"] == []
    assert {finding.rule for finding in findings} <= {"P19"}


def test_ours_by_default_are_clean():
    for name in ("convnext-atto", "cait-xxs24", "swin-tiny", "swinv2-tiny"):
        model = sw.build(name)
        assert lint(model, optimizer=torch.optim.AdamW(sw.param_groups(model, lr=1e-3, weight_decay=0.05))) == [], name


def test_typed_and_watched_connections_give_the_same():
    model = sw.build("resnet20", scheme="skipinit")
    for connection in sw.chain(model):
        zero(connection.branch.closing_norm().weight, connection.residual.scale.gain)
    optimizer = sgd(model.parameters(), weight_decay=1e-4)
    assert lint(model, optimizer=optimizer) == lint(model, torch.zeros(2, 3, 32, 32), optimizer)


def test_nothing_is_changed():
    model = net(3, scale=lambda: Scale(0.1, restart=1.0), drop=lambda: Eager(0.3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state, choice = torch.get_rng_state(), random.getstate()
    lint(model, TOKENS, sgd(model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == choice
    assert [module.p for module in model.modules() if isinstance(module, Eager)] == [0.3] * 3


def test_the_worst_comes_first_and_goes_into_a_file():
    model = net(3, scale=lambda: Scale(0.0))
    zero(*(p for block in model for p in block.fc2.parameters()))
    findings = lint(model, TOKENS, sgd(model.parameters(), weight_decay=0.1))
    ranks = [LEVELS.index(finding.level) for finding in findings]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert all(finding.to_json()["rule"] == finding.rule for finding in findings)


def test_a_network_on_the_meta_device_has_no_values_to_judge():
    with torch.device("meta"):
        model = net(30, scale=lambda: Scale(1.0))
    assert lint(model, TOKENS.to("meta")) == []
    assert levels("P4", lint(model, TOKENS.to("meta"), sgd(model.parameters(), weight_decay=0.1))) == [
        "serious",
        "note",
    ]


NARROW = {"embed_dim": 96, "num_heads": 3}
TIMM = {
    "resnet18": (64, {"P19"}, {}),
    "vit_small_patch16_224": (224, set(), NARROW),
    "convnext_tiny": (64, set(), {"dims": (24, 48, 96, 192)}),
    "deit3_small_patch16_224": (224, set(), NARROW),
    "swinv2_tiny_window8_256": (256, set(), {"embed_dim": 24, "num_heads": (1, 2, 4, 8)}),
}
"""Sides of images, rules that hit, and fewer channels at the published depth."""


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", TIMM)
def test_timm_is_clean(name):
    size, rules, narrow = TIMM[name]
    model = import_timm().create_model(name, drop_path_rate=0.1, **narrow)
    optimizer = torch.optim.AdamW(sw.param_groups(model, lr=1e-3, weight_decay=0.05))
    assert {finding.rule for finding in lint(model, torch.zeros(2, 3, size, size), optimizer)} == rules
    findings = lint(model, torch.zeros(2, 3, size, size), torch.optim.AdamW(model.parameters(), weight_decay=0.05))
    assert levels("P4", findings) == (["serious", "note"] if name[:4] in ("conv", "deit") else ["note"])


# --------------------------------------------------------------------------------------------------- the branch's start


def test_p13_two_zeros_never_learn_and_are_revived():
    """The gradients of both factors are 0, and after the remedy one is not."""
    model = net(3, scale=lambda: Scale(0.0))
    assert by("P13", lint(model, TOKENS)) == []
    zero(*(p for block in list(model)[:2] for p in block.fc2.parameters()))
    (finding,) = by("P13", lint(model, TOKENS))
    assert (finding.level, finding.where) == ("fatal", ("0", "1"))
    assert finding.remedies == (Revive(("0.fc2", "1.fc2")),)

    def gradient() -> float:
        model.zero_grad()
        model(torch.randn(2, 3, DIM)).square().sum().backward()
        return sum(float(block.fc2.weight.grad.abs().sum() + block.scale.alpha.grad.abs().sum()) for block in model[:2])

    assert gradient() == 0.0
    finding.remedies[0].apply(Case(model, Settings(), TOKENS, sw.chain(model, TOKENS)))
    assert gradient() > 0.0
    assert by("P13", lint(model, TOKENS)) == []


def test_p13_a_bias_between_two_zeros_lets_them_learn():
    model = net(2, scale=lambda: Scale(0.0))
    zero(*(block.fc2.weight for block in model))
    assert by("P13", lint(model, TOKENS)) == []


def test_p13_of_a_closing_norm_and_of_gemmas_kind_of_norm():
    model = nn.Sequential(Conv(), Conv())
    zero(*(block.bn2.weight for block in model))
    assert by("P13", lint(model, IMAGES)) == []
    zero(model[1].conv2.weight)
    assert by("P13", lint(model, IMAGES))[0].where == ("1",)

    class GemmaNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(DIM))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    model = net(2, end=GemmaNorm)
    zero(*(p for block in model for p in block.fc2.parameters()))
    assert by("P13", lint(model, TOKENS)) == []


def test_p13_in_a_network_of_ours():
    model = sw.build("resnet20", scheme="rezero")
    zero(sw.chain(model)[4].branch.closing_norm().weight)
    (finding,) = by("P13", lint(model))
    assert (finding.level, finding.where, finding.remedies) == ("fatal", (sw.chain(model)[4].name,), ())


def test_p8_a_zero_norm_on_the_stream_is_fatal():
    model = net(3, post=norm)
    assert by("P8", lint(model, TOKENS)) == []
    zero(model[1].post.weight)
    (finding,) = by("P8", lint(model, TOKENS))
    assert (finding.level, finding.where) == ("fatal", ("1.post",))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(DIM, 2, batch_first=True), norm()

    def forward(self, x):
        return x + self.norm(self.attn(x, x, x, need_weights=False)[0])


def test_p8_residual_post_norm_is_to_start_at_zero():
    model = nn.Sequential(Attention(), *net(29, end=norm))
    assert levels("P8", lint(model, TOKENS)) == ["serious"]
    assert by("P8", lint(model, TOKENS, pretrained=True)) == []
    (finding,) = by("P8", lint(model, TOKENS))
    finding.remedies[0].apply(Case(model, Settings(), TOKENS, sw.chain(model, TOKENS)))
    assert by("P8", lint(model, TOKENS)) == []
    assert levels("P8", lint(nn.Sequential(Attention(), *net(9, end=norm)), TOKENS)) == ["note"]
    assert by("P8", lint(net(30, end=norm), TOKENS)) == []  # no attention: ConvMixer's kind


def test_p6_a_scale_of_one_scales_nothing():
    assert levels("P6", lint(net(41, pre=norm, scale=lambda: Scale(1.0)), TOKENS)) == ["note"]
    assert by("P6", lint(net(40, pre=norm, scale=lambda: Scale(1.0)), TOKENS)) == []  # XCiT-12 has as many
    assert levels("P6", lint(net(25, scale=lambda: Scale(1.0, ())), TOKENS)) == ["serious"]
    assert by("P6", lint(net(25, scale=lambda: Scale(1.0)), TOKENS, pretrained=True)) == []
    assert by("P6", lint(net(25, scale=lambda: Scale(0.1)), TOKENS)) == []
    assert by("P6", lint(net(24, scale=lambda: Scale(1.0)), TOKENS)) == []
    assert by("P6", lint(sw.build("resnet56", scheme="fixup"))) == []


def test_p2_one_value_for_the_whole_network():
    model = nn.Sequential(Block(scale=Scale(0.1)), Block(scale=Scale(0.1)), Block(scale=Scale(1e-5)))
    (finding,) = by("P2", lint(model, TOKENS))
    assert (finding.level, finding.where) == ("serious", ("2.scale.alpha",))
    nn.init.normal_(model[2].scale.alpha)  # trained
    assert by("P2", lint(model, TOKENS)) == []
    assert by("P2", lint(net(3, scale=lambda: Scale(0.1)), TOKENS)) == []


def test_p2_is_found_by_the_class_where_no_example_is_given():
    class LayerScale(Scale):
        pass

    model = nn.Sequential(Block(scale=LayerScale(0.1)), Block(scale=LayerScale(0.05)))
    assert levels("P2", lint(model)) == ["note"]


def test_p2_the_papers_value_beyond_24_blocks():
    assert levels("P2", lint(net(25, pre=norm, scale=lambda: Scale(0.1)), TOKENS)) == ["note"]
    for model in (net(24, scale=lambda: Scale(0.1)), net(25, scale=lambda: Scale(1e-5))):
        assert by("P2", lint(model, TOKENS)) == []
    assert by("P2", lint(net(25, scale=lambda: Scale(0.1)), TOKENS, pretrained=True)) == []


def test_p15_a_start_from_scratch_wipes_what_was_trained():
    model = net(3, scale=lambda: Scale(1e-5))
    assert by("P15", lint(model, TOKENS)) == []
    assert levels("P15", lint(model, TOKENS, pretrained=True)) == ["serious"]
    nn.init.normal_(model[0].scale.alpha, std=1e-4)
    (finding,) = by("P15", lint(model, TOKENS, pretrained=True))
    assert (finding.level, finding.where) == ("note", ("1.scale.alpha", "2.scale.alpha"))


@pytest.mark.parametrize("shape", [(), (DIM,)])
def test_p7_a_reset_that_forgets_the_value(shape):
    forgetful = net(2, scale=lambda: Scale(1e-2, shape, restart=1.0))
    assert levels("P7", lint(forgetful, TOKENS)) == ["serious"]
    assert by("P7", lint(net(2, scale=lambda: Scale(1e-2, shape)), TOKENS)) == []
    for index, block in enumerate(forgetful):
        nn.init.constant_(block.scale.alpha, 0.1 + index)
    assert len(by("P7", lint(forgetful, TOKENS))) == (shape != ())  # trained numbers differ from one another


def test_p1_the_layers_own_index():
    def fixup(own: bool) -> nn.Sequential:
        model = net(8, scale=lambda: Scale(1.0, ()))
        for index, block in enumerate(model, start=1):
            nn.init.kaiming_normal_(block.fc1.weight, mode="fan_out")
            with torch.no_grad():
                block.fc1.weight.mul_((index if own else len(model)) ** -0.5)
            zero(*block.fc2.parameters())
        return model

    (finding,) = by("P1", lint(fixup(own=True), TOKENS))
    assert finding.level == "serious"
    assert finding.evidence["first over He"] > 2 * finding.evidence["last over He"]
    assert by("P1", lint(fixup(own=False), TOKENS)) == []


def test_p19_is_said_once():
    model = nn.Sequential(Conv(), Conv())
    assert by("P19", lint(model, IMAGES))[0].evidence["zero closing norms"] == 0
    zero(*(block.bn2.weight for block in model))
    assert by("P19", lint(model, IMAGES))[0].evidence["zero closing norms"] == 2
    assert by("P19", lint(model, IMAGES, pretrained=True)) == []


# -------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("shape", [(), (1,), (DIM,), (1, 1, DIM)])
def test_p4_decay_on_a_scale_of_any_shape(shape):
    model = net(2, pre=norm, scale=lambda: Scale(0.1, shape))
    serious, note = by("P4", lint(model, TOKENS, sgd(model.parameters(), weight_decay=1e-4)))
    assert (serious.level, serious.where) == ("serious", ("0.scale.alpha", "1.scale.alpha"))
    assert note.level == "note"
    assert len(note.where) == 8  # two biases and the norm's two in each block
    assert by("P4", lint(model, TOKENS, sgd(model.parameters()))) == []
    assert by("P4", lint(model, TOKENS, sgd(sw.param_groups(model, lr=0.1, weight_decay=1e-4)))) == []


def test_p4_what_the_optimizer_does_not_hold():
    model = net(2, scale=lambda: Scale(0.1))
    kept = [value for name, value in model.named_parameters() if "scale" not in name]
    (finding,) = by("P4", lint(model, TOKENS, sgd(kept)))
    assert (finding.level, finding.evidence["scales left out"]) == ("serious", 2)
    for block in model:
        block.scale.alpha.requires_grad_(False)
    assert by("P4", lint(model, TOKENS, sgd(kept))) == []
    assert levels("P4", lint(model, TOKENS, sgd(net(2).parameters()))) == ["fatal"]


def test_p5_scalars_of_fixup_learn_slower():
    model = sw.build("resnet20", scheme="fixup")
    assert levels("P5", lint(model, optimizer=sgd(model.parameters()))) == ["serious"]
    assert by("P5", lint(model, optimizer=sgd(sw.param_groups(model, lr=0.1)))) == []

    model = net(3, scale=lambda: Scale(1.0, ()))
    zero(*(p for block in model for p in block.fc2.parameters()))
    assert levels("P5", lint(model, TOKENS, sgd(model.parameters()))) == ["serious"]
    optimizer = sgd(
        [
            {"params": [p for p in model.parameters() if p.ndim]},
            {"params": [p for p in model.parameters() if not p.ndim], "lr": 0.01},
        ]
    )
    assert by("P5", lint(model, TOKENS, optimizer)) == []
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up has not started yet
    assert by("P5", lint(model, TOKENS, optimizer)) == []


def test_p5_is_a_note_on_other_scalars_and_silent_with_norms():
    model = net(3, scale=lambda: Scale(0.1, ()))
    assert levels("P5", lint(model, TOKENS, sgd(model.parameters()))) == ["note"]
    model = net(3, pre=norm, scale=lambda: Scale(0.1, ()))
    assert by("P5", lint(model, TOKENS, sgd(model.parameters()))) == []


def test_frozen_parameters_in_branches():
    model = net(2, scale=lambda: Scale(0.0))
    assert by("frozen", lint(model, TOKENS)) == []
    model[1].fc1.weight.requires_grad_(False)
    assert by("frozen", lint(model, TOKENS))[0].where == ("1.fc1.weight",)
    model[0].scale.alpha.requires_grad_(False)
    (finding,) = by("frozen", lint(model, TOKENS))
    assert (finding.level, finding.where) == ("serious", ("0.scale.alpha",))


# ----------------------------------------------------------------------------------------------------- stochastic depth


class DropPath(nn.Module):
    """Well made."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class AlwaysDropPath(DropPath):
    def forward(self, x):
        return nn.functional.dropout(x, self.p, training=True)


class Eager(DropPath):
    """By Python's random numbers."""

    def __init__(self, p: float) -> None:
        super().__init__(p)

    def forward(self, x):
        return x * 0 if self.training and random.random() < self.p else x


class PythonDropPath(Eager):
    pass


def test_p9_a_well_made_drop_path_is_left_alone():
    assert by("P9", lint(net(3, drop=lambda: DropPath(0.1)), TOKENS)) == []


def test_p9_dropping_in_evaluation_mode():
    model = net(2, drop=lambda: AlwaysDropPath(0.01))
    (finding,) = by("P9", lint(model))
    assert (finding.level, finding.where) == ("serious", ("0.drop", "1.drop"))


def test_p9_pythons_random_numbers():
    model = net(2, drop=lambda: PythonDropPath(0.1))
    assert levels("P9", lint(model)) == ["note"]


def test_p9_without_a_skip():
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.fc, self.drop_path = Block(drop=DropPath(0.1)), nn.Linear(DIM, DIM), DropPath(0.1)

        def forward(self, x):
            return self.drop_path(self.fc(self.block(x)))

    (finding,) = by("P9", lint(Lost(), TOKENS))
    assert (finding.level, finding.where, finding.evidence["without effect"]) == ("serious", ("drop_path",), 0)


@pytest.mark.parametrize("read", [True, False])
def test_p9_on_the_skip_or_on_what_nothing_reads(read):
    """timm 1.0.31's ResNeSt drops x after the branch: the skip where it is projected, nothing where it is not."""

    class Skipping(Block):
        def forward(self, x):
            dropped = self.drop(x)
            return (dropped if read else x) + self.fc2(self.fc1(x).relu())

    (finding,) = by("P9", lint(nn.Sequential(Block(), Skipping(drop=DropPath(0.1))), TOKENS))
    assert (finding.level, finding.where) == ("serious", ("1.drop",))
    assert finding.evidence["without effect"] == (not read)


def test_p9_rates():
    falling = nn.Sequential(*(Block(drop=DropPath(p)) for p in (0.2, 0.1, 0.0)))
    assert levels("P9", lint(falling)) == ["note"]
    rising = nn.Sequential(*(Block(drop=DropPath(p)) for p in (0.0, 0.1, 0.2)))
    assert by("P9", lint(rising)) == []
    assert levels("P9", lint(nn.Sequential(Block(drop=DropPath(0.1)), Block(drop=DropPath(1.0))))) == ["serious"]


# ---------------------------------------------------------------------------------------------------------- the modules


def test_p21_backward_hooks_beside_in_place_activations():
    model = nn.Sequential(Conv(), Conv())
    assert by("P21", lint(model)) == []
    handle = model[0].bn1.register_full_backward_hook(lambda *_: None)
    assert by("P21", lint(model))[0].where == ("0.bn1",)
    handle.remove()
    assert by("P21", lint(model)) == []


def test_batch_norm_on_one_sample():
    assert by("batch-of-one", lint(nn.Sequential(Conv()), IMAGES)) == []
    assert levels("batch-of-one", lint(nn.Sequential(Conv()), IMAGES[:1])) == ["note"]
    assert by("batch-of-one", lint(net(1, pre=norm), TOKENS[:1])) == []


def test_wrapped_models_are_unwrapped():
    model = nn.Sequential(Conv(), Conv())
    assert lint(nn.DataParallel(model), IMAGES) == lint(model, IMAGES)


def test_an_example_that_does_not_fit_is_said():
    with pytest.raises(sw.SkipwayError, match="fails on this example"):
        lint(net(2), torch.zeros(2, 3))
