"""What a search task is: questions, a corpus, a prompt, and exact match of the final answer."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.engines.search import Trace
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.passages import Corpus, Passage
from datamodules.prompt_writer import PromptWriter
from datamodules.search_texts import (
    END_INFORMATION,
    END_SEARCH,
    INFORMATION,
    SEARCH,
    last_answer,
)
from datamodules.tasks.base import Split, Task
from datamodules.tasks.exact_match import exact_match, f1
from datamodules.tasks.verdict_format import token_ids, token_text

#: What an agent is told [card 4, in our own words]; the example holds the first answer tag.
INSTRUCTION = (
    "Answer the question below. Think between <think> and </think> first, and again whenever you "
    "have read something new. Where you lack knowledge, call a search engine by writing "
    "<search> query </search>; what it finds comes back between <information> and </information>. "
    "Search as often as you want. In the end write a short answer and nothing else between "
    "<answer> and </answer>, for example <answer> Lisbon </answer>.\n\nQuestion: "
)
#: The same for tiny models, as words of a word-level vocabulary.
SPACED_INSTRUCTION = "<search> query </search> or <answer> text </answer> question "
_SHOWN = re.compile(f"{INFORMATION}(.*?)(?:{END_INFORMATION}|$)", re.DOTALL)
_ASKED = re.compile(f"{SEARCH}((?:(?!{SEARCH}).)*?){END_SEARCH}", re.DOTALL)
_SAMPLE = "<search> a </search><answer> b </answer>"


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Args:
        uid: Stable identity.
        text: The question.
        answers: Gold answers; never empty.
        supporting: Ids of the passages that hold the facts; () where unknown.
        group: ``single`` or ``multi`` (hops), or another name of its set.
        extra: What the task's own agent and judge need.
        where: ``file:line``, for messages.
    """

    uid: str
    text: str
    answers: tuple[str, ...]
    supporting: tuple[str, ...] = ()
    group: str = "multi"
    extra: Any = field(default=None, compare=False, repr=False)
    where: str = ""


