"""The loss of a model's output: the caller's, the model's own, or one that the shapes of output and targets decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skipway.errors import SkipwayError, counted
from skipway.hardware.precision import widest
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import Example

__all__ = [
    "IGNORED",
    "Loss",
    "Objective",
    "choose_objective",
    "compute_loss",
    "next_token_loss",
    "output_heads",
    "predicted_tokens",
]

Loss = Callable[[Any, Any], Tensor]
IGNORED = -100
"""The label that torch's cross-entropy and transformers' models leave out."""
GIVE = "give loss=(output, targets) → a scalar"


@dataclass(frozen=True)
class Objective:
    """The loss of a model's output, chosen once, from the first output, and the same in every later pass.

    Args:
        function: (output, targets, inputs) → the loss; no local function, which pickle could not write.
        description: of it in words.
        labelled: whether it compares with something given, and not with what is drawn at random.
        own: whether the model computes it itself, so that it is no function of the other outputs.
    """

    function: Callable[[Any, Any, Example | None], Tensor]
    description: str
    labelled: bool = True
    own: bool = False

    def __call__(self, output: Any, targets: Any = None, inputs: Example | None = None) -> Tensor:
        """The loss of an output, a tensor with one element.

        Raises:
            SkipwayError: it is not one number.
        """
        value = self.function(output, targets, inputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise SkipwayError(
                f"loss(output, targets) gives a {type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}; "
                "the rule is a tensor of one number: average over the samples"
            )
        return value


def compute_loss(output: Any, targets: Any = None, loss: Loss | None = None, inputs: Example | None = None) -> Tensor:
    """The loss of a model's output, a tensor with one element, as `choose_objective` chooses it."""
    return choose_objective(output, targets, loss, inputs=inputs)(output, targets, inputs)


def choose_objective(
    output: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    inputs: Example | None = None,
    vocabularies: Sequence[int] = (),
) -> Objective:
    """Choose the loss of a model's output: the first row that fits.

    | what there is | loss |
    |---|---|
    | `loss` | it |
    | an output with one number that requires a gradient, or with `.loss` | the model's own; where targets are there that the model was not given, or next tokens, only `.loss` or one that is computed from the output and fits no targets: another one is a part of the loss, such as a router's or a KL term, and left out |
    | an output of such numbers alone by name, as torchvision's detectors put out | their sum, without those that another is the weighted sum of: a total is taken alone |
    | targets | of each part of the output that they fit, added: cross-entropy over the axis that they lack, the mean square for real targets of the output's shape, binary cross-entropy for 0 and 1 of the output's shape |
    | tokens and an output over their vocabulary | cross-entropy of each next token |
    | none | of each part of the output, added: cross-entropy to labels drawn at random, or the mean square to noise |

    Args:
        output: what the model returned, with its graph.
        targets: what the loss compares it with: a tensor, or a tensor for each part of the output.
        loss: (output, targets) → a number.
        inputs: what the model was called with.
        vocabularies: numbers of tokens that the model knows: an output with as many classes predicts tokens.

    Raises:
        SkipwayError: targets that fit no part of the output, labels beyond the classes, only ignored labels (−100).
    """  # noqa: E501 (a row of a table)
    if loss is not None:
        return Objective(partial(given_loss, loss), "the given loss")
    own, heads, deeper = own_loss(output), {}, 0
    if own is None or targets is not None or vocabularies:
        heads, deeper = output_heads(output)
    tokens = predicted_tokens(heads, inputs, vocabularies) if heads else None
    other = own is not None and "loss" not in named_parts(output) and (targets is not None or tokens is not None)
    apart = other and is_apart(own(output), heads)
    unknowing = other and not apart and can_compare(heads, targets, inputs)
    if own is not None and not (apart or unknowing):
        refuse_ignored_labels(own, output, inputs)
        unused = "" if targets is None else "; the targets are not used"
        return Objective(own.function, own.description + unused, own=True)
    left = f"; {counted(deeper, 'tensor')} further down in the output left out" if deeper else ""
    if own is not None:
        reason = "not computed from it, left out, as of a router" if apart else "given no targets, left out"
        left += f"; {own.description}, {reason}: {GIVE} to add it"
    if targets is not None:
        return supervised(heads, targets, inputs, left)
    if tokens is not None:
        padded = ", without padding" if padding_of(inputs, tokens) is not None else ""
        return Objective(next_token_loss, f"no targets given: cross-entropy of each next token{padded}{left}")
    return unsupervised(heads, left)


