"""Preparation: things made once, kept under the hash of what made them.

One process builds under a file lock, writes to a temporary folder and renames it; the others wait
and then find it there. A killed build leaves only a temporary folder, which the next one removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

DEFAULT_CACHE = ".litpost_cache"


def digest(material: Mapping[str, Any]) -> str:
    """Sixteen hex digits of plain values (order of keys does not matter)."""
    text = json.dumps(material, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(
    cache_dir: str | Path, kind: str, material: Mapping[str, Any], build: Callable[[Path], None]
) -> Path:
    """The folder of ``material``, built by ``build(folder)`` if it is not there yet.

    Args:
        cache_dir: Where prepared folders live.
        kind: Readable first part of the folder's name.
        material: Everything that decides the content, as plain values.
        build: Writes the content into an empty folder.
    """
    root = Path(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{kind}-{digest(material)}"
    if folder.is_dir():
        return folder
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        build(unfinished)
        text = json.dumps(material, sort_keys=True, indent=1, default=str)
        (unfinished / "prepared.json").write_text(text + "\n")
        os.replace(unfinished, folder)
    return folder


def fingerprint(folder: str | Path) -> str:
    """Identity of a backbone folder: what made it, or names, sizes and times of its files.

    A hub name (no such folder) is its own identity.
    """
    path = Path(folder)
    if not path.is_dir():
        return str(folder)
    made = path / "prepared.json"
    if made.is_file():
        return digest(json.loads(made.read_text()))
    files = sorted(item for item in path.iterdir() if item.is_file())
    return digest({item.name: [item.stat().st_size, item.stat().st_mtime_ns] for item in files})
