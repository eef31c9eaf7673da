"""The pages that the product makes, each from something small: `PAGES[name](folder)` writes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from tests.trials.pictures import write_images
from torch import Tensor, nn

import skipway as sw
from skipway.diagnosis.remedies import LearningRate
from skipway.recipe import Recipe
from skipway.report import save
from skipway.studies.index import write_index
from skipway.studies.page import write_study_page
from skipway.studies.study import find_study
from skipway.training.loop import train

__all__ = ["PAGES", "ROOT"]

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
TINY = {"device": "cpu", "precision": "float32"}


def image_run(folder: Path) -> Path:
    """A few steps on pictures of two classes."""
    counts = {
        f"{part}/{name}": each for part, each in (("train", 12), ("val", 6), ("test", 8)) for name in ("cat", "tree")
    }
    data = write_images(folder / "data", counts)
    recipe = Recipe(
        data=data, model="resnet8", width=4, size=8, epochs=4, batch_size=8, start="random", augment="none", health=0.5,
        scheme="layerscale(init=0.1)", workers=0, **TINY,
    )  # fmt: skip
    return train(recipe, folder / "run").folder.report


def text_run(folder: Path) -> Path:
    """A few steps on a short text."""
    book = folder / "book.txt"
    book.write_text("the cat sat on the mat and the dog sat on the cat\n" * 60)
    recipe = Recipe(
        data=book, model="gpt-nano", depth=2, width=12, context=8, batch_size=8, steps=24, health=0.5, **TINY
    )
    return train(recipe, folder / "run").folder.report


@lru_cache
def diagnosed(scheme: str, lr: float) -> sw.diagnosis.Diagnosis:
    """What is found in a network of nine connections."""
    torch.manual_seed(0)
    model = sw.build("resnet20", scheme=scheme, classes=4, width=4)
    return sw.diagnose(model, torch.randn(8, 3, 8, 8), targets=torch.randint(4, (8,)), optimizer="sgd", lr=lr)


def diagnosis(folder: Path, *, scheme: str, lr: float, fix: bool = False) -> Path:
    """A network of nine connections, or the same before and after a remedy."""
    found = diagnosed(scheme, lr)
    shown = found.fix(LearningRate(0.003)) if fix else found
    return save(shown, folder / "report.html", command="skipway diagnose resnet20 --out report.html", name="resnet20")


def comparison(folder: Path) -> Path:
    """Two designs side by side."""
    torch.manual_seed(0)
    designs = {scheme: sw.build("resnet20", scheme=scheme, classes=4, width=4) for scheme in ("identity", "plain")}
    batch, targets = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    found = sw.diagnose(designs, batch, targets=targets, optimizer="sgd", lr=0.1, steps=100)
    return save(found, folder / "report.html", command="skipway diagnose identity plain --out report.html")


def stored(folder: Path) -> Path:
    """A copy of the tables of all studies that belong to the repository."""
    for table in (ROOT / "docs" / "studies").glob("*.csv"):
        shutil.copy(table, folder)
    return folder


def study(folder: Path, *, name: str) -> Path:
    """A study from its stored table."""
    path = write_study_page(find_study(name), stored(folder))
    assert path is not None
    return path


def study_index(folder: Path) -> Path:
    """The index of all studies."""
    return write_index(stored(folder))[0]


def drawings(folder: Path) -> Path:
    """The figures of all studies that the chapters show, as they are in the repository."""
    figures = [file.read_text("utf-8") for file in sorted((ROOT / "docs" / "studies").glob("*.svg"))]
    named = [text.replace("<svg ", '<svg aria-label="of a study" ', 1) for text in figures]
    head = '<!DOCTYPE html><html lang="en"><meta name="viewport" content="width=device-width"><title>Figures</title>'
    rules = "body { background: var(--paper); color: var(--ink); } figure { margin: 0; max-width: 28rem; }"
    style = f"<style>{rules} svg {{ width: 100%; height: auto; }}</style>"
    page = folder / "figures.html"
    page.write_text(
        f"{head}{style}<main><h1>Figures</h1>{''.join(f'<figure>{each}</figure>' for each in named)}</main>"
    )
    return page


def transfer(folder: Path) -> Path:
    """A sweep of rates over two depths of a small network, with two schemes."""

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    torch.manual_seed(0)
    batches = [(x := torch.randn(16, 4), x @ torch.ones(4, 1)) for _ in range(16)]
    found = sw.transfer(
        lambda depth: nn.Sequential(*(Block(4, 4) for _ in range(depth)), nn.Linear(4, 1)),
        [2, 8], batches, steps=8, seeds=2, optimizer="sgd",
    )  # fmt: skip
    return save(found, folder / "report.html", command="skipway transfer nets.py:make --depths 2,8 --optimizer sgd")


def monitored(folder: Path) -> Path:
    """A training that is watched, with a spike and a warning."""
    torch.manual_seed(0)
    model = sw.build("vit-tiny-16", depth=2, dim=8, heads=2, patch=4, image=8, classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with sw.monitor(model, optimizer, every=5, budget=None, on_warning=lambda warning: None) as watch:
        for step in range(50):
            loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            watch.log(loss=loss * (1 + 20 * (step == 40)))
        watch.deep()
    return save(watch, folder / "watch.html", command="skipway monitor watch.jsonl", name="watch")


PAGES: dict[str, Callable[[Path], Path]] = {
    "run-images": image_run,
    "run-text": text_run,
    "diagnosis": partial(diagnosis, scheme="identity", lr=0.1),
    "diagnosis-broken": partial(diagnosis, scheme="plain", lr=1e4),
    "treatment": partial(diagnosis, scheme="identity", lr=0.1, fix=True),
    "comparison": comparison,
    "transfer": transfer,
    "study-schemes": partial(study, name="schemes"),
    "study-scheme-table": partial(study, name="scheme-table"),
    "study-propagation": partial(study, name="propagation"),
    "studies": study_index,
    "figures": drawings,
    "monitor": monitored,
    # the site, where it is built: `bash scripts/docs`
    **{
        f"site/{page.relative_to(SITE).with_suffix('')}": lambda _, page=page: page
        for page in sorted(SITE.rglob("*.html"))
        if page.name != "404.html" and page.relative_to(SITE).parts[0] not in ("repository", "studies")
    },
}
