"""TRE on recorded rollouts: its entropies, its baselines, and PPO as its special case."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.ops import LogprobEntropy, TopK, TopP
from lightning_modules.policy_rl.ppo import PPO
from lightning_modules.policy_rl.tre import TRE
from tests.lightning_modules.test_policy_step import SGD, fit, scalars

VOCABULARY = 83


class Seen(TRE):
    """Keeps what the first pass gave."""

    def regularizer(self, tokens: LogprobEntropy, batch: Any) -> Any:
        penalty, metrics = super().regularizer(tokens, batch)
        if not hasattr(self, "seen"):
            self.seen = (tokens, batch, penalty)
        return penalty, metrics


def same(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> bool:
    return all(torch.equal(one[-1][name], value) for name, value in two[-1].items())


@pytest.mark.parametrize("critic", ["none", "head"])
@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "none"},
        {"regularizer": "tre_k", "entropy_coef": 0.0},
        {"regularizer": "global_entropy", "entropy_coef": 0.0},
        {"regularizer": "kl_cov", "kl_cov_coef": 0.0},
        {"regularizer": "none", "policy_loss": "forking_tokens", "forking_share": 1.0},
    ],
)
def test_switched_off_it_is_ppo(
    options: dict[str, Any], critic: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    data = {"passes": 2}
    _, one = fit(tiny_folder, tmp_path / "a", cls=TRE, steps=2, critic=critic, data=data, **options)
    _, two = fit(tiny_folder, tmp_path / "b", cls=PPO, steps=2, critic=critic, data=data)
    assert same(one, two)


def logits_of(module: Any, batch: Any) -> torch.Tensor:
    """Scaled logits ``(K, V)`` of the completion tokens, the plain way."""
    with torch.no_grad():
        full = module.policy(batch.input_ids).logits
    rows, places = batch.mask.nonzero(as_tuple=True)
    return full[rows, batch.prompt_lengths[rows] + places - 1] / module.temperature


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["global_entropy", "tre_k", "tre_p"])
def test_the_bonus_is_the_entropy_of_its_region(
    kind: Any, temperature: float, tiny_folder: Path, tmp_path: Path
) -> None:
    module, _ = fit(
        tiny_folder, tmp_path, cls=Seen, regularizer=kind, entropy_coef=0.1, top_k=3, top_p=0.5,
        critic="none", temperature=temperature, optimizer={**SGD, "lr": 0.0},
    )  # fmt: skip
    tokens, batch, penalty = module.seen
    logits = logits_of(module, batch)
    if kind == "global_entropy":
        wanted = entropy(logits)
    elif kind == "tre_k":
        wanted = entropy(logits.topk(3).values) * math.log(VOCABULARY) / math.log(3)
    else:
        values = []
        for row in logits:
            ranked = row.sort(descending=True).values
            before = ranked.softmax(0).cumsum(0) - ranked.softmax(0)
            kept = ranked[before < 0.5]
            assert len(kept) > 1
            values.append(entropy(kept) * math.log(VOCABULARY) / math.log(len(kept)))
        wanted = torch.stack(values)
    torch.testing.assert_close(penalty[batch.mask].detach(), -0.1 * wanted, atol=1e-5, rtol=1e-4)
    assert not penalty[~batch.mask].any()
    points = scalars(tmp_path)
    assert points["train/entropy"][0][1] == pytest.approx(float(entropy(logits).mean()), rel=1e-4)
    if kind != "global_entropy":
        mass, tail = points["train/region/mass"][0][1], points["train/region/tail_mass"][0][1]
        assert mass + tail == pytest.approx(1.0, abs=1e-5)
        assert points["train/region/entropy"][0][1] == pytest.approx(float(wanted.mean()), rel=1e-4)
    if kind == "tre_k":
        assert points["train/region/size"][0][1] == 3.0
        kept_mass = logits.softmax(1).topk(3).values.sum(1).mean()
        assert mass == pytest.approx(float(kept_mass), rel=1e-4)


def test_bonus_raises_the_regions_entropy_and_not_its_share_of_the_rest(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Ten steps of the bonus alone: a region that keeps its mass loses less of it."""

    class Alone(TRE):
        def policy_loss(self, tokens: Any, batch: Any) -> Any:
            return tokens.logprob * 0, {}

    ends: dict[bool, dict[str, list[tuple[int, float]]]] = {}
    for keep in (False, True):
        fit(
            tiny_folder, tmp_path / str(keep), cls=Alone, steps=10, regularizer="tre_k", top_k=2,
            entropy_coef=1.0, preserve_mass=keep, critic="none", optimizer={**SGD, "lr": 0.02},
        )  # fmt: skip
        ends[keep] = scalars(tmp_path / str(keep))
    for points in ends.values():
        values = [value for _, value in points["train/region/entropy"]]
        assert values[-1] > values[0]
    lost = {keep: p["train/region/mass"][0][1] - p["train/region/mass"][-1][1]
            for keep, p in ends.items()}  # fmt: skip
    assert lost[True] < lost[False]


