"""Watching one forward pass at the dispatcher: any model, no Python source, no memory for weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from skipway.errors import SkipwayError
from skipway.tracing.arguments import Path, tensor_paths
from skipway.tracing.channels import channel_axis
from skipway.tracing.containers import ATOMS, tensors_in
from skipway.tracing.example import Example, as_example, call_model, copy_example
from skipway.tracing.foreign_hooks import calls_foreign_hook, remove_foreign_hooks
from skipway.tracing.module_state import kept_tensors
from skipway.tracing.operator_call import Operand, OperatorCall
from skipway.tracing.operators import part_of
from skipway.tracing.program import Program, Value
from skipway.tracing.restoration import preserved_state, without_fused_layers
from skipway.tracing.sums import JoinedAxis, StackedAxis, Term, is_addition, number_of, terms_of

__all__ = ["Recorder", "copy_to_meta", "record_program", "require_module", "unwrap", "watch"]

# they take the shape of a tensor and not its values
FACTORIES = frozenset(
    {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "zeros_like", "ones_like", "full_like"}
    | {"empty_like", "rand_like", "randn_like", "randint_like"}
)
# their result depends on values, so that Python can decide by them: a number or indices, or a number of rows
READS = frozenset({torch.Tag.data_dependent_output})
SELECTS = frozenset({torch.Tag.dynamic_output_shape})
# they copy values out of what the dispatcher sees
COPIES = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})
# a norm written out in elementary operators is known by the name of its class
NORM = re.compile(r"norm", re.IGNORECASE)


def watch(model: nn.Module, example: Example, *, training: bool = False) -> Program:
    """The program that `model` runs on `example`, read from one forward pass.

    The pass runs on a copy on the meta device: no weights are allocated, nothing is computed and the model is not
    touched. Where the meta device does not do (a model that reads values of its tensors, or with forward hooks of
    yours, which would be given tensors without values), the model itself runs once, without gradients, and is put back
    as `preserved_state` does. Where that fails (another device, too little memory), the copy runs without your hooks.

    Args:
        model: any `torch.nn.Module`.
        example: what it is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        training: watch it in training mode instead of evaluation mode; parts of a model in training that are in
            evaluation mode stay so.

    Raises:
        SkipwayError: the forward pass failed; says with what.
    """
    model, example = unwrap(model), as_example(example)
    refuse_scripted(model)
    on_meta = any(tensor.is_meta for tensor in model.parameters())
    hooked = not on_meta and calls_foreign_hook(model)
    if not hooked:
        try:
            return watch_on_meta(copy_to_meta(model), example, training)
        except Exception as problem:  # a foreign model may raise anything on the meta device
            if on_meta:
                raise SkipwayError(
                    f"{type(model).__name__} cannot be watched on the meta device ({problem}); give a model with real "
                    "weights"
                ) from problem
    try:
        with preserved_state(model):
            return record_program(set_mode(model, training), copy_example(example))
    except SkipwayError:
        raise
    except Exception as second:
        if hooked:
            with suppress(Exception):
                return watch_on_meta(remove_foreign_hooks(copy_to_meta(model)), example, training)
        raise SkipwayError(
            f"{type(model).__name__} cannot be watched on this example: {type(second).__name__}: {second}"
        ) from second


def watch_on_meta(copied: nn.Module, example: Example, training: bool) -> Program:
    """The program of a copy on the meta device."""
    program = record_program(set_mode(copied, training), copy_example(example, "meta"))
    program.on_meta = True
    return program


def set_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model in a mode; parts of a model in training that are not, such as frozen norms, stay as they are."""
    return model if training and model.training else model.train(training)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        SkipwayError: what was given is no module.

    >>> network = nn.Linear(2, 1)
    >>> unwrap(torch.compile(network)) is network
    True
    """
    require_module(model)
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def require_module(model: nn.Module) -> nn.Module:
    """Return what was given, if it is a module.

    Raises:
        SkipwayError: it is none.
    """
    if not isinstance(model, nn.Module):
        made = " (an instance of it, not the class)" if isinstance(model, type) else ""
        raise SkipwayError(
            f"model={getattr(model, '__name__', None) or repr(model):.60}: the rule is a torch.nn.Module{made}; a "
            "network by name is made by skipway.build"
        )
    return model


def refuse_scripted(model: nn.Module) -> None:
    """Refuse models that cannot be watched: in TorchScript, or with lazy layers that have no weights yet."""
    for name, module in model.named_modules():
        if any(parameter is not None and is_lazy(parameter) for parameter in module._parameters.values()):
            raise SkipwayError(
                f"{name or 'the model'} is a lazy layer without weights; call the model once, model(example), which "
                "makes them"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise SkipwayError(
                f"{name or 'the model'} is a TorchScript module, which runs where Python cannot watch; give the model "
                "that was scripted"
            )


def copy_to_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes but no values."""
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        held = (*module._parameters.values(), *kept_tensors([module]), *module.__dict__.values())
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                empty: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
                memo[id(tensor)] = (
                    nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else empty
                )
            elif is_frozen(tensor):
                memo[id(tensor)] = tensor
    shells = [
        (module, memo.setdefault(id(module), object.__new__(type(module))))
        for module in modules
        if has_default_copy(module)
    ]
    for module, shell in shells:
        for name, value in module.__dict__.items():
            table = value if name in TABLES or (isinstance(value, dict) and not value) else None
            if table is not None:
                shell.__dict__[name] = type(table)((key, copy_value(held, memo)) for key, held in table.items())
            else:
                shell.__dict__[name] = copy_value(value, memo)
    return copy.deepcopy(model, memo)


