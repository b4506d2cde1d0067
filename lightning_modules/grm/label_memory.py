"""Earlier pseudo-labels of every pair, equal on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datamodules.loader import gather_objects
from lightning_modules.functional.consistency import Eviction, Tally, remember, tally
from lightning_modules.grm.candidates import uniform_of


class LabelMemory:
    """Labels by key (a stable name of a pair), as signs, oldest first [paper: ConsistRM].

    Args:
        size: Labels a pair [code: 20].
        evict: What a full memory forgets, see ``functional.consistency.remember``.
        decay: Weight of a label of age one; 1 counts all alike [paper].
        is_frozen: Visits are counted, but add nothing.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> memory = LabelMemory()
        >>> memory.visit({"a": 1}, 0)
        >>> memory.tally("a"), memory.last("a"), memory.last("b")
        ((1, 1), 1, None)
    """

    def __init__(
        self,
        *,
        size: int = 20,
        evict: Eviction = "farthest",
        decay: float = 1.0,
        is_frozen: bool = False,
    ) -> None:
        remember([], 0, size=size, evict=evict)  # refuses bad values
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay} must be in (0, 1]")
        self.size, self.evict, self.decay = size, evict, decay
        self.is_frozen = is_frozen
        self._entries: dict[str, list[int]] = {}
        self._last: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, votes: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Votes cast before training, by key; several of one key are strung together.

        Raises:
            ValueError: More votes of a pair than it holds.
        """
        for key, signs in votes:
            entries = self._entries.setdefault(key, [])
            entries.extend(signs)
            if len(entries) > self.size:
                raise ValueError(
                    f"pair {key!r} has {len(entries)} prior votes, more than model.memory_size="
                    f"{self.size} holds: give fewer data.prior_votes or a larger memory"
                )

    def tally(self, key: str) -> Tally:
        """Sum and count of a pair's labels, 0 among them; (0, 0) for one never seen."""
        return tally(self._entries.get(key, []), self.decay, count_zeros=True)

    def last(self, key: str) -> int | None:
        """The label of the last visit; None where there was none."""
        return self._last.get(key)

    def visit(self, labels: Mapping[str, int], index: int) -> None:
        """Add the labels of all ranks, each of other pairs; every rank must call it.

        Args:
            labels: Of this rank's pairs.
            index: Number of the draw, for the choice among equally far entries.
        """
        for written in gather_objects(dict(labels)):
            for key, label in written.items():
                self._last[key] = label
                if self.is_frozen:
                    continue
                self._entries[key] = remember(
                    self._entries.get(key, []),
                    label,
                    size=self.size,
                    evict=self.evict,
                    uniform=uniform_of("memory", key, str(index)),
                )

    def state(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {"entries": self._entries, "last": self._last}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` gave."""
        self._entries, self._last = dict(state["entries"]), dict(state["last"])
