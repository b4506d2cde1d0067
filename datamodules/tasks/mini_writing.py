"""Miniature writing: queries of a hidden type, texts with an optional plan (card, section 9).

    prompt      ``genre3 w5 write``
    completion  ``<plan> w5 w6 </plan> w5 w6 w7 ...``, end; the plan may be empty or missing

Long texts should have a plan, short ones none, and no token tells which is asked for: a policy has
to find out from rewards. What a text is worth stands in ``mini_writing_world``.
"""

from __future__ import annotations

from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Demonstration, Split
from datamodules.tasks.chat_prompts import Chat
from datamodules.tasks.mini_writing_world import (
    ASK,
    KINDS,
    TAGS,
    Query,
    WritingWorld,
    option_problems,
)
from datamodules.tasks.planning import Kind, Mode, PlannedTask, PlannedText, read_plan_ids


class MiniWriting(WritingWorld, PlannedTask):
    """Fresh queries, half of each type, with a rule for the plan and a latent utility.

    Every query is a pure function of ``(seed, split, index)``. A prompt's domain is the hidden
    type, for metrics only. The demonstrations are the card's base model: they plan with a
    probability that knows nothing of genres, in front of noisy texts; a plan is the first words of
    its text and so is worth nothing in itself [our choice: an outline].

    Args:
        plan_rate: Demonstrations: probability of a plan.
        empty_rate: Demonstrations: probability of an empty span where there is no plan, so that
            ``plan_prefix("direct")`` is nothing new to the warm-started policy.
        noise: Demonstrations: probability that a word becomes any content word.
        **world: Of ``WritingWorld``.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> [query.kind for query in MiniWriting().records("train")[:3]]
        ['long', 'short', 'long']
    """

    name = "mini_writing"
    max_prompt_tokens = 3

    def __init__(
        self,
        *,
        plan_rate: float = 0.5,
        empty_rate: float = 0.2,
        noise: float = 0.4,
        **world: Any,
    ) -> None:
        self.plan_rate, self.empty_rate, self.noise = plan_rate, empty_rate, noise
        super().__init__(**world)
        self._ids: dict[str, int] = {}
        self._words: dict[int, str] = {}

    def _problems(self) -> list[str]:
        shares = {name: getattr(self, name) for name in ("plan_rate", "empty_rate", "noise")}
        return [*super()._problems(), *option_problems({}, shares)]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of all words once."""
        super().bind(tokenizer)
        self._ids = tokenizer.get_vocab()
        self._words = {index: word for word, index in self._ids.items()}

    def records(self, split: Split) -> list[Query]:
        """All queries of a split, long and short ones in turn; ``predict`` is the split ``test``.

        Args:
            split: Which one.
        """
        return [
            self.draw_query(Random(uid), uid, KINDS[i % 2])
            for i, uid in enumerate(self.uids(split))
        ]

    def prompt(self, record: Query) -> Prompt:
        """Genre, start word and the word that asks for a text.

        A completion has room for all words that a judge model reads.

        Args:
            record: A query.
        """
        return Prompt(
            uid=record.uid,
            token_ids=self._prompt_ids(record),
            task=self,
            domain=record.kind,
            record=record,
            max_new_tokens=self.num_steps + 1,
        )

    def _prompt_ids(self, query: Query) -> tuple[int, ...]:
        return tuple(self._ids[word] for word in (*query.text.split(), ASK))

    def read_plan(self, prompt: Prompt, completion: Completion) -> PlannedText:
        """Take a completion apart, see ``planning``. Never raises.

        Args:
            prompt: What was asked.
            completion: What was written.
        """
        return read_plan_ids(
            completion.token_ids,
            (self._ids[TAGS[0]], self._ids[TAGS[1]]),
            decode=lambda ids: " ".join(self._words.get(token, "<unk>") for token in ids),
            is_finished=completion.finish_reason is FinishReason.STOP,
            ends=(self._ids["<eos>"],),
            min_plan_tokens=self.min_plan_words,
        )

    def kind(self, prompt: Prompt) -> Kind:
        """The hidden type.

        Args:
            prompt: One of this task.
        """
        query: Query = prompt.record
        return query.kind

    def conversation(self, prompt: Prompt, completion: Completion) -> tuple[Chat, str]:
        """The query as text (``genre3 w5``) and the text without its plan.

        Args:
            prompt: What was asked.
            completion: What was written.
        """
        return (("user", prompt.record.text),), self.read_plan(prompt, completion).content

    def plan_prefix(self, mode: Mode) -> tuple[int, ...]:
        """The opening tag, or both tags with nothing between.

        Args:
            mode: ``plan`` or ``direct``.
        """
        opening, closing = (self._ids[tag] for tag in TAGS)
        return (opening,) if mode == "plan" else (opening, closing)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Whether the mode is right, and what the text is worth. Never raises.

        Args:
            prompt: What was asked.
            completion: What was written.

        Returns:
            ``reward`` and ``mode``, 1 where a plan is there if and only if it should be and the
            completion parses; ``plan``; ``utility``, 1 at most, 0
            for what does not parse, and length counts in it even in a world that is
            ``length_blind``; ``content_length`` in words; ``valid``.
        """
        query: Query = prompt.record
        read = self.read_plan(prompt, completion)
        is_right, is_valid = read.has_plan == (query.kind == "long"), read.error is None
        numbers = self.numbers(read.content.split())
        return {
            "reward": float(is_right and is_valid),
            "mode": float(is_right and is_valid),
            "plan": float(read.has_plan),
            "utility": self.utility(query.kind, query.start, numbers) / self.best(query.kind),
            "content_length": float(read.content_tokens),
            "valid": float(is_valid),
        }

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Noisy texts to fresh queries of both types, with plans that know nothing of genres.

        Args:
            seed: Of the warm start.
            step: Of the warm start.
            count: How many.
        """
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        made = []
        for index in range(count):
            query = self.draw_query(rng, "", KINDS[index % 2])
            text = self.draw_text(rng, query, self.noise)
            plan: list[str] = []
            if rng.random() < self.plan_rate:
                size = rng.randint(self.min_plan_words, self.max_plan_words)
                words = [*text, *(f"w{rng.randrange(self.num_words)}" for _ in range(size))]
                plan = [TAGS[0], *words[:size], TAGS[1]]  # a short text has too few of its own
            elif rng.random() < self.empty_rate:
                plan = [*TAGS]
            ids = tuple(self._ids[word] for word in (*plan, *text, "<eos>"))
            made.append(Demonstration(self._prompt_ids(query), ids, query.kind))
        return made
