"""A compressor's run that was killed and goes on ends exactly like one that was not."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.compressor_runs.parts import CONTINUED, LORA, TINY
from tests.runs import assert_same_run, command, end, last_of, start, step_of, strike, unmeasured

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
EVERY_STEP = [
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.every_seconds=null",
    "trainer.val_check_interval=1",
    "trainer.max_steps=4",  # an epoch has three
    "name=m",
]
CASES = {
    "whole": [],
    "adapters, continuations, questions": [*LORA, *CONTINUED],
    "both learn": ["model.decoder.train=full", "model.bridge_parts=[]"],
}
#: Moment, how often it passes before, and the step of the last checkpoint then.
KILLS = [("step", 1, 1), ("window", 1, 2), ("on_test_batch_end", 1, 4)]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_like_the_unbroken_one(
    case: str, make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    overrides = [*TINY, *CASES[case], *EVERY_STEP]
    expected = train.run(make_config(*overrides, "run_id=unbroken"))
    assert expected["steps"] == 4
    assert expected["train/grad_norm"] > 0, "a run without gradients would prove nothing"
    for kind in ("train/lm/ce", "train/qa/ce", "test/cf/qa/fact_fidelity"):
        assert (kind in expected) == ("continuations" in case), kind
    started = command(*overrides, "run_id=killed", "resume=auto",
                      output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    log = tmp_path / "log"
    for moment, count, at in KILLS:
        status = end(start([*started, *strike(moment, count)], log), timeout=240)
        assert status == -signal.SIGKILL, f"{moment}: {status}\n{log.read_text()}"
        assert step_of(last_of(tmp_path / "m" / "killed")) == at
    metrics = train.run(make_config(*overrides, "run_id=killed", "resume=auto"))
    assert_same_run(tmp_path / "m" / "unbroken", tmp_path / "m" / "killed", 4)
    assert unmeasured(metrics) == unmeasured(expected)
