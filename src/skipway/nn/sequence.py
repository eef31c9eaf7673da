"""Named modules in a row, without the absent ones."""

from __future__ import annotations

from torch import nn

__all__ = ["sequence"]


def sequence(**modules: nn.Module | None) -> nn.Module:
    """The given modules in order under their names; absent ones (None) leave no trace, none at all is `nn.Identity`.

    >>> sequence(norm=None, act=nn.ReLU())
    Sequential(
      (act): ReLU()
    )
    >>> sequence(norm=None)
    Identity()
    """
    present = {name: module for name, module in modules.items() if module is not None}
    if not present:
        return nn.Identity()
    row = nn.Sequential()
    for name, module in present.items():
        row.add_module(name, module)
    return row
