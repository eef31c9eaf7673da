"""Depth: `lesion`, `influence`, `shorten`, `deepen`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from skipway.errors import SkipwayError, counted
from skipway.nn import Multiply, Residual
from skipway.surgery.block_call import BlockCall
from skipway.surgery.block_copies import by_container, listed_copies, silent_copy, slotted_copy
from skipway.surgery.block_list import edit_container, number_blocks, numbered_attributes
from skipway.surgery.block_survey import BlockSurvey, find_blocks
from skipway.surgery.checks import CHECKS, EQUAL_WITH_DRAWS
from skipway.surgery.config_fit import SAVING, has_config
from skipway.surgery.decoding_check import decoding_checks
from skipway.surgery.insertion import disable_fused_path
from skipway.surgery.insertion_point import find_insertion_points, insert_at
from skipway.surgery.operation import Operation, abbreviate
from skipway.surgery.preconditions import require_operable, require_values
from skipway.surgery.scores import Score, ScoreError, checked_score
from skipway.surgery.transaction import Transaction, transaction
from skipway.surgery.verification import output_gap, outputs
from skipway.tracing import Example, as_example, watch
from skipway.tracing.arguments import path_text
from skipway.tracing.chain import chain_from_program
from skipway.validation import check_call, check_rule, check_tolerance, is_whole

__all__ = ["Skipped", "deepen", "influence", "lesion", "shorten"]

ROUNDING = 1e-5
"""Difference of outputs, relative to their largest value, up to which two networks compute the same."""


class Skipped(nn.Module):
    """Takes the place of a block that was left out, and returns x in the form of the block's output.

    It has the plain attributes of the block and, without their weights, of the modules in it, since the module that
    calls a block may read them.

    Args:
        block: that is left out.
        call: how it is called.
        form: its output without tensors.
    """

    def __init__(self, block: nn.Module, call: BlockCall, form: Any) -> None:
        super().__init__()
        vars(self).update(plain_attributes(block))
        self.call, self.form = call, form
        self.train(block.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call.skip(self.form, args, kwargs)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are neither weights nor hooks; modules in it stand for themselves with theirs."""
    own = {
        name: value for name, value in vars(module).items() if not (name.startswith("_") or isinstance(value, Tensor))
    }
    return {name: SimpleNamespace(**plain_attributes(child)) for name, child in module.named_children()} | own


@check_call
def lesion(model: nn.Module, example: Example, names: Iterable[str]) -> Operation:
    """Silence branches, y = x + 0 · F(x), in place: the study of Veit et al. 2016 (https://arxiv.org/abs/1605.06431).

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        names: of connections, as `chain(model, example)` gives them.

    Raises:
        SkipwayError: a name is unknown, or its branch has no place to be silenced at; the model is as before.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True).eval()
    >>> x = torch.randn(2, 3, 8)
    >>> operation = lesion(layer, x, [":1", ":2"])
    >>> torch.equal(layer(x), x)
    True
    """
    model, example = require_operable(model), as_example(example)
    program = watch(model, example)
    known = {connection.name: connection for connection in chain_from_program(model, program)}
    with transaction(model, example, title=f"lesion of {type(model).__name__}") as change:
        for name in listed_names(names):
            if name not in known:
                listed = abbreviate(list(known)) or "none"
                raise SkipwayError(f"connection {name!r} is unknown; chain(model, example) lists them: {listed}")
            try:
                points = find_insertion_points(model, program, known[name])
            except SkipwayError as problem:
                raise SkipwayError(f"connection {name!r} cannot be silenced: {problem}") from problem
            for point in points:
                insert_at(change, model.get_submodule(point.name), point, Multiply(0.0))
                disable_fused_path(change, point.slot)
            change.touched[name] = ", ".join(map(str, points))
        return change.commit()


