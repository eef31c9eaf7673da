"""What was measured, one JSON object to a line, written at once: an interrupted run loses nothing and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.race.contenders import Contender, Workload
from skipway.errors import SkipwayError
from skipway.inference.backends import Choice
from skipway.inference.timer import Timing

__all__ = ["FILE", "Journal", "RaceRecord", "is_final"]

FILE = "rows.jsonl"
Row = dict[str, Any]


class Journal:
    """The rows of a folder.

    Args:
        folder: made where it is not there.

    Raises:
        SkipwayError: a line of its file is no row.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Journal(folder).write({"kind": "machine", "cores": 2})
    ...     Journal(folder).rows
    [{'kind': 'machine', 'cores': 2}]
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self.rows: list[Row] = list(read_rows(self.path)) if self.path.exists() else []

    def write(self, row: Row) -> None:
        """One more row, on disk at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row) + "\n"
        with self.path.open("ab+") as file:
            # a line that an interruption cut off stays a line of its own
            if file.tell() and not ends_with_newline(self.path):
                line = "\n" + line
            file.write(line.encode())
        self.rows.append(row)

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return [row for row in self.rows if row.get("kind") == kind]

    def has(self, kind: str, **values: Any) -> bool:
        """Whether there is a row of this kind with these values that did not fail."""
        return any(values.items() <= row.items() and not row.get("error") for row in self.of(kind))

    def races(self) -> list[RaceRecord]:
        """The last race of each workload and stage, of heats that of each field, in the order in which they were first
        begun.
        """
        begun: dict[int, RaceRecord] = {}
        last: dict[Workload, int] = {}  # rows of before races were numbered belong to the last one of their workload
        for row in self.rows:
            if row.get("kind") == "race":
                race = begun[len(begun)] = RaceRecord(row, len(begun))
                last[race.workload] = race.number
            elif row.get("kind") in ("prepared", "timing", "end"):
                number = row.get("race", last.get(Workload(**row["workload"])))
                if number in begun:
                    begun[number].take(row)
        return list({race.key: race for race in begun.values()}.values())

    def race(self, workload: Workload, names: Sequence[str], rounds: int, stage: str = "") -> RaceRecord:
        """The last race of a workload where it had these contenders and at least so many rounds, else a new one.

        Args:
            workload: what is done.
            names: of the contenders.
            rounds: how often each is timed.
            stage: "heat" or "final", where a race is run in parts.
        """
        for race in self.races():
            enough = race.ended and set(names) <= set(race.names) and rounds <= race.rounds
            if (race.workload, race.stage) == (workload, stage) and (
                enough or (sorted(names) == sorted(race.names) and rounds == race.rounds)
            ):
                return race
        row = {
            "kind": "race",
            "workload": asdict(workload),
            "stage": stage,
            "names": list(names),
            "rounds": rounds,
        }
        number = len(self.of("race"))
        self.write(row)
        return RaceRecord(row, number)

    def choice(self, workload: Workload, contender: Contender) -> Choice | None:
        """The pieces and streams that a contender was last prepared with in work of this size, if it searched for them,
        whatever else took part.
        """
        who = {name: getattr(contender, name) for name in ("library", "mode", "precision", "switched")}
        work = {name: value for name, value in asdict(workload).items() if name != "precision"}
        chosen = [
            row["choice"]
            for row in self.of("prepared")
            if row.get("choice") and who.items() <= row.items() and work.items() <= row["workload"].items()
        ]
        return Choice(**chosen[-1]) if chosen else None


class RaceRecord:
    """What is known of one race.

    Args:
        row: its first.
        number: races that were begun before it.
    """

    def __init__(self, row: Row, number: int = 0) -> None:
        self.workload, self.names, self.rounds = Workload(**row["workload"]), tuple(row["names"]), int(row["rounds"])
        self.stage, self.number = row.get("stage", ""), number
        self.prepared: dict[str, Row] = {}
        self.timings: list[Timing] = []
        self.flops, self.ended = 0, False

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later race takes the place of."""
        return (self.workload, self.stage, *(sorted(self.names) if self.stage == "heat" else ()))

    def take(self, row: Row) -> None:
        """One more row of it."""
        if row["kind"] == "prepared":
            self.prepared[row["name"]] = row
        elif row["kind"] == "timing":
            self.timings.append(read_timing(row))
        else:
            self.flops, self.ended = row["flops"], True

    @property
    def seconds(self) -> dict[str, dict[int, float]]:
        """Of each contender that was timed, by round."""
        taken: dict[str, dict[int, float]] = {}
        for timing in self.timings:
            if not is_final(timing):
                taken.setdefault(timing.name, {})[timing.round] = timing.seconds
        return taken

    def remark(self, name: str) -> str:
        """Why a contender failed, or took part in some of the rounds alone."""
        failed = self.prepared.get(name, {}).get("error", "")
        late = [
            timing.error or f"left, {timing.dropped}"
            for timing in self.timings
            if timing.name == name and is_final(timing)
        ]
        return str(failed or (late[-1] if late else ""))


def is_final(timing: Timing) -> bool:
    """Whether it was the last of its contender."""
    return bool(timing.error or timing.dropped)


def read_timing(row: Row) -> Timing:
    """A timing as it was written."""
    return Timing(row["name"], row["round"], row.get("seconds") or float("nan"), row["error"], row["dropped"])


def ends_with_newline(path: Path) -> bool:
    """Whether the last line of a file is whole."""
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file; a last line that was cut off is left out."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise SkipwayError(f"{path}, line {number}: no JSON; take the line out, or set another --out") from error
        if row is not None:
            yield row
