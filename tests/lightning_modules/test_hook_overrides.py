"""Every hook of ``PolicyModule`` can be overridden alone, from a file outside the repository."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

import train

HEAD = """\
from dataclasses import replace
from datamodules.experience import FinishReason
from lightning_modules.policy_rl.grpo import GRPO


class Mine(GRPO):
"""

# hook -> (its code, tag -> value that only this code logs)
HOOKS: dict[str, tuple[str, dict[str, float]]] = {
    "rollout": (
        """
        def rollout(self, prompts, engine):
            rollouts = super().rollout(prompts, engine)
            rollouts.completions = [
                replace(c, token_ids=c.token_ids[:1] * 3, logprobs=(-1.0,) * 3,
                        finish_reason=FinishReason.LENGTH)
                for c in rollouts.completions
            ]
            return rollouts
        """,
        {"rollout/length_min": 3.0, "rollout/length_max": 3.0},
    ),
    "score": (
        """
        def score(self, rollouts, reward):
            parts = super().score(rollouts, reward)
            return {"reward": parts["reward"] * 0 + 5, "mine": parts["valid"] * 0 + 2}
        """,
        {"rollout/reward_mean": 5.0, "rollout/mine/pref": 2.0},
    ),
    "annotate": (
        """
        def annotate(self, rollouts):
            old = rollouts.batch().sampler_logprobs - 0.6931471805599453
            return super().annotate(rollouts) | {"old_logprobs": old}
        """,
        {"train/ratio": 2.0, "train/approx_kl_k1": -math.log(2)},
    ),
    "advantages": (
        """
        def advantages(self, rollouts):
            return rollouts.reward * 0 + 3, {"rollout/mine": (14.0, 2.0)}
        """,
        {"train/loss": -3.0, "rollout/mine": 7.0},
    ),
    "policy_loss": (
        """
        def policy_loss(self, tokens, batch):
            return tokens.logprob * 0 + 4, {"mine": (14.0, 2.0)}
        """,
        {"train/loss": 4.0, "train/mine": 7.0},
    ),
    "regularizer": (
        """
        def regularizer(self, tokens, batch):
            return tokens.logprob * 0 + 6, {"mine": (14.0, 2.0)}
        """,
        {"train/loss": 6.0, "train/mine": 7.0},
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_overridden_from_outside(
    hook: str, make_config: Callable[..., Any], tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    code, wanted = HOOKS[hook]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / f"my_{hook}.py").write_text(HEAD + indent(dedent(code).strip(), "    ") + "\n")
    monkeypatch.syspath_prepend(str(folder))

    def run(target: str) -> dict[str, Any]:
        return train.run(
            make_config(
                "model=grpo", f"model._target_={target}", f"run_id={target}", "mode=fit",
                f"backbone.path={tiny_folder}", "trainer.max_steps=1", "trainer.accelerator=cpu",
                "trainer.limit_val_batches=0", "data.task.num_train=2",
                "data.prompts_per_rollout=2", "model.samples_per_prompt=2",
                "model.max_new_tokens=6",
            )
        )  # fmt: skip

    metrics = run(f"my_{hook}.Mine")
    assert metrics["steps"] == 1
    for tag, value in wanted.items():
        assert metrics[tag] == pytest.approx(value, abs=1e-4), tag
    usual = run("lightning_modules.policy_rl.grpo.GRPO")
    for tag, value in wanted.items():
        assert usual.get(tag) != pytest.approx(value, abs=1e-4), f"{tag} proves nothing"


def test_class_that_cannot_be_found_is_named(make_config, tmp_path):
    config = make_config("model=grpo", "model._target_=nowhere.Mine")
    with pytest.raises(ValueError, match=r"model\._target_: 'nowhere\.Mine' cannot be imported"):
        train.run(config)
    assert not list(tmp_path.iterdir())
