"""`skipway generate`."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

from cyclopts import Group, Parameter

__all__ = ["generate"]

SAMPLING, HARDWARE, OUTPUT = (
    Group(name, sort_key=number) for number, name in enumerate(("Sampling", "Hardware", "Output"))
)


def generate(
    run: str,
    prompt: str = "",
    /,
    *,
    length: Annotated[int, Parameter(group=SAMPLING)] = 200,
    temperature: Annotated[float, Parameter(group=SAMPLING)] = 0.8,
    top_k: Annotated[int | None, Parameter(group=SAMPLING)] = None,
    top_p: Annotated[float | None, Parameter(group=SAMPLING)] = None,
    seed: Annotated[int | None, Parameter(group=SAMPLING)] = None,
    device: Annotated[str, Parameter(group=HARDWARE)] = "auto",
    json: Annotated[bool, Parameter(negative=(), group=OUTPUT)] = False,
) -> int:
    """Continue a text with a trained language model. No code from the run folder is executed.

    Args:
        run: Run folder, file of weights, folder of transformers, or hf:ORG/NAME.
        prompt: The beginning of the text. [a new document, where the tokenizer separates documents]
        length: Tokens to add.
        temperature: 0 takes the likeliest token, 1 draws as the model says.
        top_k: Draw among this many of the likeliest tokens. [all]
        top_p: Draw among the fewest tokens whose probabilities reach this sum. [all]
        seed: Seed of the draws. [a new one each time]
        device: auto, cpu, cuda, cuda:1.
        json: Print a JSON object with prompt and text.
    """
    from skipway.inference.text_run import generate_text

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    text = generate_text(run, prompt, length, device=device, **sampling)
    sys.stdout.write(json_module.dumps({"prompt": prompt, "text": text}) if json else f"{prompt}{text}")
    sys.stdout.write("\n")
    return 0
