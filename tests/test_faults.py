"""One process: a scheduler's signals and a full disk end a run in good order, and it goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from callbacks.preemption import EXIT_CODE, Preemption, watch
from tests.runs import (
    SHORT,
    SMALL,
    assert_same_run,
    command,
    end,
    last_of,
    start,
    step_of,
    strike,
    unmeasured,
)

STEPS = 6
#: Two micro-batches a step, four steps a rollout; checkpoints at the end and when asked only.
BASE = [
    "model=grpo", "name=m", *SMALL, *SHORT, f"trainer.max_steps={STEPS}",
    "data.passes=2", "data.mini_batches=2", "data.micro_batches=2",
    "callbacks.checkpoint.every_seconds=null", "callbacks.sample_table.keep=all",
]  # fmt: skip
TERM, EARLY = int(signal.SIGTERM), int(signal.SIGUSR1)
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, compose: Make
) -> tuple[Path, dict[str, Any]]:
    """A whole run: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("unbroken")
    metrics = train.run(compose(*BASE, f"output_dir={folder}", "run_id=whole"))
    return folder / "m" / "whole", metrics


@pytest.fixture
def again(tmp_path: Path, warm_cache: Path) -> Callable[..., tuple[int | None, str]]:
    """Goes on with a run in a process of its own: exit status and output."""

    def call(*extra: str, **options: Any) -> tuple[int | None, str]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        overrides = [*BASE, "resume=auto", *extra]
        started = command(*overrides, output_dir=tmp_path / "out", cache_dir=warm_cache)
        return end(start(started, log, **options)), log.read_text()

    return call


@pytest.mark.slow
def test_signals_finish_the_step_and_the_run_goes_on(
    unbroken: tuple[Path, dict[str, Any]], again: Any, make_config: Make, tmp_path: Path
) -> None:
    run = tmp_path / "out" / "m" / "s0"
    for moment, count, number, at in (
        ("window", 0, TERM, 1),  # inside the first window: it is finished
        ("on_validation_batch_end", 1, EARLY, 3),  # the validation is finished, then saved
        ("step", 1, TERM, 5),
        ("window", 0, EARLY, STEPS),  # the last step: saved as always, the test is left out
        ("on_test_batch_start", 0, TERM, STEPS),
    ):
        status, said = again(*strike(moment, count, number=number))
        name = signal.Signals(number).name
        assert status == EXIT_CODE == 75, said
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name}: ended")]
        assert f"after step {at}," in line and "resume=auto (exit code 75)" in line
        assert "Traceback" not in said
        assert step_of(last_of(run)) == at
        if "test" not in moment:
            assert f"saved {last_of(run)}" in line
        assert not (run / "metrics.json").exists()
    metrics = train.run(make_config(*BASE, "resume=auto", f"output_dir={tmp_path / 'out'}"))
    assert unmeasured(metrics) == unmeasured(unbroken[1])
    assert_same_run(unbroken[0], run, STEPS)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(again: Any, tmp_path: Path) -> None:
    run = tmp_path / "out" / "m" / "s0"
    twice = [*strike("window", 1, number=TERM), *strike("window", 1, "other", number=TERM)]
    status, said = again("callbacks.checkpoint.every_n_steps=1", *twice)
    assert status == EXIT_CODE, said
    assert "second SIGTERM: ended at once" in said
    assert step_of(last_of(run)) == 1, "the open window is given up"
    early = [*strike("window", 0, number=EARLY), *strike("window", 0, "other", number=TERM)]
    status, said = again(*early, "callbacks.preemption.exit_code=99")
    assert status == 99, said
    assert step_of(last_of(run)) == 2, "a SIGTERM after SIGUSR1 is the first one"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["warm start", "data"])
