"""Classes that operations derive from anybody's classes, and modules of such classes in pickles and copies.

A class that was made while a program ran has no name in a module, by which pickle would find it in another process. A
module of such a class is pickled as its class before the operation, with the factory and the arguments that make the
class anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec

from torch import nn

__all__ = ["class_factory", "own_class"]

P = ParamSpec("P")


@dataclass(frozen=True)
class Derivation:
    """How a class was made.

    Args:
        factory: the function, by whose name pickle finds it.
        kind: the class that it was derived from.
        arguments: other arguments of the factory.
    """

    factory: Callable[..., type[nn.Module]]
    kind: type[nn.Module]
    arguments: tuple[Any, ...]


def class_factory(
    describe: Callable[Concatenate[type[nn.Module], P], tuple[str, dict[str, Any]]],
) -> Callable[Concatenate[type[nn.Module], P], type[nn.Module]]:
    """Make a factory of subclasses out of a function that returns the name and the body of a subclass of a class.

    The factory makes one class for each class and arguments, which are positional and hashable. Modules of it can be
    pickled, also to another process, if those of the class that it was derived from can be.

    >>> @class_factory
    ... def counting(kind):
    ...     return f"Counting{kind.__name__}", {"count": 0}
    >>> counting(nn.Linear), counting(nn.Linear).__mro__[1]
    (<class 'torch.nn.modules.linear.CountingLinear'>, <class 'torch.nn.modules.linear.Linear'>)
    """

    @wraps(describe)
    @cache
    def factory(kind: type[nn.Module], *arguments: Any) -> type[nn.Module]:
        name, body = describe(kind, *arguments)  # type: ignore[call-arg]
        if "forward" in body:  # libraries read its signature: which arguments they may give, which columns they keep
            body["forward"].__wrapped__ = kind.forward
        made = {"derivation": Derivation(factory, kind, arguments), "__reduce_ex__": reduce_to_own_class}
        return type(name, (kind,), {"__module__": kind.__module__, **made, **body})

    return factory  # type: ignore[return-value]


def own_class(module: nn.Module) -> Any:
    """The class of a module before operations derived others from it."""
    return origin(type(module))[0]


def origin(kind: type[nn.Module]) -> tuple[type[nn.Module], list[Derivation]]:
    """The class that a class was derived from at first, and the derivations, in order."""
    steps: list[Derivation] = []
    while (step := getattr(kind, "derivation", None)) is not None:
        steps.insert(0, step)
        kind = step.kind
    return kind, steps


def reduce_to_own_class(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How pickle and copy take a module of a derived class apart."""
    kind = type(self)
    own, steps = origin(kind)
    make, given, *state = own.__reduce_ex__(self, protocol)
    given = tuple(own if each is kind else each for each in given)
    recipe = tuple((step.factory, step.arguments) for step in steps)
    return (make_derived, (recipe, make, given), *state)


def make_derived(recipe: tuple[tuple[Any, tuple[Any, ...]], ...], make: Callable[..., Any], given: Any) -> nn.Module:
    """Make a module as its own class makes it, of a derived class."""
    module = make(*given)
    kind = type(module)
    for factory, arguments in recipe:
        kind = factory(kind, *arguments)
    module.__class__ = kind
    return module
