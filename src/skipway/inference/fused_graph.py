"""The graph of a network's operators, for inference on a CPU: what follows a product is computed within it.

torch exports the network for inputs of one shape. What depends on no input is computed once, weights are packed in
oneDNN's order, activations and sums become part of the product before them, and each product, norm and attention is
computed by the implementation that is the fastest here (`skipway.kernels`). Unlike torch's compiler it builds in
seconds, and the pieces of a batch fit the caches as they do elsewhere.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from skipway.inference.fused_attention import attention_in_steps, replace_attention
from skipway.inference.fused_operators import FusedNorm, FusedPool, FusedProduct, Measured
from skipway.inference.graph_nodes import Replacement, is_random, named_arguments, permutation, same_kind
from skipway.kernels.epilogue import (
    Activation,
    Epilogue,
    Geometry,
    pack_convolution,
    pack_linear,
    product_of_linear,
    product_of_patches,
)
from skipway.tracing.containers import tensors_in

__all__ = ["fuse_graph"]

aten = torch.ops.aten

SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.contiguous.default)
"""Operators that return what they are given, in a graph without writes."""
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
FILLED = tuple(
    getattr(aten, name).default
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty_like")
)
"""Operators that read the shape and type of their argument alone."""
ACTIVATIONS: dict[Any, Callable[[dict[str, Any]], Activation]] = {
    aten.relu.default: lambda given: Activation("relu"),
    aten.sigmoid.default: lambda given: Activation("sigmoid"),
    aten.tanh.default: lambda given: Activation("tanh"),
    aten.silu.default: lambda given: Activation("swish"),
    aten.hardswish.default: lambda given: Activation("hardswish"),
    aten.hardsigmoid.default: lambda given: Activation("hardsigmoid"),
    aten.relu6.default: lambda given: Activation("hardtanh", (0.0, 6.0)),
    aten.hardtanh.default: lambda given: Activation("hardtanh", (given["min_val"], given["max_val"])),
    aten.leaky_relu.default: lambda given: Activation("leaky_relu", (given["negative_slope"],)),
    aten.gelu.default: lambda given: Activation("gelu", (), given["approximate"]),
}
"""Activations that become part of the product before them."""
JOINS = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
"""Operators of two tensors that become part of the product of one of them."""


def fuse_graph(model: nn.Module, /, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Return the graph of a network in eval mode for inputs of an example's shapes, types and layouts.

    Args:
        model: the network; its weights become constants.
        args: an example of its inputs, in any containers that torch can export; what is no tensor becomes a constant.
        kwargs: further ones by name.

    Raises:
        Exception: what torch raises where it cannot export the network: a path that depends on values, for one.

    >>> layer = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    >>> x = torch.randn(4, 8)
    >>> with torch.no_grad():
    ...     graph = fuse_graph(layer, x)
    ...     torch.allclose(graph(x), layer(x), atol=1e-5), len(list(graph.children()))
    (True, 2)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own tracing warns about itself
        program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
        network = program.module(check_guards=False)
    GraphBuilder(network).build()
    run = FirstRun(network)
    with torch.no_grad():
        run.run(*tree_leaves((args, kwargs)), enable_io_processing=False)
    run.find_last_uses()
    for module in network.children():
        if isinstance(module, FusedProduct):
            module.settle()
    release_constants(network)
    return network


class FirstRun(fx.Interpreter):
    """The first run of a graph, in which every operator chooses its implementation, and which tells the memory that
    values lie in: an operator may return its argument, or a view of it, without saying so.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.memory: dict[fx.Node, set[StorageWeakRef]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.memory[n] = {StorageWeakRef(each.untyped_storage()) for each in tensors_in(value)}
        if n.target is aten.reshape.default:  # a copy here may be a view of what a convolution that writes returns
            self.memory[n] |= self.memory[n.all_input_nodes[0]]
        return value

    def find_last_uses(self) -> None:
        """Let convolutions write over the tensors that they add where nothing later reads that memory."""
        made: dict[StorageWeakRef, fx.Node] = {}
        last: dict[StorageWeakRef, fx.Node] = {}
        for node, memory in self.memory.items():
            made.update((each, node) for each in memory if each not in made)
            last.update((each, node) for source in node.all_input_nodes for each in self.memory[source])
        for node in self.memory:
            product = self.submodules.get(node.target) if node.op == "call_module" else None  # type: ignore[arg-type]
            if isinstance(product, FusedProduct) and product.of_patches and product.epilogue.joined == "add":
                memory, added = (self.memory[each] for each in node.args)  # type: ignore[index]
                fresh = node.args[1].op == "call_module" and not added & memory  # type: ignore[union-attr]
                uses = {(made[each], last[each]) for each in added}
                product.overwrites = fresh and uses == {(node.args[1], node)}


def release_constants(network: fx.GraphModule) -> None:
    """Release the weights and constants that a graph does not name: those that became part of others."""
    network.delete_all_unused_submodules()
    named = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    for prefix, module in network.named_modules():
        if not isinstance(module, Measured):
            for table in (module._parameters, module._buffers):
                for name in [each for each in table if f"{prefix}.{each}".lstrip(".") not in named]:
                    del table[name]


class GraphBuilder:
    """The passes over a graph, in order.

    Args:
        network: an exported graph, changed in place.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.network, self.graph = network, network.graph
        self.count = 0

    def build(self) -> None:
        """Rewrite the graph."""
        self.fold_constants()
        self.simplify()
        self.replace_attention_in_steps()
        self.replace_operators()
        self.absorb_affines()
        self.absorb_activations()
        self.absorb_joins()
        self.simplify()
        self.graph.lint()
        self.network.recompile()

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The calls of some operators, all where none is named, in order; they may be erased meanwhile."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets) and not node._erased:
                yield node

    def put(self, node: fx.Node, by: fx.Node) -> None:
        """Put another node in the place of one."""
        by.meta = dict(node.meta)
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def add_module(self, module: nn.Module, at: fx.Node, *inputs: fx.Node) -> fx.Node:
        """Call a module before a node."""
        name, self.count = f"fused_{self.count}", self.count + 1
        self.network.add_submodule(name, module)
        with self.graph.inserting_before(at):
            return self.graph.call_module(name, inputs)

    def constant(self, node: Any) -> Any:
        """The tensor of a node that depends on no input; None of any other."""
        fixed = isinstance(node, fx.Node) and node.op == "get_attr"
        return operator.attrgetter(node.target)(self.network) if fixed else None

    def example(self, node: fx.Node) -> Any:
        """The tensor of a node that depends on no input; one of the same shape and type of another."""
        known, value = self.constant(node), node.meta.get("val")
        return torch.zeros((), dtype=value.dtype).expand(value.shape) if known is None else known  # type: ignore[union-attr]

    def fold_constants(self) -> None:
        """Compute what depends on no input once."""
        for node in self.calls():
            schema = getattr(node.target, "_schema", None)
            known = all(each.op == "get_attr" or node.target in FILLED for each in node.all_input_nodes)
            if not known or schema is None or schema.is_mutable or is_random(node.target):
                continue
            with torch.no_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.example)
                value: Any = node.target(*args, **kwargs)  # type: ignore[operator]
            if isinstance(value, Tensor):
                self.put_constant(node, value)
            elif all(each.target is operator.getitem for each in node.users):
                for user in list(node.users):
                    self.put_constant(user, value[user.args[1]])
        self.graph.eliminate_dead_code()
        self.copy_returned()

    def put_constant(self, node: fx.Node, value: Tensor) -> None:
        """Put a tensor in the place of a node."""
        with self.graph.inserting_before(node):
            self.put(node, self.graph.get_attr(self.add_constant(value)))

    def add_constant(self, value: Tensor) -> str:
        """Keep a tensor, and return its name."""
        name, self.count = f"constant_{self.count}", self.count + 1
        self.network.register_buffer(name, value)
        return name

    def copy_returned(self) -> None:
        """Return copies of constants, which the caller may write into."""
        end = self.graph.output_node()
        for constant in [each for each in end.all_input_nodes if each.op == "get_attr"]:
            with self.graph.inserting_before(end):
                copied = self.graph.call_function(aten.clone.default, (constant,))
            end.replace_input_with(constant, copied)

    def simplify(self) -> None:
        """Remove what only copies, and join views and permutations that follow each other."""
        for node in self.calls(aten._assert_tensor_metadata.default):  # all shapes and types are fixed
            self.graph.erase_node(node)
        for node in self.calls():
            given = named_arguments(node)
            source: Any = node.args[0] if node.args else None
            computed = isinstance(source, fx.Node) and source.op in ("call_function", "call_module")
            if computed and (node.target in SAME or is_idle(node, given)):
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)
            elif node.target in RESHAPES:
                node.target = aten.reshape.default  # a view, or a copy where an operator has another layout now
                if isinstance(source, fx.Node) and source.target is aten.reshape.default:
                    node.args = (source.args[0], node.args[1])
            elif (order := permutation(node)) is not None and (before := permutation(source)) is not None:
                joined = [before[axis] for axis in order]
                if joined == sorted(joined):
                    node.replace_all_uses_with(source.args[0])
                    self.graph.erase_node(node)
                else:
                    node.target, node.args, node.kwargs = aten.permute.default, (source.args[0], joined), {}
        self.graph.eliminate_dead_code()

    def replace_attention_in_steps(self) -> None:
        """Put modules in the places of attention that is written out: two products with a softmax in between."""
        for node in self.calls(aten.matmul.default):
            module, inputs = attention_in_steps(self, node)
            if module is not None:
                self.put(node, self.add_module(module, node, *inputs))
        self.simplify()

    def replace_operators(self) -> None:
        """Put modules in the places of products, norms and attention whose weights are constants."""
        for node in self.calls(*REPLACED):
            given = named_arguments(node)
            module, inputs = REPLACED[node.target](self, node, given)
            if module is not None:
                self.put(node, self.add_module(module, node, *inputs))
        self.graph.eliminate_dead_code()

    def product(self, node: Any) -> FusedProduct | None:
        """The product that a node calls, if nothing else uses what it returns."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
            return None
        module = self.network.get_submodule(str(node.target))
        return module if isinstance(module, FusedProduct) else None

    def absorb_affines(self) -> None:
        """Let products compute the factors and summands of each output that follow them, fixed norms among them."""
        for node in self.calls(*AFFINES):
            given = named_arguments(node)
            for source, other in AFFINES[node.target](node, given):
                product = self.product(source)
                if product is None or product.epilogue != Epilogue():
                    continue
                affine = affine_of(self, node, given, product, source, other)
                if affine is None:
                    continue
                product.scale_outputs(*affine)
                for user in list(node.users) if node.target is BATCH_NORM else ():  # what it returns is its first one
                    user.replace_all_uses_with(source)
                    self.graph.erase_node(user)
                node.replace_all_uses_with(source)
                self.graph.erase_node(node)
                break

    def absorb_activations(self) -> None:
        """Let products compute the activations that follow them."""
        for node in self.calls(*ACTIVATIONS):
            product = self.product(node.args[0])
            if product is not None and product.epilogue == Epilogue():
                self.absorb_activation(product, node)

    def absorb_activation(self, product: FusedProduct, node: fx.Node) -> None:
        """Let a product compute an activation."""
        product.epilogue = Epilogue(product.epilogue.joined, ACTIVATIONS[node.target](named_arguments(node)))
        source: Any = node.args[0]
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def absorb_joins(self) -> None:
        """Let products add, or multiply by, the tensor that follows them; of two products the later one does."""
        for node in self.calls(*JOINS):
            first: Any = node.args[0]
            second: Any = node.args[1]
            if node.kwargs.get("alpha", 1) != 1 or not same_kind(node, first, second):
                continue
            order = {each: at for at, each in enumerate(self.graph.nodes)}
            found = [pair for pair in ((first, second), (second, first)) if self.joins(*pair)]
            if found:
                self.join(node, *max(found, key=lambda pair: order[pair[0]]))

    def joins(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a node is a product, or its permutation, that nothing follows yet, and not the other one as well."""
        order = permutation(node)
        moved = order is not None and len(node.users) == 1
        product = self.product(node.args[0] if moved else node)
        if product is None or node is other or product.epilogue != Epilogue():
            return False
        return not moved or not product.of_patches

    def join(self, node: fx.Node, computed: fx.Node, other: fx.Node) -> None:
        """Let a product join a tensor; where its axes were moved before that, the tensor's are moved back."""
        order = permutation(computed)
        source: Any = computed if order is None else computed.args[0]
        product = self.product(source)
        assert product is not None
        product.epilogue = Epilogue(JOINS[node.target])  # type: ignore[index]
        with self.graph.inserting_before(node):
            if order is not None:
                back = sorted(range(len(order)), key=order.__getitem__)
                other = self.graph.call_function(aten.permute.default, (other, back))
            joined = self.graph.call_module(source.target, (source.args[0], other))
            joined.meta = dict(source.meta)
            whole = joined if order is None else self.graph.call_function(aten.permute.default, (joined, order))
        self.put(node, whole)
        self.graph.erase_node(computed)
        if source is not computed:
            self.graph.erase_node(source)
        following = list(whole.users)
        if product.of_patches and len(following) == 1 and following[0].target is aten.relu.default:
            self.absorb_activation(product, following[0])


def is_idle(node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether a call returns its argument: dropout in eval, and copies, whose layout those that follow do not need."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return not given["train"]
    if node.target is not aten.clone.default:
        return False
    return all(each.target in RESHAPES for each in node.users) or given["memory_format"] in (
        None,
        torch.preserve_format,
    )


BATCH_NORM = aten._native_batch_norm_legit_no_training.default
NORMS = (BATCH_NORM, aten.batch_norm.default)
AFFINES: dict[Any, Callable[[fx.Node, dict[str, Any]], list[tuple[Any, Any]]]] = {
    BATCH_NORM: lambda node, given: [(given["input"], None)],
    aten.batch_norm.default: lambda node, given: [(given["input"], None)],
    aten.mul.Tensor: lambda node, given: [(given["self"], given["other"]), (given["other"], given["self"])],
    aten.add.Tensor: lambda node, given: [(given["self"], given["other"]), (given["other"], given["self"])],
}
"""Operators that may scale and shift each output of a product: which argument may be the product, and by what."""


def affine_of(
    builder: GraphBuilder, node: fx.Node, given: dict[str, Any], product: FusedProduct, source: fx.Node, other: Any
) -> tuple[Tensor | None, Tensor | None] | None:
    """The factor and the summand of each output of a product that a call computes; None where it computes others."""
    assert product.weight is not None
    outputs, value = len(product.weight), node.meta["val"]
    if node.target in NORMS:
        return batch_norm_of(builder, node, given, product)
    constant = builder.constant(other)
    axis = 1 if product.of_patches else value.ndim - 1
    if constant is None or not constant.is_floating_point() or constant.ndim > value.ndim or given.get("alpha", 1) != 1:
        return None
    aligned = (1,) * (value.ndim - constant.ndim) + tuple(constant.shape)
    if any(side != 1 for at, side in enumerate(aligned) if at != axis) or not same_kind(node, source):
        return None
    each = constant.detach().reshape(-1).expand(outputs)
    return (each, None) if node.target is aten.mul.Tensor else (None, each)


def batch_norm_of(
    builder: GraphBuilder, node: fx.Node, given: dict[str, Any], product: FusedProduct
) -> tuple[Tensor, Tensor] | None:
    """Factor and summand of a batch norm with fixed statistics; None where it computes others, or they are used."""
    if given.get("training"):
        return None
    if node.target is BATCH_NORM and any(each.target is not operator.getitem or each.args[1] for each in node.users):
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = values = [builder.constant(given[name]) for name in names]
    missing = any(value is None and given[name] is not None for value, name in zip(values, names, strict=True))
    x = given["input"].meta["val"]
    if missing or mean is None or variance is None or not (product.of_patches or x.ndim == 2):
        return None
    scale = (variance.detach().double() + given["eps"]).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()


def replace_linear(builder: GraphBuilder, node: fx.Node, given: dict[str, Any]) -> Replacement:
    """A linear map of a constant weight."""
    weight, bias, x = builder.constant(given["weight"]), builder.constant(given["bias"]), given["input"]
    if weight is None or (bias is None and given["bias"] is not None) or not is_product(x, weight):
        return None, ()
    rows = x.meta["val"].numel() // weight.shape[1]
    return FusedProduct(product_of_linear, weight, bias, partial(pack_linear, rows=rows)), (x,)


def replace_convolution(builder: GraphBuilder, node: fx.Node, given: dict[str, Any]) -> Replacement:
    """A convolution of images with a constant kernel."""
    weight, bias, x = builder.constant(given["weight"]), builder.constant(given["bias"]), given["input"]
    if weight is None or (bias is None and given["bias"] is not None) or not is_product(x, weight):
        return None, ()
    if x.meta["val"].ndim != 4:
        return None, ()
    steps = (tuple(two_of(given[name])) for name in ("stride", "padding", "dilation"))
    geometry = Geometry(*steps, given["groups"])  # type: ignore[arg-type]
    pack = partial(pack_convolution, geometry=geometry, size=x.meta["val"].shape)
    return FusedProduct(product_of_patches, weight, bias, pack, geometry), (x,)


def is_product(x: fx.Node, weight: Tensor) -> bool:
    """Whether a product is one of floating-point numbers of one type, with something in it."""
    value = x.meta["val"]
    return value.dtype == weight.dtype and value.is_floating_point() and value.numel() > 0 and value.ndim > 1


def two_of(sides: list[int]) -> list[int]:
    """Numbers for both axes of an image."""
    return list(sides) * 2 if len(sides) == 1 else list(sides)


def replace_norm(builder: GraphBuilder, node: fx.Node, given: dict[str, Any]) -> Replacement:
    """A layer norm over the last axis."""
    affine = [builder.constant(given[name]) for name in ("weight", "bias")]
    if any(value is None and given[name] is not None for value, name in zip(affine, ("weight", "bias"), strict=True)):
        return None, ()
    if len(given["normalized_shape"]) != 1:
        return None, ()
    weight, bias = affine
    return FusedNorm(weight, bias, given["eps"]), (given["input"],)


def replace_pool(builder: GraphBuilder, node: fx.Node, given: dict[str, Any]) -> Replacement:
    """Max-pooling over square windows."""
    window, padding = two_of(given["kernel_size"]), two_of(given["padding"])
    stride = two_of(given["stride"]) or window
    plain = not given["ceil_mode"] and set(given["dilation"]) == {1} and given["self"].meta["val"].ndim == 4
    if not plain or any(len(set(sides)) != 1 for sides in (window, stride, padding)):
        return None, ()
    return FusedPool(window[0], stride[0], padding[0]), (given["self"],)


REPLACED: dict[Any, Callable[[GraphBuilder, fx.Node, dict[str, Any]], Replacement]] = {
    aten.linear.default: replace_linear,
    aten.conv2d.default: replace_convolution,
    aten.layer_norm.default: replace_norm,
    aten.max_pool2d.default: replace_pool,
    aten.scaled_dot_product_attention.default: replace_attention,
}
"""Operators that modules take the places of."""
