"""Sweeps: one process and one folder a run, finished runs skipped; groups and arms switched off."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.runs import SHORT, SMALL, call, command, main, read_jsonl, unmeasured

pytestmark = pytest.mark.slow
RUN = ["model=grpo", "mode=fit", *SMALL, *SHORT, "trainer.limit_val_batches=0"]
has_joblib = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(
    "hydra_plugins.hydra_joblib_launcher"
)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not has_joblib, reason="needs the extra sweep")
def test_sweep_over_seeds_and_again(tmp_path: Path, warm_cache: Path) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    unfitted = [*RUN, "backbone.warm_start.steps=0"]
    swept = [*unfitted, *joblib, "seed=0,1"]
    sweep = command(*swept, output_dir=tmp_path, cache_dir=warm_cache)
    sweep.insert(2, "-m")
    first = call(*sweep)
    assert first.returncode == 0, first.stderr
    runs = sorted(path.name for path in (tmp_path / "grpo").iterdir())
    assert runs == ["s0", "s1"]
    metrics = [json.loads((tmp_path / "grpo" / s / "metrics.json").read_text()) for s in runs]
    assert [one["seed"] for one in metrics] == [0, 1]
    assert [one["steps"] for one in metrics] == [2, 2]
    samples = [read_jsonl(tmp_path / "grpo" / s / "samples.jsonl") for s in runs]
    assert samples[0][0]["token_ids"] != samples[1][0]["token_ids"]

    before = stamps(tmp_path / "grpo")
    again = call(*sweep, "resume=auto")
    assert again.returncode == 0, again.stderr
    assert stamps(tmp_path / "grpo") == before, "a finished run was touched"

    in_turn = [argument for argument in sweep[2:] if argument not in joblib]
    status, _, errors = main(*in_turn, "hydra/job_logging=none")
    assert status == 1
    assert "error: " in errors
    assert "holds a finished run" in errors
    assert stamps(tmp_path / "grpo") == before


def test_a_claim_goes_to_its_own_folder_and_is_skipped_when_finished(
    make_config: Callable[..., Any], tmp_path: Path
) -> None:
    arm = ["+claim/reflectrm=rft", *SMALL, *SHORT, "mode=fit", "trainer.max_steps=1", "seed=3",
           "trainer.limit_val_batches=0"]  # fmt: skip
    metrics = train.run(make_config(*arm))
    folder = tmp_path / "reflectrm" / "rft" / "s3"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    before = stamps(tmp_path)
    with pytest.warns(UserWarning, match="is finished"):
        assert train.run(make_config(*arm)) == metrics
    assert stamps(tmp_path) == before


def test_a_removed_callback_is_gone(make_config: Callable[..., Any], tmp_path: Path) -> None:
    removed = ["~callbacks.hf_export", "~callbacks.sample_table", "logger=none"]
    plain = train.run(make_config(*RUN, "run_id=plain"))
    metrics = train.run(make_config(*RUN, "run_id=less", *removed))
    plain_folder, folder = tmp_path / "grpo" / "plain", tmp_path / "grpo" / "less"
    gone = {path.name for path in plain_folder.iterdir()} - {p.name for p in folder.iterdir()}
    assert gone == {"export", "samples.jsonl", "tensorboard"}
    assert unmeasured(metrics) == unmeasured(plain), "callbacks that only look must not change it"


def test_no_arms(make_config: Callable[..., Any], tmp_path: Path) -> None:
    few = ["model=reflectrm", *SMALL, *SHORT, "mode=fit", "trainer.limit_val_batches=0",
           "trainer.max_steps=1", "data.build_samples=4"]  # fmt: skip
    for arms in ("[]", "[rft]"):
        train.run(make_config(*few, f"compare={arms}", f"run_id=arms{len(arms)}"))
    assert not (tmp_path / "reflectrm" / "arms2" / "arms").exists()
    assert (tmp_path / "reflectrm" / "arms5" / "arms" / "rft" / "metrics.json").is_file()
