"""What rules look at, and the remedies that several of them name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from skipway.diagnosis.findings import Finding
from skipway.diagnosis.measurement import Measurement
from skipway.diagnosis.outlook import Outlook
from skipway.diagnosis.remedies import Damp, Remedy, Rescheme, UnitVariance
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject

__all__ = ["HOLLOW", "SIGNAL", "STRUCTURAL", "Context", "Rule", "calming"]


@dataclass(frozen=True)
class Context:
    """All that a rule may look at.

    Args:
        measured: the model at its start.
        settings: of the training that is asked about.
        subject: the model, for its structure and for remedies.
        outlook: the verdict from the trial steps.
    """

    measured: Measurement
    settings: Settings
    subject: Subject
    outlook: Outlook

    @property
    def smoothness(self) -> float | None:
        """Cosine between the input's gradients at neighbouring inputs; None where it was not measured."""
        return self.measured.jacobians.shattering

    @property
    def ours(self) -> bool:
        """Whether the network was built by `skipway.build`, and so can be rebuilt with another scheme."""
        return hasattr(getattr(self.subject.model, "config", None), "scheme")

    @property
    def frozen(self) -> bool:
        """Whether maps of branches are not trained, as those of a network that was trained before; a table of positions
        that is not says nothing.
        """
        maps = (name for connection in self.subject.chain for name in connection.seen.maps)
        return any(is_trained(self.subject.model.get_submodule(name)) is False for name in maps)

    @property
    def learnt(self) -> bool:
        """Whether the loss starts at less than half of the best constant answer's, as that of a trained network."""
        ahead = self.outlook.ahead
        if ahead is None or ahead.constant is None or not self.subject.labelled:
            return False
        return 0 <= ahead.unseen[0] < ahead.constant / 2

    @property
    def trained(self) -> bool:
        """Whether the network was trained before: its weights are neither drawn again nor damped."""
        return self.frozen or self.learnt

    @property
    def maps(self) -> tuple[str, ...]:
        """Modules whose weight has two axes or more and is trained, in the order of the signal: those that can be
        re-initialised.
        """
        layers = ((name, self.subject.model.get_submodule(name)) for name in self.subject.layers)
        return tuple(name for name, layer in layers if is_trained(layer) and layer.weight.ndim > 1)  # type: ignore[operator, union-attr]


def is_trained(module: nn.Module) -> bool | None:
    """Whether the weight of a module is trained, or what it is computed from in every pass, by a hook or another
    parametrization; None where it has none, or none of its own.
    """
    if not isinstance(getattr(module, "weight", None), Tensor):
        return None
    held = dict((*module.named_parameters(), *module.named_buffers()))
    sources = [held[name] for name in held if name.startswith(("weight_", "parametrizations.weight."))]
    sources = [held["weight"]] if "weight" in held else sources
    return any(source.requires_grad for source in sources) if sources else None


Rule = Callable[[Context], Iterator[Finding]]
STRUCTURAL = frozenset({"no-skips", "two-zeros", "stream-grows", "post-norm"})
"""Rules about the architecture."""
SIGNAL = frozenset({"samples-collapse", "rank-collapse", "exploding-gradient", "vanishing-gradient", "dead-units"})
"""Rules about what the network does to its signal."""


HOLLOW = {
    "missing-causal-mask": "the loss falls because the answer is in sight, which is no learning",
    "constant-targets": "the loss falls because one answer is right for all samples, which is no learning",
}
"""Rules by which a loss that falls says nothing, with the reason."""


def calming(context: Context) -> tuple[Remedy, ...]:
    """Remedies that bound the signal: smaller branches, or weights of unit variance where there is no connection."""
    drawn = (UnitVariance(context.maps),) if context.maps else ()
    if context.trained:
        return ()
    if not context.measured.connections:
        return drawn
    return (Rescheme("skipinit(init='depth')"), Damp()) if context.ours else (Damp(), *drawn)
