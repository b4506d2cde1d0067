"""Finished labels as JSON-lines in a folder: a killed run goes on where it stopped.

The first line says what made the labels (agent, retriever, judge, options), each further one holds
the turns of one question. Labels of another agent or retriever are stale, so a folder that was
made by others is refused. A line that a kill left unfinished is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datamodules.labelling.records import LabelledTurn

NAME = "labels.jsonl"


@dataclass(frozen=True)
class Finished:
    """All labels of one question.

    Args:
        question: Its uid.
        turns: Of its trajectories, in order.
        counts: What happened on the way, see ``pipeline``.
    """

    question: str
    turns: tuple[LabelledTurn, ...]
    counts: Counter[str]


class LabelStore:
    """Labels in a folder, read at once and written question by question.

    Args:
        folder: Made if it is not there.
        made_by: What decides the labels, as plain values.

    Raises:
        ValueError: The folder holds labels that others made, or a line cannot be read.
    """

    def __init__(self, folder: str | Path, made_by: Mapping[str, Any]) -> None:
        self.path = Path(folder) / NAME
        self.made_by: dict[str, Any] = json.loads(json.dumps(dict(made_by)))
        self.finished: dict[str, Finished] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        if lines:
            self._check(self._parsed(1, lines[0]))
        else:
            self._write([json.dumps({"made_by": self.made_by}, sort_keys=True)])
        for number, line in enumerate(lines[1:], start=2):
            self._keep(number, line)

    def append(self, items: Sequence[Finished]) -> None:
        """Write finished questions; they are on the disk when this returns.

        Args:
            items: In order, none of them written before.

        Raises:
            ValueError: A question is there already.
        """
        for item in items:
            if item.question in self.finished:
                raise ValueError(f"{self.path}: question {item.question!r} is there already")
            self.finished[item.question] = item
        self._write([json.dumps(_plain(item)) for item in items])

    def _write(self, lines: Sequence[str]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        """Lines of the file; one without an end is cut off."""
        if not self.path.is_file():
            return []
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)
        return data[:end].split(b"\n")[:-1]

    def _check(self, header: Any) -> None:
        found = header.get("made_by") if isinstance(header, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}:1: field 'made_by' is missing: no file of labels")
        names = sorted({*found, *self.made_by})
        other = [name for name in names if found.get(name) != self.made_by.get(name)]
        if other:
            pairs = (f"{n}={found.get(n)!r}, now {self.made_by.get(n)!r}" for n in other)
            raise ValueError(
                f"{self.path}: these labels were made by others ({'; '.join(pairs)}): they are "
                f"stale, so label into another folder or remove this one"
            )

    def _keep(self, number: int, line: bytes) -> None:
        values = self._parsed(number, line)
        try:
            item = _finished(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}:{number}: no labelled question ({error!r})") from error
        if item.question in self.finished:
            raise ValueError(
                f"{self.path}:{number}: field 'question': {item.question!r} is there twice"
            )
        self.finished[item.question] = item

    def _parsed(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number}: does not parse as JSON ({error})") from error


def _plain(item: Finished) -> dict[str, Any]:
    turns = [asdict(turn) for turn in item.turns]
    return {"question": item.question, "turns": turns, "counts": dict(sorted(item.counts.items()))}


def _finished(values: Mapping[str, Any]) -> Finished:
    turns = tuple(_turn(turn) for turn in values["turns"])
    counts = Counter({str(name): int(count) for name, count in values["counts"].items()})
    return Finished(str(values["question"]), turns, counts)


def _turn(values: Mapping[str, Any]) -> LabelledTurn:
    known = {item.name for item in fields(LabelledTurn)}
    if set(values) != known:
        raise ValueError(f"fields {sorted(set(values) ^ known)} are missing or unknown")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    turn = LabelledTurn(**plain)
    lists = {name: plain[name] for name in ("candidates", "gold", "history")}
    bad = [name for name, value in lists.items() if not isinstance(value, tuple)]
    if bad:
        raise ValueError(f"fields {bad} of turn {turn.turn} must be lists")
    sizes = {len(x) for x in (turn.local, turn.right, turn.gold, turn.candidates) if x is not None}
    if len(sizes) > 1:
        raise ValueError(f"turn {turn.turn} has lists of {sorted(sizes)} entries")
    return turn
