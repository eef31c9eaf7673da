"""The options of commands that build the network of stored weights again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from skipway.inference.predict import NetworkChoices

__all__ = ["NetworkOptions"]

NETWORK = Group("Network of others", sort_key=10)


@dataclass(frozen=True)
class NetworkOptions:
    """How a network that is not Skipway's own is built again.

    Args:
        trust_code: Run the Python file that the run's network was built from.
        model: Where that network is now, FILE.py:NAME. [where it was]
        allow_changed_outputs: Take the network although its code computes something else than it did.
    """

    trust_code: Annotated[bool, Parameter(negative=(), group=NETWORK)] = False
    model: Annotated[str | None, Parameter(group=NETWORK)] = None
    allow_changed_outputs: Annotated[bool, Parameter(negative=(), group=NETWORK)] = False

    @property
    def choices(self) -> NetworkChoices:
        """As arguments of `from_pretrained`."""
        return asdict(self)  # type: ignore[return-value]
