"""Trajectories: the agent answers training questions, and its searches are kept.

A trajectory is kept where it closed as many searches as were logged [code: the number of
``</search>`` equals the number of retrievals; card 2.3]. Empty queries and searches beyond the
budget break that. What is left out is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from datamodules.engines.base import Sampling
from datamodules.engines.search import SearchEngine, Trace
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.labelling.records import Trajectory
from datamodules.search_texts import END_SEARCH
from datamodules.tasks.base import Task
from datamodules.tasks.exact_match import exact_match
from datamodules.tasks.searching import Question


def run_trajectories(
    questions: Sequence[Question], engine: SearchEngine, sampling: Sampling, seed: int
) -> tuple[list[Trajectory], dict[str, Counter[str]]]:
    """Let the agent answer questions.

    Args:
        questions: Of the training split.
        engine: Agent and retriever.
        sampling: Temperature, samples a question, longest episode.
        seed: Of the random streams.

    Returns:
        Kept trajectories in the order of the questions. For every question's uid the counts
        ``trajectories`` (kept), ``mismatched`` and ``failed_trajectories`` (the engine failed;
        both left out), ``right`` and ``searches`` (of kept ones).
    """
    prompts = [engine.task.prompt(question) for question in questions]
    with engine.keyed(f"labels/{seed}/trajectories"):
        groups = engine.generate(prompts, sampling)
    kept: list[Trajectory] = []
    counts: dict[str, Counter[str]] = {}
    for question, prompt, group in zip(questions, prompts, groups, strict=True):
        found = [_trajectory(question, prompt, one, i) for i, one in enumerate(group)]
        ended = [one for one in found if one.completion.finish_reason is not FinishReason.ERROR]
        good = [one for one in ended if closed_searches(one, engine.task) == len(one.turns)]
        counts[question.uid] = Counter(
            trajectories=len(good),
            mismatched=len(ended) - len(good),
            failed_trajectories=len(found) - len(ended),
            right=sum(one.is_right for one in good),
            searches=sum(len(one.turns) for one in good),
        )
        kept += good
    return kept, counts


def _trajectory(
    question: Question, prompt: Prompt, completion: Completion, sample: int
) -> Trajectory:
    trace: Trace = completion.trace
    is_right = exact_match(trace.answer, question.answers)
    return Trajectory(question, prompt, completion, trace.turns, trace.answer, is_right, sample)


def closed_searches(trajectory: Trajectory, task: Task) -> int:
    """How often the agent itself closed a search; observations do not count.

    Args:
        trajectory: One episode.
        task: Reads tokens.
    """
    ids = trajectory.completion.token_ids
    observed = trajectory.completion.observed or (False,) * len(ids)
    pieces = groupby(zip(ids, observed, strict=True), key=lambda pair: pair[1])
    texts = [task.render([token for token, _ in piece]) for seen, piece in pieces if not seen]
    return sum(text.count(END_SEARCH) for text in texts)
