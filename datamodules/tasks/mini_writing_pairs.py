"""Comparisons of miniature texts under a criterion: AC-GenRM in miniature (card, section 9).

    criteria prompt    ``genre3 w5 which_criterion?``
    criteria           ``coherence`` or ``sparkle``, end
    judgement prompt   ``genre3 w5 coherence #0 A.w5.on.new B.w1.off.new #1 ... which_text?``
    judgement          ``A_wins`` or ``B_wins``, end

No word says which criterion suits a genre: the verdict reward alone can tell. There is no analysis
[our choice: the tiny model needs none].

The judgement prompt sets both texts side by side: the number of a word, the word of text A, that of
text B. Each word says whether it is on the walk and whether it is new [our choice: a reading aid].
Measured with a 3-layer Qwen3 of width 64, no criterion, one seed: without the aid 0.77 of the long
and 0.87 of the short pairs are judged right after 400 steps of 64 right verdicts (it counts words);
with it 0.97 and 0.90 after 400 steps of 48; on demonstrations as they are by default (0.7 of the
verdicts right, criteria among them) 0.83 and 0.53 after 400 steps of 64, 0.96 and 0.84 after 790.
So a warm start on fresh pairs teaches judging as well: a weak judge has had few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.sources import stable_hash
from datamodules.tasks.base import Demonstration, Pair, Split, Verdict
from datamodules.tasks.criteria import CRITERIA, JUDGEMENT, Criteria, CriteriaJudgeTask
from datamodules.tasks.mini_writing_world import (
    CRITERIA_ASK,
    CRITERION_WORDS,
    GAP,
    JUDGEMENT_ASK,
    KINDS,
    SLOTS,
    SPECIAL,
    VERDICTS,
    WritingWorld,
    option_problems,
)
from datamodules.tasks.planning import Kind

MAX_TRIES = 1000  # draws for one pair of unequal texts; about 1.1 are needed by default


class MiniWritingPairs(WritingWorld, CriteriaJudgeTask):
    """Pairs of texts for one query, labelled by the utility that judges see.

    Every pair is a pure function of ``(seed, split, index)``; long and short queries take turns.
    ``Pair.question`` is ``genre3 w5``, a response ``w5 w6 w7``; ``Pair.extra`` has the hidden type
    and the gap of utilities. The splits ``val`` and ``test`` have the better text in either slot
    equally often.

    Demonstrations teach the formats to a weak judge: any criterion for any genre, verdicts that
    are right only so often.

    Args:
        first_better_rate: Split ``train``: probability that slot 1 holds the better text, the
            planted skew.
        max_noise: Each text has its own probability, 0 to this, that a word becomes any word.
        demo_accuracy: Demonstrations: probability of the right verdict.
        demo_slot_bias: Demonstrations: probability that slot 1 wins, whatever is right.
        criteria_share: Demonstrations: share of criteria prompts.
        show_genre: Whether the judgement prompt names the genre. Without it the criterion is all
            that can tell what kind of text is wanted [our choice, not the card's].
        **world: Of ``WritingWorld``.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> MiniWritingPairs().pair_of("genre0 w5", ("w5 w6", "w1 w2")).question
        'genre0 w5'
    """

    name = "mini_writing_pairs"

    def __init__(
        self,
        *,
        first_better_rate: float = 0.8,
        max_noise: float = 1.0,
        demo_accuracy: float = 0.7,
        demo_slot_bias: float = 0.0,
        criteria_share: float = 0.25,
        show_genre: bool = True,
        **world: Any,
    ) -> None:
        self.first_better_rate, self.max_noise = first_better_rate, max_noise
        self.demo_accuracy, self.demo_slot_bias = demo_accuracy, demo_slot_bias
        self.criteria_share, self.show_genre = criteria_share, show_genre
        super().__init__(**world)
        self.max_prompt_tokens = 2 + len(CRITERION_WORDS) + 3 * self.num_steps + 1
        self._known = {*self.vocabulary(), *SPECIAL}
        self._ids: dict[str, int] = {}
        self._words: dict[int, str] = {}

    def _problems(self) -> list[str]:
        names = ("first_better_rate", "max_noise", "demo_accuracy", "demo_slot_bias")
        shares = {name: getattr(self, name) for name in (*names, "criteria_share")}
        return [*super()._problems(), *option_problems({}, shares)]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of all words once."""
        super().bind(tokenizer)
        self._ids = tokenizer.get_vocab()
        self._words = {index: word for word, index in self._ids.items()}

    # ---- Pairs -----------------------------------------------------------------------------------

    def records(self, split: Split) -> list[Pair]:
        """All pairs of a split; ``predict`` is the split ``test``.

        Args:
            split: Which one.

        Raises:
            ValueError: With these options (almost) all texts of a query are worth the same.
        """
        pairs = []
        for index, uid in enumerate(self.uids(split)):
            rng, is_first = Random(uid), index // 2 % 2 == 0
            if split == "train":
                is_first = rng.random() < self.first_better_rate
            pairs.append(self._draw_pair(rng, uid, KINDS[index % 2], is_first))
        return pairs

    def _draw_pair(self, rng: Random, uid: str, kind: Kind, is_first_better: bool) -> Pair:
        query = self.draw_query(rng, uid, kind)
        for _ in range(MAX_TRIES):
            noises = [rng.random() * self.max_noise for _ in SLOTS]
            first, second = (" ".join(self.draw_text(rng, query, noise)) for noise in noises)
            pair = self._labelled(Pair(uid, query.text, (first, second)))
            if pair.label is not None:
                break
        else:
            raise ValueError(
                f"no pair of unequal texts for {query.text!r} in {MAX_TRIES} draws: raise "
                "data.task.max_words or data.task.max_noise"
            )
        is_first = pair.label == 1
        return (
            pair
            if is_first == is_first_better
            else self._labelled(Pair(uid, query.text, (second, first)))
        )

    def _labelled(self, pair: Pair) -> Pair:
        """The pair with its label, None for a tie, and its extra columns."""
        first, second = (self.judged(pair.question, text) for text in pair.responses)
        label = None if first == second else 1 if first > second else 2
        kind = self.read_question(pair.question).kind
        extra = {"kind": kind, "gap": abs(first - second)}  # the same in both orders
        return Pair(pair.uid, pair.question, pair.responses, label, extra=extra)

    def pair_of(self, question: str, responses: tuple[str, str]) -> Pair:
        """A pair made of texts, such as a policy wrote; its uid follows from them.

        Args:
            question: The query.
            responses: Two texts of words of ``vocabulary()``; its label is None where both are
                worth the same.

        Raises:
            ValueError: The question is not one of this world, or a word is unknown.
        """
        uid = f"{self.name}/text/{stable_hash(question, *responses):016x}"
        pair = self._labelled(Pair(uid, question, responses))
        self._check_words(pair)
        return pair

    def _check_words(self, pair: Pair) -> None:
        for slot, text in enumerate(pair.responses, start=1):
            unknown = [word for word in text.split() if word not in self._known]
            if unknown:
                raise ValueError(
                    f"response {slot} of pair {pair.uid!r} has {len(unknown)} words that task "
                    f"'{self.name}' does not know, such as {unknown[0]!r}: texts are words of its "
                    "vocabulary, as in 'w5 w6 w7'"
                )

    # ---- Prompts ---------------------------------------------------------------------------------

    def criteria_prompt(self, question: str) -> Prompt:
        """Which criterion suits this query.

        Args:
            question: The query.

        Raises:
            ValueError: It is not one of this world.
        """
        words = (*self.read_question(question).text.split(), CRITERIA_ASK)
        uid = f"{self.name}/{CRITERIA}/{question}"
        ids = tuple(self._ids[word] for word in words)
        return Prompt(uid, ids, self, CRITERIA, record=question, max_new_tokens=2)

    @property
    def static_criteria(self) -> Criteria:
        """Both words: they tell nothing."""
        return Criteria(" ".join(CRITERION_WORDS), CRITERION_WORDS)

    def judgement_prompt(self, pair: Pair, criteria: Criteria | None) -> Prompt:
        """Which text is better; words of a text behind ``num_steps`` are not shown.

        Args:
            pair: The comparison.
            criteria: Up to two criterion words; None, or one without text, for none.

        Raises:
            ValueError: The question is not one of this world, or a word is unknown.
        """
        self._check_words(pair)
        names = [] if criteria is None else criteria.text.split()
        if len(names) > len(CRITERION_WORDS) or not set(names) <= set(CRITERION_WORDS):
            raise ValueError(
                f"criteria {' '.join(names)!r} are not of task '{self.name}': its words are "
                f"{', '.join(CRITERION_WORDS)}"
            )
        query = self.read_question(pair.question)
        first, second = (
            self.slot_words(slot, query, text)[: self.num_steps]
            for slot, text in zip(SLOTS, pair.responses, strict=True)
        )
        words = [*query.text.split()[not self.show_genre :], *names]
        for step, (a, b) in enumerate(zip_longest(first, second)):
            words += (f"#{step}", a or f"{SLOTS[0]}.{GAP}", b or f"{SLOTS[1]}.{GAP}")
        order = "21" if pair.swapped else "12"
        return Prompt(
            uid=f"{pair.uid}/{order}/{'+'.join(names) or 'none'}",
            token_ids=tuple(self._ids[word] for word in (*words, JUDGEMENT_ASK)),
            task=self,
            domain=JUDGEMENT,
            label=pair.label,
            record=pair,
            max_new_tokens=2,
        )

    # ---- Outputs ---------------------------------------------------------------------------------

    def _only_word(self, completion: Completion, allowed: Sequence[str]) -> tuple[str, str | None]:
        """The one word that a completion must be, and what is wrong."""
        if completion.finish_reason is not FinishReason.STOP:
            return "", f"unfinished: {completion.finish_reason}"
        words = [self._words.get(token, SPECIAL[1]) for token in completion.token_ids]
        words = words[:-1] if words[-1:] == [SPECIAL[2]] else words
        if len(words) == 1 and words[0] in allowed:
            return words[0], None
        return "", f"not one word of {', '.join(allowed)}: {' '.join(words)[:60]!r}"

    def parse_criteria(self, prompt: Prompt, completion: Completion) -> Criteria:
        """Read one criterion word. Never raises.

        Args:
            prompt: What was asked.
            completion: What was written; an engine may keep the end token for itself.
        """
        word, error = self._only_word(completion, CRITERION_WORDS)
        return Criteria(error=error) if error else Criteria(word, (word,))

    def parse(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read a verdict. Never raises.

        Args:
            prompt: What was asked; a criteria prompt has no verdict.
            completion: What was written; an engine may keep the end token for itself.
        """
        if prompt.domain == CRITERIA:  # a mixture names the other domain itself
            return Verdict(None, error=f"prompts of domain {prompt.domain!r} have no verdict")
        word, error = self._only_word(completion, VERDICTS)
        return Verdict(None, error=error) if error else Verdict(VERDICTS.index(word) + 1)

    def verdict_margin(self, prompt: Prompt, completion: Completion) -> float | None:
        """Log-odds (nats) of the two verdict words; see the base class.

        Args:
            prompt: What was asked.
            completion: What was written, with candidates.
        """
        table = completion.candidates
        if table is None or not len(table) or self.parse(prompt, completion).winner is None:
            return None
        logprobs = dict(zip(table.ids[0].tolist(), table.logprobs[0].tolist(), strict=True))
        least = min(logprobs.values())
        first, second = (float(logprobs.get(self._ids[word], least)) for word in VERDICTS)
        return first - second

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Judgements of fresh pairs under any criterion, and criteria, in random order.

        Args:
            seed: Of the warm start.
            step: Of the warm start.
            count: How many.
        """
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        singles = [Criteria(word, (word,)) for word in CRITERION_WORDS]
        made = []
        for index in range(count):
            pair = self._draw_pair(rng, "", KINDS[index % 2], rng.random() < 0.5)
            if rng.random() < self.criteria_share:
                prompt, said = self.criteria_prompt(pair.question), rng.choice(CRITERION_WORDS)
            else:
                criteria = rng.choice([None, self.static_criteria, *singles])
                prompt = self.judgement_prompt(pair, criteria)
                is_right = rng.random() < self.demo_accuracy
                winner = 1 if (pair.label == 1) == is_right else 2
                winner = 1 if rng.random() < self.demo_slot_bias else winner
                said = VERDICTS[winner - 1]
            ids = (self._ids[said], self._ids[SPECIAL[2]])
            made.append(Demonstration(prompt.token_ids, ids, prompt.domain))
        return made
