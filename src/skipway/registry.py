"""Names that people type, and the spec strings `name(argument=value)` that are the objects' own repr."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from skipway.errors import SkipwayError, suggest

__all__ = ["Registry", "parse_spec"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to entries; names match without regard to case, `-` and `_`.

    Args:
        kind: of the entries, for messages.
        command: that lists them, for the message about an unknown name.

    >>> colours = Registry("colour")
    >>> _ = colours.add("light-blue", 7)
    >>> colours["Light_Blue"]
    7
    >>> colours["light-bleu"]
    Traceback (most recent call last):
    skipway.errors.SkipwayError: unknown colour 'light-bleu'; did you mean 'light-blue'?
    """

    def __init__(self, kind: str, command: str = "") -> None:
        self.kind, self.command = kind, command
        self.entries: dict[str, T] = {}
        self._names: dict[str, str] = {}

    @staticmethod
    def key(name: str) -> str:
        """Canonical form of a name, equal for all its spellings."""
        return name.lower().replace("-", "").replace("_", "")

    def add(self, name: str, entry: T) -> T:
        """Enter `entry` under `name`; a name that is taken raises, unless by an earlier run of the same definition."""
        if name in self and not same_definition(self[name], entry):
            raise SkipwayError(f"{self.kind} {name!r} is already registered; choose another name")
        self._names[self.key(name)] = name
        self.entries[name] = entry
        return entry

    def name_of(self, name: str) -> str:
        """The name that an entry was entered under, for any spelling of it.

        Raises:
            SkipwayError: there is no such entry.

        >>> colours = Registry("colour")
        >>> _ = colours.add("light-blue", 7)
        >>> colours.name_of("Light_Blue")
        'light-blue'
        """
        if name not in self:
            raise SkipwayError(suggest(self.kind, name, self.entries, self.command))
        return self._names[self.key(name)]

    def __getitem__(self, name: str) -> T:
        return self.entries[self.name_of(name)]

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)


def parse_spec(text: str, lookup: Callable[[str], Callable[..., T]]) -> T:
    """Make the object that a spec string describes: `name`, `name(value)` or `name(argument=value, ...)`.

    Values are Python literals; nothing is evaluated. `lookup` turns the name into the class to call.

    >>> parse_spec("layerscale(init=1e-5)", lambda name: lambda **values: (name, values))
    ('layerscale', {'init': 1e-05})
    """
    if not isinstance(text, str):
        raise SkipwayError(f"{text!r}: the rule is a name or a spec string, name(argument=value)")
    rule = f"{text!r} is not of the form name or name(argument=value), with literal values"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        node = None
    if node is None or not isinstance(node, ast.Call):
        # a bare name may hold dashes, which Python would read as a subtraction
        if any(character in text for character in "()=,"):
            raise SkipwayError(rule)
        return construct(lookup(text.strip()), text, [], {})
    if not isinstance(node.func, ast.Name):
        raise SkipwayError(rule)
    try:
        args = [ast.literal_eval(arg) for arg in node.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except ValueError as error:
        raise SkipwayError(rule) from error
    return construct(lookup(node.func.id), text, args, kwargs)


def construct(make: Callable[..., T], text: str, args: list[Any], kwargs: dict[str, Any]) -> T:
    """Call `make`, with a wrong argument turned into a message about the spec string, which names the right ones."""
    try:
        return make(*args, **kwargs)
    except TypeError as error:
        reason = str(error).replace(f"{getattr(make, '__name__', '')}.__init__() ", "")
        known = ", ".join(inspect.signature(make).parameters) or "none"
        raise SkipwayError(f"{text!r}: {reason}; the arguments are: {known}") from error


def same_definition(old: object, new: object) -> bool:
    """True if two classes come from the same source lines, as when a notebook cell is run again."""
    places = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (old, new)]
    return places[0] == places[1] and None not in places[0]
