"""AC-GenRM: two turns, who earns what, and what criteria may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Candidates as TokenCandidates
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.rewards import VerifierReward
from datamodules.tasks.base import Pair
from datamodules.tasks.criteria import CRITERIA, JUDGEMENT
from datamodules.tasks.mini_writing_pairs import MiniWritingPairs
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, word_tokenizer
from lightning_modules.functional.comparisons import soft_outcome
from lightning_modules.grm.ac_genrm import ACGenRM

TASK = MiniWritingPairs(num_train=12, num_val=4, num_test=6)
TASK.bind(word_tokenizer(TASK.vocabulary()))
WORDS = ("coherence", "sparkle")


def says(*words: str, candidates: TokenCandidates | None = None) -> Completion:
    ids = tuple(TASK.tokenizer.convert_tokens_to_ids([*words, "<eos>"]))
    return Completion(ids, (-0.2,) * len(ids), FinishReason.STOP, 0, candidates)


class Writer(Engine):
    """Criteria by turns, a verdict for slot 1 under the first word and for slot 2 under the other.

    Sample 2 of the criteria does not parse.
    """

    def __init__(self) -> None:
        self.calls: list[list[Prompt]] = []

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append(list(prompts))
        return [self._group(prompt, sampling.samples) for prompt in prompts]

    def _group(self, prompt: Prompt, samples: int) -> list[Completion]:
        if prompt.domain == CRITERIA:
            return [says("w1" if i == 2 else WORDS[i % 2]) for i in range(samples)]
        text = TASK.render(prompt.token_ids)
        return [says("A_wins" if WORDS[0] in text else "B_wins") for _ in range(samples)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critic")
    shape = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(folder, TASK.vocabulary(), shape, seed=0)
    return folder


@pytest.fixture
def make(backbone: Path) -> Any:
    def build(**options: Any) -> ACGenRM:
        values: dict[str, Any] = {"samples_per_prompt": 4, "num_votes": 2, "max_new_tokens": 8}
        module = ACGenRM(backbone=str(backbone), **values | options)
        module.judge_task = TASK
        return module

    return build


@pytest.fixture
def pairs() -> list[Pair]:
    """Two pairs of one query, one of another."""
    first, other = TASK.records("train")[:2]
    again = TASK.pair_of(first.question, (first.responses[0] + " w1", first.responses[1]))
    return [first, again, other]


def rollouts_of(module: ACGenRM, pairs: Sequence[Pair], engine: Engine) -> Any:
    return module.rollout([TASK.preference_prompt(pair) for pair in pairs], engine)


def test_criteria_earn_what_the_judgement_under_them_did(make, pairs):
    module, engine = make(), Writer()
    rollouts = rollouts_of(module, pairs, engine)
    assert rollouts.groups.tolist() == [n for n in range(6) for _ in range(4)]
    assert [p.domain for p in rollouts.prompts] == [JUDGEMENT] * 12 + [CRITERIA] * 12
    assert len(engine.calls[0]) == 2  # two queries: pairs of one query share their criteria
    parts = module.score(rollouts, VerifierReward())
    for number, pair in enumerate(pairs):
        rows = slice(4 * number, 4 * number + 4)
        # criteria 0 and 2-less: coherence says A, sparkle and junk say B
        verdicts = [1, 2, 2, 2]
        expected = [1.0 if verdict == pair.label else -1.0 for verdict in verdicts]
        assert parts["reward"][rows].tolist() == expected
        criteria = parts["reward"][12 + 4 * number : 16 + 4 * number].tolist()
        bonus = [0.2, 0.2, 0.0, 0.2]
        assert criteria == pytest.approx([e + b for e, b in zip(expected, bonus, strict=True)])
    assert parts["criteria_parsed"].tolist() == [1, 1, 0, 1] * 6


def test_fresh_criteria_a_pair(make, pairs):
    engine = Writer()
    rollouts_of(make(criteria_mode="per_pair"), pairs, engine)
    assert len(engine.calls[0]) == 3
    assert len({prompt.uid for prompt in engine.calls[0]}) == 3
    assert len({prompt.token_ids for prompt in engine.calls[0]}) == 2


@pytest.mark.parametrize("mode", ["static", "none"])
def test_modes_without_written_criteria(make, pairs, mode):
    engine = Writer()
    rollouts = rollouts_of(make(criteria_mode=mode), pairs, engine)
    assert len(engine.calls) == 1
    assert len(rollouts) == 12
    text = TASK.render(rollouts.prompts[0].token_ids)
    assert (WORDS[0] in text) == (mode == "static")


def test_shuffled_criteria_are_those_of_another_query(make, pairs):
    class ByQuery(Writer):
        def _group(self, prompt: Prompt, samples: int) -> list[Completion]:
            if prompt.domain == CRITERIA:
                own = prompt.record == pairs[0].question
                return [says(WORDS[0 if own else 1])] * samples
            return super()._group(prompt, samples)

    rollouts = rollouts_of(make(criteria_mode="shuffled"), [pairs[0], pairs[2]], ByQuery())
    assert len(rollouts) == 8  # judgements only: nobody is to blame for another query's criteria
    assert rollouts.info["criteria"] == [WORDS[1]] * 4 + [WORDS[0]] * 4


def test_judgements_alone_can_learn(make, pairs):
    rollouts = rollouts_of(make(train_criteria=False), pairs, Writer())
    assert {prompt.domain for prompt in rollouts.prompts} == {JUDGEMENT}


def test_criteria_are_asked_before_and_without_the_texts(make):
    """Other texts, same query: the same criteria prompt, to the token."""
    module, engine = make(), Writer()
    question = TASK.records("train")[0].question
    for responses in (("w1 w2", "w3"), ("w4", "w5 w5")):
        module.judging_prompts([TASK.pair_of(question, responses)], engine)
        engine.policy_version += 1  # forget
    asked = [call for call in engine.calls if call and call[0].domain == CRITERIA]
    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_criteria_are_kept_until_the_policy_changes(make, pairs):
    module, engine = make(), Writer()
    for _ in range(2):
        module.judging_prompts([pairs[0], pairs[0].swap(), pairs[2]], engine)
    assert [len(call) for call in engine.calls] == [2, 0]
    engine.policy_version = 7
    module.judging_prompts(pairs, engine)
    assert len(engine.calls[2]) == 2


def test_both_orders_are_judged_under_one_list(make, pairs):
    module, engine = make(inference="greedy"), Writer()
    records = module.judge([pairs[0]], engine=engine, task=TASK)
    # coherence first: slot 1 in both orders, so they disagree
    assert records[0]["verdicts"] == [1, 2]
    assert records[0]["verdict"] is None


def test_soft_verdicts_are_expected_outcomes(make, pairs):
    class Sure(Writer):
        def _group(self, prompt: Prompt, samples: int) -> list[Completion]:
            if prompt.domain == CRITERIA:
                return super()._group(prompt, samples)
            ids = TASK.tokenizer.convert_tokens_to_ids(["A_wins", "B_wins"])
            table = TokenCandidates(torch.tensor([ids, ids]), torch.tensor([[-0.1, -1.6]] * 2))
            return [says("A_wins", candidates=table)] * samples

    module = make(verdicts="soft")
    assert module.verdict_candidates > 1
    (found,) = module.compare([pairs[0]], engine=Sure(), task=TASK)
    assert found.winner == 1
    assert found.outcome == pytest.approx(soft_outcome(1.5), abs=1e-5)
    (plain,) = module.compare([pairs[0]], engine=Writer(), task=TASK)
    assert plain.outcome == 1.0  # no candidates: the verdict as it is


def test_real_engine_and_real_gradient(make, pairs):
    """Rows of both turns go through one training step; prompts that differ share nothing."""
    module = make(train_criteria=True)
    module.configure_model()
    engine = HFEngine()
    engine.sync(module.policy, 0)
    rollouts = rollouts_of(module, pairs, engine)
    rollouts.num_updates = 1
    parts = module.score(rollouts, VerifierReward())
    rollouts.reward, rollouts.parts = torch.arange(24.0), parts
    rollouts.advantages, _ = module.advantages(rollouts)
    batch = rollouts.batch()
    loss = module.training_step(batch, 0)
    module.share_prompts = False
    whole = module.training_step(batch, 0)
    torch.testing.assert_close(loss, whole, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in module.policy.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria_mode": "share"}, "did you mean 'shared'"),
        ({"verdicts": "sofd"}, "did you mean 'soft'"),
    ],
)
def test_bad_options_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tasks_without_criteria_are_refused(make):
    task = PrefixAudit(num_train=1, num_val=1, num_test=1)
    task.bind(word_tokenizer(task.vocabulary()))
    with pytest.raises(ValueError, match="use data=mini_writing_pairs or data=criteria_file"):
        make().judge(task.records("test"), engine=Writer(), task=task)