def given_loss(loss: Loss, output: Any, targets: Any, inputs: Example | None) -> Tensor:
    """The loss that a caller computes."""
    try:
        return loss(output, targets)
    except SkipwayError:
        raise
    except Exception as error:  # anybody's function
        given = f"here a {type(output).__name__}, and the targets, a {type(targets).__name__}"
        mapped = (
            "a batch that is a mapping goes to the model as it is, and holds no targets: yield pairs (batch, targets)"
        )
        hint = f"; {mapped}" if targets is None and isinstance(inputs, Mapping) else ""
        raise SkipwayError(
            f"loss(output, targets) raises {type(error).__name__}: {error}; the rule is a function of the output, "
            f"{given}, that returns one number{hint}"
        ) from error


def own_loss(output: Any) -> Objective | None:
    """The loss that a model puts out itself."""
    entries = named_parts(output)
    if isinstance(output, Tensor):
        return Objective(partial(sum_parts, [""]), "the model's own", own=True) if is_loss(output) else None
    given = entries.get("loss")
    if isinstance(given, Tensor) and given.requires_grad:
        if given.numel() != 1:
            raise SkipwayError(
                f"the model's own loss has shape {tuple(given.shape)}; the rule is one number: average over the "
                f"samples, or {GIVE}"
            )
        return Objective(partial(sum_parts, ["loss"]), "the model's own", own=True)
    losses = [name for name, value in entries.items() if is_loss(value)]
    if len(losses) == 1:
        return Objective(partial(sum_parts, losses), f"the model's own (output {losses[0]})", own=True)
    if not losses:
        return None
    if isinstance(output, Mapping) and all("loss" in name for name in losses):
        outer = outermost({name: entries[name] for name in losses})
        within = ", ".join(name for name in losses if name not in outer)
        words = (
            f"the sum of the model's own: {', '.join(outer)}" if outer[1:] else f"the model's own (output {outer[0]})"
        )
        if within:
            words = f"{words}, which {'have' if outer[1:] else 'has'} others in it: {within}"
        return Objective(partial(sum_parts, outer), words, own=True)
    raise SkipwayError(f"the model puts out {len(losses)} numbers ({', '.join(losses)}); say which is the loss: {GIVE}")


def outermost(losses: Mapping[str, Tensor]) -> list[str]:
    """The losses that are part of no other one, whose sum has each of them in it once: the total alone, where there is
    one.

    A loss is part of another that is computed from it as a sum with weights above 0, and all are part of one that is
    called a total and is computed from them or as large as their sum. What is of that size by chance is not.

    Raises:
        SkipwayError: one is called a total, and is none; or is computed from others in another way, as a perplexity is.
    """
    named = next(filter(is_named_total, losses), None)
    if named is not None:
        others = {key: each for key, each in losses.items() if key != named}
        if others.keys() <= slopes_of(losses[named], others).keys() or is_sum(losses[named], list(others.values())):
            return [named]
        raise SkipwayError(
            f"the model puts out {len(losses)} losses ({', '.join(losses)}), and {named} is not the sum of the others; "
            f"{GIVE}"
        )
    inside: set[str] = set()
    for name, value in losses.items():
        others = {key: each for key, each in losses.items() if each is not value}
        slopes = slopes_of(value, others)
        if any(bool(slope <= 0) or bends(slope, others) for slope in slopes.values() if not slope.is_meta):
            raise SkipwayError(
                f"the model puts out {len(losses)} losses ({', '.join(losses)}), and {name} is computed from "
                f"{', '.join(slopes)} otherwise than as a sum with weights above 0; {GIVE}"
            )
        inside |= slopes.keys()
    return [name for name in losses if name not in inside]


