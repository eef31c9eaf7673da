"""Parameter groups by role: the module that owns a parameter decides its weight decay and learning rate."""

from __future__ import annotations

import warnings
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from skipway.errors import SkipwayError
from skipway.nn import BranchFactors, Residual, Role
from skipway.optim.branch_factors import branch_factors
from skipway.optim.classifier import classifier_weights
from skipway.optim.roles import UNKNOWN, owner_of, parameter_roles
from skipway.tracing import Example, Program, unwrap, watch
from skipway.tracing.chain import Connection, WatchedConnection, chain, chain_from_program
from skipway.tracing.paths import parents
from skipway.validation import check_least, check_positive

__all__ = ["param_groups"]


def param_groups(
    model: nn.Module,
    example: Example | Program | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    eps: float | None = 1e-8,
    adaptive: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer: weights of linear maps are decayed, biases, norms and gains are
    not, and parameters of a scheme have the decay and the learning rate of their role. The model is left unchanged.

    The role comes from the owning module, or from what the parameter does in a watched forward pass where the module's
    class is not known (`skipway.optim.roles.parameter_roles`); never from a parameter's shape or name: a 0-dimensional
    SkipInit gain and a LayerScale of shape (C,) are gains, and a bias of any shape is a bias. Parameters whose role
    cannot be found are not decayed, and a warning names them.

    A constant on a branch may ask for more (`DepthScaled(base=…)`: CompleteP and depth-μP): factors on the learning
    rate, the weight decay and ε of all parameters in front of it in that branch. They make groups of their own, so that
    any optimizer follows them.

    Args:
        model: any module; frozen parameters are left out, shared ones counted once.
        example: what the model is called with, or the program that it runs, for modules of unknown class; see
            `parameter_roles`.
        lr: learning rate of the weights, >= 0; multiplied by the factor of each role.
        weight_decay: weight decay of the roles that are decayed, >= 0.
        layer_decay: the rate of layer l of L + 1 is multiplied by layer_decay^(L + 1 - l), where the blocks of the
            chain are layers 1 to L, everything before them is layer 0 and after them L + 1 (Clark 2020; Bao 2021,
            BEiT).
        eps: the optimizer's ε, > 0, which groups whose ε has a factor carry as `eps`, multiplied by it; None for an
            optimizer without ε or with several. Where your optimizer's is not torch's 1e-8, give it here, too.
        adaptive: whether the optimizer's steps do not depend on the size of the gradient (Adam, Lion, LAMB, Muon). If
            they are proportional to it (SGD), a factor on ε, which is the size of the gradient, divides the learning
            rate instead and multiplies the decay.

    Raises:
        SkipwayError: a rate or decay out of range; the model fails on `example`; a network of others has branches with
            factors (`rescheme`), and no example shows which parameters are in front of them.

    Returns:
        dicts in the order of first appearance: `params`, `lr`, `weight_decay`, `name`, and `eps` where ε has a factor.
        `matrices` holds the places in `params` of matrices and kernels of convolutions, without stacks of matrices
        (experts, kernels of grouped and depthwise convolutions) and the classifier; `classifier` those of the weights
        that make the scores.

    >>> import skipway as sw
    >>> for group in param_groups(sw.build("resnet20", scheme="fixup"), lr=0.1, weight_decay=5e-4):
    ...     print(group["name"], len(group["params"]), round(group["lr"], 4), group["weight_decay"])
    weight 20 0.1 0.0005
    bias×0.1 38 0.01 0.0005
    gain×0.1 9 0.01 0.0005
    bias 1 0.1 0.0
    """
    model = unwrap(model)
    check_least("lr", lr, 0)
    check_least("weight_decay", weight_decay, 0)
    check_positive("layer_decay", layer_decay)
    if eps is not None:
        check_positive("eps", eps)
    example = watched_once(model, example)
    roles, factors = parameter_roles(model, example), branch_factors(model, example)
    program = example if isinstance(example, Program) else None
    scoring = {id(parameter) for parameter in classifier_weights(model, program, roles)}
    layers = layer_indices(model, example) if layer_decay != 1 else {}
    last = max(layers.values(), default=0)
    if layer_decay != 1 and last <= 1:
        warnings.warn(
            f"layer_decay={layer_decay} has no effect: no blocks with residual connections are found in "
            f"{type(model).__name__}",
            stacklevel=2,
        )
    groups: dict[tuple[Role, int], dict[str, Any]] = {}
    unknown: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        unknown += [name] if roles[name] is UNKNOWN else []
        role, layer = roles[name].times(factors.get(name, BranchFactors())), layers.get(name, last)
        role = role if adaptive and eps is not None else without_epsilon(role, adaptive=adaptive)
        if (role, layer) not in groups:
            groups[role, layer] = {
                "params": [],
                "lr": lr * role.rate * layer_decay ** (last - layer),
                "weight_decay": weight_decay * role.decay,
                "name": title_of(role) if layer_decay == 1 else f"{title_of(role)}, layer {layer}",
                "matrices": [],
                "classifier": [],
                **({} if eps is None or role.epsilon == 1 else {"eps": eps * role.epsilon}),
            }
        group = groups[role, layer]
        if id(parameter) in scoring:
            group["classifier"].append(len(group["params"]))
        elif role.name == "weight" and is_matrix(model.get_submodule(owner_of(name)), parameter):
            group["matrices"].append(len(group["params"]))
        group["params"].append(parameter)
    if unknown and weight_decay:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        warnings.warn(
            f"the role of {', '.join(unknown[:3])}{more} is not known, so weight decay leaves them out; give an "
            "example of what the model is called with, param_groups(model, example, …), and it is found by watching",
            stacklevel=2,
        )
    return list(groups.values())


def title_of(role: Role) -> str:
    """The name of a role's group, with the factors that are not 1."""
    rate = "" if role.rate == 1 else f"×{role.rate:g}"
    return f"{role.name}{rate}" if role.epsilon == 1 else f"{role.name}{rate}, ε×{role.epsilon:g}"


def without_epsilon(role: Role, *, adaptive: bool) -> Role:
    """A role for an optimizer that has no ε: nothing to do if it is adaptive, else the gradient's size in the rate."""
    size = 1.0 if adaptive else role.epsilon
    return replace(role, rate=role.rate / size, decay=role.decay * size, epsilon=1.0)


def watched_once(model: nn.Module, example: Example | Program | None) -> Example | Program | None:
    """The program that a network of others runs on an example, watched once for several questions; else the example."""
    if example is None or isinstance(example, Program) or any(isinstance(each, Residual) for each in model.modules()):
        return example
    try:
        return watch(model, example)
    except SkipwayError:  # whoever needs it says so
        return example


def is_matrix(owner: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a weight is one matrix, as the kernel of a convolution without groups is, a row per output channel. With
    groups, which have inputs of their own, it is a stack of matrices (of one row each where it is depthwise), and so
    are weights of three axes that are none of a convolution, such as those of experts (E, in, out).
    """
    if parameter.ndim < 3:
        return parameter.ndim == 2
    if isinstance(owner, _ConvNd):
        return owner.groups == 1
    return parameter.ndim > 3 and parameter.shape[1] > 1


def watched_program(model: nn.Module, example: Example | Program | None) -> Program | None:
    """What a model runs on the example; None where its chain is read by type."""
    if example is None or isinstance(example, Program):
        return example
    return None if any(isinstance(module, Residual) for module in model.modules()) else watch(model, example)


def block_of(connection: Connection | WatchedConnection) -> str:
    """The path of the block that a connection belongs to; "" where it cannot be told."""
    own = connection.name.partition(":")[0].split(".")
    branch: list[str] = []
    if isinstance(connection, WatchedConnection):
        paths = [path.split(".") for path in connection.seen.modules]
        branch = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1] if paths else []
    for parts in (own, branch):
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers:
            return ".".join(parts[: numbers[-1] + 1])
    return ".".join(own) or ".".join(branch)


def whole_blocks(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The block that each of some paths belongs to: members of unlike classes of a container within a numbered module
    are its parts (a T5 block's attention and feed-forward layers).
    """
    members: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        members.setdefault(path.rpartition(".")[0], []).append(path)
    blocks: dict[str, str] = {}
    for container, inner in members.items():
        kinds = {type(model.get_submodule(path)) for path in inner}
        numbers = [place for place, part in enumerate(container.split(".")) if part.isdigit()]
        parts = numbers and 1 < len(inner) == len(kinds)
        outer = ".".join(container.split(".")[: numbers[-1] + 1]) if parts else ""
        blocks.update((path, outer or path) for path in inner)
    return blocks


def first_uses(program: Program) -> dict[str, int]:
    """The number of the first value that each parameter enters, by its name."""
    leaves = [value for value in program.values if value.operator == "parameter" and program.users[value.number]]
    return {name: program.users[leaf.number][0] for leaf in leaves for name in leaf.parameters}


def layers_of_uses(program: Program, blocks: Sequence[str]) -> dict[str, int]:
    """The layer in which a parameter is first used: 0 before the first block begins, L + 1 after the last one ends."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for value in program.values:
        if value.operator not in ("parameter", "input"):
            for name in (value.owner, *parents(value.owner)):
                first.setdefault(name, value.number)
                last[name] = value.number
    starts = sorted(first[block] for block in blocks if block in first)
    end = max((last[block] for block in blocks if block in last), default=len(program))
    return {
        name: len(blocks) + 1 if number > end else bisect(starts, number)
        for name, number in first_uses(program).items()
    }


def layer_indices(model: nn.Module, example: Example | Program | None = None) -> dict[str, int]:
    """The layer index of every parameter by name: 0 before the blocks, 1 … L inside them, L + 1 after them.

    A block is a connection's place up to its last number: `blocks.3` for `blocks.3.attention`, or where the adding
    module has none, that of the branch; parts of unlike classes are one block (`encoder.block.3.layer.0` and `.1` in
    T5). A parameter between two blocks, Swin's patch merging say, belongs to the layer before it. Connections that are
    not ours are found by watching the model on the example; which layer a parameter outside of the blocks belongs to is
    then where it is first used, and else its place among the parameters.
    """
    program = watched_program(model, example)
    connections = chain(model) if program is None else chain_from_program(model, program)
    own = [block for block in map(block_of, connections) if block]
    whole = whole_blocks(model, own)
    blocks = {block: number for number, block in enumerate(dict.fromkeys(whole[path] for path in own), start=1)}
    used = {} if program is None else layers_of_uses(program, list(blocks))
    layers: dict[str, int] = {}
    here = 0
    for name, _ in model.named_parameters():
        inside = next((number for block, number in blocks.items() if name.startswith(block + ".")), None)
        here = inside if inside is not None else here
        placed = len(blocks) + 1 if inside is None and here == len(blocks) else here
        layers[name] = used.get(name, placed) if inside is None else inside
    return layers
