"""Image classifiers by description: ours, or a network of timm, torchvision, transformers or a Python file with a
classifier for other classes.

A run stores the description with its weights, and whatever reads the weights builds the network from it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError, first_line, printable, spell
from skipway.models import build
from skipway.surgery import replace_classifier, rescheme
from skipway.surgery.class_factory import class_factory
from skipway.surgery.classifier import ends_in_softmax, read_classifiers
from skipway.tracing import call_model, preserved_state, unwrap
from skipway.tracing.containers import tensors_in
from skipway.validation import check_positive_int
from skipway.zoo import ModelRequest, load_model, source_of

__all__ = ["PooledClassifier", "add_hidden_layer", "build_classifier", "hidden_layer", "is_ours"]


# sides of images that published networks are made for
SIDES = (28, 32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 384)


def is_ours(name: str) -> bool:
    """Whether a name is one that `skipway.build` knows, or could know.

    >>> is_ours("resnet20"), is_ours("timm:resnet18"), is_ours("nets/mine.py:make")
    (True, False, False)
    """
    return source_of(name)[0].library == "skipway"


def build_classifier(
    description: Mapping[str, Any], *, remark: Callable[[str], None] = lambda sentence: None
) -> nn.Module:
    """Build a network that takes images (N, channels, image, image) and returns logits (N, classes).

    Args:
        description: "name" and, for a network of ours, the options of `skipway.build`; for any other "classes",
            "channels", "image" and, if it is dressed in a scheme, "scheme". A file of Python code named in it is run.
            "head", for any: name of the classifier and width of the hidden layer that it gets.
        remark: called with a sentence about what was done to a network that is not ours.

    Raises:
        SkipwayError: no such network, one that does not run on such images, or one whose classifier is not found.
    """
    options = dict(description)
    head = options.pop("head", None)
    name = options.pop("name")
    model = build(name, **options) if is_ours(name) else build_foreign_classifier(name, options, remark)
    if head is not None:
        add_hidden_layer(model, *head)
    return model


def build_foreign_classifier(name: str, options: dict[str, Any], remark: Callable[[str], None]) -> nn.Module:
    """Build a network that is not ours, with a classifier for the classes in its description."""
    classes, channels, image = (options.pop(key) for key in ("classes", "channels", "image"))
    scheme = options.pop("scheme", None)
    if options:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise SkipwayError(f"{given}: options of Skipway's own networks, and model={printable(name)!r} is none")
    loaded = load_model(name, ModelRequest(shape=(channels, image, image), needed_classes=classes))
    for sentence in loaded.remarks:
        remark(sentence)
    example = torch.zeros(2, channels, image, image)
    model = with_logits(unwrap(loaded.model), loaded.argument, example, name)
    if ends_in_softmax(model, example):
        raise SkipwayError(
            f"model={printable(name)!r} returns probabilities, and the loss expects logits; remove the softmax "
            "at its end"
        )
    classifiers, count = read_classifiers(model, example)
    if not classifiers:
        model = PooledClassifier(model, example, classes)
        features = f"{model.classifier.in_features:,} features"
        remark(f"no classifier is found in {printable(name)}: a new one is put on its {features}")
    elif count != classes:
        replace_classifier(model, example, classes)
    if scheme is not None:
        rescheme(model, example, scheme)
    return model


def hidden_layer(features: int, width: int, classes: int, **choices: Any) -> nn.Sequential:
    """A classifier with one hidden layer; `choices` are those of `nn.Linear`.

    >>> list(hidden_layer(8, 4, 2).state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    return nn.Sequential(nn.Linear(features, width, **choices), nn.GELU(), nn.Linear(width, classes, **choices))


def add_hidden_layer(model: nn.Module, name: str, width: int) -> None:
    """Put a fresh classifier with one hidden layer in the place of a linear one, in place.

    Raises:
        SkipwayError: there is no linear classifier of that name.
    """
    classifier = dict(model.named_modules()).get(name)
    check_positive_int("width", width)
    if not isinstance(classifier, nn.Linear):
        raise SkipwayError(f"the network has no linear classifier {printable(name)!r} to put a hidden layer before")
    weight = classifier.weight
    fresh = hidden_layer(weight.shape[1], width, weight.shape[0], device=weight.device, dtype=weight.dtype)
    model.set_submodule(name, fresh)


def with_logits(model: nn.Module, argument: str | None, example: Tensor, name: str) -> nn.Module:
    """Let a model take images as its only argument and return one tensor, in place; state-dict names stay.

    Raises:
        SkipwayError: it does not run on such images, or returns several tensors of which none is named logits.
    """
    try:
        found = []
        with preserved_state(model), torch.no_grad():
            for training in (False, True):
                found.append(call_model(model.train(training), example if argument is None else {argument: example}))
    except Exception as error:  # a stranger's forward raises what it likes
        shape = "x".join(map(str, example.shape[1:]))
        raise SkipwayError(
            f"model={printable(name)!r} does not run on images of {shape}: {printable(first_line(error))}; "
            f"{fitting_shape(model, argument, example)}"
        ) from error
    evaluated = found[0]
    tensors = list(tensors_in(evaluated))
    if not isinstance(evaluated, Tensor) and named_tensor(evaluated) is None and len(tensors) != 1:
        raise SkipwayError(
            f"model={printable(name)!r} returns {len(tensors)} tensors in a {type(evaluated).__name__}, none of them "
            "named 'logits'; return the logits alone, or a mapping with 'logits'"
        )
    if argument is not None or not all(isinstance(output, Tensor) for output in found):
        model.__class__ = first_output_class(type(model), argument)
    return model


def fitting_shape(model: nn.Module, argument: str | None, example: Tensor) -> str:
    """What to give to a model that does not run on the example: the channels or the size that it runs on, in words."""
    _, channels, side, _ = example.shape
    for number in (1, 3):
        for size in (side, *SIDES):
            images = torch.zeros(2, number, size, size)
            try:
                with preserved_state(model), torch.no_grad():
                    call_model(model.eval(), images if argument is None else {argument: images})
            except Exception:  # a stranger's forward raises what it likes
                continue
            given = (("channels", number, number != channels), ("size", size, size != side))
            return f"it runs with {' '.join(spell(key, value) for key, value, differs in given if differs)}"
    return "give the size and channels that it takes"


@class_factory
def first_output_class(kind: type[nn.Module], argument: str | None) -> tuple[str, dict[str, Any]]:
    """A subclass of `kind` that takes images and returns the tensor of its output that is named logits, or the first.

    transformers put out dataclasses, GoogLeNet and Inception the scores of their auxiliary classifiers in training.
    """

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        output = kind.forward(self, images) if argument is None else kind.forward(self, **{argument: images})
        named = named_tensor(output)
        return next(tensors_in(output)) if named is None else named

    return f"{kind.__name__}Logits", {"forward": forward}


def named_tensor(output: Any) -> Tensor | None:
    """The logits, or the tokens of a trunk, in an output that has names."""
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return None


# axes of features that are averaged, by the number of all axes
POOLED_AXES: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2, 3)}


class PooledClassifier(nn.Module):
    """A trunk with a linear classifier of its features, averaged over tokens or positions.

    Args:
        trunk: puts out features (N, D), tokens (N, L, D) or a map (N, D, H, W).
        example: images that it takes.
        classes: outputs.
    """

    def __init__(self, trunk: nn.Module, example: Tensor, classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        with preserved_state(trunk), torch.no_grad():
            features = self.pool(trunk.eval()(example))
        self.classifier = nn.Linear(features.shape[1], classes)

    @staticmethod
    def pool(features: Tensor) -> Tensor:
        """Features of whole images, (N, D)."""
        if features.ndim not in POOLED_AXES:
            raise SkipwayError(
                f"a trunk that puts out {tuple(features.shape)}: the rule is features (N, D), tokens (N, L, D) or a "
                "map (N, D, H, W)"
            )
        axes = POOLED_AXES[features.ndim]
        return features.mean(axes) if axes else features

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.trunk(images)))
