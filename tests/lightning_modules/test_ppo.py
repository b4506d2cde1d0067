"""PPO on recorded rollouts: its critic, its two parameter groups, and GRPO as its special case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.experience import Rollouts
from lightning_modules.functional.sums import Metrics
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.policy_rl.ppo import PPO
from tests.distributed.advantages_worker import CASES, SIZES, found, rollouts_of
from tests.lightning_modules.test_policy_step import ADAM, SGD, change, fit, scalars


class Kept(PPO):
    """Keeps the last rollouts, as the hook left them."""

    def advantages(self, rollouts: Rollouts) -> tuple[torch.Tensor, Metrics]:
        advantages, metrics = super().advantages(rollouts)
        self.kept = rollouts
        return advantages, metrics


def moved(states: list[dict[str, torch.Tensor]], part: str) -> float:
    changes = change(states[0], states[-1])
    return max((float(v.abs().max()) for k, v in changes.items() if k.startswith(part)), default=0)


def test_without_a_critic_it_is_grpo(tiny_folder: Path, tmp_path: Path) -> None:
    _, one = fit(tiny_folder, tmp_path / "a", cls=PPO, steps=2, critic="none")
    _, two = fit(tiny_folder, tmp_path / "b", cls=GRPO, steps=2)
    assert one[-1].keys() == two[-1].keys()
    assert all(torch.equal(one[-1][name], value) for name, value in two[-1].items())


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_the_critic_learns_the_returns(critic: Any, tiny_folder: Path, tmp_path: Path) -> None:
    module, states = fit(
        tiny_folder, tmp_path, cls=Kept, steps=60, critic=critic, optimizer={"lr": 1e-4},
        critic_optimizer={"lr": 5e-3 if critic == "separate" else 5e-2}, value_clip=None,
    )  # fmt: skip
    points = scalars(tmp_path)
    losses = [value for _, value in points["train/value_loss"]]
    assert losses[-1] < 0.3 * losses[0]
    explained = [value for _, value in points["rollout/explained_variance"]]
    assert explained[0] == pytest.approx(0.0, abs=1e-6), "a critic at zero explains nothing"
    assert explained[-1] > 0.5
    assert moved(states, "critic.") > 0 and moved(states, "policy.") > 0
    rollouts = module.kept
    mask, last = rollouts.mask, rollouts.mask.sum(1) - 1
    wanted = rollouts.reward[:, None].expand(mask.shape)
    torch.testing.assert_close(rollouts.extra["returns"][mask], wanted[mask])
    assert rollouts.extra["values"].shape == mask.shape and int(last.max()) == mask.shape[1] - 1


def test_advantages_are_whitened_over_all_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    module, _ = fit(tiny_folder, tmp_path / "a", cls=Kept, critic="head")
    values = module.kept.advantages[module.kept.mask]
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(values.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    module, _ = fit(tiny_folder, tmp_path / "b", cls=Kept, critic="head", whiten_advantages=False)
    kept = module.kept
    wanted = kept.reward[:, None].expand(kept.mask.shape)  # the critic starts at zero
    torch.testing.assert_close(kept.advantages[kept.mask], wanted[kept.mask])


def test_rows_that_are_left_out_do_not_shift_the_others() -> None:
    left_out = CASES["some_left_out"][1]
    kept = [row for row in range(len(SIZES)) if row not in left_out]
    got, metrics = found(rollouts_of(tuple(range(len(SIZES))), left_out))
    wanted, expected = found(rollouts_of(tuple(kept), ()))
    same = got[kept, : wanted.shape[1]]
    torch.testing.assert_close(same, wanted, atol=1e-6, rtol=1e-5)
    for name in ("rollout/value", "rollout/explained_variance"):
        assert metrics[name] == pytest.approx(expected[name]), name


def test_completions_without_a_token_take_no_part() -> None:
    rollouts = rollouts_of((4, 4), ())  # what an engine that failed leaves
    advantages, metrics = found(rollouts)
    assert advantages.shape == (2, 0) and metrics["rollout/value"] == (0.0, 0.0)


def test_values_of_the_head_are_those_of_evaluation(tiny_folder: Path, tmp_path: Path) -> None:
    seen: list[float] = []

    class Twice(PPO):
        def annotate(self, rollouts: Rollouts) -> Any:
            found, again = super().annotate(rollouts), super().annotate(rollouts)
            torch.testing.assert_close(found["values"], again["values"], atol=0, rtol=0)
            seen.append(float(found["values"].abs().max()))
            assert self.policy.training and self.critic.training
            return found

    lora = {"r": 4, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
    fit(tiny_folder, tmp_path, cls=Twice, steps=3, critic="head", lora=lora, optimizer=ADAM)
    assert seen[0] == 0.0 and seen[-1] > 0.0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_before_the_first_step_ratios_are_one_in_any_precision(
    precision: str, tiny_folder: Path, tmp_path: Path
) -> None:
    fit(tiny_folder, tmp_path, cls=PPO, steps=2, critic="none", data={"passes": 2},
        flags={"precision": precision}, optimizer=ADAM)  # fmt: skip
    kl = [value for _, value in scalars(tmp_path)["train/approx_kl_k3"]]
    assert kl[0] < 1e-9 < kl[1]


def test_the_heads_gradient_stops_where_asked(tiny_folder: Path, tmp_path: Path) -> None:
    class OnlyCritic(PPO):
        def policy_loss(self, tokens: Any, batch: Any) -> Any:
            return tokens.logprob * 0, {}

    # the first step moves the zero head only; the second one would reach the policy through it
    for detach in (True, False):
        folder = tmp_path / str(detach)
        _, states = fit(
            tiny_folder, folder, cls=OnlyCritic, steps=2, critic="head", detach_critic=detach
        )
        assert (moved(states, "policy.") > 0) is not detach
        assert moved(states, "critic.") > 0


@pytest.mark.parametrize("critic", ["separate", "head"])
def test_accumulation_changes_no_gradient(critic: Any, tiny_folder: Path, tmp_path: Path) -> None:
    # the critic of its own reads prompts and completions as the policy does
    options = {"cls": PPO, "steps": 2, "critic": critic, "optimizer": {**SGD, "lr": 0.1}}
    _, one = fit(tiny_folder, tmp_path / "one", **options)
    _, many = fit(tiny_folder, tmp_path / "many", data={"micro_batches": 3}, **options)
    for name, value in one[-1].items():
        torch.testing.assert_close(many[-1][name], value, atol=1e-6, rtol=1e-5)


def test_actor_and_critic_have_their_own_rate_and_norm(tiny_folder: Path, tmp_path: Path) -> None:
    module, states = fit(
        tiny_folder, tmp_path, cls=PPO, critic="separate", optimizer=SGD,
        critic_optimizer={"lr": 3.0}, flags={"gradient_clip_val": 1e-3},
    )  # fmt: skip
    groups = module.optimizers().param_groups
    assert [group["role"] for group in groups] == ["policy", "critic"]
    assert [group["lr"] for group in groups] == [1.0, 3.0]
    changes = change(states[0], states[-1])
    for part, rate in (("policy.", 1.0), ("critic.", 3.0)):
        squares = sum(float(v.square().sum()) for k, v in changes.items() if k.startswith(part))
        assert squares**0.5 == pytest.approx(1e-3 * rate, rel=1e-3), part


def test_the_critic_has_its_own_moments(tiny_folder: Path, tmp_path: Path) -> None:
    own = {"betas": [0.5, 0.9], "extra": {"eps": 1e-3}}
    module, _ = fit(tiny_folder, tmp_path, cls=PPO, optimizer=ADAM, critic_optimizer=own)
    groups = module.optimizers().param_groups
    assert [group["betas"] for group in groups] == [(0.9, 0.999), (0.5, 0.9)]
    assert [group["eps"] for group in groups] == [1e-8, 1e-3]


def test_several_passes_clip_values(tiny_folder: Path, tmp_path: Path) -> None:
    fit(
        tiny_folder, tmp_path, cls=PPO, steps=8, critic="separate", optimizer=ADAM, value_clip=0.05,
        data={"passes": 4, "mini_batches": 2},
    )  # fmt: skip
    points = scalars(tmp_path)
    shares = [value for _, value in points["train/value_clip_share"]]
    assert shares[0] == 0.0 and max(shares) > 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "seperate"}, "model.critic='seperate' is not known.*'separate'"),
        ({"gamma": 2.0}, r"model.gamma=2.0 must be in \[0, 1\]"),
        ({"value_clip": 0.0}, "model.value_clip=0.0"),
        ({"critic_optimizer": {"learning_rate": 1.0}}, "unknown key 'model.critic_optimizer.lea"),
        ({"critic_optimizer": {"class_path": "torch.optim.SGD"}}, "share optimizer's"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPO(backbone="nowhere", **options)
