"""What a checkpoint says about the backbone that it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from datamodules.prepared import prepare


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint as plain containers and tensors; nothing in it can run code.

    Raises:
        ValueError: No such file, a folder, or a file that holds more than plain data.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(
            f"ckpt_path={path}: is a folder; distributed checkpoints are refused "
            f"(they unpickle). An exported folder goes to backbone.path instead"
        )
    if not file.is_file():
        near = sorted(file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
        hint = f"; there is {near[0]}" if near else ""
        raise ValueError(f"ckpt_path={path}: no such file{hint}")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it would call {found.group(1)}" if found else str(error).strip().splitlines()[0]
        raise ValueError(
            f"ckpt_path={path}: refused, not a plain checkpoint of tensors and numbers ({reason})"
        ) from error


@contextmanager
def naming_the_data(source: str | Path) -> Iterator[None]:
    """Where a tokenizer cannot encode the data, add what its model was trained on.

    Args:
        source: Checkpoint, or folder of an exported model.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("the tokenizer of"):
            raise
        about = Path(source, "litpost.json")
        if Path(source).is_file():
            made = load_checkpoint(source).get("litpost") or {}
        else:
            made = json.loads(about.read_text()) if about.is_file() else {}
        task = made.get("task") or "unknown"
        raise ValueError(f"{error}; the model of {source} was trained on task '{task}'") from error


def backbone_of_checkpoint(path: str | Path, cache_dir: str | Path) -> Path:
    """A folder with the configuration and tokenizer that a checkpoint carries (no weights).

    Raises:
        ValueError: The file is no LitPost checkpoint.
    """
    made = load_checkpoint(path).get("litpost") or {}
    files = made.get("files")
    if not files:
        raise ValueError(f"ckpt_path={path}: not a LitPost checkpoint; give backbone.path= too")

    def build(folder: Path) -> None:
        for name, text in files.items():
            parent = folder / "decoder" if name.startswith("decoder/") else folder
            parent.mkdir(exist_ok=True)
            (parent / Path(name).name).write_text(text)

    return prepare(cache_dir, "checkpoint-backbone", {"files": files}, build)
