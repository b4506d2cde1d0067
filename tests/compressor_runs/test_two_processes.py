"""Two gloo processes on the joined batch compute what one process computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import train
from tests.compressor_runs.parts import CONTINUED, TINY, write_texts
from tests.runs import assert_same_weights, command, end, last_of, start_ranks, weights

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
#: Plain gradients, clipped, so that weights differ as much as these do.
SAME = [
    "optimizer.class_path=torch.optim.SGD", "optimizer.lr=1.0", "optimizer.weight_decay=0.0",
    "optimizer.warmup_steps=0", "trainer.gradient_clip_val=0.1", "trainer.val_check_interval=1",
    "trainer.accelerator=cpu", "name=m",
]  # fmt: skip
SHARDED = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=2"]
TWO = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2"],
    # weights are gathered layer by layer, also in evaluations
    "fsdp": [*SHARDED, "trainer.strategy.unshard_for_rollout=never"],
}
CASES = ("facts", "continuations", "texts")


def options_of(case: str, folder: Path) -> list[str]:
    """Options of both runs. The texts have no facts, uneven lengths and several segments."""
    if case == "facts":
        return ["model.loss.slot_weight=3.0", "model.decoder.train=full", "model.bridge_parts=[]"]
    return CONTINUED if case == "continuations" else write_texts(folder)


@pytest.fixture(scope="module", params=CASES)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compose: Make
) -> tuple[str, list[str], Path, dict[str, Any]]:
    """A case, its options, the folder of its run in one process, and the metrics."""
    folder = tmp_path_factory.mktemp("alone")
    case = request.param
    base = [one for one in TINY if case != "texts" or not one.startswith("data.task")]
    options = [*base, *options_of(case, folder), *SAME]
    metrics = train.run(compose(*options, f"output_dir={folder}", "run_id=one"))
    return case, options, folder / "m" / "one", metrics


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_equal_one(
    strategy: str,
    alone: tuple[str, list[str], Path, dict[str, Any]],
    tmp_path: Path,
    warm_cache: Path,
) -> None:
    case, options, one, metrics = alone
    arguments = command(*options, *TWO[strategy], "run_id=two",
                        output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    log = tmp_path / "log"
    statuses = [end(process, timeout=280) for process in start_ranks(2, arguments, log)]
    said = "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    assert statuses == [0, 0], said
    two = tmp_path / "m" / "two"
    assert_same_weights(weights(last_of(one)), weights(last_of(two)), atol=2e-5)
    for name in ("model.safetensors", "decoder/model.safetensors", "bridge.safetensors"):
        exports = [load_file(run / "export" / name) for run in (one, two)]
        assert_same_weights(*exports, atol=2e-5)
    assert metrics["train/grad_norm"] > 0.1, "the run must have trained"

    found = json.loads((two / "metrics.json").read_text())
    tags = [tag for tag in metrics if tag.startswith(("train/", "val/", "test/"))]
    assert {tag for tag in found if tag.startswith(("train/", "val/", "test/"))} == set(tags)
    for tag in tags:
        assert found[tag] == pytest.approx(metrics[tag], abs=2e-4, rel=2e-4), tag
    assert ("test/cf/gap" in tags) == (case != "texts")
    for kind in ("train/lm/ce", "train/qa/ce", "test/sw/qa/role_flip"):
        assert (kind in tags) == (case == "continuations"), kind
    assert any(tag.endswith("/shuffled/ce") for tag in tags)
