"""The role of every parameter: by the class of its owner where that is known, else by its use in a forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from skipway.errors import SkipwayError
from skipway.nn import Role, ScaledStandardConv2d, ScaledStandardLinear
from skipway.tracing import Example, Program, Value, watch
from skipway.tracing.operators import is_linear_map

__all__ = ["BIAS", "EMBEDDING", "GAIN", "NORM", "UNKNOWN", "WEIGHT", "parameter_roles", "role_of"]

WEIGHT = Role("weight", decay=True)
BIAS = Role("bias")
NORM = Role("norm")
GAIN = Role("gain")
EMBEDDING = Role("embedding")
UNKNOWN = Role("unknown")

LINEAR_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
NORM_MODULES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
TORCH_NAME = re.compile(r"(in_proj_|[qkv]_proj_)?(weight|bias)(_[ih][hr]_l\d+(_reverse)?|_[kv])?")
"""Names that torch's linear maps give their parameters; reparametrised ones (`weight_g`, `weight_orig`) are others."""

LOOKUPS = frozenset({"embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"})
BIAS_FIRST = frozenset({"addmm", "addmv", "baddbmm", "addbmm"})
"""Operators b + x W, whose first operand is the bias; other maps have it third."""
BIAS_THIRD = frozenset({"convolution", "_convolution", "convolution_overrideable", "linear", "conv1d", "conv2d"})
MOVES = frozenset({"carry", "slice", "stride", "pad", "drop"})


def role_of(module: nn.Module, name: str) -> Role:
    """The role of the parameter `name` of `module` itself by the class of the module; `UNKNOWN` for other classes.

    >>> role_of(nn.BatchNorm2d(4), "weight").name, role_of(nn.Linear(4, 4), "weight").name
    ('norm', 'weight')
    """
    own = getattr(module, "role", None)
    if isinstance(own, Role):
        return own
    if isinstance(module, ScaledStandardConv2d | ScaledStandardLinear) and name == "gain":
        return GAIN
    if isinstance(module, NORM_MODULES):
        return NORM
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return EMBEDDING
    if isinstance(module, LINEAR_MODULES) and TORCH_NAME.fullmatch(name):
        return BIAS if "bias" in name else WEIGHT
    return UNKNOWN


def parameter_roles(model: nn.Module, example: Example | Program | None = None) -> dict[str, Role]:
    """The role of every parameter of any model by name; the model is left unchanged.

    The class of the owning module decides where it is known: torch's and Skipway's linear maps, norms, embeddings and
    gains. Of other classes (transformers' `Conv1D`, experts' stacked weights, parametrized maps, modules of one's own)
    one forward pass is watched on the meta device, and the first operator that joins the parameter with the signal
    decides: a linear map makes it a weight or a bias, a lookup an embedding, a product a gain, a sum a bias (or, with
    several axes, an embedding: of positions, a class token); inside a norm it belongs to the norm.

    Args:
        model: any module.
        example: what it is called with, or the program that it runs, where that is known; by default
            `model.dummy_inputs` or `model.default_cfg["input_size"]`, as transformers and timm state them, else modules
            of unknown class are watched one by one.

    Raises:
        SkipwayError: the model fails on `example`.

    >>> class Own(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.matrix, self.shift = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(5))
    ...     def forward(self, x):
    ...         return x @ self.matrix + self.shift
    >>> {name: role.name for name, role in parameter_roles(Own(), torch.zeros(2, 3)).items()}
    {'matrix': 'weight', 'shift': 'bias'}
    """
    roles: dict[str, Role] = {}
    embeddings: set[nn.Parameter] = set()
    parameters: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False) if module._parameters else ():
            full = f"{path}.{name}" if path else name
            roles[full], parameters[full] = role_of(module, name), parameter
            if roles[full] == EMBEDDING:
                embeddings.add(parameter)
    # a tied embedding, which a linear map may have registered first
    roles.update((name, EMBEDDING) for name, parameter in parameters.items() if parameter in embeddings)
    unknown = [name for name, role in roles.items() if role is UNKNOWN]
    if unknown and example is not None:
        program = example if isinstance(example, Program) else watch(model, example)
        roles |= only(unknown, watched_roles(program))
    elif unknown and (given := stated_example(model)) is not None:
        roles |= only(unknown, watched_roles_or_none(model, given))
    for path in dict.fromkeys(owner_of(name) for name in unknown if roles[name] is UNKNOWN):
        roles |= only(unknown, roles_of_module(model.get_submodule(path), f"{path}." if path else ""))
    return roles


