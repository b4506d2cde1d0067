"""A judge made of rules: what it writes is decided by the test, token for token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.judging import JudgeDataModule
from datamodules.tasks.base import Pair
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.tiny import word_tokenizer
from lightning_modules.grm.reflectrm import ReflectRM

JudgeRule = Callable[[Pair, int | None], tuple[Any, ...]]
ReflectRule = Callable[[Pair, tuple[str, str]], int | None]
TOKENIZER = word_tokenizer(PrefixAudit().vocabulary())


def bound_task(**options: Any) -> PrefixAudit:
    """The task with the words of ``tiny_folder``; 5 pairs to test."""
    task = PrefixAudit(**{"num_test": 5, "num_val": 3, "num_train": 4} | options)
    task.bind(TOKENIZER)
    return task


@cache
def analysis_of(task: PrefixAudit, pair: Pair, number: int) -> str:
    """Analysis ``number`` of a pair: 0 is the gold one, 1 to 24 have other counts."""
    gold = task.analysis_values(task.gold_analysis(pair))
    assert gold is not None
    others = [counts for counts in product(range(5), repeat=2) if counts != gold[-2:]]
    return task.analysis_words(gold[:-2] + [gold[-2:], *others][number])


class RuleEngine(Engine):
    """Writes what two rules say.

    ``judge(pair, sample)`` gives ``(winner, number of the analysis = 0, log-prob = -0.5)``, sample
    None being the greedy one; ``reflect(pair, analyses)`` gives the winner. A winner of None is
    written as something that does not parse.
    """

    def __init__(
        self, task: PrefixAudit, judge: JudgeRule, reflect: ReflectRule = lambda pair, texts: 1
    ) -> None:
        self.task, self.judge, self.reflect = task, judge, reflect
        self.written: Counter[str] = Counter()
        self.prompts: list[Prompt] = []

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.prompts += prompts
        return [self._group(prompt, sampling) for prompt in prompts]

    def _group(self, prompt: Prompt, sampling: Sampling) -> list[Completion]:
        greedy = sampling.temperature == 0
        self.written["greedy" if greedy and prompt.domain == "pref" else prompt.domain] += (
            sampling.samples
        )
        group = []
        for index in range(sampling.samples):
            logprob = -0.5
            if prompt.domain == "pref":
                said = self.judge(prompt.record, None if greedy else index)
                winner, number, logprob = (*said, *(0, -0.5)[len(said) - 1 :])
                body, noun = analysis_of(self.task, prompt.record, number), "response"
            else:
                winner = self.reflect(*prompt.record)
                body, noun = "#0 a.x0", "critique"
            text = f"{body} {noun}{winner}_wins" if winner else "response1_wins"
            group.append(self._completion(text, logprob))
        return group

    def _completion(self, text: str, logprob: float) -> Completion:
        ids = tuple(self.task.tokenizer.convert_tokens_to_ids(f"{text} <eos>".split()))
        return Completion(ids, (logprob,) * len(ids), FinishReason.STOP, self.policy_version)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., PrefixAudit]:
    return bound_task


@pytest.fixture(scope="session")
def task() -> PrefixAudit:
    return bound_task()


@pytest.fixture(scope="session")
def analysis(task: PrefixAudit) -> Callable[[Pair, int], str]:
    """``analysis(pair, number)``, see ``analysis_of``."""
    return lambda pair, number: analysis_of(task, pair, number)


@pytest.fixture(scope="session")
def number_of(task: PrefixAudit) -> Callable[[Pair, str], int]:
    """The inverse of ``analysis``."""

    def number(pair: Pair, text: str) -> int:
        return [analysis_of(task, pair, i) for i in range(25)].index(text)

    return number


@pytest.fixture
def make_engine(task: PrefixAudit) -> Callable[..., RuleEngine]:
    return lambda judge, *reflect: RuleEngine(task, judge, *reflect)


@pytest.fixture
def make_module(tiny_folder: Path, task: PrefixAudit) -> Callable[..., Any]:
    """A module (``ReflectRM`` unless said) on the tiny backbone, with the task for ``judge``."""

    def make(cls: Any = ReflectRM, **options: Any) -> Any:
        module = cls(backbone=str(tiny_folder), **options)
        module.judge_task = task
        return module

    return make


@pytest.fixture
def run_test(tmp_path: Path, task: PrefixAudit) -> Callable[..., dict[str, float]]:
    """``Trainer.test`` of a module whose completions an engine writes; gives its results."""

    def run(module: Any, engine: Engine, split: str = "test", **options: Any) -> dict[str, float]:
        data = JudgeDataModule(**{"task": task, "engine": engine} | options)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        evaluate = trainer.test if split == "test" else trainer.validate
        evaluate(module, datamodule=data, verbose=False)
        return dict(module.results)

    return run


def noise(key: str, pair: Pair, sample: int | None) -> tuple[int | None, int, float]:
    """A weak judge: every draw depends on the stream, the pair, its order and the sample."""
    chance = random.Random(f"{key}|{pair.uid}|{pair.swapped}|{sample}")
    label = pair.label or 1
    (winner,) = chance.choices([label, 3 - label, None], [0.5, 0.3, 0.2])
    return winner, chance.randrange(6), -chance.random()


@pytest.fixture
def noisy(make_engine: Any) -> Any:
    """A weak judge that reflects at random, but always alike on the same two analyses."""

    def reflect(pair: Pair, texts: tuple[str, str]) -> int | None:
        best = max(texts, key=lambda text: random.Random(text).random())
        return texts.index(best) + 1

    engine = make_engine(lambda pair, sample: noise(engine.key, pair, sample), reflect)
    return engine
