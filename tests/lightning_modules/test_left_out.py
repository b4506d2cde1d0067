"""Completions that are scored but not trained on; evaluations by domain and by samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.experience import FinishReason, Rollouts
from lightning_modules.evaluation import by_domain, named_domains
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.policy_rl.ppo import PPO
from tests.lightning_modules.test_policy_step import SGD, change, fit, scalars


def cut(module: type[GRPO]) -> type[GRPO]:
    """The same method with completions longer than five tokens cut off."""

    class Cut(module):  # type: ignore[misc, valid-type]
        def rollout(self, prompts: Any, engine: Any) -> Rollouts:
            rollouts = super().rollout(prompts, engine)
            for completion in rollouts.completions:
                if len(completion.token_ids) > 5:
                    object.__setattr__(completion, "finish_reason", FinishReason.LENGTH)
            return rollouts

    return Cut


class Shorter(GRPO):
    """Truncated rows by hand: zero advantage, and the mean over the other rows' tokens."""

    def advantages(self, rollouts: Rollouts) -> Any:
        advantages, metrics = super().advantages(rollouts)
        keep = torch.tensor([len(c.token_ids) <= 5 for c in rollouts.completions])
        sizes = torch.tensor([len(c.token_ids) for c in rollouts.completions])
        return advantages * keep * sizes.sum() / sizes[keep].sum(), metrics


@pytest.mark.parametrize("micro_batches", [1, 8])
def test_overlong_filter_gives_no_gradient_and_no_weight(
    micro_batches: int, tiny_folder: Path, tmp_path: Path
) -> None:
    data = {"micro_batches": micro_batches}  # of 8: some windows hold a micro-batch with no token
    _, got = fit(tiny_folder, tmp_path / "a", cls=cut(GRPO), data=data, train_truncated=False)
    _, wanted = fit(tiny_folder, tmp_path / "b", cls=Shorter)
    _, usual = fit(tiny_folder, tmp_path / "c", cls=cut(GRPO))
    for name, value in wanted[-1].items():
        torch.testing.assert_close(got[-1][name], value, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(usual[-1][k], v, atol=1e-5) for k, v in wanted[-1].items())
    assert scalars(tmp_path / "a")["rollout/truncated"][0][1] == 3 / 8


class Odd:
    """A reward that is not a number for some completions, or for all."""

    def __init__(self, bad: list[int]) -> None:
        self.bad = bad

    def __call__(self, rollouts: Rollouts) -> dict[str, torch.Tensor]:
        reward = torch.tensor([float(sum(c.token_ids) % 7) for c in rollouts.completions]) / 3
        values = [float("nan"), float("inf"), float("-inf")]
        for number, row in enumerate(self.bad):
            reward[row] = values[number % 3]
        return {"reward": reward}


@pytest.mark.parametrize("cls", [GRPO, PPO])
def test_rewards_that_are_not_finite_are_counted_and_survived(
    cls: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tests.lightning_modules.test_policy_step.Sums", lambda: Odd([1, 4, 5]))
    with pytest.warns(UserWarning, match="3 of 8 rewards of rollout 0 are not finite"):
        module, states = fit(tiny_folder, tmp_path, cls=cls, steps=2)
    assert module.bad_steps == 0
    points = scalars(tmp_path)
    assert points["rollout/reward_not_finite"][0][1] == pytest.approx(3 / 8)
    assert all(torch.isfinite(value).all() for value in states[-1].values())
    assert max(float(v.abs().max()) for v in change(states[0], states[-1]).values()) > 1e-4


def test_bad_rewards_leave_the_others_as_they_were(
    tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    kept: dict[str, Rollouts] = {}

    class Kept(GRPO):
        def advantages(self, rollouts: Rollouts) -> Any:
            kept["rollouts"] = rollouts
            return super().advantages(rollouts)

    monkeypatch.setattr("tests.lightning_modules.test_policy_step.Sums", lambda: Odd([0, 1]))
    with pytest.warns(UserWarning, match="2 of 8 rewards"):
        fit(tiny_folder, tmp_path / "a", cls=Kept, normalize_std=False)
    rollouts = kept["rollouts"]
    assert rollouts.is_trained.tolist() == [False, False, *[True] * 6]
    wanted = Odd([])(rollouts)["reward"]
    mean = wanted[2:4].mean()
    torch.testing.assert_close(rollouts.reward[:2], mean.expand(2))
    torch.testing.assert_close(rollouts.advantages[2:4], wanted[2:4] - mean)


def test_a_step_without_any_good_reward_changes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        "tests.lightning_modules.test_policy_step.Sums", lambda: Odd(list(range(8)))
    )
    with pytest.warns(UserWarning, match="8 of 8 rewards"):
        module, states = fit(tiny_folder, tmp_path, optimizer=SGD)
    assert module.bad_steps == 0
    assert not any(value.any() for value in change(states[0], states[-1]).values())


def test_evaluations_are_split_by_domain_where_there_are_several() -> None:
    parts = {"reward": torch.tensor([1.0, 0.0, 4.0, 100.0])}
    counted = torch.tensor([True, True, True, False])
    got = by_domain(parts, counted, ["a", "b", "a", "b"])
    numbers = {name: (float(total), float(count)) for name, (total, count) in got.items()}
    assert numbers == {"reward": (5.0, 3.0), "reward@a": (5.0, 2.0), "reward@b": (0.0, 1.0)}
    several = {name: total / count for name, (total, count) in numbers.items()}
    assert named_domains(several) == {"reward": 5 / 3, "reward/a": 2.5, "reward/b": 0.0}
    assert named_domains({"reward": 1.0, "reward@a": 1.0}) == {"reward": 1.0}


def test_sampled_evaluation_counts_the_best_of_each_prompt(make_config: Any) -> None:
    import train

    common = ["model=tre", "backbone.warm_start.steps=60", "compare=[]", "run_id=e"]
    shape = ["data.task.length=4", "data.task.num_keys=1", "data.task.vocabulary_size=32"]
    metrics = train.run(make_config(*common, *shape, "model.eval_samples=8"))
    mean, best = metrics["test/sampled/reward"], metrics["test/sampled/pass_at_8"]
    assert 0.0 < mean < best <= 1.0
    assert metrics["test/reward"] in [i / 16 for i in range(17)]
    assert (best * 16) % 1 == pytest.approx(0.0, abs=1e-6)
