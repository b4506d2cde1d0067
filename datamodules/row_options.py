"""Where rows come from and how they are split: the options of every task that reads a file."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.sources import BadRowPolicy, stable_hash
from datamodules.tasks.base import Split


class RowOptions:
    """Which rows are read and how they are split: what every task of files takes.

    Splits go by a hash of a key, or by files of their own. A subclass hands its own
    ``**options`` on to this constructor.

    Args:
        path: File, folder of ``datasets.save_to_disk`` or hub name, see ``sources.scan_rows``.
        columns: Role to column where the usual names do not do.
        format: ``auto`` or a format of ``sources.FORMATS``, for all paths.
        split: Split of a hub data set behind ``path``.
        val_path: Validation rows from elsewhere; the fraction is then not used.
        val_split: Split of the hub data set for validation.
        test_path: Test rows from elsewhere; the fraction is then not used.
        test_split: Split of the hub data set for testing.
        val_fraction: Share of the rows of ``path`` for validation.
        test_fraction: Share of the rows of ``path`` for testing.
        seed: Changes the split.
        on_bad_row: ``error`` names up to five bad rows, ``skip`` counts them by reason.
        max_bad_share: Share of rows that ``error`` leaves out, with a count and a warning.
    """

    def __init__(
        self,
        *,
        path: str,
        columns: Mapping[str, str | None] | None = None,
        format: str = "auto",
        split: str | None = None,
        val_path: str | None = None,
        val_split: str | None = None,
        test_path: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        on_bad_row: BadRowPolicy = "error",
        max_bad_share: float = 0.0,
    ) -> None:
        self.path, self.format, self.split = path, format, split
        self.columns = dict(columns or {})
        self.sources: dict[Split, tuple[str, str | None]] = {}
        if val_path or val_split:
            self.sources["val"] = (val_path or path, val_split)
        if test_path or test_split:
            self.sources["test"] = (test_path or path, test_split)
        self.val_fraction = 0.0 if "val" in self.sources else val_fraction
        self.test_fraction = 0.0 if "test" in self.sources else test_fraction
        self.seed, self.on_bad_row, self.max_bad_share = seed, on_bad_row, max_bad_share

    def share_problems(self) -> list[str]:
        """What is wrong with the shares of validation and test: one message or none."""
        shares = self.val_fraction, self.test_fraction
        if min(shares) >= 0 and sum(shares) <= 1:
            return []
        return [
            f"data.task.val_fraction={shares[0]}, data.task.test_fraction={shares[1]}: both "
            "are shares of the rows, 0 or more, together 1 at most"
        ]

    def path_problems(self) -> list[str]:
        """What is wrong with the path: one message or none."""
        missing = "data.path is not set: name a file, a folder or a hub data set"
        return [] if self.path else [missing]

    def split_of(self, key: str) -> Split:
        """The split of a row of ``path``: a hash, so neither order nor number of rows matter.

        Args:
            key: What decides; rows of equal keys stay together.
        """
        place = stable_hash("split", self.seed, key) / 2**64
        if place < self.test_fraction:
            return "test"
        return "val" if place < self.test_fraction + self.val_fraction else "train"
