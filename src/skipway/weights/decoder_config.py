"""Configs of decoders: a `config.json` of transformers as a config of the GPT family, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from skipway.errors import CheckpointError, SkipwayError, printable
from skipway.models.gpt import GPTConfig
from skipway.nn.rope import LinearScaling, Llama3Scaling, RotaryScaling
from skipway.weights.decoder_classes import ACTIVATIONS, CLASSES, DROPOUT, LARGER, NEUTRAL, DecoderClass

__all__ = ["config_differences", "describe_misfit", "find_class", "read_decoder_config", "write_decoder_config"]

# From them ----------------------------------------------------------------------------------------------------------


def read_decoder_config(
    described: Mapping[str, Any], origin: str, remark: Callable[[str], None] = lambda sentence: None
) -> GPTConfig:
    """The config of the network that a `config.json` of transformers describes.

    Args:
        described: its content.
        origin: of it, for messages.
        remark: called with a sentence about dropout, which the GPT family has not, and about fields that are not known.

    Raises:
        CheckpointError: a model type or a value that the family cannot express, with both.
    """
    kind = described.get("model_type")
    own = CLASSES.get(str(kind))
    if own is None:
        raise CheckpointError(
            f"{origin}: model_type={printable(str(kind))!r}: the rule for the family gpt is one of {', '.join(CLASSES)}"
        )
    values = {**own.defaults, **described}
    for name, demanded in own.demands.items():
        if values[name] != demanded:
            raise CheckpointError(
                f"{origin}: {name}={values[name]!r}: the family gpt computes {name}={demanded!r} only"
            )
    refuse_foreign_parts(described, own, origin)
    options = {ours: values[theirs] for ours, theirs in own.names.items()}
    if options.get("head_dim") is not None and options["head_dim"] * options["heads"] == options["dim"]:
        options["head_dim"] = None
    if not own.rotary and options["hidden"] == 4 * options["dim"]:
        options["hidden"] = None
    options["act"] = next((ours for ours, theirs in ACTIVATIONS.items() if options["act"] in theirs), options["act"])
    if options["act"] not in ACTIVATIONS:
        known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
        raise CheckpointError(f"{origin}: {own.names['act']}={options['act']!r}: the rule is one of {known}")
    bias = next((ours for ours, flags in own.biases.items() if flags.items() <= values.items()), None)
    if bias is None:
        flags = {name for each in own.biases.values() for name in each}
        given = ", ".join(f"{name}={values[name]!r}" for name in sorted(flags))
        raise CheckpointError(f"{origin}: {given}: the family gpt has these biases otherwise only")
    if own.rotary:
        options["theta"], options["rotary_scaling"] = read_rotary(values, origin)
    known = {*own.defaults, *NEUTRAL, *DROPOUT}
    strange = sorted(name for name in described if name not in known)
    if strange:
        remark(f"{origin}: fields of no known meaning, not followed: {', '.join(map(printable, strange))}")
    dropped = [f"{name}={described[name]}" for name in DROPOUT if described.get(name)]
    if dropped:
        remark(f"{origin}: {', '.join(dropped)} is not taken: the family gpt has no dropout, which matters in training")
    try:
        return GPTConfig(**options, **own.shape, bias=bias)
    except (SkipwayError, TypeError) as error:
        raise CheckpointError(f"{origin}: {printable(str(error))}") from error


def refuse_foreign_parts(described: Mapping[str, Any], own: DecoderClass, origin: str) -> None:
    """Refuse what changes outputs and has no counterpart in the family."""
    layers = described.get("layer_types")
    if isinstance(layers, list) and set(layers) - {"full_attention"}:
        raise CheckpointError(
            f"{origin}: layer_types with {layers[-1]!r}: the family gpt attends to all earlier tokens"
        )
    if described.get("quantization_config") is not None:
        raise CheckpointError(f"{origin}: quantised weights; dequantise them, or take the weights before that")


def read_rotary(values: Mapping[str, Any], origin: str) -> tuple[float, RotaryScaling | None]:
    """Base and scaling of rotary positions, as transformers writes them since version 5, or before."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    parameters = given if isinstance(given, Mapping) else {"rope_type": given}
    theta = parameters.get("rope_theta", values["rope_theta"])
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    share = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise CheckpointError(f"{origin}: partial_rotary_factor={share!r}: the family gpt turns all channels of a head")
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, LinearScaling(parameters["factor"])
        if kind == "llama3":
            original = values.get("original_max_position_embeddings") or parameters.get(
                "original_max_position_embeddings", values["max_position_embeddings"]
            )
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            return theta, Llama3Scaling(parameters["factor"], low, high, original)
    except KeyError as error:
        raise CheckpointError(f"{origin}: rope_type={kind!r} without {error.args[0]!r}") from error
    except SkipwayError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    raise CheckpointError(f"{origin}: rope_type={printable(str(kind))!r}: the rule is one of default, linear, llama3")


