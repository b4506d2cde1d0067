"""Fillers and forks: the table, the verifier, and where branch scores lead (card, part A)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.engines.tree import grow_trees
from datamodules.experience import Candidates, Completion, FinishReason, Prompt
from datamodules.tasks.forks import CONCEPTS, LOOP, SYNONYMS, Forks, decision_word
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, word_tokenizer
from lightning_modules.functional.branching import branch_score, by_chunks


@pytest.fixture(scope="module")
def task() -> Forks:
    task = Forks()
    task.bind(word_tokenizer(task.vocabulary()))
    return task


def completion(task: Forks, words: Sequence[str], reason: str = "stop") -> Completion:
    ids = tuple(task.tokenizer.convert_tokens_to_ids(list(words)))
    return Completion(ids, (0.0,) * len(ids), FinishReason(reason))


def right_walk(task: Forks, prompt: Prompt) -> list[str]:
    asked = iter(prompt.record.asked)
    kinds = {"filler": "and3", "go": "step0"}
    return [kinds.get(word) or CONCEPTS[next(asked)] for word in prompt.record.words]


def test_plans(task: Forks) -> None:
    plans = task.records("train")
    assert plans == Forks().records("train")
    assert len({plan.uid for plan in [*plans, *task.records("val")]}) == 1064
    for plan in plans[:50]:
        kinds = Counter("decision" if w.startswith("lure") else w for w in plan.words)
        assert kinds == {"filler": 8, "go": 12, "decision": 4}
        asks = [int(plan.words[i].removeprefix("lure")[-1]) for i in plan.decisions]
        assert tuple(asks) == plan.asked
    words = [plan.words[i] for plan in plans for i in plan.decisions]
    agree = sum(word[4] == word[-1] for word in words) / len(words)
    assert abs(agree - 0.5) < 4 * (0.25 / len(words)) ** 0.5
    assert task.records("predict") == task.records("test")


def test_late_decisions_stand_behind_everything_else() -> None:
    task = Forks(length=3, decisions="late", agree=0.0)
    task.bind(word_tokenizer(task.vocabulary()))
    plans = task.records("train")[:200]
    for plan in plans:
        assert Counter(plan.words[:15]) == {"filler": 6, "go": 9}
        assert plan.words[15:] == tuple(
            decision_word(int(word[4]), asked)
            for word, asked in zip(plan.words[15:], plan.asked, strict=True)
        )
        assert plan.decisions == [15, 16, 17]
        prompt = task.prompt(plan)
        assert task.verify(prompt, completion(task, right_walk(task, prompt)))["reward"] == 1
    assert len({plan.words[:15] for plan in plans}) > 150
    mixed = Forks(length=3, agree=0.0)
    mixed.bind(task.tokenizer)
    assert task.demonstrations(0, 0, 20) == mixed.demonstrations(0, 0, 20)
    assert [sorted(p.words) for p in plans] == [
        sorted(p.words) for p in mixed.records("train")[:200]
    ]


def test_the_verifier(task: Forks) -> None:
    prompt = task.prompt(task.records("val")[0])
    walk = right_walk(task, prompt)
    score = lambda words, reason="stop": task.verify(prompt, completion(task, words, reason))  # noqa: E731
    assert score([*walk, "<eos>"]) == {"reward": 1, "decisions": 1, "loops": 0, "parsed": 1}
    assert score([*walk, *[LOOP] * 8, "<eos>"])["reward"] == 1
    assert score([*walk, *[LOOP] * 9, "<eos>"])["reward"] == 0
    assert score(walk)["reward"] == 1, "an engine may keep the end token for itself"
    assert score([*walk, LOOP], "length")["reward"] == 0
    assert score([*walk[:-1], "<eos>"])["parsed"] == 0
    assert score([*walk, "and0", "<eos>"])["reward"] == 0
    place = prompt.record.decisions[2]
    wrong = walk.copy()
    wrong[place] = CONCEPTS[(prompt.record.asked[2] + 1) % 4]
    assert score([*wrong, "<eos>"]) == {"reward": 0, "decisions": 0.75, "loops": 0, "parsed": 1}
    other = ["and7" if word == "and3" else word for word in walk]
    assert score([*other, "<eos>"])["reward"] == 1, "synonyms are as good"
    assert task.verify(prompt, Completion((), (), FinishReason.ERROR))["reward"] == 0


def test_demonstrations_follow_the_table(task: Forks) -> None:
    shown = task.demonstrations(0, 0, 600)
    assert shown == task.demonstrations(0, 0, 600)
    assert shown[:5] != task.demonstrations(0, 1, 5)
    counts: dict[str, Counter[str]] = {}
    for one in shown:
        plan = task.tokenizer.convert_ids_to_tokens(list(one.prompt_ids))[:-1]
        walk = task.tokenizer.convert_ids_to_tokens(list(one.completion_ids))
        assert walk[-1] == "<eos>"
        for word, chosen in zip(plan, walk[:24], strict=True):
            counts.setdefault(word, Counter())[chosen] += 1
        loops = walk[24:-1]
        assert loops == [LOOP] * len(loops)
        counts.setdefault("loops", Counter())[str(len(loops))] += 1
    table = {word: task.weights(word) for word in ("filler", "go", decision_word(0, 0))}
    table[decision_word(2, 1)] = {"turn0": 0.1, "turn1": 0.25, "turn2": 0.55, "turn3": 0.1}
    table["loops"] = {str(count): 1 / 9 for count in range(9)}
    for word, expected in table.items():
        total = counts[word].total()
        assert set(counts[word]) <= set(expected)
        for name, p in expected.items():
            spread = 4.5 * (p * (1 - p) / total) ** 0.5 + 2 / total
            assert abs(counts[word][name] / total - p) < spread, (word, name)


def test_embedding_rows_start_where_the_task_says(task: Forks, tmp_path: Path) -> None:
    rows = task.embeddings(48)
    together = torch.stack([rows[word] for word in (*SYNONYMS, *CONCEPTS)])
    cosines = together @ together.T
    assert float(cosines[:8, :8].min()) > 0.8
    assert float((cosines - torch.eye(12)).abs()[8:, :].max()) < 0.6
    shape = TinyOptions(hidden_size=48, num_layers=1)
    build_tiny(tmp_path / "plain", task.vocabulary(), shape, 0)
    build_tiny(tmp_path / "given", task.vocabulary(), shape, 0, rows)
    from safetensors.torch import load_file

    plain, given = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "given"))
    name = "model.embed_tokens.weight"
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "given")
    known = tokenizer.get_vocab()
    for word, row in rows.items():
        assert torch.equal(given[name][known[word]], row)
    others = [index for word, index in known.items() if word not in rows]
    assert torch.equal(given[name][others], plain[name][others])
    del plain[name], given[name]
    assert all(torch.equal(plain[key], given[key]) for key in plain)


class Table(Engine):
    """Draws walks from the warm start's table itself: no model."""

    def __init__(self, task: Forks) -> None:
        self.task, self.key = task, "table"

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        return [[self._walk(p, sampling, i) for i in range(sampling.samples)] for p in prompts]

    def _walk(self, prompt: Prompt, sampling: Sampling, number: int) -> Completion:
        rng = Random(sample_seed(self.key, prompt.uid, number))
        words, known = prompt.record.words, self.task.tokenizer.get_vocab()
        ids, table, chances = [], [], []
        for word in words[len(prompt.token_ids) - len(words) - 1 :]:
            weights = self.task.weights(word)
            ids.append(known[rng.choices(list(weights), list(weights.values()))[0]])
            listed = [(known[w], p) for w, p in weights.items()]
            listed += [(0, 0.0)] * (sampling.candidates - len(listed))
            table.append([token for token, _ in listed])
            chances.append([p for _, p in listed])
        candidates = Candidates(torch.tensor(table), torch.tensor(chances).log())
        return Completion(tuple(ids), (0.0,) * len(ids), FinishReason.LENGTH, 0, candidates)


