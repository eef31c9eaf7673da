"""Models that no operation accepts: TorchScript, quantised weights, reversible blocks, forwards that read values."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.tracing import Example, Program, call_model, preserved_state, unwrap
from skipway.tracing.example import copy_example
from skipway.tracing.foreign_hooks import remove_foreign_hooks
from skipway.tracing.watch import Recorder, copy_to_meta, refuse_scripted

__all__ = ["SEALED", "refuse_branching", "require_operable", "require_values"]

SEALED = "sealed"
"""Attribute of a class made by an operation that no other operation can follow; its value names that operation."""


def require_operable(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers (DDP, `torch.compile`), which is left alone, if it can be operated on.

    Raises:
        SkipwayError: a part is TorchScript, holds quantised weights, or is run by `reversible`.

    >>> require_operable(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    model = unwrap(model)
    refuse_scripted(model)
    for name, module in model.named_modules():
        where = name or "the model"
        if is_quantised(module):
            raise SkipwayError(
                f"{where} ({type(module).__name__}) holds quantised weights, which can neither be trained nor "
                "multiplied; operate on the float model and quantise it afterwards"
            )
        if sealed := getattr(type(module), SEALED, None):
            raise SkipwayError(f"{where} ({type(module).__name__}) was made {sealed}; undo that first")
    return model


def require_values(model: nn.Module, operation: str) -> nn.Module:
    """As `require_operable`, for an operation that looks at values.

    Raises:
        SkipwayError: the model has weights without values.
    """
    model = require_operable(model)
    if names := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise SkipwayError(
            f"{names[0]} is on the meta device and has no values, so that nothing can be computed or compared: "
            f"{operation} needs a model with weights; load them first"
        )
    return model


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's own weights are packed or integers."""
    own = (*module._parameters.values(), *module._buffers.values())
    tensors = [tensor for tensor in own if isinstance(tensor, Tensor)]
    integers = any(not (p.is_floating_point() or p.is_complex()) for p in module.parameters(recurse=False))
    return integers or hasattr(module, "_packed_params") or any(tensor.is_quantized for tensor in tensors)


def refuse_branching(
    model: nn.Module,
    example: Example,
    operation: str,
    program: Program | None = None,
    blocks: Iterable[str] | None = None,
) -> None:
    """Refuse a model whose control flow depends on values of its input: another input may take another path.

    Args:
        model: any module, which is left alone.
        example: what the model is called with.
        operation: name of the operation, for the message.
        program: what the model runs on the example, if that was watched already.
        blocks: where only the control flow within these modules matters; by default that of the whole model does.

    Raises:
        SkipwayError: a forward reads such a value.
    """
    if program is not None and program.on_meta:
        readers = program.readers
    else:
        readers, complete = list[str](), False
        with suppress(Exception):  # on the meta device there is no value to read
            given = copy_example(example, "meta")
            readers, complete = value_readers(remove_foreign_hooks(copy_to_meta(model)), given)
            if not complete:  # a hook whose output is needed
                readers = max(readers, value_readers(copy_to_meta(model), given)[0], key=len)
    if blocks is not None:
        prefixes = tuple(f"{name}." for name in blocks)
        readers = [name for name in readers if f"{name}.".startswith(prefixes)]
    if readers:
        kind = type(model.get_submodule(readers[0])).__name__
        raise SkipwayError(
            f"{readers[0] or 'the model'} ({kind}) reads values of a tensor that depends on the input, so another "
            f"input may take another path, and {operation} is verified on one path only. Compute with the tensor "
            "instead, with torch.where for example"
        )


def value_readers(model: nn.Module, example: Example) -> tuple[list[str], bool]:
    """Names of the modules whose forward reads a value of a tensor, and whether the pass came to its end."""
    recorder, complete = Recorder(model, example), False
    with suppress(Exception), preserved_state(model), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(recorder.modules.following())
        stack.enter_context(recorder)
        call_model(model.eval(), example)
        complete = True
    return recorder.program.readers, complete
