"""`rescheme(LayerScale)` on one variant per architecture family of timm, torchvision's classifiers and 20 HF classes.

    python -m benchmarks.surgery.coverage [timm|torchvision|transformers] [--only NAME] [--summary]

Every model gets random weights away from their starts and is dressed in LayerScale. It passes if at least one
connection was touched, the outputs are the same to 1e-5 in evaluation mode and in training mode (dropout off, batch
statistics fixed), every new gain gets a gradient, and after `undo` outputs are the same to the bit and keys and classes
the same. A line for each goes to coverage.csv beside this file. Resumes: models that the file holds are skipped.
"""

from __future__ import annotations

import csv
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map_only

from benchmarks.peers import import_timm, import_torchvision, import_transformers, randomise_
from skipway.errors import SkipwayError
from skipway.nn import Gain
from skipway.surgery import Operation, rescheme
from skipway.surgery.verification import difference
from skipway.tracing.example import call_model

__all__ = ["LIBRARIES", "main", "passes", "row"]

FILE = Path(__file__).with_name("coverage.csv")
HEADER = [
    *("model", "connections", "touched", "refused", "reason", "eval", "train"),
    *("gains", "reached", "undone", "seconds", "problem"),
]
TOLERANCE = 1e-5
TIMM_LIMIT, TORCHVISION_LIMIT = 45e6, 60e6
TRIES = 4  # variants of a family that are sized before it is given up as too large
SMALL_IMAGE = 128
NO_CONNECTION = "no residual connection"
# words of a timm name that tell sizes of one architecture apart, smallest first
SIZES = [
    *("zepto", "atto", "femto", "pico", "nano", "xxxs", "xxs", "xxtiny", "xs", "xtiny", "xsmall"),
    *("tiny", "mini", "micro", "wee", "pwee", "dwee", "little", "dlittle", "ti", "s", "small", "betwixt"),
    *("mediumd", "medium", "m", "base", "b", "n", "so150m", "so150m2", "so400m", "l", "large", "xl"),
    *("xlarge", "xxl", "xxlarge", "huge", "h", "giant", "gigantic", "enormous"),
]
NUMBERS = r"patch\d+|\d+(x\d+)?|w\d+|window\d+.*|[prdsmb]\d+|in\d+k|\d+[mb]|\d+gf|\d+to\d+"
# fmt: off
CLASSES = [
    "BeitModel", "BitModel", "ConvNextModel", "ConvNextV2Model", "CvtModel", "DeiTModel", "Dinov2Model",
    "EfficientNetModel", "FocalNetModel", "HieraModel", "LevitModel", "MobileNetV2Model", "MobileViTModel",
    "PoolFormerModel", "PvtV2Model", "RegNetModel", "ResNetModel", "SegformerModel", "SwinModel", "Swinv2Model",
    "CLIPVisionModel", "ViTModel",
]
# fmt: on

Built = tuple[nn.Module, Any]
Build = Callable[[str], Built]
Family = tuple[list[str], Build]  # its names, smallest first, and what builds one; of them the first that fits is taken


def family(name: str) -> str:
    """A timm name without its sizes.

    >>> family("vit_small_patch16_224"), family("resnet50d"), family("swinv2_cr_tiny_ns_224")
    ('vit', 'resnet#d', 'swinv#_cr_ns')
    """
    words = [word for word in name.split("_") if word not in SIZES and not re.fullmatch(NUMBERS, word)]
    return "_".join(re.sub(r"\d+", "#", word) for word in words)


def size(name: str) -> tuple[int, list[int]]:
    """A guess at how large a variant is, from its name."""
    words = [SIZES.index(word) for word in name.split("_") if word in SIZES]
    return max(words, default=0), [int(number) for number in re.findall(r"\d+", name)]


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timm_models() -> Iterator[Family]:
    """The smallest variant of each family; of those above the limit none."""
    timm = import_timm()
    from timm.models._registry import _model_to_module

    families = defaultdict(list)
    for name in timm.list_models():
        families[_model_to_module[name], family(name)].append(name)

    def build(name: str) -> Built:
        with torch.device("meta"):
            if weights(timm.create_model(name)) >= TIMM_LIMIT:
                raise OverflowError
        model = timm.create_model(name)
        return model, torch.randn(2, *model.default_cfg["input_size"])

    for names in families.values():
        yield sorted(names, key=size)[:TRIES], build


def torchvision_models() -> Iterator[Family]:
    models = import_torchvision().models
    for name in models.list_models(module=models):
        if models.get_model_weights(name).DEFAULT.meta["num_params"] < TORCHVISION_LIMIT:
            side = 299 if "inception" in name else 224
            yield [name], lambda name, side=side: (models.get_model(name), torch.randn(2, 3, side, side))


def transformers_models() -> Iterator[Family]:
    transformers = import_transformers()

    def build(name: str) -> Built:
        kind = getattr(transformers, name)
        config = kind.config_class()
        side = getattr(config, "image_size", None) or 224
        height, width = side if isinstance(side, tuple | list) else (side, side)
        example = torch.randn(2, getattr(config, "num_channels", 3), height, width)
        return kind(config), {"pixel_values": example}

    for name in CLASSES:
        yield [name], build


