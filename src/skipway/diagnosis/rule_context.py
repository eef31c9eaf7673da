"""What rules look at, and the remedies that several of them name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from skipway.diagnosis.findings import Finding
from skipway.diagnosis.measurement import Measurement
from skipway.diagnosis.outlook import Outlook
from skipway.diagnosis.remedies import Damp, Remedy, Rescheme, UnitVariance
from skipway.diagnosis.settings import Settings
from skipway.diagnosis.subject import Subject

__all__ = ["Context", "Rule", "calming"]


@dataclass(frozen=True)
class Context:
    """All that a rule may look at.

    Args:
        measured: the model at its start.
        settings: of the training that is asked about.
        subject: the model, for its structure and for remedies.
        outlook: the forecast from the trial steps, with these settings and perhaps with another learning rate.
    """

    measured: Measurement
    settings: Settings
    subject: Subject
    outlook: Outlook

    @property
    def ours(self) -> bool:
        """Whether the network was built by `skipway.build`, and so can be rebuilt with another scheme."""
        return hasattr(getattr(self.subject.model, "config", None), "scheme")

    @property
    def maps(self) -> tuple[str, ...]:
        """Modules whose weight has two axes or more, in the order of the signal: those that can be re-initialised."""
        modules = ((name, self.subject.model.get_submodule(name)) for name in self.subject.layers)
        return tuple(name for name, module in modules if getattr(getattr(module, "weight", None), "ndim", 0) > 1)


Rule = Callable[[Context], Iterator[Finding]]


def calming(context: Context) -> tuple[Remedy, ...]:
    """Remedies that bound the signal: smaller branches, or weights of unit variance where there is no connection."""
    if not context.measured.connections:
        return (UnitVariance(context.maps),)
    return (Rescheme("skipinit(init='depth')"), Damp()) if context.ours else (Damp(), UnitVariance(context.maps))
