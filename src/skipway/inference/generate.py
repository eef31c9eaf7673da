"""Continue tokens with a language model: greedy or sampled, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipway.errors import SkipwayError
from skipway.hardware.precision import widest
from skipway.inference.modes import eval_mode
from skipway.nn import decoding
from skipway.validation import check_positive_int

__all__ = ["Sampling", "generate"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits z: softmax(z / temperature), cut to the likeliest.

    Args:
        temperature: ≥ 0; 0 takes the likeliest token.
        top_k: keep this many tokens (Fan et al. 2018); None: all.
        top_p: keep the fewest tokens whose probabilities reach this sum, in (0, 1] (Holtzman et al. 2020); None: all.
        tokens: draw among the first so many, since a table may have rows to spare behind those of its tokenizer; None:
            among all.

    >>> Sampling(temperature=0)(torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([1])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise SkipwayError(
                f"temperature={self.temperature}: the rule is temperature >= 0; 0 takes the likeliest token"
            )
        for name in ("top_k", "tokens"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SkipwayError(f"top_p={self.top_p}: the rule is 0 < top_p <= 1")

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token of each row of logits, (N, vocab) → (N,)."""
        logits = logits[:, : self.tokens]
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = widest(logits) / self.temperature  # float32 sums of 50,000 terms are off by more than rare tokens
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], float("-inf"))
        likely = logits.softmax(-1)
        if self.top_p is not None:
            ordered, places = likely.sort(descending=True)
            dropped = ordered.cumsum(-1) - ordered >= self.top_p
            likely = likely.scatter(-1, places, ordered.masked_fill(dropped, 0.0))
        return torch.multinomial(likely, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    cache: bool = True,
    stop: int | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue each row of `ids` by `length` tokens, drawn from what the model says of the next one.

    The model runs in evaluation mode and is left as it was. With `cache` keys and values of earlier tokens
    are kept, which changes the time (T instead of T² token passes) and nothing else but rounding. Where the
    text grows beyond the model's context, each token is computed from the last `context` tokens anew. A compiled model
    runs uncompiled: every token makes the text longer, for which the compiler would begin anew.

    Args:
        model: (N, T) whole numbers → logits (N, T, vocab).
        ids: the prompts, of one length T ≥ 1.
        length: tokens to add, ≥ 1.
        temperature: see `Sampling`; 0 is greedy.
        top_k: see `Sampling`.
        top_p: see `Sampling`.
        tokens: see `Sampling`.
        seed: of the draws; None takes torch's global generator.
        cache: keep keys and values. Networks of others that put out logits take False.
        stop: a token after which a row is complete; it is filled with it.
        on_token: called with the (N,) tokens of each step, to show them as they come.

    Shapes: (N, T) → (N, T + length), fewer where all rows have met `stop`.

    Raises:
        SkipwayError: an empty prompt, a value out of range, or no cache in this network.

    >>> import skipway as sw
    >>> model = sw.build("gpt", depth=2, dim=16, heads=2, vocab=9, context=8)
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> grown = generate(model, ids, 7, temperature=0)
    >>> grown.shape, bool((grown == generate(model, ids, 7, temperature=0, cache=False)).all())
    (torch.Size([1, 10]), True)
    """
    check_positive_int("length", length)
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise SkipwayError(f"ids of shape {tuple(ids.shape)}: the rule is (N, T) with T >= 1; give at least one token")
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    text = Continuation(ids, Sampling(temperature, top_k, top_p, tokens), generator, stop, on_token)
    context = getattr(getattr(model, "config", None), "context", None)
    room = ids.shape[1] + length if context is None else min(ids.shape[1] + length, context)
    with eval_mode(model), uncompiled(model):
        if cache and ids.shape[1] <= room:
            with decoding(model, room) as state:
                for _ in range(min(length, room - ids.shape[1] + 1)):
                    new = text.ids[:, state.length :]
                    text.append(model(new)[:, -1])
                    state.advance(new.shape[1])
                    if text.is_complete:
                        break
        while not text.is_complete and text.ids.shape[1] < ids.shape[1] + length:
            text.append(model(text.ids if context is None else text.ids[:, -context:])[:, -1])
    return text.ids


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which a compiled model, or one with compiled modules, runs as it was before."""
    is_compiled = any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


class Continuation:
    """Rows of tokens that grow by what is drawn from logits."""

    def __init__(
        self,
        ids: Tensor,
        draw: Sampling,
        generator: torch.Generator | None,
        stop: int | None,
        on_token: Callable[[Tensor], object] | None,
    ) -> None:
        self.ids, self.draw, self.generator, self.stop, self.on_token = ids, draw, generator, stop, on_token
        self.stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    @property
    def is_complete(self) -> bool:
        """Whether every row has met the token that ends it."""
        return self.stop is not None and bool(self.stopped.all())

    def append(self, logits: Tensor) -> None:
        """Draw the next token of each row from (N, vocab)."""
        token = self.draw(logits, self.generator)
        if self.stop is not None:
            token = token.masked_fill(self.stopped, self.stop)
            self.stopped |= token == self.stop
        self.ids = torch.cat((self.ids, token[:, None]), dim=1)
        if self.on_token is not None:
            self.on_token(token)