# To them ------------------------------------------------------------------------------------------------------------


def find_class(config: GPTConfig, *, any_tokenizer: bool = False) -> DecoderClass | None:
    """The class of transformers that computes what a network with this config does; None: there is none."""
    fitting = [
        each for each in CLASSES.values() if not each.misfits(config) and (each.any_tokenizer or not any_tokenizer)
    ]
    return min(fitting, key=lambda each: LARGER[config.bias].index(each.bias_for(config)), default=None)  # type: ignore[arg-type]


def describe_misfit(config: GPTConfig) -> str | None:
    """Why no class of transformers computes what a network with this config does; None: one does."""
    if find_class(config) is not None:
        return None
    nearest = min(CLASSES.values(), key=lambda each: len(each.misfits(config)))
    listed = ", ".join(nearest.misfits(config))
    return f"no class of transformers computes what it does; from {nearest.architecture} it differs in {listed}"


def write_decoder_config(config: GPTConfig, *, any_tokenizer: bool = False) -> dict[str, Any]:
    """The `config.json` of transformers for a network with this config; special tokens are none.

    Args:
        config: of a network of the family.
        any_tokenizer: take a class beside which transformers reads any tokenizer.

    Raises:
        CheckpointError: no class of transformers computes what it does.

    >>> write_decoder_config(GPTConfig(dim=8, blocks=1, heads=2))["model_type"]
    'gpt2'
    """
    own = find_class(config, any_tokenizer=any_tokenizer)
    if own is None:
        raise CheckpointError(str(describe_misfit(config)))
    config = replace(config, bias=own.bias_for(config), hidden=config.mlp_width)  # type: ignore[arg-type]
    if own.rotary:
        config = replace(
            config, groups=config.groups or config.heads, head_dim=config.head_dim or config.dim // config.heads
        )
    values = {theirs: getattr(config, ours) for ours, theirs in own.names.items()}
    values[own.names["act"]] = ACTIVATIONS[config.act][0]
    dropout = {name: 0.0 for name in DROPOUT if (name != "attention_dropout") != own.rotary}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    head = {"architectures": [own.architecture], "model_type": own.kind, "dtype": "float32"}
    demands = {name: value for name, value in own.demands.items() if name != "rope_interleaved"}
    rotary = write_rotary(config) if own.rotary else {}
    return {**head, **values, **own.biases[config.bias], **demands, **dropout, **rotary, **special}


def write_rotary(config: GPTConfig) -> dict[str, Any]:
    """Base and scaling of rotary positions, for transformers before and since version 5."""
    scaling, theta = config.rotary_scaling, float(config.theta)
    parameters: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        parameters = {"rope_type": "linear", "factor": float(scaling.factor)}
    elif isinstance(scaling, Llama3Scaling):
        parameters = {
            "rope_type": "llama3",
            "factor": float(scaling.factor),
            "low_freq_factor": float(scaling.low),
            "high_freq_factor": float(scaling.high),
            "original_max_position_embeddings": int(scaling.original),
        }
    elif scaling is not None:
        raise CheckpointError(f"rotary_scaling={scaling}: transformers has it under no name that is known here")
    old = {} if scaling is None else {"rope_scaling": parameters}
    return {"rope_theta": theta, **old, "rope_parameters": {**parameters, "rope_theta": theta}}


def config_differences(ours: GPTConfig, theirs: GPTConfig) -> list[str]:
    """The fields that change what a network computes and that the shapes of its weights do not show, where they differ.

    >>> config_differences(GPTConfig(dim=8, blocks=1, heads=2), GPTConfig(dim=8, blocks=1, heads=4))
    ['heads=2 in the model, heads=4 in the file']
    """
    names = ["heads", "epsilon", "act", *(("theta", "rotary_scaling") if ours.position == "rotary" else ())]
    pairs = ((name, getattr(ours, name), getattr(theirs, name)) for name in names)
    return [f"{name}={one!r} in the model, {name}={other!r} in the file" for name, one, other in pairs if one != other]
