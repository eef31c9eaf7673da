"""Tables of a benchmark in Markdown: the best peer and the best of ours for each workload."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.race.accuracy import ALLOWED, loses_accuracy
from benchmarks.race.contenders import ANY
from benchmarks.race.journal import Journal, RaceRecord
from skipway.inference.timer import Quartiles, quartiles, round_speedups

__all__ = ["RaceResult", "deciding_results", "markdown", "race_results", "with_device", "write_markdown"]

SIDES = {"ours": "ours", "peer": "peers", "switched": "peers under our switches", "engine": "peers in other engines"}
NOTHING = "–"
Row = dict[str, Any]


@dataclass(frozen=True)
class RaceResult:
    """What came of a race.

    Args:
        race: its rows.
        best: contender of each side ("ours", "peer", "switched", "engine") with the highest median rate.
        rates: images a second of every contender that was timed, median over the rounds.
        ceiling: images a second of a machine that does nothing but multiply, as fast as was measured; 0: not known.
        barred: contenders that are the best of no side, since their precision costs too much accuracy.
    """

    race: RaceRecord
    best: dict[str, str]
    rates: dict[str, float]
    ceiling: float
    barred: frozenset[str]

    def gain(self, name: str, over: str) -> Quartiles | None:
        """How many times as fast as the best of a side, over the rounds that both took part in."""
        reference = self.best.get(over)
        if reference is None or name not in self.rates:
            return None
        found = round_speedups(self.race.seconds, name, reference)
        return quartiles(found) if found else None

    def rate(self, side: str) -> float:
        """Images a second of the best of a side; NaN where there is none."""
        return self.rates.get(self.best.get(side, ""), math.nan)

    def share(self, name: str) -> float:
        """Of the ceiling; NaN where that is not known."""
        return self.rates[name] / self.ceiling if self.ceiling else math.nan


def race_results(journal: Journal) -> list[RaceResult]:
    """Every race of a journal that has timed anybody."""
    known = ceilings(journal)
    races = [race for race in journal.races() if race.seconds]
    rows = [known.get((race.workload.device, race.workload.precision), ()) for race in races]
    best = [max((row["flops"] for row in own), default=0.0) for own in rows]
    accuracies = journal.of("accuracy")
    return [race_result(race, flops, find_barred(race, accuracies)) for race, flops in zip(races, best, strict=True)]


def find_barred(race: RaceRecord, accuracies: Sequence[Row]) -> frozenset[str]:
    """The contenders of a race at equal accuracy whose precision costs too much of it, or was not looked at."""
    if race.workload.precision != ANY:
        return frozenset()
    network = race.workload.network
    return frozenset(name for name in race.seconds if loses_accuracy(accuracies, network, race.prepared[name]))


def deciding_results(journal: Journal) -> list[RaceResult]:
    """The race that decides of each workload: its final, or what was not run in parts."""
    found: dict[Any, RaceResult] = {}
    for each in race_results(journal):
        before = found.get(each.race.workload)
        if each.race.stage != "heat" and (before is None or before.race.number < each.race.number):
            found[each.race.workload] = each
    return list(found.values())


def ceilings(journal: Journal) -> dict[tuple[str, str], list[Row]]:
    """Those that were measured, by device and precision."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in journal.of("ceiling"):
        found.setdefault((row.get("device", "cpu"), row["precision"]), []).append(row)
    return found


def with_device(text: str, device: str) -> str:
    """A title, with the device where it is not the CPU.

    >>> with_device("Training in bfloat16", "cpu"), with_device("Training in bfloat16", "cuda")
    ('Training in bfloat16', 'Training in bfloat16 on cuda')
    """
    return text if device == "cpu" else f"{text} on {device}"


def race_result(race: RaceRecord, ceiling: float, barred: frozenset[str]) -> RaceResult:
    """What came of a race.

    Args:
        race: its rows.
        ceiling: operations a second; 0: not known.
        barred: see `RaceResult`.
    """
    rates = {name: race.workload.batch / median(taken.values()) for name, taken in race.seconds.items()}
    best: dict[str, str] = {}
    for name, rate in rates.items():
        side = race.prepared[name]["side"]
        if name not in barred and rate > rates.get(best.get(side, ""), 0.0):
            best[side] = name
    return RaceResult(race, best, rates, race.workload.batch * ceiling / race.flops if race.flops else 0.0, barred)


