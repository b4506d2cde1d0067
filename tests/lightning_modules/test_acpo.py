"""ACPO: three rewards, forced modes, what prompts may tell, and what groups teach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.rewards import VerifierReward
from datamodules.tasks.arithmetic import Arithmetic
from datamodules.tasks.mini_writing import MiniWriting
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, word_tokenizer
from lightning_modules.grm.exported import TaskJudge
from lightning_modules.grm.judge_reward import ComparisonReward
from lightning_modules.policy_rl.acpo import ACPO, begin, whole_texts
from lightning_modules.policy_rl.grpo import GRPO

TASK = MiniWriting(num_train=8, num_val=2, num_test=2, flip=0.0)
TASK.bind(word_tokenizer(TASK.vocabulary()))
LONG, SHORT = (next(r for r in TASK.records("train") if r.kind == k) for k in ("long", "short"))
WALK = " ".join(f"w{(LONG.start + i) % 8}" for i in range(8))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    shape = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(folder, TASK.vocabulary(), shape, seed=0)
    return folder


@pytest.fixture
def make(backbone: Path) -> Any:
    return lambda **options: ACPO(
        backbone=str(backbone), **{"long_min": 6, "short_max": 4, "kl_coef": 0.0} | options
    )


def rollouts_of(record: Any, texts: Sequence[str]) -> Rollouts:
    ids = [tuple(TASK.tokenizer.convert_tokens_to_ids(f"{text} <eos>".split())) for text in texts]
    group = [Completion(one, (-0.1,) * len(one), FinishReason.STOP) for one in ids]
    rollouts = Rollouts.from_groups([TASK.prompt(record)], [group])
    rollouts.info["forced"] = [0] * len(texts)
    return rollouts


def test_rewards_by_hand(make):
    module = make()
    texts = [f"<plan> w0 w1 </plan> {WALK}", WALK, "<plan> w0 w1 </plan> w0", "<plan> w0"]
    parts = module.score(
        rollouts_of(LONG, texts), ComparisonReward(TaskJudge(), scheme="round_robin")
    )
    assert parts["reward_structure"].tolist() == [0, -5, 0, -4]  # a third of the gate's -12
    assert parts["reward_length"].tolist() == pytest.approx([0, 0, -5 * 5 / 6, -4])
    assert parts["failed"].tolist() == [0, 0, 0, 1]
    assert float(parts["reward"][3]) == -12.0
    # equal contents tie, whatever their plans; both beat the short one and the empty one
    relative = parts["reward_relative"].tolist()
    assert relative == pytest.approx([4 / 3, 4 / 3, -2 / 3, -4])
    total = [r + s + n for r, s, n in zip(
        relative, parts["reward_structure"].tolist(), parts["reward_length"].tolist(), strict=True
    )]  # fmt: skip
    assert parts["reward"].tolist() == pytest.approx(total)


def test_reward_does_not_depend_on_the_length_of_a_plan(make):
    """The judge likes plans; it is not shown them unless asked."""
    likes = MiniWriting(num_train=8, num_val=2, num_test=2, flip=0.0, plan_bonus=1.0)
    likes.bind(TASK.tokenizer)
    plans = ["w1 w2", "w1 w2 w3 w4", "w7 w7 w7"]
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    for plan in plans:
        texts = [f"<plan> {plan} </plan> {WALK}", f"<plan> w0 w1 w2 </plan> {WALK} w0"]
        rollouts = rollouts_of(LONG, texts)
        rollouts.prompts = [replace(prompt, task=likes) for prompt in rollouts.prompts]
        for show in found:
            reward = ComparisonReward(TaskJudge(), show_plan=show)
            found[show].append(make().score(rollouts, reward)["reward"].tolist())
    assert found[False][0] == found[False][1] == found[False][2]
    assert found[True][0] != found[True][1]


def test_structure_is_invisible_in_a_uniform_group(make):
    """What all members share teaches nothing: with and without it the advantages are equal."""
    texts = ["<plan> w0 w1 </plan> w1 w2", "<plan> w0 w1 </plan> w1 w1", "<plan> w0 w1 </plan> w3"]
    found = []
    for coef in (0.0, 5.0):
        module = make(structure_coef=coef)
        rollouts = rollouts_of(SHORT, texts)
        parts = module.score(rollouts, ComparisonReward(TaskJudge()))
        rollouts.reward, rollouts.parts = parts["reward"], parts
        module.samples_per_prompt = 3
        found.append(module.advantages(rollouts))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert float(found[1][1]["rollout/mixed_modes"][0]) == 0.0


def test_each_reward_off(make):
    texts = [WALK, f"<plan> w0 w1 </plan> {WALK} w0 w0"]
    for option, part in (
        ("relative_coef", "relative"),
        ("structure_coef", "structure"),
        ("length_cap", "length"),
    ):
        parts = make(**{option: 0.0}).score(
            rollouts_of(SHORT, texts), ComparisonReward(TaskJudge())
        )
        assert parts[f"reward_{part}"].abs().max() == 0
        others = {"relative", "structure", "length"} - {part}
        assert all(parts[f"reward_{name}"].abs().max() > 0 for name in others)


def test_no_judge_is_asked_without_a_relative_reward(make):
    def refuse(rollouts: Rollouts) -> dict[str, torch.Tensor]:
        raise AssertionError("the judge was asked")

    make(relative_coef=0.0).score(rollouts_of(LONG, [WALK, "w1"]), refuse)


def test_structure_warms_up(make, monkeypatch):
    module = make(structure_warmup=10)
    monkeypatch.setattr(ACPO, "global_step", 5)
    module._trainer = object()
    parts = module.score(rollouts_of(LONG, [WALK, WALK]), ComparisonReward(TaskJudge()))
    assert parts["reward_structure"].tolist() == [-2.5, -2.5]


def test_forced_modes_stand_in_prompts_and_give_no_gradient(make):
    module = make(mode_explore=0.5, samples_per_prompt=8, max_new_tokens=12)
    assert module.modes() == [None] * 4 + ["direct", "plan", "direct", "plan"]
    module.configure_model()
    engine = HFEngine()
    engine.sync(module.policy, 0)
    prompts = [TASK.prompt(record) for record in (LONG, SHORT)]
    rollouts = module.rollout(prompts, engine)
    sizes = [0] * 4 + [2, 2, 1, 1]  # direct, direct, plan, plan: by mode
    assert rollouts.info["forced"] == sizes * 2
    assert rollouts.groups.tolist() == [0] * 8 + [1] * 8
    for prompt, size in zip(rollouts.prompts, rollouts.info["forced"], strict=True):
        own = prompts[0 if prompt.uid.startswith(LONG.uid) else 1]
        assert len(prompt.token_ids) == len(own.token_ids) + size
    batch = rollouts.batch()
    assert batch.mask.sum(1).tolist() == [len(c.token_ids) for c in rollouts.completions]
    # rows of one group that begin in different ways share no prompt
    assert len(batch.groups.unique()) == 6
    whole = whole_texts(rollouts)
    tags = TASK.tokenizer.convert_tokens_to_ids(["<plan>", "</plan>"])
    for prompt, completion, size in zip(
        whole.prompts, whole.completions, rollouts.info["forced"], strict=True
    ):
        assert prompt.token_ids in [own.token_ids for own in prompts]
        assert list(completion.token_ids[:size]) == tags[:size]
        assert len(completion.token_ids) == len(completion.logprobs)
    free = make(samples_per_prompt=8, max_new_tokens=12)
    free.configure_model()
    engine.sync(free.policy, 0)
    plain, flat = free.rollout(prompts, engine), GRPO.rollout(free, prompts, engine)
    assert [c.token_ids for c in plain.completions] == [c.token_ids for c in flat.completions]


@pytest.mark.parametrize(("mode", "tags"), [("plan", 1), ("direct", 2)])
def test_a_mode_can_be_forced_throughout(make, mode, tags):
    module = make(force_mode=mode, samples_per_prompt=4, max_new_tokens=12)
    module.configure_model()
    engine = HFEngine()
    engine.sync(module.policy, 0)
    prefix = TASK.tokenizer.convert_tokens_to_ids(["<plan>", "</plan>"])[:tags]
    for rollouts in (
        module.rollout([TASK.prompt(LONG)], engine),
        module.evaluation_rollouts([TASK.prompt(LONG)], Sampling(temperature=0.0), engine),
    ):
        whole = whole_texts(rollouts)
        assert all(list(one.token_ids[:tags]) == prefix for one in whole.completions)


def test_prompts_tell_no_type_and_hold_no_reference():
    """Types of genres exchanged: the same prompts, token for token."""
    other = MiniWriting(num_train=64, num_val=2, num_test=2, world_seed=1)
    same = MiniWriting(num_train=64, num_val=2, num_test=2)
    for task in (other, same):
        task.bind(TASK.tokenizer)
    kinds = [
        {record.genre: record.kind for record in task.records("train")} for task in (same, other)
    ]
    assert kinds[0] != kinds[1]
    for genre in range(4):
        record = replace(LONG, genre=genre)
        assert same.prompt(record).token_ids == other.prompt(record).token_ids
        assert len(same.prompt(record).token_ids) == 3


def test_normalising_each_reward_gives_each_its_share(make):
    """By hand: the sum of three group-normalised rewards, failed texts among them."""
    texts = [WALK, f"<plan> w0 w1 </plan> {WALK}", "w0", "<plan> w0"]
    found = {}
    for way in ("sum", "each"):
        module = make(normalise=way, samples_per_prompt=4)
        rollouts = rollouts_of(LONG, texts)
        parts = module.score(rollouts, ComparisonReward(TaskJudge()))
        rollouts.reward, rollouts.parts = parts["reward"], parts
        found[way], metrics = module.advantages(rollouts)
    expected = torch.zeros(4)
    for name in ("relative", "structure", "length"):
        value = parts[f"reward_{name}"]
        expected += (value - value.mean()) / (value.std() + 1e-6)
    torch.testing.assert_close(found["each"], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["each"], found["sum"], atol=0.1)
    assert float(found["each"][3]) == float(found["each"].min())
    shares = [metrics[f"rollout/share_{name}"] for name in ("relative", "structure", "length")]
    assert sum(float(total) / float(count) for total, count in shares) == pytest.approx(1)


def test_failed_texts_are_in_no_right_mode(make):
    parts = make().score(rollouts_of(SHORT, ["</plan> w0", "w0 w1"]), ComparisonReward(TaskJudge()))
    assert parts["mode"].tolist() == [0, 1]
    assert TASK.verify(*next(zip(*_both(SHORT, ["</plan> w0"]), strict=True)))["mode"] == 0.0


def _both(record: Any, texts: Sequence[str]) -> tuple[list[Any], list[Any]]:
    rollouts = rollouts_of(record, texts)
    return rollouts.prompts, rollouts.completions


def test_evaluation_asks_no_judge(make):
    parts = make().score_evaluation(rollouts_of(LONG, [WALK, "<plan> w0 w1 </plan> w1"]), None)
    assert parts["mode"].tolist() == [0, 1]
    assert parts["utility"].tolist() == pytest.approx([1.0, float(LONG.start == 1) / 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode_explore": 1.5}, "model.mode_explore=1.5"),
        ({"mode_explore": 0.05}, "is less than one completion"),
        ({"force_mode": "plans"}, "did you mean 'plan'"),
        ({"normalise": "all"}, "model.normalise='all'"),
        ({"long_min": 0, "structure_coef": -1}, "structure_coef=-1.*long_min=0"),
    ],
)
def test_bad_options_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tasks_without_plans_are_refused(make):
    task = Arithmetic(num_train=2, num_val=1, num_test=1)
    task.bind(word_tokenizer(task.vocabulary() or []))
    prompt = task.prompt(task.records("train")[0])
    rollouts = Rollouts.from_groups([prompt], [[Completion((5,), (0.0,), FinishReason.STOP)]])
    rollouts.info["forced"] = [0]
    with pytest.raises(ValueError, match="model=acpo needs a task of long and short texts"):
        make().score(rollouts, VerifierReward())


def test_begin_leaves_room():
    prompt = TASK.prompt(LONG)
    begun, size = begin(prompt, "direct")
    assert (size, begun.max_new_tokens) == (2, (prompt.max_new_tokens or 0) - 2)
    assert begin(prompt, None) == (prompt, 0)
