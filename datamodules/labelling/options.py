"""Options of labelling, checked once: ``data.labels.*``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from datamodules.sources import nearest

LABELS = ("both", "local", "global", "gold_ids")
NEGATIVES = ("random", "gac0_only", "top", "in_batch_only")
_LOWEST = {
    "candidates": 2,
    "judge_chunk": 1,
    "samples": 1,
    "max_positives": 1,
    "num_negatives": 1,
    "chunk_questions": 1,
    "batch_size": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class LabelOptions:
    """How passages are labelled and selected.

    The first group decides the labels, the second what is made of them: labels in a folder serve
    any second group.

    Args:
        label: ``both`` signals, ``local`` (judge) or ``global`` (continued rollouts) alone, or
            ``gold_ids``, the supporting passages, an upper bound [our choice].
        candidates: Passages a turn [code].
        judge_chunk: Passages the judge sees together [code].
        use_subanswers: Tell the judge the fact that a query was after, where it is known [code].
        samples: Trajectories a question.
        temperature: Of trajectories and continued rollouts; 0 is greedy [our choice].
        seed: Of sampling and of the drawn negatives.
        pos_threshold: Fewest points (0 to 100) of a positive, where the judge counts [code: 0.6].
        max_positives: Most rows a turn [code].
        num_negatives: Negatives a row [code].
        negatives: ``random`` of all that are no positives [code]; ``gac0_only`` of those whose
            rollout was wrong; ``top`` takes the retriever's best; ``in_batch_only`` takes none.
        chunk_questions: Questions whose labels are saved together.
        batch_size: Most continued rollouts at once.

    Raises:
        ValueError: A value is not allowed; several problems come together.

    Example:
        >>> LabelOptions(label="local").needs_rollouts
        False
    """

    label: str = "both"
    candidates: int = 20
    judge_chunk: int = 10
    use_subanswers: bool = True
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0

    pos_threshold: int = 60
    max_positives: int = 3
    num_negatives: int = 15
    negatives: str = "random"

    chunk_questions: int = 64
    batch_size: int = 4096

    def __post_init__(self) -> None:
        problems = [*self._type_problems()] or [*self._value_problems()]
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> LabelOptions:
        """From a config's mapping.

        Args:
            values: ``data.labels``.

        Raises:
            ValueError: An unknown key, or a value that is not allowed.
        """
        known = [item.name for item in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            keys = (f"unknown key 'data.labels.{name}'{nearest(name, known)}" for name in unknown)
            raise ValueError("; ".join(keys))
        return cls(**values)

    @property
    def needs_judge(self) -> bool:
        """Whether local scores count."""
        return self.label in ("both", "local")

    @property
    def needs_rollouts(self) -> bool:
        """Whether continued rollouts count."""
        return self.label in ("both", "global")

    def material(self) -> dict[str, Any]:
        """What decides the labels, as plain values: selecting anew needs no new labels."""
        names = ("candidates", "samples", "temperature", "seed")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found |= {"judge": self.needs_judge, "rollouts": self.needs_rollouts}
        if self.needs_judge:
            found |= {"judge_chunk": self.judge_chunk, "use_subanswers": self.use_subanswers}
        return found

    def _type_problems(self) -> list[str]:
        problems = []
        for field in fields(self):
            value, key = getattr(self, field.name), f"data.labels.{field.name}"
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and not whole:
                problems.append(f"{key}={value!r} must be a whole number")
            if field.type == "float" and not (whole or isinstance(value, float)):
                problems.append(f"{key}={value!r} must be a number")
            if field.type == "bool" and not isinstance(value, bool):
                problems.append(f"{key}={value!r} must be true or false")
        return problems

    def _value_problems(self) -> list[str]:
        problems = []
        for name, allowed in (("label", LABELS), ("negatives", NEGATIVES)):
            if getattr(self, name) not in allowed:
                one_of = ", ".join(allowed)
                problems.append(f"data.labels.{name}={getattr(self, name)!r}: allowed are {one_of}")
        for name, lowest in _LOWEST.items():
            if getattr(self, name) < lowest:
                value = getattr(self, name)
                problems.append(f"data.labels.{name}={value} must be at least {lowest}")
        if not 0 <= self.pos_threshold <= 100:
            problems.append(f"data.labels.pos_threshold={self.pos_threshold} must be in 0 to 100")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"data.labels.temperature={self.temperature} must be 0 or more")
        return problems + self._clashes()

    def _clashes(self) -> list[str]:
        problems = []
        if self.negatives != "in_batch_only" and self.num_negatives >= self.candidates:
            problems.append(
                f"data.labels.num_negatives={self.num_negatives} must be below "
                f"data.labels.candidates={self.candidates}"
            )
        if self.negatives == "gac0_only" and not self.needs_rollouts:
            problems.append(
                f"data.labels.negatives='gac0_only' needs continued rollouts, which "
                f"data.labels.label={self.label!r} leaves out"
            )
        if self.samples > 1 and self.temperature == 0:
            problems.append(
                f"data.labels.samples={self.samples} needs data.labels.temperature above 0: greedy "
                "trajectories are all the same"
            )
        return problems
