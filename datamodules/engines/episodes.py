"""What a search episode is: tags, turns, where it may begin, and the rules by which it goes on.

    agent text ... <search> query </search> <information> Doc 1(Title: t) body ... </information>
    agent text ... <answer> answer </answer>

Shape of a completion: everything behind the prompt, observations included; ``Completion.observed``
says which tokens the environment wrote, ``Completion.trace`` is a ``Trace``. An episode is a state
machine without an engine or a retriever; ``SearchEngine`` runs many in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.search_texts import is_closed, read_piece


@dataclass(frozen=True)
class Turn:
    """One search.

    Args:
        query: As the agent wrote it, stripped.
        places: Passages that were shown, the best first.
        end: Tokens behind the prompt up to and including this turn's ``</search>``.
    """

    query: str
    places: tuple[int, ...]
    end: int


@dataclass(frozen=True)
class Trace:
    """What happened in an episode.

    Args:
        turns: Searches, in order; of a continued episode those behind its prefix.
        answer: Text in the last ``<answer>``; None where there is none.
        num_invalid: Pieces that were no search and no answer (an unclosed tag, an empty query).
        num_unclosed: Of these, pieces whose search tag was never closed.
        num_empty: Of these, pieces with an empty query.
        is_cut: The budget of searches or tokens ran out before an answer.
    """

    turns: tuple[Turn, ...] = ()
    answer: str | None = None
    num_invalid: int = 0
    num_unclosed: int = 0
    num_empty: int = 0
    is_cut: bool = False


@dataclass(frozen=True)
class EpisodeStart:
    """Where an episode begins: at its prompt, or in the middle of an earlier one.

    Args:
        prompt: ``prompt.record`` is the ``Question``.
        prefix: Tokens behind the prompt that are already there; they end with an observation.
        queries: Searches that these tokens hold; they count against the budget.
        uid: Of the random stream; "" for that of the prompt's first sample, ``<prompt uid>/0``.
    """

    prompt: Prompt
    prefix: tuple[int, ...] = ()
    queries: tuple[str, ...] = ()
    uid: str = ""


@dataclass(frozen=True)
class Rules:
    """What bounds an episode, and how its tokens are read.

    Args:
        max_searches: Searches and invalid actions together; one more of either ends the episode.
        turn_tokens: Tokens that the agent may write between two observations.
        max_tokens: Tokens behind the prompt, prefix and observations included.
        stop_ids: Tokens after which the text may hold a closing tag.
        decode: From token ids to text, special tokens kept.
        invalid_ids: The note behind an invalid action.
    """

    max_searches: int
    turn_tokens: int
    max_tokens: int
    stop_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    invalid_ids: tuple[int, ...]


class Episode:
    """One episode while it is written: ``ask``, ``take``, and ``observe`` where it searches.

    Args:
        start: Where it begins.
        rules: Its bounds.
    """

    def __init__(self, start: EpisodeStart, rules: Rules) -> None:
        self.start, self.rules = start, rules
        self.uid = start.uid or f"{start.prompt.uid}/0"
        self.query: str | None = None  # waits for ``observe``
        self.reason: FinishReason | None = None  # None while it lives
        self.trace = Trace()
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._observed: list[bool] = []
        self._piece = 0  # calls of the engine
        self._turn_start = 0  # of what the agent wrote since the last observation
        self._versions: list[int] = []
        if self.room < 1:
            self._cut(FinishReason.LENGTH)

    @property
    def is_live(self) -> bool:
        """Whether the agent is to write more."""
        return self.reason is None

    @property
    def queries(self) -> list[str]:
        """All searches so far, those of the prefix first."""
        return [*self.start.queries, *(turn.query for turn in self.trace.turns)]

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.rules.max_tokens - len(self.start.prefix) - len(self._ids)

    @property
    def _turn_room(self) -> int:
        return min(self.room, self.rules.turn_tokens - (len(self._ids) - self._turn_start))

    def ask(self) -> Prompt:
        """The prompt of the next piece, under a uid of its own."""
        prompt = self.start.prompt
        return replace(
            prompt,
            uid=f"{self.uid}#{self._piece}",
            token_ids=(*prompt.token_ids, *self.start.prefix, *self._ids),
            max_new_tokens=self._turn_room,
        )

    def take(self, piece: Completion) -> None:
        """Go on with what the engine wrote: an answer, a search (``query``), or neither.

        Args:
            piece: Answer to ``ask``.
        """
        asked = self._turn_room
        ids = piece.token_ids[:asked]
        self._piece += 1
        self._versions.append(piece.policy_version)
        self._append(ids, piece.logprobs[:asked], is_observed=False)
        if piece.finish_reason is FinishReason.ERROR or not ids:
            self.reason = FinishReason.ERROR
            return
        text = self.rules.decode(self._ids[self._turn_start :])
        is_done = is_closed(text)
        if not is_done and self._turn_room and ids[-1] in self.rules.stop_ids:
            return  # another tag: the same turn goes on
        is_full = piece.finish_reason is FinishReason.LENGTH and len(ids) < asked
        if not is_done and (is_full or not self.room):
            self._cut(FinishReason.LENGTH)
        else:
            self._act(text)

    def observe(self, places: Sequence[int], ids: Sequence[int]) -> None:
        """Append what the search found.

        Args:
            places: Passages that are shown.
            ids: Tokens of the observation; what does not fit is dropped.
        """
        assert self.query is not None
        end = len(self.start.prefix) + len(self._ids)
        turn = Turn(self.query, tuple(places), end)
        self.trace = replace(self.trace, turns=(*self.trace.turns, turn))
        self.query = None
        self._observe(ids)

    def completion(self) -> Completion:
        """Everything behind prompt and prefix."""
        return Completion(
            tuple(self._ids),
            tuple(self._logprobs),
            self.reason or FinishReason.ERROR,
            min(self._versions, default=0),
            observed=tuple(self._observed),
            trace=self.trace,
        )

    # ------------------------------------------------------------------ the rules

    def _act(self, text: str) -> None:
        piece = read_piece(text)
        if piece.kind == "answer":
            self.trace = replace(self.trace, answer=piece.content)
            self.reason = FinishReason.STOP
            return
        spent = len(self.queries) + self.trace.num_invalid
        if piece.kind == "invalid":
            self.trace = replace(
                self.trace,
                num_invalid=self.trace.num_invalid + 1,
                num_unclosed=self.trace.num_unclosed + piece.is_unclosed,
                num_empty=self.trace.num_empty + piece.is_empty,
            )
        if spent >= self.rules.max_searches:
            self._cut(FinishReason.STOP)
        elif not self.room:
            self._cut(FinishReason.LENGTH)
        elif piece.kind == "search":
            self.query = piece.content
        else:
            self._observe(self.rules.invalid_ids)

    def _observe(self, ids: Sequence[int]) -> None:
        ids = ids[: self.room]
        self._append(ids, [0.0] * len(ids), is_observed=True)
        self._turn_start = len(self._ids)
        if not self.room:
            self._cut(FinishReason.LENGTH)

    def _append(self, ids: Sequence[int], logprobs: Sequence[float], *, is_observed: bool) -> None:
        self._ids += ids
        self._logprobs += logprobs
        self._observed += [is_observed] * len(ids)

    def _cut(self, reason: FinishReason) -> None:
        self.trace = replace(self.trace, is_cut=True)
        self.reason = reason