def share_at_decisions(task: Forks, name: str, common: float = 0.0) -> float:
    """Share of branches at decisions, over 100 trees of 8 chains."""
    rows = torch.zeros(len(task.tokenizer), 64)
    for word, row in task.embeddings(64).items():
        rows[task.tokenizer.convert_tokens_to_ids(word)] = row
    others = [task.tokenizer.convert_tokens_to_ids(w) for w in rows_without_synonyms(task)]
    rows[others] += common * torch.ones(64) / 8

    def score(candidates: Candidates) -> torch.Tensor:
        chosen: Any = name
        return by_chunks(
            lambda logprobs, table: branch_score(chosen, logprobs, table),
            candidates.ids, candidates.logprobs, rows,
        )  # fmt: skip

    trees = grow_trees(
        [task.prompt(plan) for plan in task.records("train")[:100]],
        Table(task), Sampling(max_new_tokens=24, candidates=8), num_chains=8, epsilon=0.5,
        score=None if name == "random" else score,
    )  # fmt: skip
    places = [
        prompt.record.words[k].startswith("lure")
        for prompt, parent, k in zip(trees.rollouts.prompts, trees.parent.flatten().tolist(),
                                     trees.branch_pos.flatten().tolist(), strict=True)
        if parent >= 0
    ]  # fmt: skip
    assert len(places) > 50  # the paper's formula often takes the certain root
    return sum(places) / len(places)


def rows_without_synonyms(task: Forks) -> list[str]:
    return [word for word in task.embeddings(4) if word not in SYNONYMS]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("semantic_rao", 0.9, 1.0),
        ("entropy", 0.0, 0.1),
        ("semantic_paper", 0.0, 0.1),
        ("random", 0.1, 0.3),
    ],
)
def test_only_rao_finds_the_decisions(task: Forks, name: str, low: float, high: float) -> None:
    assert low <= share_at_decisions(task, name) <= high


def test_the_codes_formula_needs_isotropic_rows(task: Forks) -> None:
    """A direction that all but the synonyms share: rao does not mind."""
    assert share_at_decisions(task, "semantic_rao", common=1.5) > 0.9
    assert share_at_decisions(task, "semantic_code", common=1.5) < 0.2


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"length": 0}, "data.task.length=0"),
        ({"lured": 1.2}, "data.task.lured=1.2"),
        ({"lured": 0.8, "asked": 0.3}, "exceed 1"),
        ({"max_loops": -1}, "data.task.max_loops=-1"),
        ({"decisions": "early"}, "data.task.decisions=early must be mixed or late"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        Forks(**options)