def listed_names(names: str | Iterable[str]) -> list[str]:
    """Names of connections, of which there has to be one; a lone name is a list of one.

    Raises:
        SkipwayError: it is no list of names, or an empty one.
    """
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else []
    fits = bool(listed) and all(isinstance(name, str) for name in listed)
    rule = "names of connections, at least one; chain(model, example) lists them"
    check_rule("names", names, fits, rule)
    return listed


@check_call
def influence(model: nn.Module, example: Example, score: Score | None = None) -> dict[str, float]:
    """Return how much each block that can be left out matters, least first; the model is left alone.

    Args:
        model: any module that `chain` can read.
        example: a batch; outputs are compared on it.
        score: model → number, higher is better (the accuracy on a validation set, for example); the influence is what
            is lost without the block. By default the mean relative change of the output, |f(x) − f₋ₗ(x)| / |f(x)|.

    Raises:
        SkipwayError: there are blocks, and none of them can be left out; says why.
    """
    model, example = require_values(model, "influence"), as_example(example)
    survey = find_blocks(model, example)
    if survey.refused and not survey.calls:
        raise SkipwayError(f"{type(model).__name__} has no block that can be left out: {survey.reasons()}")
    return measure_influence(model, example, score, survey)


def measure_influence(model: nn.Module, example: Example, score: Score | None, survey: BlockSurvey) -> dict[str, float]:
    """The influence of each block; why others cannot be left out is noted in the survey."""
    # what blocks write into caches is put out after what the network computes, and is missing without them
    count = 1 if any(call.written_arguments for call in survey.calls.values()) else None
    before = outputs(model, example)[:count] if score is None else []

    def agreement(changed: nn.Module) -> float:
        return -output_gap(before, outputs(changed, example)[:count], mean=True)

    measure, found = agreement if score is None else checked_score(score), {}
    full = measure(model)
    for name, call in survey.calls.items():
        with transaction(model, title=f"{name} left out") as trial:  # never committed
            leave_out(trial, name, survey)
            try:
                found[name] = full - measure(model)
            except ScoreError:
                raise
            except Exception as problem:  # whatever a network raises that is not given what it expects
                what = abbreviate([path_text(path, what="output") for path in call.computed])
                returned = f", which returns {what} as well" if what else ""
                survey.refused[name] = f"the network does not run without it{returned} ({problem})"
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def leave_out(change: Transaction, name: str, survey: BlockSurvey) -> None:
    """Put the identity in the place of a block, in place."""
    block = change.model.get_submodule(name)
    change.set_submodule(name, Skipped(block, survey.calls[name], survey.forms[name]))


@check_call
def shorten(model: nn.Module, example: Example, to: int, score: Score | None = None) -> Operation:
    """Leave out the blocks of least influence until `to` of those that can be left out remain, in place.

    The parameters of the blocks are gone from the state dict until `undo`; the network is best trained a little more.
    In a network that is built from a config which counts its blocks (transformers), later blocks and their keys are
    renumbered and the config is changed, so that weights and config build the same network again. Elsewhere an
    identity is in the place of a block, and the keys of the others stay.

    Args:
        model: any module that `chain` can read.
        example: a batch to measure the influence on.
        to: blocks that remain, ≥ 0, of those that `influence` lists (a transformer's block, or in networks of ours
            each of its two connections).
        score: see `influence`.

    Returns:
        the operation; its report holds the difference of the outputs and the influence of every block.

    Raises:
        SkipwayError: fewer blocks can be left out than asked for; the model is as before.
    """
    wrapped, model, example = model, require_values(model, "shorten"), as_example(example)
    check_rule("to", to, is_whole(to), "a whole number of blocks")
    survey = find_blocks(model, example)
    measured = measure_influence(model, example, score, survey)
    check_range("to", to, 0, len(measured), f"{type(model).__name__} has {{}} blocks that can be left out", survey)
    surplus = len(measured) - to
    title, checks = f"{type(model).__name__} shortened to {counted(to, 'block')}", (*CHECKS, *decoding_checks(model))
    with transaction(model, example, title=title, checks=checks, wrapped=wrapped) as change:
        change.report = measured
        if not any(measured.values()):
            change.refused["influence"] = (
                "it is 0 for every block, so that it chose none: branches that put out 0 yet (a warm-up, gains that "
                "start at 0) have to be trained first, or give a score"
            )
        for container, names in by_container(list(measured)[:surplus]).items():
            how = take_out(change, survey, container, names)
            change.touched = {name: f"influence {measured[name]:.3g}; {how}" for name in names} | change.touched
        change.refused |= kept_for_depth(model)
        return change.commit()


