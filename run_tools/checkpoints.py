"""What a checkpoint says about the backbone that it needs."""

from __future__ import annotations

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
        raise ValueError(f"ckpt_path={path}: is a folder; distributed checkpoints are refused "
                         f"(they unpickle). An exported folder goes to backbone.path instead")
    if not file.is_file():
        near = sorted(file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
        hint = f"; there is {near[0]}" if near else ""
        raise ValueError(f"ckpt_path={path}: no such file{hint}")
    try:
        return torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"ckpt_path={path}: not a plain checkpoint: {first}") from error


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
            (folder / Path(name).name).write_text(text)

    return prepare(cache_dir, "checkpoint-backbone", {"files": files}, build)
