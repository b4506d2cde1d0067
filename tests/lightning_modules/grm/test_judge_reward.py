"""``reward=judge``: groups, orders, cache, empty texts, exported folders, and their bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.hf import HFEngine
from datamodules.engines.vllm import VLLMEngine
from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.tasks.base import Pair, Task
from datamodules.tasks.mini_writing import MiniWriting
from datamodules.tasks.mini_writing_pairs import MiniWritingPairs
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.tiny import word_tokenizer
from lightning_modules.grm.ac_genrm import ACGenRM
from lightning_modules.grm.candidates import Comparison
from lightning_modules.grm.exported import ExportedJudge, TaskJudge
from lightning_modules.grm.judge_reward import ComparisonReward
from tests.data_files import write_judge

WORLD: dict[str, Any] = {"num_train": 4, "num_val": 2, "num_test": 2, "flip": 0.0}
TEXTS = ["w1", "w1 w2 w3", "", "w1 w2", "<plan> w1 w2 </plan> w1 w2 w3 w4"]


class LongestWins:
    """A judge of lengths that likes slot 1 when texts are as long; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[Pair]] = []

    def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        self.asked.append(list(pairs))
        found = []
        for pair in pairs:
            first, second = (len(text.split()) for text in pair.responses)
            found.append(Comparison.of(1, 1.0, 3) if first >= second else Comparison.of(2, -1.0, 3))
        return found


@pytest.fixture(scope="module")
def task() -> MiniWriting:
    made = MiniWriting(**WORLD)
    made.bind(word_tokenizer(made.vocabulary()))
    return made


def rollouts_of(task: MiniWriting, texts: Sequence[str], groups: int = 1) -> Rollouts:
    prompts = [task.prompt(record) for record in task.records("train")[:groups]]
    ids = [tuple(task.tokenizer.convert_tokens_to_ids(f"{text} <eos>".split())) for text in texts]
    written = [Completion(one, (-0.1,) * len(one), FinishReason.STOP) for one in ids]
    size = len(texts) // groups
    return Rollouts.from_groups(
        prompts, [written[n * size : (n + 1) * size] for n in range(groups)]
    )


def test_round_robin_ranks_contents_without_their_plans(task):
    judge = LongestWins()
    parts = ComparisonReward(judge, scheme="round_robin")(rollouts_of(task, TEXTS))
    assert parts["reward"].tolist() == pytest.approx([-0.5, 0.5, -1.0, 0.0, 1.0])
    assert parts["judge/empty"].tolist() == [0, 0, 1, 0, 0]
    assert len(judge.asked) == 1  # one batch
    assert len(judge.asked[0]) == 6  # the empty text meets nobody
    assert all("plan" not in text for pair in judge.asked[0] for text in pair.responses)
    assert {pair.question for pair in judge.asked[0]} == {task.records("train")[0].text}
    assert float(parts["judge/tokens"].sum()) == pytest.approx(3 * 6)


def test_plans_are_shown_where_asked(task):
    judge = LongestWins()
    parts = ComparisonReward(judge, scheme="round_robin", show_plan=True)(
        rollouts_of(task, ["w1 w2 w3", "<plan> w1 w2 </plan> w1"])
    )
    assert parts["reward"].tolist() == [-1.0, 1.0]


def test_a_taste_for_length_is_seen(task):
    texts = ["w1", "w1 w2", "w1 w2 w3"]
    parts = ComparisonReward(LongestWins(), scheme="round_robin")(rollouts_of(task, texts))
    assert parts["judge/longer"].tolist() == [1.0] * 3
    alike = ComparisonReward(LongestWins(), scheme="round_robin")(
        rollouts_of(task, ["w1 w2", "w2 w1"])
    )
    assert alike["judge/longer"].tolist() == [0.5] * 2


def test_orders_are_random_and_slots_cancel(task):
    """A judge of slot 1 gives nothing to anybody on average, and is seen in the metric."""

    class First:
        def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
            return [Comparison.of(1, 1.0) for _ in pairs]

    texts = [f"w{i % 8} w{i // 8}" for i in range(24)]
    parts = ComparisonReward(First(), scheme="round_robin")(rollouts_of(task, texts))
    assert abs(float(parts["reward"].mean())) < 1e-6
    assert float(parts["reward"].abs().max()) < 0.8
    assert float(parts["judge/first_slot"].mean()) == 1.0
    both = ComparisonReward(First(), scheme="round_robin", both_orders=True)
    parts = both(rollouts_of(task, texts))
    assert parts["reward"].abs().max() == 0
    assert float(parts["judge/flip"].mean()) == 1.0


