"""Recomputation: the same random numbers, the same precision, statistics updated once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from skipway.surgery.side_effects import version_of

__all__ = [
    "BlockParts",
    "KeptBuffer",
    "RandomState",
    "as_before",
    "autocasting",
    "buffers_kept",
    "precision",
    "replaying",
]


@dataclass(frozen=True)
class RandomState:
    """State of the random number generators of the CPU and of the devices that a tensor is on."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    kind: str

    @classmethod
    def now(cls, x: Tensor, last: RandomState | None = None) -> RandomState:
        """The state now; `last` itself if nothing was drawn since, so that no equal states are kept."""
        devices, states = ([], []) if x.device.type == "cpu" else get_device_states(x)
        found = cls(torch.get_rng_state(), devices, states, x.device.type if devices else "cuda")
        return last if last is not None and last.same(found) else found

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn in between."""
        mine, others = (self.cpu, *self.states), (other.cpu, *other.states)
        return len(mine) == len(others) and all(torch.equal(one, two) for one, two in zip(mine, others, strict=True))


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Within it, random numbers are drawn from a state; afterwards they go on as if nothing had been drawn."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=state.devices, device_type=state.kind):
        torch.set_rng_state(state.cpu)
        set_device_states(state.devices, state.states, device_type=state.kind)
        yield


def precision(kind: str) -> list[tuple[str, bool, torch.dtype]]:
    """Settings of autocast now, on the CPU and on a kind of device."""
    kinds = [each for each in dict.fromkeys(("cpu", kind)) if torch.amp.is_autocast_available(each)]
    return [(each, torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in kinds]


@contextmanager
def autocasting(settings: Sequence[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast with these settings, without its cache, which could hold weights that were cast without gradients."""
    if not any(enabled or torch.is_autocast_enabled(kind) for kind, enabled, _ in settings):
        yield
        return
    with ExitStack() as stack:
        for kind, enabled, dtype in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


class BlockParts:
    """Parameters and modules of a block, without walking it anew in every pass.

    Args:
        block: any module; modules that are exchanged in it later are seen, since its modules' own tables are read.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.walk()

    def walk(self) -> None:
        """List the modules of the block."""
        self.modules = list(self.block.modules())
        self.tables = [module._modules for module in self.modules]
        self.children = [child for table in self.tables for child in table.values()]

    def refresh(self) -> None:
        """Walk again if a module was put in, taken out or exchanged."""
        held = [child for table in self.tables for child in table.values()]
        if len(held) != len(self.children) or any(a is not b for a, b in zip(held, self.children, strict=True)):
            self.walk()

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained, each once."""
        own = [parameter for module in self.modules for parameter in module._parameters.values()]
        return list(dict.fromkeys(p for p in own if p is not None and p.requires_grad))

    def writers(self) -> list[nn.Module]:
        """Modules that may write into buffers."""
        return [module for module in self.modules if module._buffers and module.training]


@dataclass(frozen=True)
class KeptBuffer:
    """A buffer as it was at one time."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> KeptBuffer:
        """The buffer as it is now."""
        buffer = module._buffers[name]
        if buffer is None:
            return cls(module, name, None, 0, None)
        return cls(module, name, buffer, version_of(buffer), buffer.detach().clone())

    def changed(self) -> bool:
        """Whether it was written into or exchanged since then."""
        now = self.module._buffers.get(self.name)
        return now is not self.buffer or (now is not None and version_of(now) != self.version)

    def put_back(self) -> None:
        """Write the old values, without autograd's notice."""
        now = self.module._buffers.get(self.name)
        if now is not None and self.values is not None:
            now.data.copy_(self.values)


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, buffers may be written into, running statistics among them; afterwards they are as before."""
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
            # without autograd's notice, which may have saved a buffer that nothing wrote into
            buffer.data.copy_(old)


@contextmanager
def as_before(
    settings: Sequence[tuple[str, bool, torch.dtype]], state: RandomState | None, writers: Sequence[nn.Module]
) -> Iterator[None]:
    """Within it, a block computes what it computed in the forward pass, with gradients."""
    with torch.enable_grad(), autocasting(settings):
        if state is None and not writers:
            yield
            return
        with replaying(state), buffers_kept(writers):
            yield