def take_out(change: Transaction, survey: BlockSurvey, container: str, names: Sequence[str]) -> str:
    """Take blocks out of a container that the network's config counts, or put identities in their places, in place;
    returns which in words.

    Raises:
        SkipwayError: an identity leaves a slot in a cache empty that the network may read.
    """
    mark = change.mark
    for name in names:
        leave_out(change, name, survey)
    expected = change.current_outputs()
    change.roll_back(mark)

    def check() -> None:
        if not output_gap(expected, change.current_outputs()) <= ROUNDING:
            raise SkipwayError("the output would not be that with identities in their places")

    members = list(change.model.get_submodule(container)._modules)
    gone = {members.index(name.rpartition(".")[2]) for name in names}
    if has_config(change.model):
        try:
            with change.savepoint():
                edit_container(change, container, [place for place in range(len(members)) if place not in gone], check)
            return "taken out; later blocks are renumbered"
        except Exception as problem:  # whatever a network raises that was not made for it
            change.refused["config"] = f"it does not build the shortened network: {problem}; {SAVING}"
    row = list(change.model.get_submodule(container).children())
    numbers = numbered_attributes(row)
    for name in names:
        leave_out(change, name, survey)
    if written := {what for name in names for what in survey.calls[name].written_arguments}:
        if not numbers:
            raise SkipwayError(
                f"{abbreviate(names)} cannot be left out: an identity in its place would write nothing into "
                f"{abbreviate(sorted(written))}, which is read later; give an example without it (use_cache=False)"
            )
        number_blocks(change, [block for place, block in enumerate(row) if place not in gone], numbers)
        check()
    return "an identity is in its place, so that other keys stay"


