"""What an agent made of a retriever: figures of a search set, and episodes as records and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from datamodules.engines.search import Trace
from datamodules.experience import Completion, FinishReason
from datamodules.retrieval import Retriever
from datamodules.tasks.exact_match import exact_match, f1
from datamodules.tasks.search_set import SearchSet
from datamodules.tasks.searching import Question
from lightning_modules.functional.retrieval_metrics import retrieval_metrics

_RANKS = (3, 20)  # what an agent reads, and what labelling asks for [code]
_SHOWN = 200  # characters of a passage in a text panel


def outcomes(one: SearchSet, completions: Sequence[Completion]) -> dict[str, float]:
    """How episodes went, as means over the questions.

    Args:
        one: Whose questions.
        completions: Of each question.

    Returns:
        ``em`` and ``f1`` of the final answers (0 without one), ``turns`` (searches), ``answered``,
        ``invalid`` (pieces that were neither a search nor an answer), ``cut`` (share that ran out
        of budget) and ``support_recall``: the share of a question's supporting passages that any
        search showed, over the questions where they are known; left out where none is.
    """
    traces: list[Trace] = [completion.trace for completion in completions]
    answers = [final_answer(completion) for completion in completions]
    said = list(zip(answers, (question.answers for question in one.questions), strict=True))
    given = list(zip(one.questions, traces, strict=True))
    values: dict[str, list[float]] = {
        "em": [float(exact_match(answer, right)) for answer, right in said],
        "f1": [f1(answer, right) for answer, right in said],
        "turns": [len(trace.turns) for trace in traces],
        "answered": [answer is not None for answer in answers],
        "invalid": [trace.num_invalid for trace in traces],
        "cut": [trace.is_cut for trace in traces],
        "support_recall": [_support(one, q, trace) for q, trace in given if q.supporting],
    }
    return {name: sum(each) / len(each) for name, each in values.items() if each}


def first_searches(
    one: SearchSet, completions: Sequence[Completion], retriever: Retriever
) -> dict[str, float]:
    """How the retriever ranks the passages that answer each question's first search.

    The first, because all retrievers see the same one where the agent is the same; later ones
    depend on what was shown. An episode without a search, or without known passages, has no
    ranking: ``ranked`` is the share of those that have.

    Args:
        one: Whose questions.
        completions: Of each question.
        retriever: Of the set's corpus.

    Returns:
        ``recall_at_3``, ``recall_at_20``, ``mrr_at_10``, ``ndcg_at_10`` and ``ranked``.
    """
    texts, relevant = [], []
    for question, completion in zip(one.questions, completions, strict=True):
        if not completion.trace.turns:
            continue
        query = completion.trace.turns[0].query
        if gold := question.supporting if one.gold is None else one.gold(question, query):
            texts.append(one.fit(one.input, question.text, [query]))
            relevant.append(one.places(question, gold))
    values = {"ranked": len(texts) / len(one.questions)}
    if not texts:
        return values
    places = torch.tensor(retriever.search(texts, one.k))
    scores = torch.arange(places.shape[1], 0, -1, dtype=torch.float32).expand(places.shape)
    found = retrieval_metrics(scores, places, relevant, ks=_RANKS)
    names = (*(f"recall_at_{k}" for k in _RANKS), "mrr_at_10", "ndcg_at_10")
    return values | {name: found[name] for name in names}


def final_answer(completion: Completion) -> str | None:
    """What an episode answers; None where it was cut or never answers.

    Args:
        completion: With a ``Trace``.
    """
    is_whole = completion.finish_reason is FinishReason.STOP and not completion.trace.is_cut
    return completion.trace.answer if is_whole else None


def episode_record(one: SearchSet, question: Question, completion: Completion) -> dict[str, Any]:
    """An episode as plain values.

    Args:
        one: The question's set.
        question: What was asked.
        completion: Of its episode.
    """
    trace: Trace = completion.trace
    answer = final_answer(completion)
    return {
        "set": one.name,
        "uid": question.uid,
        "question": question.text,
        "answers": list(question.answers),
        "answer": answer,
        "em": float(exact_match(answer, question.answers)),
        "searches": [
            {"query": turn.query, "passages": [one.corpus[place].uid for place in turn.places]}
            for turn in trace.turns
        ],
    }


def episode_text(one: SearchSet, record: dict[str, Any], supporting: Sequence[str]) -> str:
    """An episode as a Markdown block; a star marks passages that support the answer.

    Args:
        one: The question's set.
        record: See ``episode_record``.
        supporting: Ids of passages.
    """
    lines = [f"question: {record['question']}"]
    for number, search in enumerate(record["searches"], start=1):
        lines.append(f"search {number}: {search['query']}")
        for uid in search["passages"]:
            text = one.corpus[one.corpus.places[uid]].encoded_text
            lines.append(f"  {'*' if uid in supporting else '-'} [{uid}] {text[:_SHOWN]}")
    answer = "none" if record["answer"] is None else record["answer"]
    lines.append(f"answer: {answer} ({'right' if record['em'] else 'wrong'})")
    lines.append(f"right answers: {' | '.join(record['answers'])}")
    return "\n".join("    " + " ".join(line.split("\n")) for line in lines)  # indented: code


def _support(one: SearchSet, question: Question, trace: Trace) -> float:
    """Share of the supporting passages that any search showed."""
    wanted = set(one.places(question, question.supporting))
    return len(wanted & {place for turn in trace.turns for place in turn.places}) / len(wanted)
