"""Prefix audit: a tiny judge task whose reasoning can be checked token by token.

A query of ``L`` digits in base ``B`` has true running sums modulo ``B``; each of two responses
claims a whole sequence of them. The response with fewer wrong positions is better. The task,
the layout and the rates of the demonstrations are those of the second trial of our ReflectRM
card, section 9 [our choice; measured there]:

* Preference prompt: ``#t x r1 r2`` for every step, then a word that asks about responses
  (17 tokens for ``L = 4``). Completion: ``#t x g m1 m2`` for every step (digit, recomputed sum,
  marks of both responses), ``#L count1 count2``, verdict, end (25 tokens).
* Reflection prompt: the query, both critiques interleaved word by word (``#t x x' g g' ...``,
  ``#L c1 c1' c2 c2'``), then a word that asks about critiques. Completion: the step of the first
  difference, the locally right word there, verdict, end (4 tokens).

Queries, analyses, critiques 1 and 2 and both verdict nouns have words of their own, so that the
tiny Qwen3 of the card can look them up; only the step numbers are shared.

Where we differ from the card: its vocabulary has 84 words; what it describes needs 83 with
``<pad> <unk> <eos>``, and we add none to fill up (170,912 instead of 171,040 parameters).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Demonstration, JudgeTask, Pair, Split, Verdict
from datamodules.tasks.prefix_audit_judges import (
    FIELDS_PER_STEP,
    NOUNS,
    Case,
    CaseShape,
    JudgeNoise,
    Lexicon,
    better_slot,
    check_options,
    draw_case,
    either_values,
    first_difference,
    gold_values,
    lenient_values,
    make_lexicon,
    num_wrong,
    verdict_of,
)

MAX_TRIES = 2000  # draws for one reflection demonstration; about 2 are needed by default


class PrefixAudit(JudgeTask):
    """The prefix-audit task: fresh random pairs, exact labels, checkable analyses.

    Every pair is a pure function of ``(seed, split, index)``. ``Pair.question`` is the digits as
    text (``"2 0 1 1"``), ``Pair.responses`` the claimed sums as text.

    Args:
        base: Digits are 0 to ``base - 1``.
        length: Digits of a query.
        num_train: Pairs of the split ``train``.
        num_val: Pairs of the split ``val``.
        num_test: Pairs of the split ``test``.
        seed: Seed of the pairs.
        max_better_errors: Wrong positions of the better response, 0 to this many (never more
            than ``length - 1``).
        max_gap: Wrong positions that the worse response has more, 1 to this many (at most
            ``length`` in all).
        lenient: Demonstrations: probability to tick a wrong digit of response 1 that claims 0.
        stray: Demonstrations: probability to tick any other wrong digit, in either slot.
        sum_slip: Demonstrations: probability that a running sum slips; the slip propagates.
        slot_bias: Demonstrations: probability that a preference verdict for slot 2 is written as
            slot 1, whatever the analysis says.
        reflection_share: Share of reflections among the demonstrations.
        broad_sum: Broad noise: probability of a wrong sum.
        broad_mark: Broad noise: probability of a wrong mark.
        broad_count: Broad noise: probability of a random count.
        broad_share: Probability that an analysis in a reflection demonstration has broad noise
            instead of the lenient judge's errors.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> task = PrefixAudit(num_test=1)
        >>> pair = task.records("test")[0]
        >>> len(task.gold_analysis(pair).split())
        23
    """

    name = "prefix_audit"

    def __init__(
        self,
        *,
        base: int = 3,
        length: int = 4,
        num_train: int = 320,
        num_val: int = 50,
        num_test: int = 200,
        seed: int = 0,
        max_better_errors: int = 3,
        max_gap: int = 2,
        lenient: float = 0.7,
        stray: float = 0.02,
        sum_slip: float = 0.02,
        slot_bias: float = 0.0,
        reflection_share: float = 0.5,
        broad_sum: float = 0.08,
        broad_mark: float = 0.08,
        broad_count: float = 0.04,
        broad_share: float = 0.5,
    ) -> None:
        self.shape = CaseShape(base, length, max_better_errors, max_gap)
        self.noise = JudgeNoise(
            lenient, stray, sum_slip, broad_sum, broad_mark, broad_count, broad_share
        )
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.seed = seed
        self.slot_bias, self.reflection_share = slot_bias, reflection_share
        check_options(
            self.shape.__dict__ | {f"num_{split}": size for split, size in self.sizes.items()},
            self.noise.__dict__ | {"slot_bias": slot_bias, "reflection_share": reflection_share},
            seed,
        )
        self.words = make_lexicon(base, length)
        self._ids: Lexicon[int] | None = None
        self._word_of: dict[int, str] = {}
        self._value_of = [  # of every position of an analysis: word to value
            {word: value for value, word in enumerate(self.words.table(position))}
            for position in range(FIELDS_PER_STEP * length + 2)
        ]

    def vocabulary(self) -> list[str]:
        """All words but ``<pad> <unk> <eos>``: 80 for base 3 and length 4."""
        return self.words.everything()

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of all words once.

        Raises:
            ValueError: A word is unknown to the tokenizer, or it has no end token.
        """
        super().bind(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer for task '{self.name}' has no eos_token")
        known = tokenizer.get_vocab()
        self._word_of = {known[word]: word for word in self.vocabulary()}
        self._ids = self.words.map(known.__getitem__)

    def analysis_words(self, values: Sequence[int]) -> str:
        """The text of an analysis given as values; see ``prefix_audit_judges``."""
        return " ".join(self.words.lines((0,), (values,)))

    def analysis_values(self, analysis: str) -> tuple[int, ...] | None:
        """The values of an analysis given as text, None where it does not parse."""
        values, error = self._read_analysis(analysis.split())
        return None if error else values

    def records(self, split: Split) -> list[Pair]:
        """All pairs of a split; ``predict`` is the split ``test``.

        Raises:
            ValueError: The split is none of train, val, test and predict.
        """
        source = "test" if split == "predict" else split
        if source not in self.sizes:
            raise ValueError(f"split {split!r} is none of {', '.join(self.sizes)}, predict")
        return [self._pair(source, index) for index in range(self.sizes[source])]

    def _pair(self, split: str, index: int) -> Pair:
        uid = f"{self.name}/{self.seed}/{split}/{index}"
        case, label = draw_case(Random(uid), self.shape)
        first, second = (" ".join(map(str, row)) for row in case.claims)
        few, many = sorted(num_wrong(case, self.shape.base))
        extra = {"num_better_errors": few, "gap": many - few}  # the same in both orders
        return Pair(uid, " ".join(map(str, case.query)), (first, second), label, extra=extra)

    def case(self, pair: Pair) -> Case:
        """The numbers of a pair.

        Raises:
            ValueError: The pair is not one of this task.
        """
        try:
            query, first, second = (
                tuple(int(word) for word in text.split())
                for text in (pair.question, *pair.responses)
            )
        except ValueError:
            query = first = second = ()
        base, length = self.shape.base, self.shape.length
        sizes = {len(query), len(first), len(second)}
        if sizes != {length} or not all(0 <= v < base for v in query + first + second):
            raise ValueError(
                f"pair {pair.uid!r} is not one of task '{self.name}': question and responses "
                f"must be {length} digits of 0 to {base - 1} each, as in '0 1 1 0'"
            )
        return Case(query, (first, second))

    def preference_prompt(self, pair: Pair) -> Prompt:
        """Which response is better; the two orders of a pair have different uids."""
        ids = self._bound()
        return Prompt(
            uid=f"{pair.uid}/{_order(pair)}",
            token_ids=(*ids.question(self.case(pair)), ids.asks["pref"]),
            task=self,
            domain="pref",
            label=pair.label,
            record=pair,
            max_new_tokens=5 * self.shape.length + 5,
        )

    def reflection_prompt(
        self, pair: Pair, analyses: tuple[str, str], label: int | None = None, uid: str = ""
    ) -> Prompt:
        """Which analysis is better; see the base class.

        Raises:
            ValueError: An analysis does not parse.
        """
        values = []
        for slot, analysis in enumerate(analyses, start=1):
            read, error = self._read_analysis(analysis.split())
            if error:
                raise ValueError(f"analysis {slot} of pair {pair.uid!r} does not parse: {error}")
            values.append(read)
        if not uid:
            digest = hashlib.sha256("|".join(analyses).encode()).hexdigest()[:16]
            uid = f"{pair.uid}/{_order(pair)}/refl/{digest}"
        return Prompt(
            uid=uid,
            token_ids=tuple(self._reflection_ids(self.case(pair), values)),
            task=self,
            domain="refl",
            label=label,
            record=(pair, analyses),
            max_new_tokens=4,
        )

    def _bound(self) -> Lexicon[int]:
        if self._ids is None:
            raise RuntimeError(f"task '{self.name}' has no tokenizer yet: call bind() first")
        return self._ids

    def _reflection_ids(self, case: Case, values: Sequence[Sequence[int]]) -> list[int]:
        ids = self._bound()
        return [*ids.question(case), *ids.lines((1, 2), values), ids.asks["refl"]]

    def parse(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read the verdict of either kind of prompt; never raises.

        Strict: the right kind of word at every position, the verdict noun of the prompt's
        domain, and after the verdict nothing but at most one end token (an engine may keep it
        for itself). ``Verdict.analysis`` leaves the verdict out.
        """
        if completion.finish_reason != FinishReason.STOP:
            return Verdict(None, error=f"unfinished: {completion.finish_reason}")
        if prompt.domain not in NOUNS or self._ids is None:
            return Verdict(None, error=f"no grammar for prompts of domain {prompt.domain!r}")
        token_ids = list(completion.token_ids)
        if token_ids and token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids.pop()
        *body, last = [self._word_of.get(token, "<other>") for token in token_ids] or [""]
        read = self._read_analysis if prompt.domain == "pref" else self._read_reflection
        error = read(body)[1]
        verdicts = self.words.verdicts[prompt.domain]
        if error is None and last not in verdicts:
            error = f"the last word must be one of {', '.join(verdicts)}, not {last!r}"
        if error is not None:
            return Verdict(None, error=error)
        return Verdict(verdicts.index(last) + 1, analysis=" ".join(body))

    def _read_analysis(self, words: Sequence[str]) -> tuple[tuple[int, ...], str | None]:
        """Values and None, or nothing and what is wrong."""
        expected = 5 * self.shape.length + 3
        if len(words) != expected:
            return (), f"an analysis has {expected} words, not {len(words)}"
        values: list[int] = []
        for index, word in enumerate(words):
            step, field = divmod(index, FIELDS_PER_STEP + 1)
            if field == 0:
                if word != self.words.steps[step]:
                    return (), f"word {index} must be {self.words.steps[step]}, not {word!r}"
                continue
            table = self._value_of[len(values)]
            if word not in table:
                return (), f"word {index} must be one of {', '.join(table)}, not {word!r}"
            values.append(table[word])
        return tuple(values), None

    def _read_reflection(self, words: Sequence[str]) -> tuple[tuple[int, ...], str | None]:
        """Like ``_read_analysis``, for a step number and any word of an analysis."""
        if len(words) != 2:
            return (), f"a reflection has 2 words before its verdict, not {len(words)}"
        if words[0] not in self.words.steps:
            return (), f"word 0 must be a step number, not {words[0]!r}"
        if not any(words[1] in table for table in self.words.fields[0]):
            return (), f"word 1 must be a word of an analysis, not {words[1]!r}"
        return (), None

    def gold_analysis(self, pair: Pair) -> str:
        """The one right analysis of a pair, without its verdict."""
        return self.analysis_words(gold_values(self.case(pair), self.shape.base))

    def better_analysis(self, pair: Pair, analyses: tuple[str, str]) -> int | None:
        """Slot of the analysis that is locally right at the first difference.

        Returns:
            1 or 2; None where one does not parse, both are equal, or neither is right there.
        """
        first, second = (self.analysis_values(analysis) for analysis in analyses)
        if first is None or second is None:
            return None
        return better_slot(self.case(pair), first, second, self.shape.base)

    def analysis_metrics(self, pair: Pair, verdict: Verdict) -> dict[str, float]:
        """Quality of a preference analysis against the gold one; {} where it does not parse.

        Returns:
            ``step_acc``, share of right values among the four of every step and both counts;
            ``exact``, 1 where all are right; ``verdict_follows_analysis``, 1 where the verdict
            is fewer crosses by the written counts (a tie goes to slot 1); ``first_wrong_step``,
            0 to ``L - 1`` for the step of the first wrong value, ``L`` for the counts and
            ``L + 1`` where nothing is wrong.
        """
        values = self.analysis_values(verdict.analysis)
        if values is None or verdict.winner is None:
            return {}
        gold = gold_values(self.case(pair), self.shape.base)
        wrong = first_difference(values, gold)
        right = sum(value == truth for value, truth in zip(values, gold, strict=True))
        last = self.shape.length + 1
        return {
            "step_acc": right / len(gold),
            "exact": float(wrong is None),
            "verdict_follows_analysis": float(verdict.winner == verdict_of(values)),
            "first_wrong_step": float(last if wrong is None else wrong // FIELDS_PER_STEP),
        }

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Preferences of the lenient judge, then reflections; fresh pairs in every call.

        The pairs come from a stream of their own, so they are none of a split's except by
        chance. Reflections are ``reflection_share`` of ``count``, rounded up.

        Raises:
            ValueError: Reflections are asked for but the judges write no two analyses of which
                exactly one is right.
        """
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        num_reflections = math.ceil(round(count * self.reflection_share, 9))  # no float dust
        out = [self._preference_demonstration(rng) for _ in range(count - num_reflections)]
        return out + [self._reflection_demonstration(rng) for _ in range(num_reflections)]

    def _preference_demonstration(self, rng: Random) -> Demonstration:
        ids = self._bound()
        case, _ = draw_case(rng, self.shape)
        values = lenient_values(rng, case, self.shape.base, self.noise)
        slot = verdict_of(values)
        if self.slot_bias and slot == 2 and rng.random() < self.slot_bias:
            slot = 1
        verdict = ids.verdicts["pref"][slot - 1]
        return Demonstration(
            prompt_ids=(*ids.question(case), ids.asks["pref"]),
            completion_ids=(*ids.lines((0,), (values,)), verdict, self.tokenizer.eos_token_id),
            domain="pref",
        )

    def _reflection_demonstration(self, rng: Random) -> Demonstration:
        """Both analyses are drawn alike, so their order is random without a further coin."""
        ids, base = self._bound(), self.shape.base
        for _ in range(MAX_TRIES):
            case, _ = draw_case(rng, self.shape)
            first, second = (either_values(rng, case, base, self.noise) for _ in range(2))
            slot = better_slot(case, first, second, base)
            if slot is not None:
                break
        else:
            raise ValueError(
                f"no reflection demonstration in {MAX_TRIES} draws: the judges (almost) never "
                "differ with these settings; raise data.task.broad_mark or set "
                "data.task.reflection_share=0"
            )
        position = first_difference(first, second) or 0  # never None here: a slot is better
        step, end = ids.steps[position // FIELDS_PER_STEP], self.tokenizer.eos_token_id
        right = ids.table(position)[(first, second)[slot - 1][position]]
        return Demonstration(
            prompt_ids=tuple(self._reflection_ids(case, (first, second))),
            completion_ids=(step, right, ids.verdicts["refl"][slot - 1], end),
            domain="refl",
        )


def _order(pair: Pair) -> str:
    return "21" if pair.swapped else "12"
