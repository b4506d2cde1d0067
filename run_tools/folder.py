"""The run folder: who owns it, what is in it, and whether a run goes on in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Folders of modes that train nothing; a model may well be measured before it is trained.
_MODES = {"validate", "test", "predict"}


@dataclass
class RunFolder:
    """A folder of one run.

    Args:
        path: The folder.
        metrics: Of a finished run that is not run again, else None.
        checkpoint: To go on from, else None.
    """

    path: Path
    metrics: dict[str, Any] | None = None
    checkpoint: Path | None = None

    @classmethod
    def open(
        cls, path: str | Path, *, resume: bool, overwrite: bool, is_writer: bool = True
    ) -> RunFolder:
        """Take a folder for a run.

        Args:
            path: The folder.
            resume: Go on with what is there; a finished run gives its metrics.
            overwrite: Remove what is there.
            is_writer: Whether this is rank 0; others only look.

        Raises:
            FileExistsError: The folder holds a run and neither was asked for.
        """
        folder = cls(Path(path))
        last = folder.path / "checkpoints" / "last.ckpt"
        if overwrite and is_writer and folder.path.exists():
            shutil.rmtree(folder.path)
        if resume:
            if folder.metrics_path.is_file():
                folder.metrics = folder.read_json(folder.metrics_path.name)
            elif last.exists():  # a folder too: it is refused where it is loaded
                folder.checkpoint = last
        elif is_writer and folder._names():
            state = "a finished" if folder.metrics_path.is_file() else "an unfinished"
            raise FileExistsError(
                f"{folder.path} holds {state} run: go on with resume=auto, replace it with "
                f"overwrite=true, or choose another run_id=<name>"
            )
        if is_writer:
            folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that failed before it did anything, so it can start anew."""
        if self._names() <= {"config.yaml", "tensorboard"}:
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            (self.path / "config.yaml").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of a mode that trains nothing there are files
                self.path.rmdir()

    def _names(self) -> set[str]:
        """What is there of the run itself."""
        if not self.path.is_dir():
            return set()
        return {item.name for item in self.path.iterdir()} - _MODES

    @property
    def metrics_path(self) -> Path:
        """Written last: its existence means that the run is finished."""
        return self.path / "metrics.json"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(name, json.dumps(values, indent=1, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all.

        Raises:
            OSError: The disk is full, for example; what was there is intact.
        """
        target = self.path / name
        unfinished = target.with_suffix(".unfinished")
        try:
            with open(unfinished, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(unfinished, target)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {target} ({error.strerror or error}); free space and go on with "
                f"resume=auto"
            ) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of this run, None where it is not there.

        Raises:
            ValueError: It holds something else.
        """
        path = self.path / name
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path}: not JSON ({error}); remove it or give overwrite=true"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: not a JSON object; remove it or give overwrite=true")
        return values


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ between two nested configs, as ``key (old -> new)``."""
    old, new = flatten(before), flatten(now)
    return [
        f"{key} ({old.get(key)!r} -> {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat
