"""What the page of a claim shows: ``conf/claim/<claim>/report.json`` and its defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from run_tools.checks import nearest
from run_tools.claim_matched import matched_problems
from run_tools.claim_scatter_options import scatter_problems
from run_tools.table import row_and_metric

FILE = "report.json"


def find_claim(claim: str | None, conf: str | Path) -> Path:
    """Folder of a claim.

    Args:
        claim: Its name.
        conf: Folder of the config groups.

    Raises:
        ValueError: There is none of that name; names those there are.
    """
    claims = sorted(path.name for path in Path(conf, "claim").glob("*") if path.is_dir())
    known = f"conf/claim has: {', '.join(claims) or 'no claims'}"
    if claim is None:
        raise ValueError(f"mode=report needs report.claim=<name>; {known}")
    if claim not in claims:
        raise ValueError(f"report.claim={claim} is unknown{nearest(claim, claims)}; {known}")
    return Path(conf, "claim", claim)


def tag_of(row: str, metric: str) -> str:
    """Tag of a metric of an inference row; the row ``""`` is the trained state itself.

    >>> tag_of("maj8", "accuracy"), tag_of("", "accuracy")
    ('test/maj8/accuracy', 'test/accuracy')
    """
    return "/".join(part for part in ("test", row, metric) if part)


@dataclass(frozen=True)
class ClaimOptions:
    """Keys of ``report.json``, all optional.

    Args:
        metrics: Columns; None shows every metric of the runs.
        baseline_arm: Arm that all others are compared with; None takes the first one unless
            there are ``pairs``.
        rows: Inference rows of each arm, in their order; None shows every row of the runs.
        pairs: ``[label, "arm/inference", "arm/inference"]``: differences by seed, the second from
            the first; None makes them from ``baseline_arm``.
        extra: Tags shown once an arm, such as ``test/conf_auc``.
        curves: Tags drawn over the steps, such as ``rollout/reward_mean``.
        scatter: Plots of metrics against each other or against a size; see ``claim_scatter``.
        matched: Arms where a curve of theirs has come equally far; see ``claim_matched``.
    """

    metrics: list[str] | None = None
    baseline_arm: str | None = None
    rows: list[str] | None = None
    pairs: list[list[str]] | None = None
    extra: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    scatter: list[dict[str, Any]] = field(default_factory=list)
    matched: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, arms: Sequence[str]) -> ClaimOptions:
        """Options of a claim; the defaults where it has no file.

        Args:
            folder: Of the claim.
            arms: Names that ``pairs`` and ``baseline_arm`` may use.

        Raises:
            ValueError: The file holds unknown keys or arms, or values of a wrong type.
        """
        path = folder / FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        problems = _problems(values, arms, [f.name for f in fields(cls)])
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        return cls(**values)

    def filled(self, arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Shown:
        """What to show, with what was left open taken from the runs.

        Args:
            arms: ``arm -> seed -> flat metrics``.
        """
        found = found_cells(arms, self.metrics or ())
        metrics, rows = self.metrics, self.rows
        if metrics is None:
            metrics = sorted({m for row, m in found if self.rows is None or row in self.rows})
        if rows is None:
            rows = sorted({row for row, metric in found if metric in metrics})
        pairs = [
            (label, _state(first), _state(second)) for label, first, second in self.pairs or []
        ]
        if self.pairs is None or self.baseline_arm is not None:
            base = self.baseline_arm or min(arms)
            pairs += [
                (_named(arm, row) + " - " + _named(base, row), (arm, row), (base, row))
                for arm in sorted(arms)
                for row in rows
                if arm != base
            ]
        return Shown(metrics, rows, pairs, list(self.extra))


@dataclass(frozen=True)
class Shown:
    """What a page shows.

    Args:
        metrics: Columns.
        rows: Inference rows.
        pairs: ``(label, (arm, row), (arm, row))`` of the differences.
        extra: Tags shown once an arm.
    """

    metrics: list[str]
    rows: list[str]
    pairs: list[tuple[str, tuple[str, str], tuple[str, str]]]
    extra: list[str]

    def measured(self, arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> tuple[Shown, str]:
        """The same without what no run holds, and a line that names it (empty if nothing)."""
        found = found_cells(arms, self.metrics)
        rows = {row for row, _ in found}
        tags = {tag for runs in arms.values() for run in runs.values() for tag in run}
        compared = [row for _, *sides in self.pairs for _, row in sides if row not in self.rows]
        missing: list[str] = []

        def kept(kind: str, wanted: Iterable[str], known: set[str]) -> list[str]:
            for name in wanted:
                if name not in known:
                    hint = nearest(name, sorted(known)).removeprefix("; ")
                    missing.append(f"{kind} {name}" + (f" ({hint})" if hint else ""))
            return [name for name in wanted if name in known]

        kept("row of a pair", dict.fromkeys(compared), rows)
        shown = Shown(
            kept("metric", self.metrics, {metric for _, metric in found}),
            kept("row", self.rows, rows),
            self.pairs,
            kept("extra", self.extra, tags),
        )
        return shown, f"in no run: {', '.join(missing)}" if missing else ""


def found_cells(
    arms: Mapping[str, Mapping[int, Mapping[str, Any]]], metrics: Sequence[str] = ()
) -> set[tuple[str, str]]:
    """``(inference row, metric)`` of every number below ``test/`` in any run.

    Args:
        arms: ``arm -> seed -> flat metrics``.
        metrics: Names that may have a slash of their own.
    """
    tags = {
        tag
        for runs in arms.values()
        for run in runs.values()
        for tag, value in run.items()
        if tag.startswith("test/") and isinstance(value, (int, float))
    }
    return {row_and_metric(tag, metrics) for tag in tags}


def _state(text: str) -> tuple[str, str]:
    arm, _, row = text.partition("/")
    return arm, row


def _named(arm: str, row: str) -> str:
    return f"{arm} {row}".strip()


def _problems(values: Any, arms: Sequence[str], keys: Sequence[str]) -> list[str]:
    if not isinstance(values, dict):
        return ["must be an object"]
    problems = []
    for key, value in values.items():
        if key not in keys:
            problems.append(f"unknown key '{key}'{nearest(key, keys)} (keys: {', '.join(keys)})")
        elif key == "baseline_arm":
            problems += _unknown_arm(key, value, arms)
        elif key == "pairs":
            problems += _bad_pairs(value, arms)
        elif key == "scatter":
            problems += scatter_problems(value, arms)
        elif key == "matched":
            problems += matched_problems(value, arms)
        elif not _are_texts(value):
            problems.append(f"{key}={value!r} must be a list of texts")
    return problems


def _bad_pairs(pairs: Any, arms: Sequence[str]) -> list[str]:
    if not isinstance(pairs, list):
        return [f"pairs={pairs!r} must be a list"]
    problems = []
    for index, pair in enumerate(pairs):
        if not _are_texts(pair) or len(pair) != 3:
            problems.append(f'pairs[{index}]={pair!r} must be [label, "arm/row", "arm/row"]')
            continue
        for text in pair[1:]:
            problems += _unknown_arm(f"pairs[{index}]", _state(text)[0], arms)
    return problems


def _unknown_arm(key: str, arm: Any, arms: Sequence[str]) -> list[str]:
    if arm in arms:
        return []
    return [f"{key}: unknown arm {arm!r}{nearest(str(arm), arms)} (arms: {', '.join(arms)})"]


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
