"""Computing a second time what was computed before: the same random numbers, the same precision, statistics once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

__all__ = ["Draws", "Parts", "again", "autocasting", "precision", "replaying", "statistics_kept"]


@dataclass(frozen=True)
class Draws:
    """Where the random numbers stand, on the CPU and on the devices that a tensor is on."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str

    @classmethod
    def now(cls, x: Tensor, last: Draws | None = None) -> Draws:
        """Where they stand now: `last` itself if nothing was drawn since, so that as many are kept as are needed."""
        devices, states = ([], []) if x.device.type == "cpu" else get_device_states(x)
        found = cls(torch.get_rng_state(), devices, states, x.device.type if devices else "cuda")
        return last if last is not None and last.same(found) else found

    def same(self, other: Draws) -> bool:
        """Whether nothing was drawn in between."""
        mine, others = (self.cpu, *self.states), (other.cpu, *other.states)
        return len(mine) == len(others) and all(torch.equal(one, two) for one, two in zip(mine, others, strict=True))


@contextmanager
def replaying(draws: Draws | None) -> Iterator[None]:
    """The random numbers from where they stood then; afterwards they go on from where they stand now."""
    if draws is None:
        yield
        return
    with torch.random.fork_rng(devices=draws.devices, device_type=draws.kind):
        torch.set_rng_state(draws.cpu)
        set_device_states(draws.devices, draws.states, device_type=draws.kind)
        yield


def precision(kind: str) -> list[tuple[str, bool, torch.dtype]]:
    """What autocast does now, on the CPU and on a kind of device."""
    kinds = [each for each in dict.fromkeys(("cpu", kind)) if torch.amp.is_autocast_available(each)]
    return [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in kinds]


@contextmanager
def autocasting(settings: Sequence[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was; weights cast without gradients must not be taken from its cache later."""
    if not any(enabled or torch.is_autocast_enabled(kind) for kind, enabled, _ in settings):
        yield
        return
    with ExitStack() as stack:
        for kind, enabled, dtype in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


class Parts:
    """What a block consists of, without walking it anew in every pass.

    Args:
        block: any module; what is exchanged in it later is seen, since its modules' own tables are read.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.walk()

    def walk(self) -> None:
        self.modules = list(self.block.modules())
        self.tables = [module._modules for module in self.modules]
        self.children = [child for table in self.tables for child in table.values()]

    def refresh(self) -> None:
        """Walk again if a module was put in, taken out or exchanged."""
        held = [child for table in self.tables for child in table.values()]
        if len(held) != len(self.children) or any(a is not b for a, b in zip(held, self.children, strict=True)):
            self.walk()

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, each once."""
        own = [parameter for module in self.modules for parameter in module._parameters.values()]
        return list(dict.fromkeys(p for p in own if p is not None and p.requires_grad))

    def writers(self) -> list[nn.Module]:
        """Modules that may write into buffers."""
        return [module for module in self.modules if module._buffers and module.training]


@contextmanager
def statistics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Buffers as they were, running statistics among them, whatever a block writes into them."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, old in kept:
            module._buffers[name] = buffer
            # past autograd, which may have kept a buffer that nothing wrote into
            buffer.data.copy_(old)


@contextmanager
def again(
    settings: Sequence[tuple[str, bool, torch.dtype]], draws: Draws | None, writers: Sequence[nn.Module]
) -> Iterator[None]:
    """All of that, with gradients: what is computed within is what was computed then."""
    with torch.enable_grad(), autocasting(settings):
        if draws is None and not writers:
            yield
            return
        with replaying(draws), statistics_kept(writers):
            yield
