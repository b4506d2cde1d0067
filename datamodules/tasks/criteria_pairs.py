"""Preference pairs from files, judged under criteria: the data of AC-GenRM in text.

Files, splits and the rule by which long texts are cut are those of ``preferences``; texts and
parsers stand in ``criteria_format``. Criteria are cut like any other text of a prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.sources import stable_hash
from datamodules.tasks.base import Demonstration, Pair, Verdict
from datamodules.tasks.criteria import CRITERIA, JUDGEMENT, Criteria, CriteriaJudgeTask
from datamodules.tasks.criteria_format import (
    GENERIC_COMPARISONS,
    GENERIC_CRITERIA,
    MAX_ITEMS,
    SLOTS,
    WeightedCriteria,
    ask_criteria,
    ask_judgement,
    find_verdict,
    list_criteria,
    parse_criteria,
    parse_judgement,
    write_criteria,
    write_judgement,
)
from datamodules.tasks.planning import decoded_spans
from datamodules.tasks.preferences import PreferencePairs
from datamodules.tasks.verdict_format import as_chat, token_text

#: One list for all queries, good for any text [our choice].
STATIC_CRITERIA = ("fit to the query", "clarity", "originality", "style", "feeling")
PLAIN = "plain"  # a judgement prompt without criteria: a template of its own, domain JUDGEMENT
WEIGHTS = "criteria_weights"  # key of ``Pair.extra`` in the record of a judgement prompt
# What the base class calls the kinds that it measures and screens.
_KINDS = {"pref": JUDGEMENT, "refl": CRITERIA}


class CriteriaPairs(PreferencePairs, CriteriaJudgeTask):
    """Comparisons from a file or data set, judged under criteria.

    The record of a judgement prompt is the pair; its ``extra`` has the weights of the criteria,
    which the parser needs where a verdict is missing. ``counts`` as in ``PreferencePairs``, with
    ``cut_query`` (criteria prompts that were cut) in place of ``cut_reflection``.

    Args:
        static_criteria: Names of the criteria that ``criteria_mode=static`` judges by, of equal
            weight; None for ``STATIC_CRITERIA``.
        min_criteria: Fewest criteria of a list that parses.
        max_criteria: Most, 8 or fewer.
        max_criteria_tokens: Most tokens of written criteria; None leaves the module's bound.
        max_prompt_tokens: As in ``PreferencePairs``; twice its default, as criteria take room.
        **options: Of ``PreferencePairs``: ``max_new_tokens`` is that of a judgement;
            ``max_analysis_tokens`` must stay None, as there are no reflections;
            ``on_too_long=skip`` and ``error`` look at judgements under the static criteria, and
            longer criteria are always cut.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "criteria_pairs"

    def __init__(
        self,
        *,
        static_criteria: Sequence[str] | None = None,
        min_criteria: int = 3,
        max_criteria: int = 6,
        max_criteria_tokens: int | None = None,
        max_prompt_tokens: int = 1024,
        **options: Any,
    ) -> None:
        names = STATIC_CRITERIA if static_criteria is None else tuple(static_criteria)
        self.static_names = tuple(" ".join(str(name).split()) for name in names)
        self.min_criteria, self.max_criteria = min_criteria, max_criteria
        self.max_criteria_tokens = max_criteria_tokens
        self._cut_queries: set[str] = set()
        super().__init__(max_prompt_tokens=max_prompt_tokens, **options)

    def _check_options(self) -> None:
        names, least, most = self.static_names, self.min_criteria, self.max_criteria
        problems = []
        if not 1 <= len(names) <= MAX_ITEMS or not all(names) or len(set(names)) < len(names):
            problems.append(
                f"data.task.static_criteria={list(names)}: 1 to {MAX_ITEMS} different names are "
                "needed; null for the usual ones"
            )
        if not 1 <= least <= most <= MAX_ITEMS:
            problems.append(
                f"data.task.min_criteria={least}, data.task.max_criteria={most}: at least 1, at "
                f"most {MAX_ITEMS}, and the first not above the second"
            )
        if self.max_criteria_tokens is not None and self.max_criteria_tokens < 1:
            size = self.max_criteria_tokens
            problems.append(f"data.task.max_criteria_tokens={size}: 1 or more is needed")
        if self.max_analysis_tokens is not None:
            problems.append(
                f"data.task.max_analysis_tokens={self.max_analysis_tokens}: this task has no "
                "reflections; leave it null"
            )
        try:
            super()._check_options()
        except ValueError as error:
            problems.insert(0, str(error))
        if problems:
            raise ValueError("\n".join(problems))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer; measure the templates and, where asked, all pairs with it.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: As in ``PreferencePairs``.
        """
        self.tokenizer = tokenizer
        sizes = {kind: len(self._encode(kind, [""] * 4)) for kind in (CRITERIA, JUDGEMENT, PLAIN)}
        longest = max(sizes, key=lambda kind: sizes[kind])
        if sizes[longest] >= self.max_prompt_tokens:
            raise ValueError(
                f"data.task.max_prompt_tokens={self.max_prompt_tokens}: the template of "
                f"'{longest}' prompts alone takes {sizes[longest]} tokens with this tokenizer; "
                f"set at least {2 * sizes[longest]}, so that there is room for texts"
            )
        super().bind(tokenizer)
        self._template_tokens |= sizes

    # ---- Prompts ---------------------------------------------------------------------------------

    def _encode(self, kind: str, texts: Sequence[str]) -> list[int]:
        """Texts are the query, both responses and the criteria, as far as a kind has them."""
        kind = _KINDS.get(kind, kind)
        if kind == CRITERIA:
            text = ask_criteria(texts[0], self.min_criteria, self.max_criteria)
        else:
            text = ask_judgement(texts[0], texts[1:3], None if kind == PLAIN else texts[3])
        text = f"{text}{self.control_token}\n" if self.control_token else text
        return self._ids(as_chat(self.tokenizer, text) if self.chat_template == "auto" else text)

    def _texts(self, pair: Pair) -> list[str]:
        """What is measured of a pair: a judgement under the static criteria."""
        return self._harmless(pair.question, *pair.responses, self.static_criteria.text)

    def criteria_prompt(self, question: str) -> Prompt:
        """Which criteria a text for this query must meet: domain ``criteria``, record = question.

        Args:
            question: The query; nothing else goes into uid and tokens.
        """
        ids, was_cut = self._fit(CRITERIA, self._harmless(question))
        uid = f"{self.name}:{CRITERIA}:{stable_hash(question):016x}"
        if was_cut:
            self._cut_queries.add(uid)
            self.counts["cut_query"] = len(self._cut_queries)
        return Prompt(
            uid, ids, self, CRITERIA, record=question, max_new_tokens=self.max_criteria_tokens
        )

    @property
    def static_criteria(self) -> WeightedCriteria:
        """One list for all queries, of equal weights and without meanings."""
        return list_criteria([(name, "", 1 / len(self.static_names)) for name in self.static_names])

    def judgement_prompt(self, pair: Pair, criteria: Criteria | None) -> Prompt:
        """Which text is better under criteria: domain ``judgement``, record = the pair.

        Args:
            pair: The comparison, in either order.
            criteria: Any; those without weights weigh alike. None, or one without text, for none.
        """
        texts = self._harmless(pair.question, *pair.responses)
        extra = {key: value for key, value in pair.extra.items() if key != WEIGHTS}
        kind, asked = PLAIN, "none"
        if criteria is not None and criteria.text:
            kind, asked = JUDGEMENT, f"{stable_hash(criteria.text):016x}"
            texts += self._harmless(criteria.text)
            own = criteria.weights if isinstance(criteria, WeightedCriteria) else ()
            extra[WEIGHTS] = own or (1.0,) * len(criteria.names)
        ids, was_cut = self._fit(kind, texts)
        if was_cut:
            self._cut_pairs.add(pair.uid)
            self.counts["cut"] = len(self._cut_pairs)
        order = "21" if pair.swapped else "12"
        return Prompt(
            uid=f"{pair.uid}:{order}:{JUDGEMENT}:{asked}",
            token_ids=ids,
            task=self,
            domain=JUDGEMENT,
            label=pair.label,
            record=replace(pair, extra=extra),
            max_new_tokens=self.max_new_tokens,
        )

    def preference_prompt(self, pair: Pair) -> Prompt:
        """The judgement prompt without criteria.

        Args:
            pair: The comparison, in either order.
        """
        return self.judgement_prompt(pair, None)

    def reflection_prompt(
        self, pair: Pair, analyses: tuple[str, str], label: int | None = None, uid: str = ""
    ) -> Prompt:
        """There are none.

        Raises:
            ValueError: Always.
        """
        return CriteriaJudgeTask.reflection_prompt(self, pair, analyses, label, uid)

    # ---- Outputs ---------------------------------------------------------------------------------

    def _written(self, completion: Completion) -> tuple[list[int], str, str | None]:
        """Token ids without the end token, their text, and what is wrong."""
        if completion.finish_reason is not FinishReason.STOP:
            return [], "", f"did not end by itself: {completion.finish_reason}"
        try:
            ids = list(completion.token_ids)
            ends = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
            ids = ids[:-1] if ids and ids[-1] in ends else ids
            return ids, token_text(self.tokenizer, ids), None
        except Exception as error:  # ids outside the vocabulary, in whatever way they fail
            return [], "", f"token ids that do not decode: {type(error).__name__}"

    def parse_criteria(self, prompt: Prompt, completion: Completion) -> WeightedCriteria:
        """Read criteria by ``criteria_format.parse_criteria``. Never raises.

        Args:
            prompt: What was asked; a judgement prompt has no criteria.
            completion: What was written; one that did not end by itself does not parse.
        """
        if prompt.domain != CRITERIA:
            return WeightedCriteria(error=f"prompts of domain {prompt.domain!r} have no criteria")
        _, text, error = self._written(completion)
        if error is not None:
            return WeightedCriteria(error=error)
        return parse_criteria(text, self.min_criteria, self.max_criteria)

    def parse(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read a verdict by ``criteria_format.parse_judgement``. Never raises.

        Args:
            prompt: What was asked; a criteria prompt has no verdict.
            completion: What was written; one that did not end by itself is invalid.
        """
        if prompt.domain == CRITERIA:  # a mixture names the other domain itself
            return Verdict(None, error=f"prompts of domain {prompt.domain!r} have no verdict")
        _, text, error = self._written(completion)
        if error is not None:
            return Verdict(None, error=error)
        return parse_judgement(text, getattr(prompt.record, "extra", {}).get(WEIGHTS, ()))

    def verdict_margin(self, prompt: Prompt, completion: Completion) -> float | None:
        """Log-odds (nats) of slot 1 against slot 2 at the letter of the last verdict.

        A slot has the mass of all candidates that are its letter, with white space around it or
        not. None also where the verdict came from the scores, and where the letter shares its
        token with other characters [our choice: that token says more than the slot].

        Args:
            prompt: What was asked.
            completion: What was written, with candidates.
        """
        table = completion.candidates
        if table is None or not table.ids.numel() or self.parse(prompt, completion).winner is None:
            return None
        ids, text, _ = self._written(completion)
        verdict = find_verdict(text)
        if verdict is None:
            return None
        place = verdict.start(1)
        spans = decoded_spans(ids, partial(token_text, self.tokenizer), text)
        found = [n for n, (start, stop) in enumerate(spans) if start <= place < stop]
        if len(found) != 1 or found[0] >= len(table):
            return None
        start, stop = spans[found[0]]
        if text[start:stop].strip() != verdict.group(1):
            return None
        return self._log_odds(table.ids[found[0]].tolist(), table.logprobs[found[0]])

    def _log_odds(self, tokens: Sequence[int], logprobs: Tensor) -> float | None:
        """Nats of letter A against letter B among candidates ``(C,)``."""
        try:
            letters = [token_text(self.tokenizer, [token]).strip() for token in tokens]
        except Exception:  # an id that the model has and the tokenizer has not
            return None
        values = []
        for slot in SLOTS:
            own = torch.tensor([letter == slot for letter in letters], dtype=torch.bool)
            kept = logprobs[own] if own.any() else logprobs.min()[None]
            values.append(float(kept.logsumexp(0)))
        margin = values[0] - values[1]
        return None if math.isnan(margin) else margin  # a filter may leave both nothing

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Examples of both formats from the train split, half of them criteria.

        They teach the grammar, not judging: criteria and comparisons are generic, only the verdict
        is the pair's. A pure function of its arguments; empty where no train pair has a label.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        return super().demonstrations(seed, step, count)

    def _demonstrate(self, pair: Pair, kind: str, rng: random.Random) -> Demonstration:
        # short lists: a tiny model has to write every byte of them
        size = rng.randint(self.min_criteria, min(self.min_criteria + 1, self.max_criteria))
        cuts = [0, *sorted(rng.sample(range(1, 10), size - 1)), 10]  # weights are tenths
        drawn = sorted(rng.sample(range(len(GENERIC_CRITERIA)), size))  # in order: none comes twice
        items = [
            (*GENERIC_CRITERIA[index], (cuts[place + 1] - cuts[place]) / 10)
            for place, index in enumerate(drawn)
        ]
        if _KINDS[kind] == CRITERIA:
            prompt, said = self.criteria_prompt(pair.question), write_criteria(items)
        else:
            pair = pair.swap() if rng.random() < 0.5 else pair
            assert pair.label is not None
            own = list_criteria(items)
            criteria = rng.choice([None, self.static_criteria, own, own])
            prompt = self.judgement_prompt(pair, criteria)
            lines = []
            for _ in criteria.names if criteria else range(1):
                high, why = rng.randint(5, 10), rng.choice(GENERIC_COMPARISONS)
                scores = high, rng.randint(1, high - 1)
                first, second = scores if pair.label == 1 else scores[::-1]
                lines.append((why.format(SLOTS[pair.label - 1]), first, second))
            said = write_judgement(lines, pair.label)
        ids = self._ids(said)
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return Demonstration(prompt.token_ids, tuple(ids), prompt.domain)