@check_call
def deepen(model: nn.Module, example: Example, by: int, *, tolerance: float = 1e-5) -> Operation:
    """Insert a copy after each of `by` blocks, evenly spread, that starts as the identity: what its branches end in is
    0, in place.

    The network computes what it did, and every copy learns from the first step on, in a frozen network too: all
    parameters of a copy are trained where none of its block is, and elsewhere those that its branches end in. A copy
    is given the block's output as x and all other arguments of the block, masks, positions and caches, and is numbered
    where blocks are numbered.
    In a network that is built from a config which counts its blocks (transformers), the copy becomes the next block of
    the container: later blocks and their keys are renumbered, and the config is changed, so that weights and config
    build the same network again. Elsewhere the copy is a part of its block, and existing keys stay.

    Args:
        model: any module that `chain` can read.
        example: what the model is called with.
        by: blocks that are added, 1 ≤ by ≤ the blocks that can be copied.
        tolerance: bound on the difference of the outputs, relative to their largest value.

    Raises:
        SkipwayError: too many are asked for, a branch cannot be silenced, a block writes into a cache that has no
            place for its copy, or the output changed (in a post-norm network whose norms are trained a copy is no
            identity); the model is as before.
    """
    wrapped, model, example = model, require_values(model, "deepen"), as_example(example)
    check_rule("by", by, is_whole(by), "a whole number of blocks")
    check_tolerance("tolerance", tolerance)
    program = watch(model, example)
    survey = find_blocks(model, example, program)
    blocks = list(survey.calls)
    check_range("by", by, 1, len(blocks), f"{type(model).__name__} has {{}} blocks that can be copied", survey)
    usual = usual_blocks(model, blocks)
    offered = usual if by <= len(usual) else blocks
    chosen = [offered[(2 * number + 1) * len(offered) // (2 * by)] for number in range(by)]
    title = f"{type(model).__name__} deepened by {counted(by, 'block')}"
    hint = (
        "a copy of these blocks is not the identity where its branches put out 0: their skip is weighted or gated, or "
        "what follows the addition is not the identity on its own output"
    )
    checks = (*EQUAL_WITH_DRAWS, *decoding_checks(model))
    with transaction(
        model, example, title=title, tolerance=tolerance, hint=hint, checks=checks, wrapped=wrapped
    ) as change:
        for name in chosen:
            if norm := program[program.returned[name][survey.calls[name].output]].norm:
                change.recast.update(model.get_submodule(norm).parameters())  # the copy ends in this norm again
        for container, names in by_container(chosen).items():
            copies = {name: silent_copy(change, survey, name, program) for name in names}
            if not listed_copies(change, container, copies):
                for number, name in enumerate(names):
                    slotted_copy(change, survey, name, copies[name], number)
        try:
            change.current_outputs()
        except Exception as problem:  # whatever a copy of somebody's block raises
            raise SkipwayError(
                f"a copy of {abbreviate(chosen)} does not run with the arguments of its block{cache_hint(survey)}: "
                f"{problem}"
            ) from problem
        change.refused |= kept_for_depth(model)
        return change.commit()


def kept_for_depth(model: nn.Module) -> dict[str, str]:
    """What schemes chose for the number of branches that a network had, and is left as it is."""
    dressed = (module for module in model.modules() if isinstance(module, Residual))
    schemes = {str(each.scheme) for each in dressed if follows_depth(each)}
    if any(isinstance(module, Multiply) and module.branch_factors is not None for module in model.modules()):
        schemes.add("constants with a base depth")
    return {"depth": f"chosen for the number of branches before: {', '.join(sorted(schemes))}"} if schemes else {}


def follows_depth(residual: Residual) -> bool:
    """Whether a scheme dresses a connection otherwise in a deeper network."""
    site, scheme = residual.site, residual.scheme
    if site is None or scheme is None:
        return False
    deeper = replace(site, depth=2 * site.depth)
    hooks: tuple[Any, ...] = (scheme.scale, scheme.enter, scheme.drop, lambda where: scheme.carry(where, None))  # type: ignore[attr-defined]
    return any(repr(hook(site)) != repr(hook(deeper)) for hook in hooks)


def check_range(name: str, value: int, least: int, most: int, what: str, survey: BlockSurvey) -> None:
    """Refuse a number of blocks that is out of range; says why there are no more."""
    if least <= value <= most:
        return
    rule = f"the rule is {least} <= {name} <= {most}" if most >= least else f"no {name} will do"
    reasons = f"; no such blocks: {survey.reasons()}" if survey.refused else ""
    raise SkipwayError(f"{name}={value}: {what.format(most)}; {rule}{reasons}")


def cache_hint(survey: BlockSurvey) -> str:
    """The way out where blocks write into what they are given."""
    written = sorted({what for call in survey.calls.values() for what in call.writes})
    return f", which writes into {abbreviate(written)} (give an example with use_cache=False)" if written else ""


def usual_blocks(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Blocks that have the weights that most in their container have: T5's first block alone has a table of positions,
    and a copy of it is not what the config describes.
    """
    keys = {name: tuple(model.get_submodule(name).state_dict()) for name in blocks}
    counts = {around: Counter(keys[name] for name in names) for around, names in by_container(blocks).items()}
    most = {around: count.most_common(1)[0][1] for around, count in counts.items()}
    return [name for name in blocks if counts[around := name.rpartition(".")[0]][keys[name]] == most[around]]