def only(names: list[str], roles: Mapping[str, Role]) -> dict[str, Role]:
    """The roles of some names, where they are there."""
    return {name: roles[name] for name in names if name in roles}


def owner_of(name: str) -> str:
    """The module that computes with a parameter: its owner, or the module whose parametrization owns it."""
    path = name.split(".")
    return ".".join(path[: path.index("parametrizations")] if "parametrizations" in path else path[:-1])


def stated_example(model: nn.Module) -> Example | None:
    """An example by what the model states about its input, as transformers' and timm's models do."""
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        return dict(dummy)
    config = getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    return torch.empty((1, *size), device="meta") if isinstance(size, tuple) else None


def watched_roles_or_none(model: nn.Module, example: Example) -> dict[str, Role]:
    """The roles in a pass on an example that nobody gave: none if the model fails on it."""
    try:
        return watched_roles(watch(model, example))
    except SkipwayError:
        return {}


def roles_of_module(module: nn.Module, prefix: str) -> dict[str, Role]:
    """The roles in a module alone, run on tensors whose last axis is one of the lengths of its parameters' axes."""
    if len(list(module.children())) > 1:
        return {}
    # a module of scalars takes any size
    sizes = sorted({size for parameter in module.parameters() for size in parameter.shape} or {4})
    examples: Iterator[Tensor] = (torch.empty(*rest, size, device="meta") for rest in ((2,), (2, 3)) for size in sizes)
    for example in examples:
        roles = watched_roles_or_none(module, example)
        if roles:
            return {prefix + name: role for name, role in roles.items()}
    return {}


def watched_roles(program: Program) -> dict[str, Role]:
    """The role of every parameter that met the signal in a watched pass.

    Of several uses a lookup decides (a tied embedding), else the first. A parameter is followed through operators that
    the signal takes no part in (a transpose, a cast, weight normalisation, a low-rank product) to the first that it
    takes part in.
    """
    found: dict[str, Role] = {}
    for leaf in program.values:
        if leaf.operator != "parameter" or not leaf.parameters:
            continue
        roles = list(roles_of_uses(program, leaf))
        if roles:
            (name,) = leaf.parameters
            found[name] = EMBEDDING if EMBEDDING in roles else roles[0]
    return found


def roles_of_uses(program: Program, leaf: Value) -> Iterator[Role]:
    """What each operator that joins a parameter with the signal makes of it, in order."""
    waiting: list[tuple[Value, bool]] = [(leaf, True)]
    seen = {leaf.number}
    while waiting:
        value, whole = waiting.pop(0)
        for number in program.users[value.number]:
            user = program[number]
            if number in seen:
                continue
            seen.add(number)
            if user.signal and user.part != "other":
                yield role_in(program, user, value, leaf, whole=whole)
            elif user.signal:
                continue  # an operator of unknown effect says nothing about the parameter
            elif user.operator in LOOKUPS:
                yield EMBEDDING  # of positions, which no input decides
            elif user.part == "map":
                yield WEIGHT  # a factor of a low-rank or composed weight
            else:
                waiting.append((user, whole and (user.part in MOVES or user.numel == leaf.numel)))


def role_in(program: Program, user: Value, value: Value, leaf: Value, *, whole: bool) -> Role:
    """The role of a parameter whose descendant `value` is an operand of `user`, an operator on the signal."""
    if user.norm is not None or user.part == "norm":
        return NORM
    if user.operator in LOOKUPS:
        return EMBEDDING
    if user.part in ("map", "upsample", "softmax") or is_linear_map(user.operator):
        place = user.operands.index(value.number)
        if (user.operator in BIAS_FIRST and place == 0) or (user.operator in BIAS_THIRD and place == 2):
            return BIAS
        return WEIGHT if whole else GAIN  # a gain multiplied into the weight, as in weight normalisation
    if user.part in ("scale", "product", "nonlinear"):
        return GAIN
    several_axes = sum(size > 1 for size in leaf.shape) > 1
    return EMBEDDING if several_axes or user.part in ("join", "pad", "slice") else BIAS
