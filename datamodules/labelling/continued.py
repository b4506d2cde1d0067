"""Global answer correctness: does the agent finish right when shown one passage alone?

    agent text up to the turn's </search> + <information> that single passage </information>

and from there on the agent goes on with the live retriever for the searches that it has left
(card, 2.4 c). The label is exact match of the final answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.engines.base import Sampling
from datamodules.engines.search import EpisodeStart, SearchEngine
from datamodules.experience import Completion, FinishReason
from datamodules.labelling.records import OpenTurn
from datamodules.tasks.exact_match import exact_match

#: Question, tokens behind its prompt up to the search, place of the passage.
State = tuple[str, tuple[int, ...], int]


def searches_left(turn: OpenTurn, engine: SearchEngine) -> int:
    """Searches that remain behind a turn.

    Args:
        turn: Of a trajectory.
        engine: Has a budget.
    """
    return engine.max_searches - len(turn.queries)


def continued_labels(
    turns: Sequence[OpenTurn],
    engine: SearchEngine,
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
) -> tuple[list[tuple[int, ...] | None], list[int]]:
    """Run the agent from every turn with each of its candidates alone.

    Rollouts of all turns and questions share batches. Two equal states of a question (samples that
    began alike) run once. Random streams are named by question, turn and passage, so that labels
    do not depend on the batch.

    Args:
        turns: Each with at least one search left.
        engine: Agent and the retriever that it goes on with.
        sampling: Temperature and longest episode, prefix included.
        batch_size: Most rollouts at once.
        seed: Of the random streams.

    Returns:
        For each turn 0 or 1 a candidate, None where the engine failed at one of them; for each
        turn how many rollouts it added.
    """
    starts: dict[State, EpisodeStart] = {}
    shown: dict[int, tuple[int, ...]] = {}
    states: list[list[State]] = []
    added: list[int] = []
    for turn in turns:
        before = len(starts)
        states.append([_add(starts, shown, turn, place, engine, sampling) for place in turn.places])
        added.append(len(starts) - before)
    found: list[Completion] = []
    with engine.keyed(f"labels/{seed}/continued"):
        for batch in _batches([*starts.values()], batch_size):
            found += engine.run(batch, sampling)
    ends = dict(zip(starts, found, strict=True))
    pairs = zip(turns, states, strict=True)
    return [_labels(turn, [ends[state] for state in own]) for turn, own in pairs], added


def _labels(turn: OpenTurn, ends: Sequence[Completion]) -> tuple[int, ...] | None:
    if any(end.finish_reason is FinishReason.ERROR for end in ends):
        return None
    gold = turn.trajectory.question.answers
    return tuple(int(exact_match(end.trace.answer, gold)) for end in ends)


def _add(
    starts: dict[State, EpisodeStart],
    shown: dict[int, tuple[int, ...]],
    turn: OpenTurn,
    place: int,
    engine: SearchEngine,
    sampling: Sampling,
) -> State:
    trajectory = turn.trajectory
    head = trajectory.completion.token_ids[: trajectory.turns[turn.number].end]
    state = (trajectory.question.uid, head, place)
    if state not in starts:
        room = (trajectory.prompt.max_new_tokens or sampling.max_new_tokens) - len(head)
        room = min(room, sampling.max_new_tokens - len(head))
        whole = shown.get(place) or shown.setdefault(place, engine.observation((place,)))
        block = whole if len(whole) <= room else engine.observation((place,), room)
        passage = engine.retriever.corpus[place].uid
        starts[state] = EpisodeStart(
            prompt=trajectory.prompt,
            prefix=head + block,
            queries=turn.queries,
            uid=f"{trajectory.uid}/{turn.number}/{passage}",
        )
    return state


def _batches(starts: Sequence[EpisodeStart], size: int) -> list[Sequence[EpisodeStart]]:
    return [starts[start : start + size] for start in range(0, len(starts), size)]