def test_verdicts_are_kept_by_content(task):
    judge = LongestWins()
    reward = ComparisonReward(judge, scheme="round_robin", both_orders=True)
    first = reward(rollouts_of(task, ["w1", "w1 w2", "w3"]))
    again = reward(rollouts_of(task, ["w1", "w1 w2", "w3"]))
    assert len(judge.asked) == 1
    assert torch.equal(first["reward"], again["reward"])
    assert float(again["judge/tokens"].sum()) == 0
    reward(rollouts_of(task, ["w4", "w1 w2", "w1"]))  # in another order
    assert len(judge.asked[1]) == 4  # both orders of the two new pairs
    small = ComparisonReward(LongestWins(), cache_size=2, scheme="round_robin")
    small(rollouts_of(task, ["w1", "w1 w2", "w3"]))
    assert len(small._cache) == 2


def test_the_reward_of_a_group_does_not_depend_on_its_neighbours(task):
    texts = ["w1", "w1 w2", "w3", "w5 w6 w7", "w1 w2 w3 w4", "w2"]
    whole = ComparisonReward(LongestWins())(rollouts_of(task, texts, groups=2))
    alone = ComparisonReward(LongestWins())(rollouts_of(task, texts[:3]))
    assert torch.equal(whole["reward"][:3], alone["reward"])


def test_one_sample_a_group_is_refused_in_training_and_verified_in_tests(task):
    judge = LongestWins()
    alone = rollouts_of(task, ["w1 w2"])
    with pytest.raises(ValueError, match="model.samples_per_prompt must be at least 2"):
        ComparisonReward(judge)(alone)
    parts = ComparisonReward(judge).evaluation(alone)
    expected = task.verify(alone.prompts[0], alone.completions[0])
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected)
    assert judge.asked == []


def test_equal_texts_tie_unread(task):
    judge = LongestWins()
    parts = ComparisonReward(judge, scheme="round_robin")(rollouts_of(task, ["w1 w2"] * 4))
    assert parts["reward"].abs().max() == 0
    assert parts["judge/tie"].tolist() == [1.0] * 4
    assert judge.asked == []


def test_texts_that_were_cut_off_count_as_empty(task):
    rollouts = rollouts_of(task, ["w1", "w1 w2 w3"])
    rollouts.completions[1] = replace(rollouts.completions[1], finish_reason=FinishReason.LENGTH)
    assert ComparisonReward(LongestWins())(rollouts)["reward"].tolist() == [1.0, -1.0]
    plain = replace(rollouts.completions[1], finish_reason=FinishReason.STOP)
    rollouts.completions[1] = plain
    assert ComparisonReward(LongestWins())(rollouts)["reward"].tolist() == [-1.0, 1.0]


def test_every_task_asks_its_own_judge(task):
    other = MiniWriting(**WORLD, world_seed=1)
    other.bind(task.tokenizer)
    seen = []

    class Noted(TaskJudge):
        def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
            seen.append((task, len(pairs)))
            return super().compare(pairs, task)

    first, second = (rollouts_of(one, ["w1", "w2 w3"]) for one in (task, other))
    both = Rollouts(
        prompts=[*first.prompts, *second.prompts],
        completions=[*first.completions, *second.completions],
        groups=torch.tensor([0, 0, 1, 1]),
    )
    ComparisonReward(Noted())(both)
    assert seen in ([(task, 1), (other, 1)], [(other, 1), (task, 1)])