def slopes_of(value: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The derivatives of a number by those others that it is computed from."""
    if not value.requires_grad or not parts:
        return {}
    found = torch.autograd.grad(value, list(parts.values()), create_graph=True, allow_unused=True)
    return {name: each for name, each in zip(parts, found, strict=True) if each is not None}


def bends(slope: Tensor, parts: Mapping[str, Tensor]) -> bool:
    """Whether a derivative depends on the numbers that it is by."""
    return any(bool(each != 0) for each in slopes_of(slope, parts).values())


def is_named_total(name: str) -> bool:
    """Whether a name says that a loss is the total.

    >>> is_named_total("loss_total"), is_named_total("total_variation_loss")
    (True, False)
    """
    words = set(name.lower().split("_"))
    return "total" in words and words <= {"total", "loss"}


def is_sum(value: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a number is the sum of others but for rounding."""
    numbers = [value, *parts]
    if any(each.is_meta for each in numbers):
        return False
    total, *terms = (float(each.detach()) for each in numbers)
    rounding = max(1e-5, *(4 * torch.finfo(each.dtype).eps for each in numbers))
    return abs(total - sum(terms)) <= rounding * max(abs(total), sum(map(abs, terms)))


def can_compare(heads: Mapping[str, Tensor], targets: Any, inputs: Example | None) -> bool:
    """Whether targets fit the heads and were not given to the model, whose own loss cannot know them then."""
    given = [each for each in tensors_in(inputs) if not each.is_meta]
    compared = [each for each in tensors_in(targets) if not each.is_meta]
    known = any(each.shape == one.shape and torch.equal(each, one) for each in compared for one in given)
    if known or not compared:
        return False
    try:
        supervised({name: head for name, head in heads.items() if head.ndim}, targets, inputs, "")
    except SkipwayError:
        return False
    return True


def is_apart(loss: Tensor, heads: Mapping[str, Tensor]) -> bool:
    """Whether a loss is not computed from any of the heads that have a gradient."""
    others = [head for head in heads.values() if head.requires_grad and head.ndim]
    if not others or not loss.requires_grad:
        return False
    return not any(each is not None for each in torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True))


def sum_parts(names: Sequence[str], output: Any, targets: Any, inputs: Example | None) -> Tensor:
    """The sum of the losses that a model puts out under some names."""
    parts = named_parts(output)
    return sum_of([parts[name].reshape(()) for name in names])


def is_loss(value: Any) -> bool:
    """Whether a part of an output is one number with a gradient."""
    return isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad


def refuse_ignored_labels(own: Objective, output: Any, inputs: Example | None) -> None:
    """Name labels that are all left out, the cause of a loss that is not a number."""
    integers = (each for each in tensors_in(inputs) if not each.is_floating_point() and not each.is_meta)
    if bool(own(output).isnan()) and any(bool((each == IGNORED).all()) for each in integers if each.numel()):
        raise only_ignored()


def only_ignored() -> SkipwayError:
    return SkipwayError(
        f"targets: every label is {IGNORED}, which cross-entropy leaves out, in the batch or in a part of it that is "
        "computed alone; give other labels, or shuffle the samples"
    )


def named_parts(output: Any) -> dict[str, Any]:
    """The parts at the top of an output by name: keys, fields, attributes, or positions."""
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, Mapping):
        return {str(name): output[name] for name in output}
    if isinstance(output, tuple | list):
        return dict(zip(getattr(output, "_fields", map(str, range(len(output)))), output, strict=True))
    return dict(getattr(output, "__dict__", {}))


def output_heads(output: Any) -> tuple[dict[str, Tensor], int]:
    """The tensors at the top of an output by name, and how many more it holds further down (states, caches).

    Where an output has `logits`, they are the heads, auxiliary ones included. Where no tensor is at the top, all are,
    and of an output of numbers alone they are.

    Raises:
        SkipwayError: it holds no real tensor.

    >>> output_heads([torch.zeros(2), torch.zeros(3)])[0].keys(), output_heads((torch.zeros(2), [torch.zeros(3)]))[1]
    (dict_keys(['0', '1']), 1)
    """
    parts = {name: part for name, part in named_parts(output).items() if is_head(part)}
    real = [each for each in tensors_in(output) if each.is_floating_point()]
    everything = [each for each in real if each.ndim] or real
    if not parts:
        parts = {str(number): each for number, each in enumerate(everything)}
    if any("logits" in name for name in parts):
        parts = {name: part for name, part in parts.items() if "logits" in name}
    if not parts:
        kinds = sorted({str(each.dtype).removeprefix("torch.") for each in tensors_in(output)})
        held = f", but {' and '.join(kinds)}" if kinds else ""
        raise SkipwayError(
            f"the model's output, a {type(output).__name__}, holds no tensor of real numbers{held}; the rule is an "
            "output of real numbers: return torch.view_as_real(output) of complex ones"
        )
    return parts, len(everything) - len(parts)