LIBRARIES = {"timm": timm_models, "torchvision": torchvision_models, "transformers": transformers_models}


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Floating-point outputs of the model in its current mode, with the same random numbers each time."""
    torch.manual_seed(0)
    output = call_model(model, example)
    leaves = tree_flatten(output)[0]
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = found or [value for value in vars(output).values() if isinstance(value, Tensor)]
    return [value for value in found if value.is_floating_point()]


def set_deterministic_(model: nn.Module) -> nn.Module:
    """Training mode without anything random: dropout and stochastic depth at 0, batch statistics fixed."""
    model.train()
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "attn_drop", "attn_drop_p", "attention_dropout", "drop_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def smallest_example(model: nn.Module, example: Any) -> Any:
    """One small image if the model takes it, else one or two images of the size that the model was built for."""
    smaller = tree_map_only(Tensor, lambda image: image[:1, :, :SMALL_IMAGE, :SMALL_IMAGE].contiguous(), example)
    single = tree_map_only(Tensor, lambda image: image[:1], example)
    with torch.no_grad():
        for candidate in (smaller, single):
            try:
                outputs(model.eval(), candidate)
                outputs(set_deterministic_(model), candidate)
                return candidate
            except Exception:
                continue
    return example


def classes(model: nn.Module) -> list[type]:
    """Classes of all modules."""
    return [type(module) for module in model.modules()]


def count_gains(model: nn.Module, example: Any) -> tuple[int, int]:
    """Number of gains, and number of gains that get a gradient."""
    gains = [module.gain for module in model.modules() if isinstance(module, Gain)]
    loss = sum((value * torch.randn_like(value)).mean() for value in outputs(model, example) if value.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    return len(gains), sum(gain.grad is not None and bool(gain.grad.abs().max() > 0) for gain in gains)


def measure(model: nn.Module, example: Any) -> dict[str, Any]:
    """Differences of outputs after `rescheme`, gradients of the gains, and whether `undo` is exact."""
    example = smallest_example(randomise_(model), example)
    with torch.no_grad():
        train, evaluation = outputs(set_deterministic_(model), example), outputs(model.eval(), example)
    keys, kinds = list(model.state_dict()), classes(model)
    operation: Operation = rescheme(model, example, "layerscale")
    counts = Counter(operation.refused.values())
    with torch.no_grad():
        after = outputs(model, example)
        after_train = outputs(set_deterministic_(model), example)
    gains, reached = count_gains(model, example)
    operation.undo()
    with torch.no_grad():
        back = outputs(model.eval(), example)
    same = all(torch.equal(old, new) for old, new in zip(evaluation, back, strict=True))
    return {
        "connections": len(operation.touched) + len(operation.refused),
        "touched": len(operation.touched),
        "refused": len(operation.refused),
        "reason": re.sub(r"^[\w.]+ (?=runs)", "", counts.most_common(1)[0][0])[:120] if counts else "",
        "eval": f"{difference(evaluation, after):.2g}",
        "train": f"{difference(train, after_train):.2g}",
        "gains": gains,
        "reached": reached,
        "undone": same and list(model.state_dict()) == keys and classes(model) == kinds,
        "problem": "",
    }


def row(name: str, build: Build) -> dict[str, Any] | None:
    """The row of one model, with the problem if there is one; None for a model that is too large."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        found = measure(*build(name.partition(":")[2]))
    except OverflowError:
        return None
    except SkipwayError as problem:
        none = NO_CONNECTION in str(problem)
        found = {"connections": 0 if none else "", "reason": NO_CONNECTION if none else "", "touched": 0}
        found["problem"] = "" if none else str(problem)[:200]
    except Exception as problem:  # the table is there to show it
        found = {"problem": f"{type(problem).__name__}: {problem}".replace("\n", " ")[:200]}
    return {"model": name, **found, "seconds": f"{time.perf_counter() - start:.1f}"}


def passes(line: dict[str, str]) -> bool:
    """Whether a line of the table shows every promise kept."""
    return (
        not line["problem"]
        and int(line["touched"] or 0) > 0
        and max(float(line["eval"]), float(line["train"])) <= TOLERANCE
        and line["gains"] == line["reached"]
        and line["undone"] == "True"
    )


def summary() -> str:
    """Shares of the models that pass, from the table."""
    lines = list(csv.DictReader(FILE.open()))
    without = [line for line in lines if line["reason"] == NO_CONNECTION]
    rest = [line for line in lines if line["reason"] != NO_CONNECTION]
    passed = [line for line in rest if passes(line)]
    complete = sum(line["refused"] == "0" for line in passed)
    text = [
        f"{len(lines)} models; {len(without)} without any residual connection:",
        "  " + ", ".join(line["model"] for line in without),
        f"of the other {len(rest)} pass {len(passed)} ({len(passed) / max(1, len(rest)):.1%}), "
        f"{complete} of them with every connection touched",
    ]
    for library in LIBRARIES:
        own = [line for line in rest if line["model"].startswith(library + ":")]
        text.append(f"  {library}: {sum(map(passes, own))} of {len(own)}")
    text += [f"  {line['model']}: {line['problem'] or line}" for line in rest if not passes(line)]
    return "\n".join(text)


def main(arguments: list[str]) -> int:
    """Operate on them all, and sum up."""
    if "--summary" in arguments:
        print(summary())
        return 0
    only = arguments[arguments.index("--only") + 1] if "--only" in arguments else None
    chosen = [library for library in LIBRARIES if library in arguments] or list(LIBRARIES)
    done = {line["model"] for line in csv.DictReader(FILE.open())} if FILE.exists() else set()
    with FILE.open("a", newline="") if only is None else sys.stdout as file:
        table = csv.DictWriter(file, HEADER)
        if not done:
            table.writeheader()
        for library in chosen:
            for names, build in LIBRARIES[library]():
                full = [f"{library}:{name}" for name in (names if only is None else [only])]
                if done.intersection(full) if only is None else only not in names:
                    continue
                found = next(filter(None, (row(name, build) for name in full)), None)
                if found is not None:
                    table.writerow(found)
                    file.flush()
    if only is None:
        print(summary())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