def test_the_task_is_its_own_judge(task):
    long = next(r for r in task.records("train") if r.kind == "long")
    walk = " ".join(f"w{(long.start + i) % 8}" for i in range(8))
    rollouts = rollouts_of(task, [walk, "w0", "w0 w0"])
    parts = ComparisonReward(TaskJudge(), scheme="round_robin")(rollouts)
    assert float(parts["reward"][0]) == 1.0
    audit = PrefixAudit(num_train=1, num_val=1, num_test=1)
    audit.bind(word_tokenizer(audit.vocabulary()))
    prompt = audit.preference_prompt(audit.records("train")[0])
    two = [Completion((first, 2), (0.0, 0.0), FinishReason.STOP) for first in (5, 6)]
    made = Rollouts.from_groups([prompt], [two])
    with pytest.raises(ValueError, match="'prefix_audit' has no judge of its own"):
        ComparisonReward(TaskJudge())(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scheme": "robin"}, "did you mean 'round_robin'"), ({"cache_size": -1}, "cache_size=-1")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonReward(LongestWins(), **options)


# --- exported folders ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AC-GenRM as its training would export it."""
    return write_judge(tmp_path_factory.mktemp("judge"), **WORLD)


def test_exported_judge_is_the_judge(exported, task):
    """The folder alone gives the verdicts that the module itself gives."""
    pairs = [Pair(f"p{i}", "genre1 w2", (f"w{i} w2", f"w3 w{i}")) for i in range(6)]
    judge = ExportedJudge(str(exported))
    found = judge.compare(pairs, task)
    module = ACGenRM(backbone=str(exported), num_votes=3, max_new_tokens=8)
    own = MiniWritingPairs(**WORLD)
    own.bind(word_tokenizer(own.vocabulary()))
    expected = module.compare(pairs, engine=HFEngine(), task=own)
    assert found == expected
    assert not any(p.requires_grad for p in judge._load().parameters())


def test_rewards_of_an_exported_judge(exported, task):
    reward = ComparisonReward(
        ExportedJudge(str(exported), inference="majority", num_votes=3), path=str(exported)
    )
    parts = reward(rollouts_of(task, ["w1", "w1 w2", "w3", "w4 w5"]))
    assert parts["reward"].shape == (4,)
    assert set(parts) >= {"judge/tokens", "judge/unparsed", "judge/first_slot"}
    assert float(parts["judge/tokens"].sum()) > 0
    again = ComparisonReward(
        ExportedJudge(str(exported), inference="majority", num_votes=3), path=str(exported)
    )
    assert torch.equal(
        parts["reward"], again(rollouts_of(task, ["w1", "w1 w2", "w3", "w4 w5"]))["reward"]
    )


def test_texts_that_the_judge_cannot_read_are_refused(exported):
    odd = MiniWriting(**WORLD, num_words=12)
    odd.bind(word_tokenizer(odd.vocabulary()))
    reward = ComparisonReward(ExportedJudge(str(exported)), path=str(exported))
    with pytest.raises(ValueError, match="the judge of reward.path=.* such as 'w11'"):
        reward(rollouts_of(odd, ["w11", "w1"]))


def test_judges_do_not_push_the_policy_out_of_vllm(exported):
    with pytest.raises(ValueError, match="room for one model"):
        ExportedJudge(str(exported), engine=VLLMEngine())


def test_folder_with_another_tokenizer_is_refused(exported, tmp_path, task):
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    word_tokenizer(["other", "words"]).save_pretrained(folder)
    with pytest.raises(ValueError, match="its tokenizer does not fit its task"):
        ExportedJudge(str(folder)).compare([Pair("p", "genre1 w2", ("w1", "w2"))], task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no folder of an exported judge"),
        ({"module": "lightning_modules.policy_rl.grpo.GRPO"}, "which is no judge"),
        ({"judge": {"module": "os.system", "options": {}, "task": {}}}, "asks for 'os.system'"),
        ({"judge": {"module": "os.system"}}, "which is no judge"),
        ([1], "which is no judge"),
        (
            {
                "judge": {
                    "module": "lightning_modules.grm.ac_genrm.ACGenRM",
                    "options": {"volts": 3},
                    "task": {"_target_": f"{MiniWritingPairs.__module__}.MiniWritingPairs"},
                }
            },
            "does not fit this version of the library",
        ),
        (
            {
                "judge": {
                    "module": "lightning_modules.grm.ac_genrm.ACGenRM",
                    "options": {},
                    "task": {"_target_": "datamodules.tasks.preferences.read_preference_pairs"},
                }
            },
            "which is no JudgeTask below datamodules.tasks",
        ),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path, task, change, message):
    if change is not None:
        (tmp_path / "litpost.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=message):
        ExportedJudge(str(tmp_path)).compare([Pair("p", "q", ("a", "b"))], task)