def is_head(part: Any) -> bool:
    """Whether a part of an output is a tensor of real numbers with axes."""
    return isinstance(part, Tensor) and part.ndim > 0 and part.is_floating_point()


class Match(NamedTuple):
    """A loss of one head that its targets fit.

    Args:
        words: its name.
        function: (head, targets) → the loss.
        shape: of the head without its sample axis, which heads that share targets have in common.
    """

    words: str
    function: Callable[[Tensor, Tensor], Tensor]
    shape: torch.Size


def supervised(heads: Mapping[str, Tensor], targets: Any, inputs: Example | None, left: str) -> Objective:
    """The sum of the losses of all heads that the targets fit."""
    given = targets_of_heads(heads, targets)
    tokens = [each.shape for each in tensors_in(inputs) if not each.is_floating_point()]
    matches = {name: match_targets(heads[name], each, tokens) for name, each in given.items()}
    fitting = {name: match for name, match in matches.items() if match is not None}
    if isinstance(targets, Tensor):
        if len(heads) == 1:
            check_labels(next(iter(heads.values())), targets, fitting)
        if len({match.shape for match in fitting.values()}) > 1:
            raise SkipwayError(f"the targets fit several outputs of other shapes ({', '.join(fitting)}); {GIVE}")
    if not fitting or (not isinstance(targets, Tensor) and len(fitting) < len(given)):
        raise unfitting(heads, given)

    others = [name for name in heads if name not in fitting]
    skipped = f"; no target fits output {', '.join(others)}" if others else ""
    words = sum_words([match.words for match in fitting.values()], list(fitting))
    return Objective(partial(supervised_loss, fitting), words + skipped + left)


def supervised_loss(matches: Mapping[str, Match], output: Any, targets: Any, inputs: Example | None) -> Tensor:
    """The sum of the losses of the heads that the targets fit."""
    heads, _ = output_heads(output)
    given = targets_of_heads(heads, targets)
    return sum_of([match.function(heads[name], given[name]) for name, match in matches.items()])


def targets_of_heads(heads: Mapping[str, Tensor], targets: Any) -> dict[str, Tensor]:
    """The targets of each head: one tensor for all of them, or tensors by the names or positions of the heads."""
    if isinstance(targets, Tensor):
        return dict.fromkeys(heads, targets)
    parts = {name: part for name, part in named_parts(targets).items() if isinstance(part, Tensor)}
    if len(parts) == len(heads) > 0 and not parts.keys() <= heads.keys():
        parts = dict(zip(heads, parts.values(), strict=True))
    if not parts or not parts.keys() <= heads.keys():
        raise SkipwayError(
            f"targets={type(targets).__name__}: the rule is a tensor, or one for each of the model's "
            f"{counted(len(heads), 'output')}, where no loss is given; {GIVE}"
        )
    return parts


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses]).sum() if len(losses) > 1 else losses[0]


def sum_words(words: Sequence[str], names: Sequence[str]) -> str:
    """The words of a sum of losses over heads."""
    kinds = " and ".join(dict.fromkeys(words))
    if len(words) == 1:
        return f"{kinds} of output {names[0]}" if names[0] else kinds
    return f"{kinds}, the sum over {len(words)} outputs ({', '.join(names)})"


