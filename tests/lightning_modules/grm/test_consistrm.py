"""ConsistRM: pseudo-labels of one and of both orders, what they earn, and what stays unread."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.engines.base import Engine
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.judging import JudgeDataModule
from datamodules.rewards import VerifierReward
from datamodules.self_training import SelfTrainingDataModule
from datamodules.tasks.base import Pair
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.functional.advantages import group_advantages
from lightning_modules.grm.consistrm import ConsistRM


def rollouts_of(
    task: PrefixAudit, analysis: Any, pair: Pair, votes: Sequence[Sequence[int | None]]
) -> Rollouts:
    """One group for each list of votes: the pair, then its other order. A vote of None is junk.

    Sample ``i`` writes analysis ``i``.
    """
    orders = [pair, pair.swap()][: len(votes)]
    prompts = [task.preference_prompt(replace(order, label=None)) for order in orders]
    groups = []
    for order, cast in zip(orders, votes, strict=True):
        texts = [
            f"{analysis(order, number)} response{vote}_wins <eos>" if vote else "response1_wins"
            for number, vote in enumerate(cast)
        ]
        ids = [tuple(task.tokenizer.convert_tokens_to_ids(text.split())) for text in texts]
        groups.append([Completion(one, (-0.5,) * len(one), FinishReason.STOP) for one in ids])
    return Rollouts.from_groups(prompts, groups)


@pytest.fixture
def judge(make_module: Any) -> Any:
    """A module without a critique reward unless asked."""
    return lambda **options: make_module(ConsistRM, **{"critique_signal": "none"} | options)


@pytest.fixture
def pair(task: PrefixAudit) -> Pair:
    return task.records("test")[0]


def test_one_order_earns_by_its_own_majority(task, analysis, judge, pair):
    module = judge(symmetrise="off", format_bonus=0.5)
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 2, None]])
    parts = module.score(rollouts, VerifierReward())
    assert parts["reward"].tolist() == [1.5, 1.5, -0.5, -5.0]
    assert parts["agreement"].tolist() == [1, 1, 0, 0]
    assert "accuracy" not in parts
    assert rollouts.info["target"] == [1] * 4
    assert module.memory.tally(f"{pair.uid}/12") == (-1, 1)


@pytest.mark.parametrize(
    ("votes", "targets", "remembered"),
    [
        # a judge of slot 1 cancels: no label, nobody earns
        ([[1, 1, 1], [1, 1, 1]], (None, None), (0, 1)),
        # a judge of responses agrees with itself
        ([[1, 1, 1], [2, 2, 2]], (1, 2), (-1, 1)),
        # biased, but it sees something: 3 of 3 and 2 of 3 for slot 1
        ([[1, 1, 1], [1, 1, 2]], (1, 2), (-1, 1)),
        ([[None, None, None], [1, 2, 1]], (2, 1), (1, 1)),
    ],
)
def test_pooled_orders_cast_one_vote(task, analysis, judge, pair, votes, targets, remembered):
    module = judge()
    rollouts = rollouts_of(task, analysis, pair, votes)
    module.score(rollouts, VerifierReward())
    assert rollouts.info["target"] == [targets[0]] * 3 + [targets[1]] * 3
    assert module.memory.tally(pair.uid) == remembered


def test_shared_memory_is_seen_from_both_orders(task, analysis, judge, pair):
    module = judge(symmetrise="memory", labels="memory_only")
    module.memory.begin([(pair.uid, [-1, -1, 1])])
    rollouts = rollouts_of(task, analysis, pair, [[2, 2], [1, 1]])
    module.score(rollouts, VerifierReward())
    assert rollouts.info["target"] == [1, 1, 2, 2]
    assert module.memory.tally(pair.uid) == (-2, 4)
    # each order by its own vote: both say slot 1, which is two responses
    voting = judge(symmetrise="memory")
    voting.score(rollouts_of(task, analysis, pair, [[1, 1], [1, 1]]), VerifierReward())
    assert voting.memory.tally(pair.uid) == (0, 1)


def test_undecided_and_code_rewards(task, analysis, judge, pair):
    module = judge(symmetrise="off", verdict_reward={"invalid": -3.0}, format_bonus=0.1)
    parts = module.score(rollouts_of(task, analysis, pair, [[1, 2, None]]), VerifierReward())
    assert parts["reward"].tolist() == pytest.approx([0.1, 0.1, -3.0])


def test_memory_outweighs_a_wavering_vote(task, analysis, judge, pair):
    module = judge(symmetrise="off")
    module.memory.begin([(f"{pair.uid}/12", [1] * 8)])
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 2]])
    module.score(rollouts, VerifierReward())
    assert rollouts.info["target"] == [2] * 3
    plain = judge(symmetrise="off", labels="majority")
    plain.memory.begin([(f"{pair.uid}/12", [1] * 8)])
    other = rollouts_of(task, analysis, pair, [[1, 1, 2]])
    plain.score(other, VerifierReward())
    assert other.info["target"] == [1] * 3


def test_plain_majority_is_an_empty_memory_without_bonus(task, analysis, judge, pair):
    votes = [[1, 2, 2, None], [1, 1, 2, 2]]
    found = []
    for options in ({"labels": "majority"}, {"labels": "consist"}):
        module = judge(symmetrise="off", **options)
        parts = module.score(rollouts_of(task, analysis, pair, votes), VerifierReward())
        found.append(parts["reward"])
    assert torch.equal(*found)


def test_frozen_memory_stays_and_junk_leaves_no_trace(task, analysis, judge, pair):
    frozen = judge(symmetrise="off", labels="frozen", verdict_reward={"invalid": -3.0})
    frozen.memory.begin([(f"{pair.uid}/12", [1, 1])])
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 1]])
    frozen.score(rollouts, VerifierReward())
    assert rollouts.info["target"] == [2] * 3
    assert frozen.memory.tally(f"{pair.uid}/12") == (2, 2)
    module = judge(symmetrise="off")
    parts = module.score(rollouts_of(task, analysis, pair, [[None] * 3]), VerifierReward())
    assert parts["reward"].tolist() == [-5.0] * 3
    assert len(module.memory) == 0


def test_agreeing_critiques_of_the_right_side_get_the_bonus(task, analysis, make_module, pair):
    module = make_module(ConsistRM, symmetrise="off", embedder="hashed")
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 1, 1, 2, 2]])
    # samples 0 to 2 say the same, 3 something else; 4 and 5 agree, but on the wrong side
    ids = rollouts.completions[0].token_ids
    for row in (1, 2):
        rollouts.completions[row] = replace(rollouts.completions[row], token_ids=ids)
    parts = module.score(rollouts, VerifierReward())
    assert parts["critique_reward"].tolist() == pytest.approx([0.1, 0.1, 0.1, 0, 0, 0])
    assert parts["reward"].tolist() == pytest.approx([1.1, 1.1, 1.1, 1, -1, -1])
    assert rollouts.info["critique_peers"] == [4, 4, 4, 4, 0, 0]


def test_policy_embeds_in_context(task, analysis, make_module, pair):
    module = make_module(ConsistRM, symmetrise="off", annotate_batch_size=2)
    module.configure_model()
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 1, 2]])
    ids = rollouts.completions[0].token_ids
    rollouts.completions[2] = replace(rollouts.completions[2], token_ids=ids)
    vectors = module.embed_critiques(rollouts, [])
    assert vectors.shape == (4, module.policy.config.hidden_size)
    torch.testing.assert_close(vectors[0], vectors[2], atol=1e-5, rtol=1e-5)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    # by hand, from the states that predict the completion's tokens
    tokens = torch.tensor([rollouts.prompts[1].token_ids + rollouts.completions[1].token_ids])
    with torch.no_grad():
        states = module.policy.base.model(tokens).last_hidden_state[0]
    begin = len(rollouts.prompts[1].token_ids) - 1
    torch.testing.assert_close(vectors[1], states[begin:-1].mean(0), atol=1e-4, rtol=1e-4)


def test_failing_embedder_costs_the_bonus_only(task, analysis, make_module, pair):
    def broken(texts: Sequence[str]) -> torch.Tensor:
        raise RuntimeError("out of memory")

    module = make_module(ConsistRM, symmetrise="off", embedder="hashed")
    module.embedder = broken
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 2]])
    with pytest.warns(UserWarning, match="no critique bonus in rollout 0: out of memory"):
        parts = module.score(rollouts, VerifierReward())
    assert parts["reward"].tolist() == [1, 1, -1]


@pytest.mark.parametrize("signal", ["confidence_tail", "confidence_lowest"])
def test_confident_critiques_of_the_right_side_get_the_bonus(
    task, analysis, make_module, pair, signal
):
    module = make_module(ConsistRM, symmetrise="off", critique_signal=signal)
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 1, 2]])
    for row, value in enumerate((-0.9, -0.1, -0.5, -0.01)):
        ids = rollouts.completions[row].token_ids
        rollouts.completions[row] = Completion(ids, (value,) * len(ids), FinishReason.STOP)
    parts = module.score(rollouts, VerifierReward())
    assert parts["critique_reward"].tolist() == pytest.approx([0, 0.1, 0.1, 0])


def test_unanimous_group_pushes_critiques_only_and_its_advantages_cancel(
    task, analysis, make_module, pair
):
    module = make_module(ConsistRM, symmetrise="off", embedder="hashed")
    rollouts = rollouts_of(task, analysis, pair, [[1, 1, 1, 1]])
    reward = module.score(rollouts, VerifierReward())["reward"]
    values = group_advantages(reward, rollouts.groups).advantages
    assert len(set(values.tolist())) == 2
    assert float(values.sum()) == pytest.approx(0, abs=1e-5)
    assert float(values.abs().max()) > 1  # the bonus of 0.1, blown up by the division


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "gild"}, "did you mean 'gold'"),
        ({"symmetrise": "poled"}, "did you mean 'pooled'"),
        ({"critique_share": 0.0}, "model.critique_share=0.0"),
        ({"label_rule": "sum"}, "did you mean 'sum_sign'"),
        ({"memory_size": 0}, "size=0"),
        ({"memory_decay": 0.0}, "decay=0.0"),
        ({"embedder": ""}, "model.embedder is empty"),
    ],
)
def test_bad_options_are_named(make_module, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(ConsistRM, **options)


def test_yaml_off_is_off(judge):
    assert judge(symmetrise=False).symmetrise == "off"


# --- runs ---------------------------------------------------------------------------------------


class Mislabelled(PrefixAudit):
    """Every training pair has the wrong label."""

    def records(self, split: Any) -> list[Pair]:
        pairs = super().records(split)
        wrong = [replace(pair, label=3 - (pair.label or 0)) for pair in pairs]
        return wrong if split == "train" else pairs


class Unlabelled(PrefixAudit):
    """No training pair has a label."""

    def records(self, split: Any) -> list[Pair]:
        pairs = super().records(split)
        return [replace(pair, label=None) for pair in pairs] if split == "train" else pairs


def mostly_first(pair: Pair, sample: int | None) -> tuple[int | None, int]:
    """A judge who has not seen a label: slot 1 rather than 2, now and then nothing."""
    chance = random.Random(f"{pair.uid}|{pair.swapped}|{sample}")
    return chance.choice([1, 1, 2, 2, 1, None]), chance.randrange(6)


@pytest.fixture
def fit(tiny_folder: Path, tmp_path: Path, make_engine: Any) -> Any:
    """Two steps on 4 pairs, whose judgements are written by a rule; the module and its weights."""

    def run(
        cls: type[PrefixAudit], data_options: dict[str, Any] | None = None, **options: Any
    ) -> tuple[ConsistRM, dict[str, torch.Tensor]]:
        return trained(
            cls, str(tiny_folder), tmp_path, make_engine(mostly_first), data_options, options
        )

    return run


def trained(
    cls: type[PrefixAudit],
    folder: str,
    tmp_path: Path,
    engine: Engine,
    data_options: dict[str, Any] | None,
    options: dict[str, Any],
) -> tuple[ConsistRM, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    task = cls(num_train=4, num_val=2, num_test=2)
    data = SelfTrainingDataModule(
        task=task,
        engine=engine,
        **{"prompts_per_rollout": 2, "prior_votes": 2} | (data_options or {}),
    )
    data.prepare(folder, tmp_path / "cache", {"task": "prefix_audit"})
    module = ConsistRM(backbone=folder, samples_per_prompt=4, optimizer={"lr": 1e-2}, **options)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    weights = {name: value.clone() for name, value in module.policy.base.state_dict().items()}
    return module, weights


def test_training_reads_no_label(fit):
    """Wrong labels and none at all train to the same weights as right ones, to the last bit."""
    found = [fit(cls) for cls in (PrefixAudit, Mislabelled, Unlabelled)]
    (right, expected), (wrong, _), (bare, _) = found
    for module, weights in found[1:]:
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        assert module.memory.state() == right.memory.state()
    accuracy = [module.results.get("pseudo/accuracy") for module in (right, wrong, bare)]
    assert accuracy == [pytest.approx(1 - accuracy[1]), accuracy[1], None]


def test_gold_labels_do_change_training(fit):
    """The same check can fail: with ``labels=gold`` wrong labels lead elsewhere."""
    options: dict[str, Any] = {"labels": "gold", "data_options": {"labels": "given"}}
    _, right = fit(PrefixAudit, **options)
    _, wrong = fit(Mislabelled, **options)
    assert any(not torch.equal(right[name], wrong[name]) for name in right)


@pytest.mark.parametrize(
    ("options", "data_options", "message"),
    [
        ({"labels": "gold"}, {}, "data.labels=given"),
        ({"labels": "frozen"}, {"prior_votes": 0}, "data.prior_votes=8"),
        ({"labels": "memory_only"}, {"prior_votes": 0}, "data.prior_votes=8"),
        ({"embedder": "/no/such/folder"}, {}, "model.embedder='/no/such/folder' could not"),
        ({"memory_size": 1}, {}, "more than model.memory_size=1 holds"),
        ({}, {"pair_order": "single"}, "data.pair_order=both"),
    ],
)
def test_data_that_do_not_fit_are_refused(fit, options, data_options, message):
    with pytest.raises(ValueError, match=message):
        fit(PrefixAudit, data_options=data_options, **options)


def test_data_of_another_kind_are_refused(tiny_folder, tmp_path, task):
    module = ConsistRM(backbone=str(tiny_folder))
    data = JudgeDataModule(task=task, engine=HFEngine())
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        default_root_dir=tmp_path, enable_progress_bar=False,
    )  # fmt: skip
    trainer.strategy.connect(module)
    module._trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="SelfTrainingDataModule, not JudgeDataModule"):
        module.on_fit_start()


def test_collapse_to_one_slot_is_said_once(judge):
    module = judge(symmetrise="off")
    with pytest.warns(UserWarning, match="100% of the verdicts .* name slot 1.*pooled") as caught:
        for _ in range(12):
            module._watch(1.0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        healthy = judge()
        for _ in range(12):
            healthy._watch(0.6)
