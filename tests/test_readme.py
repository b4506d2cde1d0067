"""The README's commands: all compose, and those that can run here are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import train
from tests.runs import REPO, SHORT, SMALL, call, command, environment, read_jsonl

TEXT = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [
    line.split(" #")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if "train.py" in line]
PAIRS = [{"question": f"q{i}", "response_A": "yes", "response_B": "no", "label": "A>B"}
         for i in range(30)]  # fmt: skip


def arguments(line: str) -> list[str]:
    """Overrides of a command line of the README, without what stands before ``train.py``."""
    words = shlex.split(line)
    return [w for w in words[words.index("train.py") + 1 :] if w != "-m"]


def test_the_readme_has_its_two_commands() -> None:
    makefile = (REPO / "Makefile").read_text()
    for target in ("demo", "test"):
        assert any(line.split("#")[0].strip() == f"make {target}" for line in LINES)
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_composes(line: str, make_config: Any, tmp_path: Path) -> None:
    import json

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    overrides = [
        word.replace("pairs.jsonl", str(pairs))
        for word in arguments(line)
        if "glob" not in word and "range" not in word and "launcher" not in word
    ]
    overrides = [word for word in overrides if not word.startswith("model._target_=my_ablation")]
    config = make_config(*overrides, smoke=False)
    config.run_dir, config.predictions = str(tmp_path), str(tmp_path / "p.jsonl")
    train.check_config(train.plain(config))


@pytest.mark.slow
def test_the_ablation_runs_as_written(tmp_path: Path, warm_cache: Path) -> None:
    code = next(block for kind, block in BLOCKS if kind == "python")
    name = re.search(r"# (\w+)\.py", code)
    assert name is not None
    (tmp_path / f"{name.group(1)}.py").write_text(code)
    line = next(line for line in COMMANDS if name.group(1) in line)
    words = command(*arguments(line), *SMALL, *SHORT, output_dir=tmp_path, cache_dir=warm_cache)
    done = call(*words, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    records = read_jsonl(tmp_path / "grpo" / "positive" / "samples.jsonl")
    advantages = [record["advantage"] for record in records]
    assert min(advantages) == 0.0  # the hook was used
    assert max(advantages) > 0.0


@pytest.mark.slow
def test_a_judge_trained_on_a_file_predicts_one(tmp_path: Path, warm_cache: Path) -> None:
    import json

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    unlabelled = tmp_path / "unlabelled.jsonl"
    rows = [{k: v for k, v in row.items() if k != "label"} for row in PAIRS[:5]]
    unlabelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["model=reflectrm", "data=preference_file", "data.task.max_prompt_tokens=300"]
    few = ["model.num_votes=2", "data.build_samples=2", "backbone.warm_start.batch_size=4"]
    words = command(*data, f"data.path={pairs}", *SMALL, *few, "backbone.warm_start.steps=60",
                    output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "cannot judge English" in done.stderr
    last = tmp_path / "reflectrm" / "s0" / "checkpoints" / "last.ckpt"
    words = command(*data, f"data.path={unlabelled}", *few, "mode=predict", f"ckpt_path={last}",
                    output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    done = call(*words)
    assert done.returncode == 0, done.stderr
    records = read_jsonl(tmp_path / "reflectrm" / "s0" / "predict" / "predictions.jsonl")
    assert len(records) == 5
    keys = {"uid", "verdict", "verdicts", "analysis", "confidence", "votes", "orders_agree"}
    assert all(keys <= record.keys() for record in records)
    judge = train.load(tmp_path / "reflectrm" / "s0")
    again = judge.judge(judge.judge_task.records("predict")[:2])
    assert [len(record["votes"]) for record in again] == [2, 2]
