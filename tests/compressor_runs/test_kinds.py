"""Other kinds of pairs as whole runs: broken and resumed, tested again from their exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import train
from tests.compressor_runs.parts import CONTINUED, TINY
from tests.runs import assert_same_run, last_of, unmeasured, weights

pytestmark = pytest.mark.slow
Make = Callable[..., Any]
OPEN = ["model.bridge_parts=[]"]
CASES = {
    "keys and values": ["model.memory.form=kv", *OPEN],
    "decoder with adapters": ["model.decoder.train=lora", "model.decoder.lora={r: 4}", *OPEN],
    "decoder as a whole": ["model.decoder.train=full", *OPEN],
    "continuations": CONTINUED,
    "segments": ["model.memory.segment_tokens=4"],
}
LEARNS = {"decoder with adapters", "decoder as a whole"}
SHORT = [
    "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.every_seconds=null",
    "trainer.max_steps=3", "trainer.val_check_interval=1", "~callbacks.fidelity_figures", "name=m",
]  # fmt: skip
CRASH = ["+callbacks.crash._target_=tests.runs.CrashAt", "+callbacks.crash.batch=3"]


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_and_is_tested_again(case: str, make_config: Make, tmp_path: Path) -> None:
    own = [*TINY, *CASES[case], *SHORT]
    expected = train.run(make_config(*own, "run_id=unbroken"))
    assert expected["steps"] == 3 and expected["train/grad_norm"] > 0
    with pytest.raises(KeyError, match="crashed before batch 3"):  # two batches are a step
        train.run(make_config(*own, *CRASH, "run_id=broken"))
    metrics = train.run(make_config(*own, "run_id=broken", "resume=auto"))
    runs = [tmp_path / "m" / name for name in ("unbroken", "broken")]
    assert_same_run(*runs, 3)
    assert unmeasured(metrics) == unmeasured(expected)

    export = runs[0] / "export"
    again = train.run(make_config(*own, "mode=test", f"backbone.path={export}", "run_id=again"))
    tags = [tag for tag in unmeasured(expected) if tag.startswith("test/")]
    assert len(tags) > 80
    for tag in tags:
        assert again[tag] == pytest.approx(expected[tag], abs=1e-5), tag
    ranks = {what: expected.get(f"test/cf/rank_{what}/sample_erank", 0.0) for what in "zh"}
    assert (max(ranks.values()) > 2) == (case == "segments"), "two vectors a segment"
    assert ("test/cf/rank_z/erank" in expected) == (case != "keys and values")
    assert any(tag.startswith("train/lm/") for tag in expected) == (case == "continuations")
    start = Path(train.start_of(make_config(*own)))
    decoders = [load_file(one / "decoder" / "model.safetensors") for one in (start, export)]
    moved = [not decoders[0][name].equal(value) for name, value in decoders[1].items()]
    assert any(moved) == (case in LEARNS)
    trained = [name for name in weights(last_of(runs[0])) if "decoder" in name and "lora_" in name]
    assert bool(trained) == (case == "decoder with adapters")