def markdown(journal: Journal) -> str:
    """The tables of a benchmark in Markdown."""
    every = deciding_results(journal)
    parts = [
        machine_text(journal),
        *(section(title, table) for title, table in overview(every)),
        section("Accuracy of trained networks", accuracy_table(journal)),
        section("Depth: narrow networks of ever more branches", growth_table(every)),
        section("Memory of a training step", memory_table(journal)),
        section("Start: import and build in a fresh process", startup_table(journal)),
        section("Every contender", details(race_results(journal))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_markdown(journal: Journal, path: Path) -> Path:
    """The tables into a file."""
    path.write_text(f"# Speed\n\n{markdown(journal)}", encoding="utf-8")
    return path


def section(title: str, text: str) -> str:
    """A table under its heading; nothing where it is empty."""
    return f"## {title}\n\n{text}" if text else ""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; nothing where it has no rows.

    >>> print(markdown_table(["net", "rate"], [["a", "1|2"]]))
    | net | rate |
    |---|---|
    | a | 1\\|2 |
    """
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines]) if lines else ""


def format_number(value: float, form: str = ".1f", unit: str = "") -> str:
    """A number, or that there is none.

    >>> format_number(1234.56), format_number(float("nan")), format_number(0.5, ".0%")
    ('1,234.6', '–', '50%')
    """
    return f"{value:,{form}}{unit}" if math.isfinite(value) else NOTHING


def machine_text(journal: Journal) -> str:
    """The machine, the ceilings, and who was not there."""
    lines = []
    for row in {row.get("device", "cpu"): row for row in journal.of("machine")}.values():
        fused = f", TIMM_FUSED_ATTN={row['fused_attention']}" if row.get("fused_attention") else ""
        lines.append(
            f"{row['processor']}, {row['cores']} cores, {row['threads']} threads, torch {row['torch']}, "
            f"Python {row['python']}, {row['date']}{fused}; load {row['load'] or 0:.1f} when it began."
        )
    for (device, precision), rows in ceilings(journal).items():
        best = max(rows, key=lambda row: row["flops"])
        lines.append(
            f"{with_device(f'Ceiling in {precision}', device)}: {best['flops'] / 1e9:,.0f} GFLOP/s ({best['how']}; "
            f"measured {len(rows)} times, {min(row['flops'] for row in rows) / 1e9:,.0f} at least)."
        )
    copies: dict[str, list[float]] = {}
    for row in journal.of("copy"):
        copies.setdefault(row.get("device", "cpu"), []).append(row["bytes"] / 1e9)
    for device, rates in copies.items():
        lines.append(
            f"{with_device('Copying', device)}: {max(rates):,.1f} GB/s read and written ({min(rates):,.1f} at least)."
        )
    absent = dict.fromkeys(row["library"] for row in journal.of("missing"))
    if absent:
        lines.append(f"Not installed, hence not measured: {', '.join(absent)}.")
    lines.append(
        "A ratio is the median over the rounds of one run in which all take turns, with its quartiles. The best peer "
        "is the fastest of all libraries and modes of torch; a peer that uses our switches (our kernels; on a CPU also "
        "freed memory kept and single precision sent to oneDNN) has a column of its own, and so has a peer in OpenVINO "
        "or ONNX Runtime, which `optimize` may choose as well: what it gains over that column is ours, the rest is the "
        "engine's. Modes of peers that end in `-pieces`, and `openvino-throughput`, search for the best pieces of a "
        "batch, streams and threads as `optimize` does for ours."
    )
    if any(race.stage for race in journal.races()):
        lines.append(
            "Races were run in parts: heats, each with our network in torch's operators as the pacemaker, and a final "
            "of the fastest of each side. Seconds of different parts do not compare."
        )
    return "\n".join(f"* {line}" for line in lines)


def overview(every: Sequence[RaceResult]) -> Iterator[tuple[str, str]]:
    """A table for inference and one for training, of each precision."""
    titles = {"infer": "Inference", "train": "Training"}
    suffixes = {"any": f" at equal accuracy, each in any precision within {ALLOWED:g} points of top-1"}
    for what, title in titles.items():
        for device, precision in dict.fromkeys(
            (each.race.workload.device, each.race.workload.precision) for each in every
        ):
            chosen = [
                each
                for each in every
                if (each.race.workload.what, each.race.workload.device, each.race.workload.precision)
                == (what, device, precision)
                and "@" not in each.race.workload.network
            ]
            heading = f"{title}{suffixes.get(precision, f' in {precision}')}, images a second"
            yield with_device(heading, device), overview_table(chosen)


def overview_table(every: Iterable[RaceResult]) -> str:
    """Best peer against ours, a row for each workload."""
    columns = (
        *("network", "batch x size", "best peer", "", "best peer + switches", "best peer in another engine", ""),
        *("ours", "", "ours / peer", "ours / peer + switches", "ours / peer in another engine", "ours of ceiling"),
    )
    return markdown_table(columns, map(overview_row, every))


def overview_row(each: RaceResult) -> list[str]:
    workload, best = each.race.workload, each.best
    mine = best.get("ours", "")
    gains = [each.gain(mine, side) for side in ("peer", "switched", "engine")]
    return [
        workload.network,
        f"{workload.batch}x{workload.size}",
        format_number(each.rate("peer")),
        best.get("peer", NOTHING),
        format_number(each.rate("switched")),
        format_number(each.rate("engine")),
        best.get("engine", NOTHING),
        format_number(each.rate("ours")),
        mine.removeprefix("skipway ") or NOTHING,
        *(NOTHING if gain is None else str(gain) for gain in gains),
        format_number(each.share(mine), ".0%") if mine else NOTHING,
    ]


def growth_table(every: Iterable[RaceResult]) -> str:
    """Milliseconds a step and seconds to build, by depth."""
    rows = []
    for each in every:
        workload = each.race.workload
        family, at, branches = workload.network.partition("@")
        if not at:
            continue
        mine, peer = each.best.get("ours", ""), each.best.get("peer", "")
        gain = each.gain(mine, "peer")
        rows.append(
            (
                with_device(f"{workload.what} {family} {workload.batch}x{workload.size}", workload.device),
                f"{int(branches):,}",
                *(format_number(1000 * workload.batch / each.rate(side)) for side in ("peer", "ours")),
                f"{peer or NOTHING}",
                mine or NOTHING,
                NOTHING if gain is None else str(gain),
                *(
                    format_number(each.race.prepared.get(name, {}).get("build_seconds", math.nan), ".2f")
                    for name in (peer, mine)
                ),
            )
        )
    columns = (
        *("work", "branches", "best peer, ms", "ours, ms", "peer", "ours", "ours / peer", "peer builds in s"),
        "ours builds in s",
    )
    return markdown_table(columns, rows)


def memory_table(journal: Journal) -> str:
    """Peak and kept bytes of a training step."""
    rows = []
    for row in journal.of("memory"):
        workload = row["workload"]
        amounts = [format_number(row.get(name, math.nan) / 2**20, ".0f") for name in ("peak_bytes", "saved_bytes")]
        size = with_device(f"{workload['batch']}x{workload['size']}", workload.get("device", "cpu"))
        rows.append((workload["network"], workload["precision"], size, row["name"], *amounts, row["error"]))
    columns = ("network", "precision", "batch x size", "contender", "peak MiB", "kept for backward MiB", "remark")
    return markdown_table(columns, rows)


def startup_table(journal: Journal) -> str:
    """Seconds until a network is there."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in journal.of("startup"):
        found.setdefault((row["network"], row["library"]), []).append(row)
    rows = []
    for (network, library), measured in found.items():
        good = [row for row in measured if not row["error"]]
        halves = [
            median(row[name] for row in good) if good else math.nan for name in ("import_seconds", "build_seconds")
        ]
        remark = "" if good else measured[-1]["error"]
        rows.append((network, library, *(format_number(value, ".2f") for value in (*halves, sum(halves))), remark))
    return markdown_table(("network", "library", "import s", "build s", "both s", "remark"), rows)


def details(every: Iterable[RaceResult]) -> str:
    """Every contender of every race, the fastest first, those without a time last."""
    columns = (
        *("workload", "side", "contender", "images/s", "over best peer", "of ceiling", "build s", "prepare s"),
        *("pieces and streams", "rounds", "parameters", "remark"),
    )
    return markdown_table(columns, (row for each in every for row in detail_rows(each)))


def detail_rows(each: RaceResult) -> Iterator[list[str]]:
    race = each.race
    known: Callable[[str], Row] = lambda name: race.prepared.get(name, {})  # noqa: E731
    for name in sorted(race.names, key=lambda name: -each.rates.get(name, 0.0)):
        gain = each.gain(name, "peer")
        yield [
            f"{race.workload}{f', {race.stage}' if race.stage else ''}",
            SIDES.get(known(name).get("side", ""), NOTHING),
            f"**{name}**" if name in each.best.values() else name,
            format_number(each.rates.get(name, math.nan)),
            NOTHING if gain is None else str(gain),
            format_number(each.share(name), ".0%") if name in each.rates else NOTHING,
            *(format_number(known(name).get(key, math.nan), ".1f") for key in ("build_seconds", "prepare_seconds")),
            searched(known(name)),
            str(len(race.seconds.get(name, {}))),
            f"{known(name)['parameters']:,}" if "parameters" in known(name) else NOTHING,
            "; ".join(filter(None, ("costs too much accuracy" * (name in each.barred), race.remark(name)))),
        ]


def accuracy_table(journal: Journal) -> str:
    """Top-1 of trained networks in each mode and precision."""
    last = {(row["network"], row["precision"], row["mode"]): row for row in journal.of("accuracy")}
    columns = ("network", "trained", "held-out images", "mode", "precision", "top-1 %", "in float32 %", "remark")
    rows = [
        (
            *(str(row[key]) for key in ("network", "trained", "images", "mode", "precision")),
            *(format_number(row.get(key, math.nan), ".2f") for key in ("top1", "reference")),
            row["error"] or "more than allowed" * loses_accuracy([row], row["network"], row),
        )
        for row in last.values()
    ]
    return markdown_table(columns, rows)


def searched(row: Row) -> str:
    """The pieces and streams of a contender, and among how many they were the best.

    >>> searched({"how": "bfloat16, 8 pieces", "tried": 5}), searched({})
    ('bfloat16, 8 pieces (best of 5)', '–')
    """
    tried = f" (best of {row['tried']})" if row.get("tried") else ""
    return f"{row['how']}{tried}" if row.get("how") else NOTHING
