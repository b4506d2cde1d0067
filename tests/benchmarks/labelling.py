"""Labelling, one candidate at a time or batched: ``python -m tests.benchmarks.labelling``.

Questions of the default procedural world. Two arms do the same work in turn:

* ``one``: each question, each chunk of the judge and each continued rollout by itself, and a
  retriever that remembers nothing;
* ``batched``: as in a run, with shared batches and the retriever's cache, which begins empty.

``scripted`` is the whole pipeline with the task's own agent; what counts there is the retriever.
``tiny_lm`` are the continued rollouts of the first ``--lm-questions`` of the same trajectories by
a random Qwen3 of the default tiny shape through the embedded engine, 24 tokens each, greedy: what
counts there is the forward pass. Both are measured with BM25 and with MiniLM over a flat index.
``equal`` says that both arms gave the same labels, and with ``tiny_lm`` the same tokens too.
Medians of ``--repeats`` after one of each to warm up. Nothing is asserted but equality; the goal is
a ratio of 5 or more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.agents import FolderAgent, ScriptedAgent
from datamodules.dense_encoder import DenseEncoder
from datamodules.dense_retrieval import DenseRetriever
from datamodules.engines.base import Sampling
from datamodules.engines.search import EpisodeStart, SearchEngine
from datamodules.experience import Completion
from datamodules.labelling.continued import continued_labels
from datamodules.labelling.judges import TaskJudge
from datamodules.labelling.options import LabelOptions
from datamodules.labelling.pipeline import label_turns
from datamodules.labelling.records import OpenTurn
from datamodules.labelling.trajectories import run_trajectories
from datamodules.lexical import LexicalRetriever
from datamodules.retrieval import CACHE_SIZE, CachedRetriever
from datamodules.search_options import SearchOptions
from datamodules.tasks.search_world import SearchWorld
from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from tests.benchmarks.embedding_parts import MINILM, hush, now, ratios, show, write_csv

CANDIDATES, NEW_TOKENS = 20, 24
#: What each arm does at once: questions, passages of a judge's prompt, rollouts, answers kept.
ARMS = {"one": (1, 1, 1, 0), "batched": (64, 10, 4096, CACHE_SIZE)}


class Keeping(SearchEngine):
    """Keeps the tokens of continued rollouts."""

    tokens: list[tuple[int, ...]]

    def run(self, starts: Sequence[EpisodeStart], sampling: Sampling) -> list[Completion]:
        """See ``SearchEngine``."""
        found = super().run(starts, sampling)
        self.tokens += [one.token_ids for one in found]
        return found


class Bench:
    """The world and its agents.

    Args:
        folder: For models, indexes and labels.
        args: Of the command line.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args, self.count = folder, args, 0
        self.task = SearchWorld()
        build_tiny(folder / "lm", self.task.vocabulary(), TinyOptions(), seed=0)
        self.model = FolderAgent(path=str(folder / "lm"), dtype="float32").open(self.task)
        self.agent = ScriptedAgent().open(self.task)
        self.questions = self.task.records("train")[: args.questions]
        self.search = SearchOptions()

    def retriever(self, name: str, kept: int) -> CachedRetriever:
        """One that has seen nothing yet."""
        if name == "bm25":
            return LexicalRetriever(self.task.corpus, cache_size=kept)
        encoder = DenseEncoder(MINILM, TextEncoding())
        return DenseRetriever(self.task.corpus, encoder, None, self.folder, cache_size=kept)

    def scripted(self, arm: str, retriever: CachedRetriever) -> tuple[Any, int]:
        """Labels of the whole pipeline, and the number of rollouts."""
        chunk, judged, batch, _ = ARMS[arm]
        self.count += 1
        found = label_turns(
            task=self.task,
            engine=self.search.engine(self.agent, self.task, retriever, "query"),
            retriever=retriever,
            judge=TaskJudge(self.task),
            options=LabelOptions(
                candidates=CANDIDATES, judge_chunk=judged, chunk_questions=chunk, batch_size=batch
            ),
            search=self.search,
            agent="scripted",
            folder=self.folder / f"labels{self.count}",
            questions=self.questions,
        )
        return found.turns, CANDIDATES * len(found.turns)

    def tiny_lm(self, arm: str, retriever: CachedRetriever) -> tuple[Any, int]:
        """Labels and tokens of continued rollouts."""
        bounds = {"max_searches": self.search.max_searches, "turn_tokens": NEW_TOKENS}
        engine = Keeping(self.model, task=self.task, retriever=retriever, **bounds)
        engine.tokens = []
        labels = []
        size = len(self.open_turns) if arm == "batched" else 1
        for start in range(0, len(self.open_turns), size):
            turns = self.open_turns[start : start + size]
            own, _ = continued_labels(turns, engine, self.bound, batch_size=ARMS[arm][2], seed=0)
            labels += own
        return (labels, engine.tokens), len(engine.tokens)

    def prepare_turns(self, name: str) -> None:
        """Turns of the scripted agent for ``tiny_lm``."""
        retriever = self.retriever(name, CACHE_SIZE)
        engine = self.search.engine(self.agent, self.task, retriever, "query")
        few = self.questions[: self.args.lm_questions]
        kept, _ = run_trajectories(few, engine, self.search.sampling(), 0)
        self.open_turns = [
            OpenTurn(one, number, tuple(retriever.search([turn.query], CANDIDATES)[0]))
            for one in kept
            for number, turn in enumerate(one.turns)
        ]
        self.bound = self.search.sampling()


def measure(bench: Bench, agent: str, name: str) -> dict[str, Any]:
    """One line: both arms in turn."""
    run: Callable[[str, CachedRetriever], tuple[Any, int]] = getattr(bench, agent)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    found: dict[str, Any] = {}
    bench.prepare_turns(name)
    for _ in range(bench.args.repeats + 1):
        for arm, (*_, kept) in ARMS.items():
            retriever = bench.retriever(name, kept)
            start = now(bench.args.clock)
            found[arm], rollouts = run(arm, retriever)
            seconds[arm].append(now(bench.args.clock) - start)
            share = retriever.num_hits / max(1, retriever.num_searches)
    assert found["one"] == found["batched"], "the arms disagree"
    one, batched = (seconds[arm][1:] for arm in ARMS)
    middle, lowest, highest = ratios(one, batched)
    row = {
        "agent": agent,
        "retriever": name,
        "one_seconds": round(statistics.median(one), 2),
        "batched_seconds": round(statistics.median(batched), 2),
        "ratio": middle,
        "lowest": lowest,
        "highest": highest,
        "equal": True,
        "questions": len(bench.questions) if agent == "scripted" else bench.args.lm_questions,
        "rollouts": rollouts,
        "cache_share": round(share, 3),
        "repeats": bench.args.repeats,
        "threads": torch.get_num_threads(),
        "clock": bench.args.clock,
    }
    show(row)
    return row


def main() -> None:
    """One line an agent and retriever; ``--output`` writes them as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--lm-questions", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        pairs = [(a, r) for a in ("scripted", "tiny_lm") for r in ("bm25", "minilm")]
        write_csv(args.output, [measure(bench, agent, name) for agent, name in pairs])


if __name__ == "__main__":
    main()