def test_regions_are_set_from_the_options() -> None:
    def region(**options: Any) -> Any:
        return TRE(backbone="nowhere", **options).region

    assert region(top_k=4) == TopK(4)
    assert region(top_k=4, preserve_mass=True, scale_entropy=False) == TopK(4, "none", True)
    assert region(regularizer="tre_p", top_p=0.9) == TopP(0.9, max_size=256)
    assert region(regularizer="global_entropy") is None
    assert region(regularizer="none", log_region=True, top_k=7) == TopK(7)


def test_kl_cov_is_inert_until_the_policy_has_moved(tiny_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "cls": TRE, "critic": "none", "kl_cov_share": 0.5, "kl_cov_coef": 5.0,
    }  # fmt: skip
    fresh = {"data": {"passes": 1}, "steps": 1, **options}
    _, with_it = fit(tiny_folder, tmp_path / "a", regularizer="kl_cov", **fresh)
    _, without = fit(tiny_folder, tmp_path / "b", regularizer="none", **fresh)
    assert same(with_it, without)
    later = {"data": {"passes": 3}, "steps": 3, **options}
    _, with_it = fit(tiny_folder, tmp_path / "c", regularizer="kl_cov", **later)
    _, without = fit(tiny_folder, tmp_path / "d", regularizer="none", **later)
    assert not same(with_it, without)
    assert scalars(tmp_path / "c")["train/kl_cov_share"][0][1] == pytest.approx(0.5, abs=0.02)


def test_forking_trains_its_share(tiny_folder: Path, tmp_path: Path) -> None:
    fit(tiny_folder, tmp_path, cls=TRE, policy_loss="forking_tokens", regularizer="none",
        critic="none", with_entropy=False)  # fmt: skip
    tokens = 2 * (1 + 7 + 3 + 5) + 4  # of the recorded completions
    share = scalars(tmp_path)["train/forking_share"][0][1]
    assert share == pytest.approx(math.ceil(0.2 * tokens) / tokens)


def test_alpha_decays_to_zero(tiny_folder: Path, tmp_path: Path) -> None:
    fit(tiny_folder, tmp_path, cls=TRE, steps=6, critic="none", entropy_coef=0.4,
        entropy_decay_steps=4)  # fmt: skip
    alphas = [value for _, value in scalars(tmp_path)["train/entropy_coef"]]
    assert alphas == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("micro_batches", [8, 3])
def test_accumulation_changes_no_gradient(
    micro_batches: int, tiny_folder: Path, tmp_path: Path
) -> None:
    options = {"cls": TRE, "steps": 2, "critic": "none", "entropy_coef": 0.5, "top_k": 5}
    _, one = fit(tiny_folder, tmp_path / "one", **options)
    data = {"micro_batches": micro_batches}
    _, many = fit(tiny_folder, tmp_path / "many", data=data, **options)
    for name, value in one[-1].items():
        torch.testing.assert_close(many[-1][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizer": "tre-k"}, "model.regularizer='tre-k' is not known.*'tre_k'"),
        ({"policy_loss": "forking"}, "did you mean 'forking_tokens'"),
        ({"top_p": 1.0}, r"model.top_p=1.0 must be inside \(0, 1\)"),
        ({"top_k": 0}, "model.top_k=0"),
        (
            {"policy_loss": "forking_tokens", "loss_aggregation": "sequence_mean"},
            "model.loss_aggregation=sequence_mean.*use token_mean",
        ),
        ({"forking_share": 0.0, "kl_cov_share": 2.0}, "kl_cov_share=2.0.*forking_share=0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRE(backbone="nowhere", **options)


def test_a_region_larger_than_the_vocabulary_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.top_k=84 is more than the 83 tokens.*top_k=83"):
        fit(tiny_folder, tmp_path, cls=TRE, top_k=84, critic="none")
    fit(tiny_folder, tmp_path, cls=TRE, top_k=83, critic="none")
