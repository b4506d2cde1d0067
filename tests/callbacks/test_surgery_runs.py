"""Surgery in whole runs: configs, policy RL with shares, adapters, kills and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

import train
from callbacks.gradient_surgery import GradientSurgery
from tests import runs
from tests.runs import SHORT, SMALL, call, command, last_of, strike, weights

Make = Callable[..., Any]
ENTRY = "callbacks=[default,gradient_surgery]"
#: Two domains: comparisons and reflections on them.
SHARES = ["data.shares={pref: 2, refl: 1}", "data.prompts_per_rollout.pref=4",
          "data.prompts_per_rollout.refl=2"]  # fmt: skip
RUN = ["model=reflectrm", ENTRY, *SHARES, *SMALL, *SHORT, "mode=fit", "trainer.limit_val_batches=0"]


def test_config_composes_and_instantiates(compose: Make) -> None:
    config = compose("model=grpo", ENTRY, "callbacks.gradient_surgery.granularity=module", "seed=4")
    surgery = instantiate(config.callbacks.gradient_surgery)
    assert isinstance(surgery, GradientSurgery)
    assert (surgery.granularity, surgery.seed, surgery.method) == ("module", 4, "pcgrad")
    assert "checkpoint" in config.callbacks
    removed = compose("model=grpo", ENTRY, "~callbacks.gradient_surgery")
    assert "gradient_surgery" not in removed.callbacks


def test_config_names_every_option_with_its_default(compose: Make) -> None:
    import inspect

    entry = dict(compose(ENTRY).callbacks.gradient_surgery)
    signature = inspect.signature(GradientSurgery.__init__).parameters
    assert entry.keys() - {"_target_"} == signature.keys() - {"self"}
    for name, parameter in signature.items():
        if name not in ("self", "exclude", "seed"):
            assert entry[name] == parameter.default, name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["lora=default", "lora.r=2"]])
def test_policy_rl_with_shares(make_config: Make, tmp_path: Path, lora: list[str]) -> None:
    metrics = train.run(make_config(*RUN, *lora, "name=m", "run_id=r"))
    assert metrics["steps"] == 2 and metrics["bad_steps"] == 0
    for tag in ("cos_global/pref_refl", "cos/attn/pref_refl", "grad_norm/refl", "weight/pref",
                "conflict_frac", "cos_final_naive", "ms", "buffers_mib"):  # fmt: skip
        assert f"surgery/{tag}" in metrics, tag
    assert metrics["train/grad_norm"] > 0
    saved = json.loads((tmp_path / "m" / "r" / "metrics.json").read_text())
    assert saved["surgery/cos_global/pref_refl"] == metrics["surgery/cos_global/pref_refl"]


@pytest.mark.slow
def test_method_none_trains_as_without(make_config: Make, tmp_path: Path) -> None:
    plain = [word for word in RUN if word != ENTRY]
    none = [*RUN, "callbacks.gradient_surgery.method=none"]
    for name, words in (("plain", plain), ("none", none), ("cut", RUN)):
        train.run(make_config(*words, "name=m", f"run_id={name}"))
    folder = tmp_path / "m"
    found = {name: weights(last_of(folder / name)) for name in ("plain", "none", "cut")}
    gaps = {
        name: max(float((found[name][k] - v).abs().max()) for k, v in found["plain"].items())
        for name in ("none", "cut")
    }
    assert gaps["none"] < 1e-5 < gaps["cut"]


@pytest.mark.slow
def test_mixed_domains_are_one_clear_line(tmp_path: Path, warm_cache: Path) -> None:
    words = [word for word in RUN if not word.startswith("data.shares")]
    words += ["data.micro_batches=2"]
    done = call(*command(*words, output_dir=tmp_path, cache_dir=warm_cache))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: gradient surgery needs micro-batches of one domain each" in done.stderr
    assert "data.shares" in done.stderr


@pytest.mark.slow
def test_killed_in_a_window_and_resumed(tmp_path: Path, warm_cache: Path) -> None:
    """With the method that has a state of its own; buffers are lost and made again."""
    base = [*RUN, "mode=fit_test", "trainer.limit_val_batches=1", "trainer.max_steps=3",
            "callbacks.gradient_surgery.method=gradvac", "callbacks.checkpoint.every_n_steps=1",
            "test_base=false"]  # fmt: skip
    options = {"cache_dir": warm_cache}
    whole = call(*command(*base, "run_id=whole", output_dir=tmp_path, **options))
    assert whole.returncode == 0, whole.stderr
    killed = [*base, "run_id=killed", *strike("window", 2)]
    assert call(*command(*killed, output_dir=tmp_path, **options)).returncode != 0
    again = call(*command(*base, "run_id=killed", "resume=auto", output_dir=tmp_path, **options))
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "reflectrm"
    ours = torch.load(last_of(folder / "killed"), weights_only=True)
    assert ours["global_step"] == 3
    runs.assert_same_run(folder / "whole", folder / "killed", 3)