def test_a_signal_while_things_are_prepared(stage: str, tmp_path: Path, warm_cache: Path) -> None:
    cache = tmp_path / "cache"
    overrides = ["model=reflectrm", "name=m", *SMALL, *SHORT, "trainer.max_steps=1", "mode=fit"]
    kind = "backbone"
    if stage == "data":
        cache.symlink_to(warm_cache)  # the backbone is there
        overrides += ["data.build_samples=5", "data.task.num_train=300"]
        kind = "judging"
    started = command(*overrides, "resume=auto", output_dir=tmp_path, cache_dir=cache)
    log = tmp_path / "log"
    before = {path.name for path in cache.glob(f"{kind}-*")} if cache.exists() else set()
    process = start(started, log)
    deadline = time.monotonic() + 60

    def is_open() -> bool:  # other tests may have left unfinished folders of their own
        return bool({path.name for path in cache.glob(f"{kind}-*.unfinished")} - before)

    while not is_open() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert is_open(), log.read_text()
    os.kill(process.pid, TERM)
    assert end(process) == EXIT_CODE, log.read_text()
    assert "SIGTERM: ended before training; go on with" in log.read_text()
    new = {path.name for path in cache.glob(f"{kind}-*")} - before
    assert not [name for name in new if not name.endswith((".lock", ".unfinished"))]
    assert end(start(started, log)) == 0, log.read_text()
    assert (tmp_path / "m" / "s0" / "metrics.json").is_file()


@pytest.mark.slow
def test_full_disk_while_a_checkpoint_is_written(
    unbroken: tuple[Path, dict[str, Any]], again: Any, make_config: Make, tmp_path: Path
) -> None:
    run = tmp_path / "out" / "m" / "s0"
    often = "callbacks.checkpoint.every_n_steps=1"
    assert again(often, *strike("step", 2))[0] == -signal.SIGKILL
    last = last_of(run)
    assert step_of(last) == 2
    size, good = last.stat().st_size, last.read_bytes()
    full = last.with_suffix(".unfinished")
    for way in ("File too large", "No space left on device"):
        limit = size // 2 if "large" in way else None
        if limit is None:
            full.symlink_to("/dev/full")
        status, said = again(often, limit=limit)
        assert status == 1, said
        assert f"error: cannot write {last} ({way})" in said
        assert "free space and go on with resume=auto" in said
        assert "Traceback" not in said
        assert last.read_bytes() == good
        assert not full.exists() and not full.is_symlink()
    metrics = train.run(make_config(*BASE, "resume=auto", f"output_dir={tmp_path / 'out'}"))
    assert unmeasured(metrics) == unmeasured(unbroken[1])
    assert_same_run(unbroken[0], run, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "file"),
    [(600, "config.yaml"), (9_000, "samples.jsonl"), (80_000, "export"), (6_000, "")],
)
def test_full_disk_elsewhere(limit: int, file: str, again: Any, tmp_path: Path) -> None:
    run = tmp_path / "out" / "m" / "s0"
    few = ["trainer.max_steps=2", "mode=fit", "trainer.limit_val_batches=0"]
    first = {
        "export": ["logger=none", "~callbacks.checkpoint"],
        # TensorBoard's
        "": ["~callbacks.checkpoint", "~callbacks.sample_table", "~callbacks.hf_export"],
    }.get(file, [])
    status, said = again(*few, *first, limit=limit)
    assert status == 1, said
    where = run / file if file else "a file of the run folder, such as tensorboard/"
    assert f"error: cannot write {where}" in said
    assert "free space and go on with resume=auto" in said
    assert "Traceback" not in said or not file, "only TensorBoard's own thread leaves one"
    status, said = again(*few)
    assert status == 0, said
    assert (run / "metrics.json").is_file() and (run / "export" / "config.json").is_file()


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch(["SIGTERM"]):
        ours = signal.getsignal(signal.SIGTERM)
        assert ours is not before
        with watch():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"signals": ["SIGKILL"]}, "'SIGKILL' cannot be handled"),
        ({"signals": ["SIGTREM"]}, "callbacks.preemption.signals: 'SIGTREM'"),
        ({"exit_code": 0}, "callbacks.preemption.exit_code=0 must be from 1 to 125"),
    ],
)
def test_wrong_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment.replace("[", r"\[")), watch(**options):
        pass
    assert Preemption().exit_code == EXIT_CODE
