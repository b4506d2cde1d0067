"""Preference pairs from files as a judging task: which response, or which critique, is better.

The texts and the rule by which they are cut stand in ``verdict_format``. The analysis of a response
becomes a critique in the reflection prompt, without its result [our choice].
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.preference_rows import read_preference_pairs
from datamodules.row_options import RowOptions
from datamodules.sources import nearest, stable_hash
from datamodules.tasks.base import Demonstration, JudgeTask, Pair, Split, Verdict
from datamodules.tasks.verdict_format import (
    GENERIC_ANALYSES,
    NOUNS,
    as_chat,
    break_up,
    check_writes_answers,
    control_strings,
    cut_text,
    cut_to_fit,
    format_answer,
    format_question,
    parse_answer,
    token_ids,
    token_text,
)


class PreferencePairs(RowOptions, JudgeTask):
    """Comparisons from a file or data set, split by a hash, judged in text.

    The split ``predict`` is the whole main file in its order, with or without labels, and is read
    apart from the others. Nothing asks for labels before a split that needs them is asked for.

    ``counts`` says what became of every row: ``<source>/rows|pairs|skipped[/<reason>]`` with
    source ``main``, ``val``, ``test`` or ``predict`` (the main file once more), pairs a split,
    ``too_long`` and ``predict/too_long`` (left out by ``on_too_long=skip``), ``cut`` (pairs whose
    response prompt was cut) and ``cut_reflection`` (reflection prompts that were cut).

    Args:
        labels: ``optional`` allows pairs without label outside of ``predict`` too; those always go
            to the train split, for methods that need none.
        max_prompt_tokens: Upper bound of a prompt; longer texts are cut, see
            ``verdict_format``.
        max_new_tokens: Most tokens of an analysis and its verdict; None leaves the module's bound.
        max_analysis_tokens: Upper bound of each critique in a reflection prompt, before the
            common bound; None has only that one.
        control_token: Appended to every prompt, e.g. ``/no_think`` [paper].
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        on_too_long: ``cut``, ``skip`` (leave the pair out) or ``error``. Reflection prompts are
            made on the fly and always cut.
        **options: Of ``RowOptions``; the pairs of one row stay in one split.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "preference_pairs"

    def __init__(
        self,
        *,
        labels: Literal["required", "optional"] = "required",
        max_prompt_tokens: int = 512,
        max_analysis_tokens: int | None = None,
        max_new_tokens: int | None = None,
        control_token: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        on_too_long: Literal["cut", "skip", "error"] = "cut",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.labels = labels
        self.max_prompt_tokens: int = max_prompt_tokens
        self.max_analysis_tokens = max_analysis_tokens
        self.max_new_tokens = max_new_tokens
        self.control_token, self.chat_template = control_token, chat_template
        self.on_too_long = on_too_long
        self.counts: Counter[str] = Counter()
        self._records: dict[Split, list[Pair]] = {}
        self._cut_pairs: set[str] = set()
        self._template_tokens: dict[str, int] = {}
        self._control_strings: list[str] = []
        self._check_options()

    def _check_options(self) -> None:
        allowed = {
            "labels": ("required", "optional"),
            "chat_template": ("auto", "off"),
            "on_bad_row": ("error", "skip"),
            "on_too_long": ("cut", "skip", "error"),
        }
        problems = [
            f"data.task.{key}={value!r}: allowed are {', '.join(options)}{nearest(value, options)}"
            for key, options in allowed.items()
            if (value := getattr(self, key)) not in options
        ]
        problems += self.share_problems()
        for key in ("max_prompt_tokens", "max_analysis_tokens", "max_new_tokens"):
            size = getattr(self, key)
            if size is not None and size < 1:
                problems.append(f"data.task.{key}={size}: 1 or more is needed")
        problems += self.path_problems()
        if problems:
            raise ValueError("\n".join(problems))

    # ---- Records --------------------------------------------------------------------------------

    def records(self, split: Split) -> list[Pair]:
        """All pairs of a split, in file order; read once.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for all pairs of the main file.

        Raises:
            ValueError: The file cannot be read or no pair is left.
        """
        if split not in self._records:
            if split == "predict":
                pairs, counts = self._read_source("predict", self.path, self.split, False)
                self._keep({"predict": pairs}, counts)
            else:
                self._keep(*self._read(label_required=self.labels == "required"))
        return self._records[split]

    def _keep(self, found: dict[Split, list[Pair]], counts: Mapping[str, int]) -> None:
        """Make pairs the records of their splits, without the long ones where so asked."""
        long = self._drop_long(found)
        self._records |= found
        self.counts.update({**counts, **long})
        for split, pairs in found.items():
            self.counts[split] = len(pairs)

    def _read(self, label_required: bool) -> tuple[dict[Split, list[Pair]], dict[str, int]]:
        """The three splits, and what became of the rows of their sources."""
        found: dict[Split, list[Pair]] = {"train": [], "val": [], "test": []}
        pairs, counts = self._read_source("main", self.path, self.split, label_required)
        for pair in pairs:
            # by the row, so that all pairs of one row stay on one side
            split = "train" if pair.label is None else self.split_of(pair.extra["row_uid"])
            found[split].append(pair)
        for split, (path, part) in self.sources.items():
            pairs, more = self._read_source(split, path, part, label_required)
            found[split] += pairs
            counts |= more
        return found, counts

    def _read_source(
        self, name: str, path: str, split: str | None, label_required: bool
    ) -> tuple[list[Pair], dict[str, int]]:
        pairs, counts = read_preference_pairs(
            path,
            columns=self.columns,
            format=self.format,
            split=split,
            on_bad_row=self.on_bad_row,
            max_bad_share=self.max_bad_share,
            label_required=label_required,
        )
        return pairs, {f"{name}/{key}": value for key, value in counts.items()}

    # ---- Tokenizer ------------------------------------------------------------------------------

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer; measure the templates and, where asked, all pairs with it.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: It cannot write the output format, a template alone is longer than
                ``max_prompt_tokens``, or with ``on_too_long=error`` a pair does not fit.
        """
        super().bind(tokenizer)
        check_writes_answers(tokenizer, self.name)
        self._control_strings = control_strings(tokenizer)
        sizes = {kind: len(self._encode(kind, [""] * 5)) for kind in NOUNS}
        longest = max(sizes, key=lambda kind: sizes[kind])
        if sizes[longest] >= self.max_prompt_tokens:
            raise ValueError(
                f"data.task.max_prompt_tokens={self.max_prompt_tokens}: the template of "
                f"'{longest}' prompts alone takes {sizes[longest]} tokens with this tokenizer; "
                f"set at least {2 * sizes[longest]}, so that there is room for texts"
            )
        self._template_tokens = sizes
        if self.on_too_long != "cut":
            self._screen()

    def _screen(self) -> None:
        """Leave out, or refuse, long pairs; a label that is missing is no fault as yet."""
        found = self._records
        self._keep(found, {})
        if "train" not in found:
            found, counts = self._read(label_required=False)
            labelled = all(pair.label for pairs in found.values() for pair in pairs)
            if labelled or self.labels == "optional":
                self._keep(found, counts)
            else:
                self._drop_long(found)
        if not any(found.values()):
            raise ValueError(
                f"{self.path}: every pair is longer than data.task.max_prompt_tokens="
                f"{self.max_prompt_tokens}; raise it or set data.task.on_too_long=cut"
            )

    def _drop_long(self, found: Mapping[Split, list[Pair]]) -> Counter[str]:
        """Leave out, or refuse, the pairs whose prompt would have to be cut, and count them."""
        counts: Counter[str] = Counter()
        if self.on_too_long == "cut" or not self._template_tokens:
            return counts
        for split, pairs in found.items():
            is_long = [self._fit("pref", self._texts(pair))[1] for pair in pairs]
            long = [pair for pair, flag in zip(pairs, is_long, strict=True) if flag]
            if long and self.on_too_long == "error":
                raise ValueError(
                    f"{long[0].extra['where']}: the prompt of pair {long[0].uid!r} is longer than "
                    f"data.task.max_prompt_tokens={self.max_prompt_tokens} (so are {len(long) - 1} "
                    f"more of split {split}); raise it, or set data.task.on_too_long=cut or skip"
                )
            pairs[:] = [pair for pair, flag in zip(pairs, is_long, strict=True) if not flag]
            counts["predict/too_long" if split == "predict" else "too_long"] += len(long)
        return counts

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    # ---- Prompts --------------------------------------------------------------------------------

    def preference_prompt(self, pair: Pair) -> Prompt:
        """Which response is better: domain ``pref``, record = the pair.

        Args:
            pair: The comparison, in either order.
        """
        ids, was_cut = self._fit("pref", self._texts(pair))
        if was_cut:
            self._cut_pairs.add(pair.uid)
            self.counts["cut"] = len(self._cut_pairs)
        uid = f"{pair.uid}:{_order(pair)}:pref"
        return Prompt(uid, ids, self, "pref", pair.label, pair, self.max_new_tokens)

    def reflection_prompt(
        self, pair: Pair, analyses: tuple[str, str], label: int | None = None, uid: str = ""
    ) -> Prompt:
        """Which analysis of the pair is better: domain ``refl``, record = (pair, analyses).

        Args:
            pair: The comparison that both analyses are about.
            analyses: ``Verdict.analysis`` of two parsed outputs, slot 1 first.
            label: Slot of the better analysis where known.
            uid: Identity of the prompt; "" derives it from pair, order and analyses.
        """
        whole = self._harmless(*analyses)
        bound = self.max_analysis_tokens
        kept = [text if bound is None else cut_text(self.tokenizer, text, bound) for text in whole]
        ids, was_cut = self._fit("refl", [*self._texts(pair), *kept])
        self.counts["cut_reflection"] += was_cut or kept != whole
        uid = uid or f"{pair.uid}:{_order(pair)}:refl:{stable_hash(*analyses):016x}"
        return Prompt(uid, ids, self, "refl", label, (pair, analyses), self.max_new_tokens)

    def _texts(self, pair: Pair) -> list[str]:
        return self._harmless(pair.question, *pair.responses)

    def _harmless(self, *texts: str) -> list[str]:
        return [break_up(text, self._control_strings) for text in texts]

    def _encode(self, kind: str, texts: Sequence[str]) -> list[int]:
        text = format_question(kind, texts)
        text = f"{text}{self.control_token}\n" if self.control_token else text
        return self._ids(as_chat(self.tokenizer, text) if self.chat_template == "auto" else text)

    def _fit(self, kind: str, texts: Sequence[str]) -> tuple[tuple[int, ...], bool]:
        """Token ids within ``max_prompt_tokens`` and whether a text had to be cut."""
        if not self._template_tokens:
            raise RuntimeError("bind a tokenizer to the task before making prompts")
        ids = self._encode(kind, texts)
        if len(ids) <= self.max_prompt_tokens:
            return tuple(ids), False
        budget = self.max_prompt_tokens - self._template_tokens[kind]
        encode = partial(self._encode, kind)
        cut = cut_to_fit(self.tokenizer, texts, encode, budget, self.max_prompt_tokens)
        return tuple(cut), True

    # ---- Outputs --------------------------------------------------------------------------------

    def parse(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read the verdict of either kind of prompt by ``parse_answer``. Never raises.

        Args:
            prompt: What was asked; its domain tells the noun.
            completion: What was written; one that did not end by itself is invalid.
        """
        if completion.finish_reason != FinishReason.STOP:
            return Verdict(None, error=f"did not end by itself: {completion.finish_reason}")
        try:
            ids = list(completion.token_ids)
            ends = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
            ids = ids[:-1] if ids and ids[-1] in ends else ids
            text = token_text(self.tokenizer, ids)
        except Exception as error:  # ids outside the vocabulary, in whatever way they fail
            return Verdict(None, error=f"token ids that do not decode: {type(error).__name__}")
        return parse_answer(text, prompt.domain)

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Examples of the output format from the train split, half of them reflections.

        They teach the grammar, not judging: the analyses are generic, only the verdict is the
        pair's. A pure function of its arguments; empty where no train pair has a label.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        pairs = [pair for pair in self.records("train") if pair.label is not None]
        rng = random.Random(f"demonstrations:{seed}:{step}")
        return [
            self._demonstrate(rng.choice(pairs), "refl" if index % 2 else "pref", rng)
            for index in range(count if pairs else 0)
        ]

    def _demonstrate(self, pair: Pair, kind: str, rng: random.Random) -> Demonstration:
        pair = pair.swap() if rng.random() < 0.5 else pair
        assert pair.label is not None
        winner = pair.label
        if kind == "pref":
            prompt = self.preference_prompt(pair)
        else:
            winner = rng.choice((1, 2))
            sides = (pair.label, 3 - pair.label) if winner == 1 else (3 - pair.label, pair.label)
            first, second = (rng.choice(GENERIC_ANALYSES).format(f"Response {s}") for s in sides)
            prompt = self.reflection_prompt(pair, (first, second), winner)
        analysis = rng.choice(GENERIC_ANALYSES).format(f"{NOUNS[kind]} {winner}")
        ids = self._ids(format_answer(kind, analysis, winner))
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return Demonstration(prompt.token_ids, tuple(ids), kind)


def _order(pair: Pair) -> str:
    return "21" if pair.swapped else "12"