class SearchTask(Task):
    """Questions whose answers are in a corpus. Engines and trainers know no task by name.

    A prompt's domain is the question's group, so that metrics part single from multi.
    """

    max_prompt_tokens: int = 2048
    max_new_tokens: int | None = None

    @property
    @abstractmethod
    def corpus(self) -> Corpus:
        """The passages, always the same object."""

    @abstractmethod
    def records(self, split: Split) -> Sequence[Question]:
        """Questions of a split, in a fixed order."""

    @cached_property
    def spaced(self) -> bool:
        """Whether texts are words parted by single spaces (word-level tokenizers)."""
        return self.vocabulary() is not None

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and refuse one that cannot write the tags.

        Args:
            tokenizer: One of the task's vocabulary, a byte-level one or that of a real model.

        Raises:
            ValueError: A word of the vocabulary is unknown, the tags do not come back as they are,
                or the instruction alone is too long.
        """
        super().bind(tokenizer)
        ids = token_ids(tokenizer, _SAMPLE)
        back = token_text(tokenizer, ids).strip()
        if not self.spaced and (tokenizer.unk_token_id in ids or back != _SAMPLE):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write the "
                f"tags of task '{self.name}': {_SAMPLE!r} comes back as {back!r}; use a byte-level "
                "tokenizer or a real model's"
            )
        before = SPACED_INSTRUCTION if self.spaced else INSTRUCTION
        after = "" if self.spaced else "\n"
        self.writer = PromptWriter(
            before=before, after=after, max_prompt_tokens=self.max_prompt_tokens
        )
        self.writer.bind(tokenizer)

    def prompt(self, record: Question) -> Prompt:
        """Instruction and question, in the tokenizer's chat template where it has one.

        Args:
            record: One of ``records``. A question that is too long is cut in its middle.
        """
        ids, _ = self.writer.prompt(record.text)
        return Prompt(
            record.uid, ids, self, record.group, None, record, max_new_tokens=self.max_new_tokens
        )

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Exact match of the final answer, and what happened on the way. Never raises.

        The answer is read from what the agent wrote itself: neither the prompt's example nor a
        tag inside a passage can be one. [code] takes the last tag of prompt and response together
        and asks for two of them (card 2.7); ours is stricter [our choice].

        Args:
            prompt: What was asked.
            completion: Of the whole episode; one that was cut has no answer.

        Returns:
            ``reward`` (0 or 1), ``f1``, ``searches``, ``invalid`` (pieces that were no action),
            ``answered``, and ``support``, the share of the supporting passages that were shown,
            where they are known.
        """
        question: Question = prompt.record
        trace = completion.trace if isinstance(completion.trace, Trace) else Trace()
        answer = self.final_answer(completion)
        parts = {
            "reward": float(exact_match(answer, question.answers)),
            "f1": f1(answer, question.answers),
            "searches": float(len(trace.turns)),
            "invalid": float(trace.num_invalid),
            "answered": float(answer is not None),
        }
        if question.supporting:
            shown = {self.corpus[place].uid for turn in trace.turns for place in turn.places}
            found = sum(uid in shown for uid in question.supporting)
            parts["support"] = found / len(question.supporting)
        return parts

    def final_answer(self, completion: Completion) -> str | None:
        """What an episode answers; None where it was cut or never answers.

        Args:
            completion: With a trace, or plain text of the agent.
        """
        if completion.finish_reason is not FinishReason.STOP:
            return None
        if isinstance(completion.trace, Trace):
            return None if completion.trace.is_cut else completion.trace.answer
        answers = [last_answer(self.writer.read(ids)) for ids in written_pieces(completion)]
        return next((answer for answer in reversed(answers) if answer is not None), None)

    def gold(self, question: Question, query: str) -> tuple[str, ...]:
        """Ids of the passages that answer one search rightly; by default all supporting ones.

        Args:
            question: Which question.
            query: What was searched for.
        """
        return question.supporting

    # ------------------------------------------------------------------ offline parts, optional

    def act(self, question: Question, transcript: str, coin: int) -> str:
        """What the task's scripted agent writes next, up to a closing tag.

        Args:
            question: Which question.
            transcript: All text after the prompt so far, observations included.
            coin: A random 64-bit number, a pure function of (key, prompt, sample).

        Raises:
            NotImplementedError: The task has no scripted agent.
        """
        raise NotImplementedError(f"task '{self.name}' has no scripted agent: give agent=folder")

    def sub_answers(self, question: Question, queries: Sequence[str], solved: bool) -> list[str]:
        """The short fact that each query was after, "" for *not sure*; see the card, 2.4 (a).

        Args:
            question: Which question.
            queries: Of one trajectory, in order.
            solved: Whether its answer was right.
        """
        return [""] * len(queries)

    def relevance(self, query: str, passages: Sequence[Passage], sub_answer: str) -> list[int]:
        """Scores 0 to 100 of the task's procedural judge, one a passage.

        Args:
            query: Of the turn.
            passages: Candidates.
            sub_answer: As ``sub_answers`` gave it.

        Raises:
            NotImplementedError: The task has no procedural judge.
        """
        raise NotImplementedError(f"task '{self.name}' has no judge of its own: give data.judge")


def written_pieces(completion: Completion) -> list[tuple[int, ...]]:
    """Token ids between the observations, piece by piece.

    Args:
        completion: Of an episode; one without observations is one piece.

    Example:
        >>> done = Completion(
        ...     (5, 6, 7), (0.0,) * 3, FinishReason.STOP, 0, None, (False, True, False)
        ... )
        >>> written_pieces(done)
        [(5,), (7,)]
    """
    observed = completion.observed or (False,) * len(completion.token_ids)
    pairs = zip(completion.token_ids, observed, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return [tuple(token for token, _ in run) for is_seen, run in runs if not is_seen]


def read_transcript(transcript: str) -> tuple[str, list[str]]:
    """What was shown, and what was searched for.

    Args:
        transcript: All behind the prompt.

    Returns:
        Words of all observations in their order, and the queries outside of them.

    Example:
        >>> read_transcript("<search> a b </search> <information> Doc 1 c </information>")
        ('Doc 1 c', ['a b'])
    """
    words = " ".join(transcript.split())
    shown = " ".join(found.strip() for found in _SHOWN.findall(words))
    queries = [query.strip() for query in _ASKED.findall(_SHOWN.sub(" ", words))]
    return shown, queries