TABLES = frozenset({"_parameters", "_buffers", "_modules"})


def copy_value(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, without asking `copy` for what is known or cannot be written into."""
    if type(value) in ATOMS:
        return value
    known = memo.get(id(value))
    return copy.deepcopy(value, memo) if known is None else known


def has_default_copy(module: nn.Module) -> bool:
    """True if copying a module means copying its `__dict__`, which `copy.deepcopy` finds out slowly."""
    kind = type(module)
    asked = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__slots__")
    return all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in asked)


def is_vector(tensor: Tensor) -> bool:
    """True if at most one axis is longer than 1, as of a gain (C, 1, 1)."""
    return tensor.numel() == max(tensor.shape, default=1)


def is_frozen(value: object) -> bool:
    """True for immutable values, such as a `Site` or a scheme, which need no copy."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def record_program(model: nn.Module, example: Example, kind: type[Recorder] | None = None) -> Program:
    """Run the model on the example under the watch, by a recorder of some kind."""
    recorder = (kind or Recorder)(model, example)
    with without_fused_layers(), ExitStack() as stack, torch.no_grad():
        stack.callback(recorder.modules.close)
        stack.enter_context(recorder.modules.following())
        stack.enter_context(Calls(recorder))
        stack.enter_context(recorder)
        call_model(model, example)
    recorder.split_joins()
    return recorder.program


class Modules:
    """The running module: a stack of paths kept by forward hooks, which `close` removes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entered: Callable[[str, Any, Any], None] = lambda name, args, kwargs: None
        self.left: Callable[[str, Any], None] = lambda name, out: None
        self.stack: list[tuple[str, bool]] = [("", False)]
        self.handles: list[Any] = []

    @contextmanager
    def following(self) -> Iterator[None]:
        for name, module in self.model.named_modules():
            named_so = bool(NORM.search(type(module).__name__))
            is_norm = named_so and all(is_vector(parameter) for parameter in module.parameters())
            self.handles.append(
                module.register_forward_pre_hook(self.enter(name, is_norm), prepend=True, with_kwargs=True)
            )
            self.handles.append(module.register_forward_hook(self.leave, always_call=True))
        try:
            yield
        finally:
            self.close()

    def enter(self, name: str, is_norm: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append((name, is_norm))
            self.entered(name, args, kwargs)

        return hook

    def leave(self, module: nn.Module, given: Any, out: Any) -> None:
        name, _ = self.stack.pop()
        self.left(name, out)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @property
    def owner(self) -> str:
        return self.stack[-1][0]

    @property
    def norm(self) -> str | None:
        name, is_norm = self.stack[-1]
        return name if is_norm else None


class Calls(TorchFunctionMode):
    """Numbers the calls of Python that may add tensors, so that a later pass can find the same ones."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPIES and any(map(self.recorder.is_signal, args)):
            self.recorder.note_reader()
        if not is_addition(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.recorder.call = self.recorder.program.calls
        self.recorder.program.calls += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.recorder.call = None


class Recorder(TorchDispatchMode):
    """Writes down every operator that the dispatcher runs.

    A tensor is known by its storage and its place in it, since views arrive as new objects. A write in place makes a
    new value of the storage, and what is read from it later was computed from that.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.program = Program()
        self.modules = Modules(model)
        self.modules.entered, self.modules.left = self.take_in, self.put_out
        self.call: int | None = None
        self.held: list[Tensor] = []  # a storage's address must not be used twice
        self.known: dict[int, dict[tuple[Any, ...], int]] = {}
        self.written: dict[int, int] = {}
        self.stacks: dict[int, StackedAxis] = {}
        self.joins: dict[int, JoinedAxis] = {}
        self.parts: dict[int, Value] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self.note(tensor, "parameter", signal=False, parameters=frozenset({name}))
        for tensor in tensors_in(example):
            self.note(tensor, "input", signal=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        terms = terms_of(name, args, kwargs)
        given = [t for term in terms for t in term.tensors] or (() if name in FACTORIES else (args, kwargs))
        operands = [self.read(leaf) for leaf in tree_flatten(given)[0] if isinstance(leaf, Tensor)]
        reads, tags = name == "nonzero", set(func.tags)
        if (tags & (READS | SELECTS)) and any(map(self.is_signal, deciding(name, args, kwargs))):
            self.note_reader() if reads or tags & READS else self.program.selectors.append(self.modules.owner)
        addends = self.addends(name, args, terms)
        varying = [term for term in terms if any(map(self.is_signal, term.tensors))]
        result = func(*args, **kwargs)
        mutates = func._schema.is_mutable
        if len(addends) > 1 and isinstance(result, Tensor):
            self.note_sum(result, addends, written=mutates)
            return result
        # x + x carries x, while x · x is a product of two
        signals = self.count_signals(operands) if terms else sum(self.program[each].signal for each in operands)
        transposed = "convolution" in name and len(args) > 6 and bool(args[6])
        strided = name == "slice" and len(args) > 4 and args[4] != 1
        part = "stride" if strided else part_of(name, signals, transposed=transposed)
        if part == "other" and signals < 2 and torch.Tag.pointwise in func.tags:
            part = "nonlinear"
        factor = number_of(name, args, varying)
        operation = OperatorCall.of(func, (args, kwargs), self.read) if signals else None
        for output, leaf in enumerate(tree_flatten(result)[0]):
            if isinstance(leaf, Tensor):
                more = {"output": output, "factor": factor, "args": args, "operation": operation}
                number = self.note(leaf, name, part, tuple(operands), written=mutates, **more)
                if self.joins and part == "slice" and (member := self.find_member(leaf, tuple(operands))):
                    self.parts[number] = member
        if mutates and not tree_flatten(result)[0]:
            self.note(next(iter(args)), name, part, tuple(operands), written=True)
        if stack := StackedAxis.of(name, args, kwargs, result, operands):
            self.stacks[address(result)[0]] = stack
        if join := JoinedAxis.of(name, args, kwargs, result, operands, len(self.program) - 1):
            self.joins[address(result)[0]] = join
        return result

    def note_reader(self) -> None:
        """Note that the running module reads values of the signal."""
        self.program.readers.append(self.modules.owner)

    def is_signal(self, value: Any) -> bool:
        """Whether a value is a tensor that depends on the input."""
        number = self.look_up(value) if isinstance(value, Tensor) else None
        return number is not None and self.program[number].signal

    def find_member(self, view: Tensor, operands: tuple[int, ...]) -> Value | None:
        """A slice of joined tensors as a value that is computed from the one tensor it lies in; None of any other."""
        storage = address(view)[0]
        join = None if storage in self.written else self.joins.get(storage)
        found = None if join is None or operands != (join.number,) else join.member(view)
        if join is None or found is None:
            return None
        member, start, length = found
        value, operand = self.program.values[-1], Operand(member)
        if join.stacked or length == self.program[member].shape[join.axis]:
            call = OperatorCall.on(torch.clone, operand)
            return replace(value, operator="clone", part="carry", operands=(member,), operation=call)
        call = OperatorCall.on(torch.narrow, operand, join.axis, start, length)
        return replace(value, operands=(member,), operation=call)

    def split_joins(self) -> None:
        """Where tensors were joined only to be taken apart again, let the parts be computed from the tensors alone."""
        users = self.program.users
        for join in self.joins.values():
            if all(user in self.parts for user in users[join.number]):
                for user in users[join.number]:
                    self.program.values[user] = self.parts[user]
        del self.program.users

    def take_in(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the values that a module is called with."""
        self.program.given[name] = self.values_in(args) | self.values_in(kwargs)

    def values_in(self, container: Any) -> dict[Path, int]:
        """The known values in arguments or outputs, by their paths; nothing is written down for it."""
        found = ((path, self.look_up(tensor)) for path, tensor in tensor_paths(container))
        return {path: number for path, number in found if number is not None}

    def look_up(self, tensor: Tensor) -> int | None:
        """The value that a tensor holds now, if it or its storage is known."""
        return self.value_at(*address(without_transforms(tensor)))

    def value_at(self, storage: int, place: tuple[Any, ...]) -> int | None:
        """The value at a place in a storage: the one noted there or, if that is older, what was written last into the
        storage; the first value in the storage where neither is known.
        """
        places, write = self.known.get(storage, {}), self.written.get(storage)
        number = places.get(place)
        if number is not None and (write is None or number >= write):
            return number
        return write if write is not None else min(places.values(), default=None)

    def count_signals(self, operands: Iterable[int]) -> int:
        return sum(self.program[operand].signal for operand in dict.fromkeys(operands))

    def addends(self, name: str, args: tuple[Any, ...], terms: list[Term]) -> list[int]:
        """The values that an operator adds, where several tensors of the signal take part; none otherwise."""
        for tensor in args if self.stacks else ():
            stack = self.stacks.get(address(tensor)[0]) if isinstance(tensor, Tensor) else None
            if stack is not None and stack.is_contracted(name, args, tensor) and address(tensor)[0] not in self.written:
                others = [self.read(other) for other in args if isinstance(other, Tensor) and other is not tensor]
                factor = 1 / len(stack.members) if name == "mean" else 1.0
                return [self.weighted(member, others, factor) for member in stack.members]
        several = len(terms) > 1 and self.count_signals(self.read(each) for term in terms for each in term.tensors) > 1
        return [self.read_term(term) for term in terms] if several else []

    def weighted(self, member: int, weights: list[int], factor: float) -> int:
        """A member of a stack times its weight in a sum over the stack."""
        if not weights and factor == 1:
            return member
        part = part_of("mul", self.count_signals((member, *weights)))
        return self.append("mul", part, (member, *weights), self.program[member].shape, factor=factor)

    def read_term(self, term: Term) -> int:
        """The value of a term, written down as operators of its own."""
        operands = tuple(self.read(tensor) for tensor in term.tensors)
        number, shapes = operands[0], [tensor.shape for tensor in term.tensors]
        if term.operator:
            part = part_of(term.operator, self.count_signals(operands))
            shape = term.shape or torch.broadcast_shapes(*shapes)
            function = getattr(torch, term.operator, None)  # None of what places a tensor among zeros
            operation = function and OperatorCall.on(function, *map(Operand, operands))
            number = self.append(term.operator, part, operands, tuple(shape), operation=operation)
        if term.factor != 1:
            operation = OperatorCall.on(torch.mul, Operand(number), term.factor)
            shape = self.program[number].shape
            number = self.append("mul", "scale", (number,), shape, factor=term.factor, operation=operation)
        return number

    def note_sum(self, result: Tensor, addends: list[int], *, written: bool) -> None:
        """Write down the additions of several values, one after the other."""
        total = addends[0]
        for term, addend in enumerate(addends[1:], 1):
            part = part_of("add", self.count_signals((total, addend)))
            more = {"term": term, "operation": OperatorCall.on(torch.add, Operand(total), Operand(addend))}
            if term == len(addends) - 1:
                self.note(result, "add", part, (total, addend), written=written, **more)
            else:
                total = self.append("add", part, (total, addend), tuple(result.shape), **more)

    def put_out(self, name: str, out: Any) -> None:
        """Note which module has put out the value that its output holds, or the first of its outputs."""
        program = self.program
        program.runs[name] = program.runs.get(name, 0) + 1
        program.left[name] = len(program)
        program.returned[name] = self.values_in(out)
        first = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(first, Tensor):
            program.makers.setdefault(self.read(first), []).append(name)

    def read(self, tensor: Tensor) -> int:
        """The value a tensor holds now."""
        tensor = without_transforms(tensor)
        storage, place = address(tensor)
        source = self.value_at(storage, place)
        if source is None:  # a constant made outside of the watch
            return self.note(tensor, "constant", signal=False)
        noted = self.known[storage].get(place)
        if noted == source:
            return source
        operands = (source,) if noted is None else (noted, source)
        return self.note(tensor, "alias", "carry", operands)

    def note(
        self,
        tensor: Tensor,
        operator: str,
        part: Any = "carry",
        operands: tuple[int, ...] = (),
        *,
        written: bool = False,
        **more: Any,
    ) -> int:
        """Write down that `tensor` now holds what `operator` made of `operands`."""
        if tensor.is_nested and tensor.layout is torch.strided:
            raise SkipwayError(
                "the model computes with a nested tensor of layout torch.strided, which does not tell its sizes; use "
                "layout=torch.jagged, or a padded tensor with a mask"
            )
        floating = tensor.is_floating_point() or tensor.is_complex()
        number = self.append(operator, part, operands, tuple(tensor.shape), floating=floating, written=written, **more)
        storage, place = address(tensor)
        self.held.append(tensor)
        self.known.setdefault(storage, {})[place] = number
        if written:
            self.written[storage] = number
        return number

    def append(
        self,
        operator: str,
        part: Any,
        operands: tuple[int, ...],
        shape: tuple[int, ...],
        *,
        signal: bool | None = None,
        parameters: frozenset[str] | None = None,
        output: int = 0,
        args: tuple[Any, ...] = (),
        **more: Any,
    ) -> int:
        """Write down a value, which no tensor has to hold: a term of a sum, for example."""
        values = self.program.values
        if signal is None:
            signal = any(values[operand].signal for operand in operands)
        if parameters is None:
            constants = (values[operand] for operand in operands if not values[operand].signal)
            parameters = frozenset().union(*(value.parameters for value in constants))
        number = len(values)
        owner, norm = self.modules.owner, self.modules.norm
        channel = channel_axis(operator, args, [values[operand] for operand in operands], shape) if signal else None
        place = {"owner": owner, "norm": norm, "shape": shape, "signal": signal, "parameters": parameters}
        values.append(Value(number, operator, part, operands, output, **place, call=self.call, channel=channel, **more))
        return number


def deciding(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments by whose values an operator of `READS` or `SELECTS` decides: masks where it selects by them.

    >>> x = torch.zeros(3)
    >>> deciding("index", (x, [torch.arange(2)]), {}), deciding("index", (x, [x > 0]), {})
    ([], [tensor([False, False, False])])
    """
    leaves = tree_flatten((args[1:] if name in ("index", "masked_select") else args, kwargs))[0]
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [each for each in given if name != "index" or each.dtype in (torch.bool, torch.uint8)]


def without_transforms(tensor: Tensor) -> Tensor:
    """The tensor that `torch.func` computes with, where hooks are given one that stands for it within `vmap` or
    `grad`; operators are dispatched on the former.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def address(tensor: Tensor) -> tuple[int, tuple[Any, ...]]:
    """The location of a tensor's values: its storage, offset, size and strides."""
    with torch._C.DisableTorchFunction():  # `Calls`, which hooks of modules run in, would be asked six times
        storage = storage_of(tensor)
        if storage is None:
            return id(tensor), ()
        if tensor.is_nested:  # of rows of different sizes, so that it has none itself
            return storage._cdata, (id(tensor),)
        return storage._cdata, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory that a tensor's values lie in; None for another layout than a strided one, and within
    `torch.func.vmap`, where it cannot be told.

    >>> x = torch.eye(2)
    >>> storage_of(x[0]).nbytes(), storage_of(x.to_sparse())
    (16, None)
    """
    try:
        return tensor.untyped_storage() if tensor.layout is torch.strided else None
    except NotImplementedError:
        return None
