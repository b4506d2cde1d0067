"""An embedding run that was killed and goes on ends exactly like one that was not."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.embedding_runs.parts import BOOM, CONTRASTIVE
from tests.models import EMBEDDING_MODELS
from tests.runs import (
    assert_same_run,
    command,
    end,
    last_of,
    small,
    start,
    step_of,
    strike,
    unmeasured,
)

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
EVERY_STEP = [
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.every_seconds=null",
    "trainer.val_check_interval=1",
    "test_base=false",
    "compare=[]",
]
MERGE = {"entry": "merge", "_target_": "tests.embedding_runs.parts.MergeSignal"}
#: Where a run dies (see ``SignalAt``), how often the moment passes before, and the step that its
#: last checkpoint then has; the next start goes on from there.
KILLS: dict[str, list[tuple[str, int, int]]] = {
    # six steps of two micro-batches; the second epoch of the schedule begins after three
    "contrastive": [
        ("window", 0, -1),
        ("step", 1, 1),
        ("checkpoint", 1, 2),
        ("on_validation_batch_end", 2, 2),
        ("rename", 1, 3),
        ("window", 2, 5),
        ("on_train_end", 0, 5),
        ("on_test_batch_end", 0, 6),
    ],
    # bags of 2, 4 and 6 steps
    "boom": [
        ("step", 0, -1),
        ("on_train_batch_start", 2, 2),  # at the border: weights are back at the start
        ("window", 0, 2),  # in the first step of the second bag
        ("step", 2, 4),  # in the middle of it
        ("rename", 1, 5),  # its last step, exported and not yet saved
        ("checkpoint", 2, 7),
        ("merging", 0, 11),
        ("merged", 0, 11),
        ("on_train_end", 0, 11),
        ("on_test_batch_end", 0, 12),
    ],
    "boom, adapters": [("step", 3, 3), ("merged", 0, 11), ("on_test_batch_end", 0, 12)],
    "boom, task vectors": [("on_train_batch_start", 2, 2), ("merging", 0, 11)],
    "contrastive, passes": [("step", 2, 2), ("step", 1, 3), ("on_test_batch_end", 0, 6)],
}
CASES: dict[str, tuple[list[str], int]] = {
    "contrastive": (
        [
            *CONTRASTIVE,
            "data.schedule.epochs=2",
            "data.micro_batches=2",
            "model.chunk_size=4",
            "model.keep_chunks=1",
        ],
        6,
    ),
    "boom": (BOOM, 12),
    "boom, adapters": ([*BOOM, "lora=default", "lora.r=4", "lora.dropout=0.1"], 12),
    "boom, task vectors": (
        [*BOOM, "callbacks.model_merging.method=ties", "trainer.max_steps=12"],
        12,
    ),
    "contrastive, passes": ([*CONTRASTIVE, "data.micro_batches=2", "trainer.max_epochs=2"], 6),
}


@pytest.mark.parametrize("case", CASES)
def test_run_killed_again_and_again_ends_like_the_unbroken_one(
    case: str, make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own, steps = CASES[case]
    overrides = [*own, *EVERY_STEP]
    expected = train.run(make_config(*overrides, "name=m", "run_id=unbroken", smoke=False))
    assert expected["steps"] == steps
    assert expected["train/grad_norm"] > 0, "a run without gradients would prove nothing"

    unbroken, killed = tmp_path / "m" / "unbroken", tmp_path / "m" / "killed"
    started = command(*overrides, "name=m", "run_id=killed", "resume=auto",
                      output_dir=tmp_path, cache_dir=warm_cache, smoke=False)  # fmt: skip
    log = tmp_path / "log"
    for moment, count, at in KILLS[case]:
        more = MERGE if moment in ("merging", "merged") else {}
        status = end(start([*started, *strike(moment, count, **more)], log))
        assert status == -signal.SIGKILL, f"{moment}: {status}\n{log.read_text()}"
        assert step_of(last_of(killed)) == at, moment
    metrics = train.run(
        make_config(*overrides, "name=m", "run_id=killed", "resume=auto", smoke=False)
    )
    assert_same_run(unbroken, killed, steps)
    assert unmeasured(metrics) == unmeasured(expected)
    assert not list(killed.rglob("*.unfinished"))


@pytest.mark.parametrize("model", sorted(set(EMBEDDING_MODELS) - set(CASES)))
def test_every_other_model_goes_on_after_a_kill(
    model: str, make_config: Make, compose: Make, tmp_path: Path, warm_cache: Path
) -> None:
    overrides = [*small(model, compose), *EVERY_STEP, "trainer.max_steps=4", "name=m"]
    expected = train.run(make_config(*overrides, "run_id=unbroken"))
    started = command(*overrides, "run_id=killed", "resume=auto",
                      output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    log = tmp_path / "log"
    for moment, count, at in (("step", 1, 1), ("window", 1, 2), ("on_test_batch_end", 0, 4)):
        status = end(start([*started, *strike(moment, count)], log))
        assert status == -signal.SIGKILL, f"{moment}: {status}\n{log.read_text()}"
        assert step_of(last_of(tmp_path / "m" / "killed")) == at
    metrics = train.run(make_config(*overrides, "run_id=killed", "resume=auto"))
    assert_same_run(tmp_path / "m" / "unbroken", tmp_path / "m" / "killed", 4)
    assert unmeasured(metrics) == unmeasured(expected)