def match_targets(head: Tensor, targets: Tensor, tokens: Sequence[torch.Size]) -> Match | None:
    """The loss that fits the shapes and values of one head and its targets; None if none does."""
    if targets.is_floating_point():
        return match_real(head, targets)
    labels = without_unit_axes(targets, head)
    axes = class_axes(head, labels)
    if axes and head.shape[axes[-1]] > 1:
        if not labels_fit(labels, head.shape[axes[0]]):
            return None
        axis = axes[-1] if labels.shape in tokens else axes[0]  # tokens keep their place, as in language models
        over = f" over axis {axis} of the output {tuple(head.shape)}" if head.ndim > 2 else ""
        doubt = f" (axis {(set(axes) - {axis}).pop()} fits as well: if it is the classes, {GIVE})" if axes[1:] else ""
        return Match(f"cross-entropy{over}{doubt}", partial(cross_entropy, axis=axis), head.shape[1:])
    if squeezed(head) == squeezed(targets):
        return match_real(head, targets.to(head.dtype))
    return None


def match_real(head: Tensor, targets: Tensor) -> Match | None:
    """The loss for real targets: class probabilities, 0 and 1, or values."""
    if squeezed(head) != squeezed(targets):
        return None
    words, loss = "mean squared error", F.mse_loss
    if head.shape == targets.shape and are_distributions(targets):
        words, loss = "cross-entropy to class probabilities", F.cross_entropy
    elif are_binary(targets):
        words, loss = "binary cross-entropy of logits", F.binary_cross_entropy_with_logits
    return Match(words, partial(compare, loss), head.shape[1:])


def are_binary(targets: Tensor) -> bool:
    """True if targets are 0 and 1, and both."""
    return not targets.is_meta and set(targets.unique().tolist()) == {0, 1}


def compare(loss: Callable[[Tensor, Tensor], Tensor], head: Tensor, targets: Tensor) -> Tensor:
    """A loss of elements; axes of length 1 are not broadcast."""
    return loss(head.float(), targets.reshape(head.shape).float())


def cross_entropy(head: Tensor, targets: Tensor, *, axis: int) -> Tensor:
    """Cross-entropy over one axis, averaged over the labels that are not ignored.

    Raises:
        SkipwayError: a label is no class, as may happen in a later batch than the first.
    """
    labels, classes = without_unit_axes(targets, head), head.shape[axis]
    if not labels_fit(labels, classes):
        raise beyond_classes(*label_range(labels), classes, axis)
    return F.cross_entropy(head.movedim(axis, 1).float(), labels.long(), ignore_index=IGNORED)


def squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor without axes of length 1, the samples' aside."""
    return (*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1))


def without_unit_axes(targets: Tensor, head: Tensor) -> Tensor:
    """Labels (N, 1) as (N,), and masks (N, 1, H, W) as (N, H, W), beside an output with as many axes."""
    return targets.squeeze(1) if targets.ndim == head.ndim > 1 and targets.shape[1] == 1 < head.shape[1] else targets


def labels_fit(labels: Tensor, classes: int) -> bool:
    """Whether every label that counts is a class."""
    if labels.is_meta or not labels.numel():
        return True
    low, high = label_range(labels)
    return low >= 0 and high < classes


def label_range(labels: Tensor) -> tuple[int, int]:
    """The smallest and the largest label that counts.

    Raises:
        SkipwayError: none counts.
    """
    counting = labels[labels != IGNORED]
    if not counting.numel():
        raise only_ignored()
    low, high = torch.aminmax(counting.long())
    return int(low), int(high)


def class_axes(head: Tensor, labels: Tensor) -> list[int]:
    """The axes of an output without which it has the shape of the labels; all of them are as long."""
    return [axis for axis in range(1, head.ndim) if (*head.shape[:axis], *head.shape[axis + 1 :]) == labels.shape]


def check_labels(head: Tensor, targets: Tensor, fitting: Mapping[str, Match]) -> None:
    """Refuse labels beyond the classes of the only head."""
    labels = without_unit_axes(targets, head)
    binary = any("binary" in match.words for match in fitting.values())
    axes = class_axes(head, labels)
    if targets.is_floating_point() or binary or not axes or not labels.numel() or labels.is_meta:
        return
    classes = head.shape[axes[0]]
    if fitting and classes > 1:
        return
    low, high = label_range(labels)
    if low == high == 0 and classes == 1:
        raise SkipwayError(
            f"targets: every label is 0, and the output has one class on axis {axes[-1]}; the rule is at least two "
            f"classes, or both 0 and 1 among the labels; {GIVE}"
        )
    raise beyond_classes(low, high, classes, axes[-1])


