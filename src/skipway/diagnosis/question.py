"""`diagnose(model, example)`: the question whether a training will learn, of one model or of several."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from skipway.diagnosis.batches import Batches, is_finite
from skipway.diagnosis.comparison import Comparison, compare_diagnoses, model_names
from skipway.diagnosis.diagnosis import PASSES, Diagnosis, examine
from skipway.diagnosis.progress import PassCounter
from skipway.diagnosis.settings import Settings, settings_of
from skipway.diagnosis.subject import Subject
from skipway.errors import SkipwayError, counted
from skipway.probes.objective import Loss
from skipway.tracing import Example, as_batch, preserved_state, unwrap
from skipway.tracing.containers import tensors_in
from skipway.tracing.example import batches_of
from skipway.tracing.foreign_errors import ForeignErrors
from skipway.tracing.paths import condense_paths
from skipway.tracing.restoration import generator_devices, own_tensors, seed_generators
from skipway.tracing.watch import refuse_scripted
from skipway.validation import check_rule, check_seed, check_whole, is_real

__all__ = ["diagnose"]

Models = Sequence[nn.Module] | Mapping[str, nn.Module]


@overload
def diagnose(
    model: nn.Module,
    example: Example,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str | Callable[[int], float] = "constant",
    steps: int = 1000,
    certainty: float = 0.95,
    allowance: float = 0.03,
    remedies: int = 6,
    training: bool = True,
    thorough: bool = False,
    seed: int = 0,
) -> Diagnosis: ...


@overload
def diagnose(
    model: Models,
    example: Example,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str | Callable[[int], float] = "constant",
    steps: int = 1000,
    certainty: float = 0.95,
    allowance: float = 0.03,
    remedies: int = 6,
    training: bool = True,
    thorough: bool = False,
    seed: int = 0,
) -> Comparison: ...


def diagnose(
    model: nn.Module | Models,
    example: Example,
    targets: Any = None,
    *,
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: str | Callable[[int], float] = "constant",
    steps: int = 1000,
    certainty: float = 0.95,
    allowance: float = 0.03,
    remedies: int = 6,
    training: bool = True,
    thorough: bool = False,
    seed: int = 0,
) -> Diagnosis | Comparison:
    """Tell from the first steps of a training whether the network will learn, what is at fault, why, and what to do.

    The optimizer's first steps, on the planned warm-up and schedule, are taken and taken back, until the verdict is
    certain or the allowance is spent; beside them it takes at most 6 forward-backward passes over the batch. The model
    is left alone: its parameters, gradients and buffers, the mode of its modules and the random state are afterwards as
    they were, and no hook stays. How often verdicts are right is in `benchmarks/trainability`.

    Several models are compared: each is diagnosed with the same batches, seeds and settings, and takes trial steps of
    the same cost; one that fails is a row of the comparison.

    Args:
        model: any `torch.nn.Module`, on any device, not yet trained; or several, in a list or by name in a mapping.
        example: what the model is called with, 32 to 128 samples, at least 8 (or 4 sequences whose tokens have
            labels): a tensor, a tuple of positional arguments, or a mapping of keyword arguments. The samples are on
            the first axis, or on the second one if targets or outputs tell so. Or batches: a `DataLoader` or another
            iterable, a list of them, or a function that returns an iterator. The first one is measured, each trial
            step takes another one, moved to the model's device, and the planned training's batch is the loader's.
            Without batches the trial steps share the one given, an eighth of it each.
        targets: what the loss compares the output with, a tensor or one for each part of the output; None: those of
            the loader, the next tokens of a language model, else drawn at random.
        loss: (output, targets) → a scalar; None: as `skipway.probes.objective.choose_objective` chooses it, which
            `Diagnosis.remarks` tells: the model's own where it puts one out, else by the shapes of output and targets.
        optimizer: "sgd" (momentum 0.9), "adam", "adamw", "rmsprop", "adagrad", or a torch optimizer made for `model`,
            or several for parts of it, whose classes, groups and learning rates are taken over; they take no step
            themselves, and parameters outside of them stay as they are.
        lr: learning rate of the weights; None: the optimizer's own, else 0.1 for SGD, 0.01 for Adagrad and 0.001 for
            the others.
        weight_decay: of the weights; scales, norms and biases as `skipway.param_groups` has it.
        warmup: planned steps of warm-up.
        schedule: of the learning rate after warm-up, as in `Settings`: "constant", "cosine", "linear", or a function of
            the step that returns the factor.
        steps: planned steps of training; a learning rate that gets nowhere in them is too low.
        certainty: share of right verdicts on trainings that learn, and on those that fail, that the thresholds aim at,
            on networks as in `benchmarks/trainability`. Between 0.5 and 1. Up to 0.95 was calibrated (0.97 on one
            batch); above that only a loss beyond hope decides.
        allowance: share of the planned training that the trial steps may cost, steps times batch; at least 12 are
            taken, and at most 240.
        remedies: how many remedies are tried at most where the verdict is not "trains" and the odds are below 80 %,
            on copies of the model that are looked at as long; 0: none.
        training: measure in training mode (batch statistics, dropout); False: in evaluation mode.
        thorough: also measure the largest singular value of every connection's Jacobian by power iteration, at six
            more passes.
        seed: of dropout and of random targets.

    Returns:
        a `Diagnosis`; of several models a `Comparison`, in the order in which to train them.

    Raises:
        SkipwayError: the model has nothing to train, no values (meta device) or fails on the example; the example has
            fewer than 8 samples; the targets fit no output; the output holds no tensor; the loss is no scalar or
            depends on no parameter.

    >>> import torch, skipway as sw
    >>> model = sw.build("resnet", depth=8, scheme="skipinit(init=1.0, norm='remove')", classes=10, width=4)
    >>> images, labels = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    >>> diagnosis = sw.diagnose(model, images, targets=labels, lr=0.1, remedies=1)
    >>> diagnosis.verdict in ("trains", "will not train", "undecided"), 0 <= diagnosis.odds <= 1
    (True, True)
    """
    check_seed("seed", seed)
    check_rule("loss", loss, loss is None or callable(loss), "a function (output, targets) → a scalar")
    check_rule("certainty", certainty, is_real(certainty) and 0.5 < certainty < 1, "0.5 < certainty < 1")
    check_whole("remedies", remedies, 0, of="remedies")
    check_rule("allowance", allowance, is_real(allowance) and 0 <= allowance <= 1, "0 <= allowance <= 1")
    if torch.is_inference_mode_enabled():
        raise SkipwayError("diagnose(): it takes training steps, which torch.inference_mode() refuses; call it outside")
    listed = isinstance(model, Sequence | Mapping) and not isinstance(model, nn.Module | str)
    several = model_names(model) if listed else None
    if several is not None and not isinstance(optimizer, str):
        raise SkipwayError(
            "optimizer: a torch optimizer is made for one of the models; for several give a name, such as "
            'optimizer="adamw"'
        )
    plan = {"warmup": warmup, "schedule": schedule, "steps": steps}
    named = None
    if isinstance(optimizer, str):
        named = Settings(optimizer=optimizer, lr=lr, weight_decay=weight_decay, **plan)
    shared: dict[torch.device | None, Batches | None] = {}

    def judge(one: nn.Module) -> Diagnosis:
        began, one = time.perf_counter(), unwrap(one)
        settings = named
        if settings is None:
            settings = settings_of(optimizer, one)  # type: ignore[arg-type]
            settings = replace(settings, **plan, lr=settings.lr if lr is None else lr)
        device = next((parameter.device for parameter in one.parameters()), None)
        if device not in shared:
            with preserved_state(one):  # a loader draws random numbers
                seed_generators(generator_devices(own_tensors(one)), seed)
                shared[device] = batches_for(device, example, targets)
        batches = shared[device]
        inputs, wanted = as_batch(example, targets) if batches is None else batches.first
        progress = PassCounter(PASSES + (6 if thorough else 0) + allowance * steps)
        subject = Subject(one, inputs, wanted, loss, training=training, seed=seed, progress=progress)
        subject.batches = None if batches is None or batches.single else batches
        try:
            # what reads a parametrized weight may change buffers, too, as under spectral norm
            with ForeignErrors(one, inputs), preserved_state(one):
                check_subject(subject)
                limits = {"certainty": certainty, "allowance": allowance, "remedies": remedies}
                return examine(subject, settings, thorough=thorough, began=began, **limits)
        finally:
            progress.finish()

    if several is None:
        return judge(model)  # type: ignore[arg-type]
    return compare_diagnoses(outcomes_of(several, judge), allowance=allowance)


def outcomes_of(
    models: Mapping[str, nn.Module], judge: Callable[[nn.Module], Diagnosis]
) -> dict[str, Diagnosis | SkipwayError]:
    """The diagnosis of every model, or why there is none."""
    outcomes: dict[str, Diagnosis | SkipwayError] = {}
    for name, model in models.items():
        try:
            outcomes[name] = judge(model)
        except SkipwayError as error:
            outcomes[name] = error
    return outcomes


def batches_for(device: torch.device | None, example: Example, targets: Any) -> Batches | None:
    """The batches that an example stands for, on a device; None where it is one batch, or where the targets
    are those of one.
    """
    loader = batches_of(example) if targets is None else None
    return None if loader is None else Batches(loader, device)


def is_packed(part: Any) -> bool:
    """Whether a part of an example is a packed sequence."""
    return isinstance(part, PackedSequence)


def check_subject(subject: Subject) -> None:
    """Refuse, before anything runs, what cannot be diagnosed."""
    refuse_scripted(subject.model)
    if isinstance(subject.inputs, tuple):
        try:
            inspect.signature(subject.model.forward).bind(*subject.inputs)
        except TypeError as error:
            raise SkipwayError(
                f"example=({', '.join(type(part).__name__ for part in subject.inputs)}): a tuple is positional "
                f"arguments, and {type(subject.model).__name__}.forward refuses them ({error}); targets go to targets="
            ) from error
    if not subject.parameters:
        raise SkipwayError(
            f"model={type(subject.model).__name__}: no parameter has requires_grad=True, so there is nothing to train; "
            "unfreeze some"
        )
    if complex_ones := [name for name, parameter in subject.parameters.items() if parameter.is_complex()]:
        raise SkipwayError(
            f"model={type(subject.model).__name__}: {condense_paths(complex_ones)} of complex numbers; the rule is "
            "real parameters: hold them as torch.view_as_real(…), and read them by torch.view_as_complex"
        )
    if any(parameter.is_meta for parameter in subject.model.parameters()):
        raise SkipwayError(
            f"model={type(subject.model).__name__}: on the meta device it has no values to measure; initialise it on a "
            "real device, or look at its connections alone: skipway.chain(model, example)"
        )
    for name, given in (("example", subject.inputs), ("targets", subject.targets)):
        if not all(map(is_finite, tensors_in(given))):
            raise SkipwayError(f"{name} with values that are not finite: the rule is finite numbers")
    if any(map(is_packed, tree_leaves(subject.inputs, is_leaf=is_packed))):
        raise SkipwayError(
            "example with a PackedSequence: its samples are not along an axis; give the padded tensor and the lengths "
            "to a module that packs them in its forward"
        )
    if subject.size < (4 if subject.terms >= 8 else 8):
        listed = any(isinstance(each, list) for each in (subject.inputs if isinstance(subject.inputs, tuple) else ()))
        raise SkipwayError(
            f"example of {counted(subject.size, 'sample')}: the rule is at least 8 (4 sequences whose tokens have "
            "labels), 32 to 128 are better; give a larger batch"
            + (" (samples are counted along axis 0 of the tensors: a list of single samples is no batch)" * listed)
        )
