"""The arguments that messages name, in the words of whoever reads them: of Python, or of the command line."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields

__all__ = ["option_spelling", "spelled"]

ARGUMENT = re.compile(r"""\w\([^()]*\)|(?<![\w.\-])([a-z]\w*)=(\([^()]*\)|'[^']*'|"[^"]*"|[\w+-]+(?:\.\w+)?)(?!\()""")


def option_spelling(text: str) -> str:
    """Spell every `name=value` in a message whose name is a field of the recipe, or of another command, as an option;
    not those in the parentheses of a spec.

    >>> option_spelling("keep it with allow_empty=True, or name them with columns=('image', 'label')")
    'keep it with --allow-empty, or name them with --columns image,label'
    >>> option_spelling("lr=-1.0: the rule is lr > 0")
    '--lr -1.0: the rule is lr > 0'
    >>> option_spelling("80 more trial steps would probably decide it: allowance=0.08, about 40 s")
    '80 more trial steps would probably decide it: --allowance 0.08, about 40 s'
    >>> option_spelling("3 connections, scheme prores(warmup=0.25)")
    '3 connections, scheme prores(warmup=0.25)'
    """
    from skipway.recipe import Recipe

    known = {
        "allowance",
        "certainty",
        "opset",
        "preset",
        "sides",
        "trust_code",
        "allow_changed_outputs",
        *(field.name for field in fields(Recipe)),
    }

    def of_command(found: re.Match[str]) -> str:
        name, text = found.groups()
        if name not in known:  # None for a spec
            return found[0]
        option = name.replace("_", "-")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if isinstance(value, bool):
            return f"--{'' if value else 'no-'}{option}"
        return f"--{option} {shlex.quote(','.join(map(str, value)) if isinstance(value, tuple) else str(value))}"

    return ARGUMENT.sub(of_command, text)


def spelled(text: str, command: str) -> str:
    """A message for a page or picture that a command has made, in the words of that command; "" for Python.

    >>> spelled("more steps: allowance=0.08", "skipway diagnose nets.py"), spelled("more steps: allowance=0.08", "")
    ('more steps: --allowance 0.08', 'more steps: allowance=0.08')
    """
    return option_spelling(text) if command.startswith("skipway ") else text
