"""Images in the page itself: the worst mistakes, and what the network sees while it trains."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from skipway.data import Data
from skipway.errors import printable
from skipway.inference.metrics import percent
from skipway.report.charts import cut
from skipway.report.run.answers import Answers

__all__ = ["SEEN", "data_address", "mistakes_section", "seen_section"]

# images of the augmented batch
SEEN = 24
# side in pixels up to which an image is stored as it is, and to which a larger one is scaled
EXACT, SHOWN = 40, 128
QUALITY = 80
CPU = torch.device("cpu")


def mistakes_section(data: Data, found: Answers, names: Sequence[str]) -> Iterator[str]:
    """The wrong answers with the largest losses, as pictures."""
    if not found.mistakes:
        yield "<p>No mistakes.</p>"
        return
    yield '<div class="pictures">'
    for _, place, inputs in found.mistakes:
        true, taken = names[int(found.labels[place])], names[int(found.taken[place])]
        file = printable(data.test.names[int(found.numbers[place])])
        told = f"{taken}, {percent(float(found.confidence[place]))} sure"
        yield (
            f"<figure>{picture(pixels_of(inputs, data), file)}<figcaption><b>{escape(cut(told, 60))}</b>"
            f"<span>is {escape(cut(true, 40))}</span>"
            f'<span class="file" title="{escape(file)}">{escape(ending(file))}</span></figcaption></figure>'
        )
    yield "</div>"


def seen_section(data: Data, seed: int, names: Sequence[str]) -> Iterator[str]:
    """The beginning of the first epoch, varied as the network got it."""
    count = min(SEEN, len(data.train))
    batch = next(data.train_batches(seed=seed, epoch=0, batch_size=count, device=CPU))
    yield '<div class="pictures">'
    for inputs, target in zip(batch.inputs, batch.targets, strict=True):
        told = target_text(target, names)
        image = picture(pixels_of(inputs, data), told)
        yield f"<figure>{image}<figcaption>{escape(cut(told, 60))}</figcaption></figure>"
    yield "</div>"


def pixels_of(inputs: Tensor, data: Data) -> Tensor:
    """uint8 (H, W, C) from an input of the network (C, H, W)."""
    mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (data.mean, data.std))
    return ((inputs.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def target_text(target: Tensor, names: Sequence[str]) -> str:
    """What the network is to say: a class, or the shares of two.

    >>> target_text(torch.tensor([0.25, 0.75, 0.0]), ["cat", "dog", "cow"])
    'dog 75 %, cat 25 %'
    """
    if target.ndim == 0:
        return names[int(target)]
    shares, places = target.topk(min(2, len(target)))
    told = [(names[place], share) for share, place in zip(shares.tolist(), places.tolist(), strict=True) if share > 0]
    return told[0][0] if len(told) == 1 else ", ".join(f"{name} {100 * share:.0f} %" for name, share in told)


def picture(pixels: Tensor, told: str) -> str:
    """An `img` with the pixels in itself; uint8 (H, W, C)."""
    kind = ' class="small"' if max(pixels.shape[:2]) <= EXACT else ""
    return f'<img{kind} src="{data_address(pixels)}" alt="{escape(told)}" width="{SHOWN}" height="{SHOWN}">'


def data_address(pixels: Tensor) -> str:
    """The pixels of uint8 (H, W, C) as an address: a PNG of small images, a JPEG of larger ones, scaled down.

    >>> data_address(torch.zeros(8, 8, 1, dtype=torch.uint8)).partition(",")[0]
    'data:image/png;base64'
    """
    image = Image.fromarray(pixels.squeeze(-1).contiguous().numpy() if pixels.shape[-1] == 1 else pixels.numpy())
    stored = io.BytesIO()
    if max(image.size) <= EXACT:
        kind = "png"
        image.save(stored, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((SHOWN, SHOWN))
        image.save(stored, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stored.getvalue()).decode()}"


def ending(file: str) -> str:
    """The end of a long path, which tells files apart.

    >>> ending("a" * 40 + "/b.png")
    '…aaaaaaaaaaaaaaaaaaaaaaa/b.png'
    """
    return file if len(file) <= 30 else f"…{file[-29:]}"
