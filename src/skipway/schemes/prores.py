from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from skipway.nn import Multiply
from skipway.nn.site import Site
from skipway.nn.warmup import ResidualWarmup
from skipway.schemes.scheme import Scheme
from skipway.validation import check_choice, check_rule, is_real, is_whole

__all__ = ["ProRes", "WarmupSchedule"]

WarmupSchedule = Literal[
    "linear",
    "linear-sqrt",
    "linear-square",
    "equal",
    "reverse",
    "stagewise-0",
    "stagewise-L",
    "stagewise-sqrt-L",
    "stagewise-sqrt-l",
    "fix-L",
    "fix-sqrt-L",
    "fix-sqrt-l",
]


@dataclass(frozen=True)
class ProRes(Scheme):
    """Branches that are switched on one after the other while the network trains: y = x + a(l, t) F(x).

    a(l, t) = min(t / (T l), 1) after t optimizer steps: block l of N is at its full size from step T l on, the last one
    from W = T N on. An orthogonal slot: add it to any scheme, `Keel() + ProRes()`, `LayerScale() + ProRes(0.25)`.

    **Something has to move the clock.** `skipway train` and `sw.fit` do; a loop of your own calls
    `sw.set_step(model, step, total)` after every optimizer step (see "A loop of your own"). Without it the network
    stays what it is at step 0: its shortcuts alone. The step is stored in the state dict, so a resumed training goes on
    where it was, and evaluation uses the factors of that step.

    Args:
        warmup: a whole number is T, the steps of a block; a float, 0 < warmup ≤ 1, the share of the training after
            which the last block is at its full size, W = warmup · total. The authors' 1000 steps are meant for 100,000
            (W is 12 to 24 % of them for 12 to 24 blocks, up to 72 % for 72); in a short training take a share.
        schedule: names of the authors' code; s = t / W, N blocks, l = 1 … N.

    | schedule | a(l, t), cut to [0, 1] |
    |---|---|
    | linear | s N / l |
    | linear-sqrt, linear-square | √(s N / l), (s N / l)² |
    | equal | s |
    | reverse | s N / (N + 1 − l), the last blocks first |
    | stagewise-0, -L, -sqrt-L, -sqrt-l | m + (1 − m) (s N − l + 1), one after the other from m = 0, 1/N, 1/√N, 1/√l |
    | fix-L, fix-sqrt-L, fix-sqrt-l | 1/N, 1/√N, 1/√l for ever: no clock, for comparison |

    Depth: l and N count blocks: two branches in a transformer, which have the same a, one in a ResNet or ConvNeXt.

    Decay and learning rate: no parameters of its own. A branch at a = 0 has no gradient but is decayed: under
    stagewise-0 the last block is for (N − 1) T steps. The size of Adam's steps does not depend on a, as long as the
    gradients stay far above its ε; that of SGD's does.

    Theory at the start: at step 0 the network is its shortcuts and every branch has exactly zero gradient; only stem
    and head learn (except where m > 0). With pre-norm and branches of variance v the weights of the start have
    Var(x_l) = Var(x_0) + v Σ a(i, t)² over the branches up to l. Under linear the sum over blocks is less than
    (t/T)² π²/6 at any depth, where without the factors it grows with the depth.
    With a scheme that starts branches at zero (`rezero`, `zeroinit`) there are two zeros at step 0 and one from step 1
    on: it learns, one step later. With a gate as join (`highway`, `gtrxl`) step 0 is what the gate leaves of x.

    Source: Chen et al. 2026, "Progressive Residual Warmup for Language Model Pretraining" (arXiv:2603.05369), eq. 2
    and 3, and the authors' `torchrun_main.py`. In their tables linear is best with pre-norm, linear-square with
    post-norm; reverse is worse than no warm-up, and equal diverges with post-norm.

    >>> import skipway as sw
    >>> network = sw.build("resnet20", scheme="prores(10)")
    >>> _ = sw.set_step(network, 20)
    >>> [round(float(block.scale.factor()), 3) for stage in network.stages for block in stage][:5]
    [1.0, 1.0, 0.667, 0.5, 0.4]
    """

    warmup: int | float = 1000
    schedule: WarmupSchedule = "linear"

    equation: ClassVar[str] = "y = x + a(l, t) F(x), a = min(t / (T l), 1)"
    when: ClassVar[str] = "deep transformers of any norm placement, trained from scratch"
    source: ClassVar[str] = "Chen et al. 2026, eq. 2, 3"

    def __post_init__(self) -> None:
        share = not is_whole(self.warmup) and is_real(self.warmup) and 0 < self.warmup <= 1
        rule = (
            "a whole number of steps for each block, at least 1, or a share of the training, 0 < warmup <= 1, as float"
        )
        # a run has a warmup and a schedule of its own, of the learning rate
        check_rule("prores.warmup", self.warmup, is_whole(self.warmup, 1) or share, rule)
        check_choice("prores.schedule", self.schedule, get_args(WarmupSchedule))

    def scale(self, site: Site) -> nn.Module:
        branches = 1 if site.kind == "conv" else 2
        block, blocks = site.index // branches + 1, math.ceil(site.depth / branches)
        name, _, floor = self.schedule.partition("-")
        lowest = {"L": 1 / blocks, "sqrt-L": blocks**-0.5, "sqrt-l": block**-0.5}.get(floor, 0.0)
        if name == "fix":
            return Multiply(lowest)
        end = int(self.warmup) * blocks if is_whole(self.warmup) else float(self.warmup)
        if name == "stagewise":
            return ResidualWarmup(end, until=block / blocks, span=1 / blocks, lowest=lowest)
        span = {"equal": blocks, "reverse": blocks + 1 - block}.get(name, block) / blocks
        return ResidualWarmup(end, until=span, span=span, power={"sqrt": 0.5, "square": 2.0}.get(floor, 1.0))
