"""What tests of labelling share: a small world, its scripted agent, turns made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.agents import ScriptedAgent
from datamodules.engines.base import Engine, Sampling
from datamodules.engines.search import SearchEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.labelling.judges import TaskJudge
from datamodules.labelling.options import LabelOptions
from datamodules.labelling.pipeline import Labelled, label_turns
from datamodules.labelling.records import LabelledTurn
from datamodules.lexical import LexicalRetriever
from datamodules.search_options import SearchOptions
from datamodules.tasks.search_world import SearchWorld


def small_world(**options: Any) -> SearchWorld:
    """Twelve training questions, a hundred passages or so."""
    sizes = {"num_names": 20, "num_cities": 20, "num_train": 12, "num_val": 2, "num_test": 4}
    return SearchWorld(**{**sizes, "guess": 0.0, **options})


class Counting(Engine):
    """An engine that counts the prompts it was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked, self.policy_version = engine, 0, engine.policy_version

    def sync(self, policy: Any, version: int) -> None:
        self.engine.sync(policy, version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.asked += len(prompts)
        with self.engine.keyed(self.key):
            return self.engine.generate(prompts, sampling)


class Saying(Engine):
    """Says the same text at every call."""

    policy_version = 0

    def __init__(self, task: SearchWorld, text: str) -> None:
        self.ids = tuple(task.tokenizer.encode(text, add_special_tokens=False))

    def sync(self, policy: Any, version: int) -> None:
        pass

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        one = Completion(self.ids, (0.0,) * len(self.ids), FinishReason.STOP)
        return [[one] * sampling.samples for _ in prompts]


class Failing(Counting):
    """Fails where the prompt's uid holds a text."""

    def __init__(self, engine: Engine, text: str) -> None:
        super().__init__(engine)
        self.text = text

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        lost = [Completion((), (), FinishReason.ERROR)]
        found = super().generate(prompts, sampling)
        pairs = zip(prompts, found, strict=True)
        return [lost if self.text in prompt.uid else group for prompt, group in pairs]


class Bench:
    """A world with its agent, a lexical retriever and its judge.

    Args:
        max_searches: Of an episode.
        world: Options of the world.
    """

    def __init__(self, max_searches: int = 5, **world: Any) -> None:
        self.task = small_world(**world)
        self.agent = Counting(ScriptedAgent().open(self.task))
        self.retriever = LexicalRetriever(self.task.corpus)
        self.search = SearchOptions(max_searches=max_searches)
        self.engine = self.engine_of(self.agent)
        self.judge = TaskJudge(self.task)

    def engine_of(self, agent: Engine) -> SearchEngine:
        return self.search.engine(agent, self.task, self.retriever, "query")

    def label(
        self, folder: Path, agent: str = "scripted", judge: Any = None, **options: Any
    ) -> Labelled:
        return label_turns(
            task=self.task,
            engine=self.engine,
            retriever=self.retriever,
            judge=judge or self.judge,
            options=LabelOptions(**options),
            search=self.search,
            agent=agent,
            folder=folder,
        )


def turn_of(
    pairs: Sequence[tuple[int, int]], *, uid: str = "q", turn: int = 0, gold: Sequence[int] = ()
) -> LabelledTurn:
    """A labelled turn of (global, local) pairs; candidate i is called ``p<i>``."""
    count = len(pairs)
    return LabelledTurn(
        question_uid=uid,
        turn=turn,
        question="who?",
        history=("first",) * turn,
        query="now",
        candidates=tuple(f"p{i}" for i in range(count)),
        local=tuple(lr for _, lr in pairs),
        right=tuple(gac for gac, _ in pairs),
        gold=tuple(int(i in gold) for i in range(count)),
    )
