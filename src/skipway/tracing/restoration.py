"""Putting back what a pass changed, to the end, whatever interrupts it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from skipway.tracing.module_state import TensorValues, attribute_restoration, detach_attributes, weights_of

__all__ = [
    *("TRACELESS", "devices_in_use", "generator_devices", "generator_states", "own_tensors", "preserved_state"),
    *("restored", "run_to_end", "seed_generators", "seeded_generators", "without_fused_layers"),
]

TRACELESS: ContextVar[bool] = ContextVar("traceless", default=False)
"""Whether `preserved_state` is entered: passes in it are Skipway's own, and no part of anybody's training."""
Steps = list[Callable[[], None]]


def run_to_end(steps: Steps, remaining: int = 0) -> None:
    """Run and drop steps, last one first, until so many remain; all of them, whatever is raised on the way.

    A step has to restore a known state, so that it can run twice: an interrupted step is run again. A step that fails
    is dropped. The last exception is raised when all steps are done.
    """
    problem: BaseException | None = None
    while len(steps) > remaining:
        try:
            while len(steps) > remaining:
                steps[-1]()
                steps.pop()
        except KeyboardInterrupt as interrupt:
            problem = interrupt
        except Exception as failure:
            problem = failure
            steps.pop()
    if problem is not None:
        raise problem


@contextmanager
def restored(steps: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Run the steps at the end, also if an exception arrives while that begins."""
    with restoring(steps), restoring(steps):
        yield


@contextmanager
def restoring(steps: Sequence[Callable[[], None]]) -> Iterator[None]:
    """Run the steps at the end."""
    try:
        yield
    finally:
        run_to_end(list(steps))


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Context in which torch runs its transformer layers part by part, and not a whole layer as one operator."""
    steps = [partial(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())]
    with restored(steps):
        torch.backends.mha.set_fastpath_enabled(False)
        yield


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Context that restores what a forward pass changes: buffers; tensors, numbers and texts kept as attributes or in
    containers there, whether replaced or written in place; parameters that are replaced; mode of every module; random
    states of torch, Python and NumPy. Parameters that are written in place stay so, as do other objects, and flags
    beside hooks or modules that the pass makes (`attribute_restoration`). An interrupt while that is done is raised
    when all is restored.
    """
    modules = list(model.modules())  # walked once: of thousands of modules that takes as long as a forward pass
    modes = [module.training for module in modules]
    buffers = [
        (module, name, None if buffer is None else TensorValues.of(buffer))
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    steps = [
        *random_states(model),
        attribute_restoration(modules),
        partial(write_buffers, buffers),
        partial(set_modes, modules, modes),
        partial(set_traceless, TRACELESS.get()),
    ]
    with restored(steps):
        set_traceless(True)
        detach_attributes(modules)
        yield


def set_traceless(own: bool) -> None:
    """Say whether passes from now on are Skipway's own."""
    TRACELESS.set(own)


def random_states(model: nn.Module) -> Steps:
    """Steps that put back the states of the random number generators: of the CPU and of the devices that the model is
    on, of Python and of NumPy.
    """
    steps: Steps = [partial(torch.set_rng_state, torch.get_rng_state()), partial(random.setstate, random.getstate())]
    steps += generator_states(generator_devices(own_tensors(model)))
    if (numpy := sys.modules.get("numpy")) is not None:
        steps.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return steps


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a model, in one walk."""
    return weights_of(model.modules())


def generator_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices other than the CPU that tensors are on, and that random numbers are drawn on."""
    return with_generators(dict.fromkeys(tensor.device for tensor in tensors))


def with_generators(devices: Iterable[torch.device]) -> list[torch.device]:
    """Those of some devices, other than the CPU, that random numbers are drawn on."""
    return [
        each for each in devices if each.type != "cpu" and hasattr(getattr(torch, each.type, None), "set_rng_state")
    ]


def generator_states(devices: Iterable[torch.device]) -> Steps:
    """Steps that put back the states of the random number generators of devices."""
    modules = [(torch.get_device_module(device), device) for device in with_generators(devices)]
    return [partial(module.set_rng_state, module.get_rng_state(device), device) for module, device in modules]


def seed_generators(devices: Iterable[torch.device], seed: int) -> None:
    """Seed the generators of the CPU and of some devices, and no others, whose states nobody would put back:
    `torch.manual_seed` also seeds those that are not in use yet, once they are.
    """
    torch.default_generator.manual_seed(seed)
    for device in with_generators(devices):
        state = torch.Generator(device).manual_seed(seed).get_state()
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def seeded_generators(devices: Iterable[torch.device], seed: int) -> Iterator[None]:
    """Context in which the random numbers of the CPU and of some devices begin at a seed, and go on afterwards where
    they were before; those of other devices are left alone.

    >>> before = torch.get_rng_state()
    >>> with seeded_generators([torch.device("cpu")], 0):
    ...     numbers = torch.rand(2)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    devices = with_generators(devices)
    with restored([partial(torch.set_rng_state, torch.get_rng_state()), *generator_states(devices)]):
        seed_generators(devices, seed)
        yield


def devices_in_use() -> list[torch.device]:
    """The accelerators that this process has begun to use; the states of others are not there yet."""
    kind = torch.accelerator.current_accelerator()
    module = None if kind is None else torch.get_device_module(kind)
    if kind is None or not getattr(module, "is_initialized", bool)():
        return []
    return with_generators(torch.device(kind.type, index) for index in range(torch.accelerator.device_count()))


def write_buffers(buffers: Sequence[tuple[nn.Module, str, TensorValues | None]]) -> None:
    """Put buffers back, those whose names are still there, and their values."""
    for module, name, buffer in buffers:
        if name in module._buffers:
            module._buffers[name] = None if buffer is None else buffer.tensor
            if buffer is not None:
                buffer.put_back()


def set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    """Set the mode of each module."""
    for module, mode in zip(modules, modes, strict=True):
        if module.training != mode:  # to set it costs much more than to look
            module.training = mode