def beyond_classes(low: int, high: int, classes: int, axis: int) -> SkipwayError:
    """Name labels beyond the classes of an output."""
    what = f"the largest label is {high}" if high >= classes else f"the smallest label is {low}"
    rule = "0 <= label < classes" if low < 0 else "label < classes"
    return SkipwayError(
        f"targets: {what}, and the output has {classes} classes on axis {axis}; the rule is {rule}: build the model "
        "with more classes, or give a loss"
    )


def unfitting(heads: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> SkipwayError:
    """Name the shapes of outputs and targets that do not fit each other."""
    shapes = ", ".join(f"{name + ' ' if name else ''}{tuple(head.shape)}" for name, head in heads.items())
    given = ", ".join(dict.fromkeys(f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in targets.values()))
    return SkipwayError(
        f"targets: {given} beside the output {shapes}: the rule is class numbers (int64) in the output's shape without "
        f"the axis of classes, or real numbers in its shape; {GIVE}"
    )


def predicted_tokens(heads: Mapping[str, Tensor], inputs: Example | None, vocabularies: Sequence[int]) -> Tensor | None:
    """The tokens that the first head predicts: whole numbers in its shape without the last axis, its vocabulary."""
    head = next(iter(heads.values()))
    if head.ndim < 3 or head.shape[-1] not in vocabularies or head.shape[1] < 2:
        return None
    names = ("decoder_input_ids", "input_ids")
    named = [inputs[name] for name in names if name in inputs] if isinstance(inputs, Mapping) else []
    fitting = (each for each in tensors_in([*named, inputs]) if each.shape == head.shape[:-1])
    return next((each for each in fitting if not each.is_floating_point()), None)


def next_token_loss(output: Any, targets: Any, inputs: Example | None) -> Tensor:
    """Cross-entropy between the output at each position and the token at the next one."""
    heads, _ = output_heads(output)
    head = next(iter(heads.values()))
    tokens = predicted_tokens(heads, inputs, (head.shape[-1],))
    if tokens is None:
        raise SkipwayError(f"the output has shape {tuple(head.shape)}, and no tokens of the input have it; {GIVE}")
    labels = tokens[:, 1:].long()
    padding = padding_of(inputs, tokens)
    if padding is not None:
        labels = labels.masked_fill(padding[:, 1:] | padding[:, :-1], IGNORED)
    return F.cross_entropy(head[:, :-1].flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def padding_of(inputs: Example | None, tokens: Tensor) -> Tensor | None:
    """Where the attention mask beside tokens, as a tokenizer gives it, is 0; None without one, or where it never is."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != tokens.shape or bool(mask.all()):
        return None
    return mask == 0


def unsupervised(heads: Mapping[str, Tensor], left: str) -> Objective:
    """The sum, over all heads, of a loss to labels or values drawn at random."""
    words = ["cross-entropy to random labels" if is_row(head) else "mean square to noise" for head in heads.values()]
    return Objective(unsupervised_loss, f"no targets given: {sum_words(words, list(heads))}{left}", labelled=False)


def unsupervised_loss(output: Any, targets: Any, inputs: Example | None) -> Tensor:
    """The sum of the losses of all heads to labels or values drawn at random."""
    return sum_of([random_loss(head) for head in output_heads(output)[0].values()])


def is_row(head: Tensor) -> bool:
    """Whether an output is a row of classes for each sample."""
    return head.ndim == 2 and head.shape[1] > 1


def random_loss(head: Tensor) -> Tensor:
    """Cross-entropy to labels drawn at random, or the mean square to noise where the output is no row of classes."""
    if is_row(head):
        labels = torch.randint(head.shape[1], (head.shape[0],), device=head.device)
        return F.cross_entropy(head.float(), labels)
    return F.mse_loss(head.float(), torch.randn_like(head, dtype=torch.float32))


def are_distributions(targets: Tensor) -> bool:
    """True if targets (N, C), C > 1, are non-negative and every row adds up to 1."""
    if targets.ndim != 2 or targets.shape[1] < 2 or targets.is_meta:
        return False
    return bool((targets >= 0).all()) and bool(((widest(targets).sum(1) - 1).abs() < 1e-2).all())
