"""Texts that contradict what a model remembers, from files in the shapes of two benchmarks.

    ConflictQA   question, memory_answer and its evidence, counter_answer and its evidence,
                 ground_truth (names of the true answer) [third-party code and readme]
    FaithEval    question, context that is counterfactual, choices, answerKey [third-party code]
    our own      context, slots: a list of {key, value, prior, aliases, question}

The text is the counter evidence or the context, its slot the answer to the question: the value is
the counter answer, the prior what a model remembers. Decoded texts are read by comparing strings
without case, punctuation and articles [card, section 2.1]; a judge for what they miss is not here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.row_options import RowOptions
from datamodules.tasks.compression import (
    CompressionTask,
    Context,
    ContextSet,
    Probe,
    Slot,
    Split,
)

ROLES = {
    "context": Role(
        ("counter_memory_aligned_evidence", "counter_evidence", "counter_memory", "context",
         "passage", "text")
    ),
    "memory": Role(
        ("parametric_memory_aligned_evidence", "memory_evidence", "parametric_memory"), False
    ),
    "question": Role(("question", "query"), False),
    "answer": Role(("counter_answer", "answer"), False),
    "prior": Role(("memory_answer", "prior_answer", "prior", "original_answer"), False),
    "truth": Role(("ground_truth", "aliases"), False),
    "choices": Role(("choices", "options"), False),
    "answer_key": Role(("answerKey", "answer_key"), False),
    "slots": Role(("slots", "facts"), False),
}  # fmt: skip
ARTICLES = {"a", "an", "the"}
FILLERS = ARTICLES | {"is", "was", "are", "were", "of", "s", "in", "it", "to", "that", "answer"}
_Names = tuple[tuple[str, ...], tuple[str, ...]]


def normalise(text: str) -> list[str]:
    """Words of a text without case, punctuation and articles.

    Args:
        text: Any text.

    Example:
        >>> normalise("The Moon, made of CHEESE!")
        ['moon', 'made', 'of', 'cheese']
    """
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ARTICLES]


def core(answer: str, question: str) -> str:
    """An answer without the words at its ends that only repeat the question.

    ConflictQA's memory answers are sentences; a text that keeps the fact rarely keeps the sentence
    [our choice].

    Args:
        answer: A phrase or a sentence.
        question: What it answers.

    Returns:
        The rest; the whole answer where nothing is left.

    Example:
        >>> core("Rankin's occupation is a photographer.", "What is Rankin's occupation?")
        'photographer'
    """
    known = {*normalise(question), *FILLERS}
    words = normalise(answer)
    while words and words[0] in known:
        words = words[1:]
    while words and words[-1] in known:
        words = words[:-1]
    return " ".join(words or normalise(answer))


@dataclass(frozen=True)
class _Fact:
    """A slot and the strings that count as its value and as its prior."""

    slot: Slot
    values: tuple[str, ...]
    priors: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class ConflictRecord:
    """One row of a file.

    Args:
        context: The counterfactual text.
        memory: The text that agrees with the prior; None where the row has none.
        others: Slot key -> other answers that a decoded text may give.
        names: Uid of either text and slot key -> strings that count as (value, prior).
        unmatched: Facts whose value the text does not hold word by word: no slots.
    """

    context: Context
    memory: Context | None
    others: Mapping[str, tuple[str, ...]]
    names: Mapping[tuple[str, str], _Names]
    unmatched: int


class ConflictFile(RowOptions, CompressionTask):
    """Counterfactual texts of a file, split by a hash of the text; ``predict`` is the whole file.

    A fact whose value does not stand in its text word by word is asked for (``probes``) but is no
    slot, since a perfect copy would not be read as one: ``counts['unmatched']``.

    Args:
        **options: Of ``RowOptions``: ``path`` and the rest. ``columns`` renames the roles
            ``context``, ``memory``, ``question``, ``answer``, ``prior``, ``truth``, ``choices``,
            ``answer_key`` and ``slots``.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> task = ConflictFile(path="conflictQA-popQA-chatgpt.json", format="jsonl")
    """

    name = "conflict_file"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.file: PromptFile[ConflictRecord] = PromptFile(
            roles=ROLES,
            make_record=make_record,
            key_of=lambda record: record.context.text,
            **options,
        )
        self._records: dict[str, ConflictRecord] = {}

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows: ``PromptFile.counts``, and ``unmatched`` facts so far."""
        records = {id(record): record for record in self._records.values()}
        unmatched = sum(record.unmatched for record in records.values())
        return Counter({**self.file.counts, "unmatched": unmatched})

    def contexts(self, split: Split) -> Sequence[Context]:
        """Counterfactual texts of a split; in ``train`` also those that agree with the prior.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or no row is usable.
        """
        records = self._of(split)
        agreeing = [r.memory for r in records if r.memory is not None and split == "train"]
        return [*(record.context for record in records), *agreeing]

    def evaluations(self, split: Split) -> list[ContextSet]:
        """The set ``cf`` and, where rows have evidence for the prior, ``pc``.

        Args:
            split: As in ``contexts``.

        Returns:
            The sets; none where the split has no rows. Texts of one row are no twins: they differ
            in more than the answer.
        """
        records = self._of(split)
        agreeing = [record.memory for record in records if record.memory is not None]
        sets = [("cf", [record.context for record in records]), ("pc", agreeing)]
        return [ContextSet(name, found) for name, found in sets if found]

    def _of(self, split: Split) -> list[ConflictRecord]:
        found = self.file.records(split)
        for record in found:
            for one in (record.context, record.memory):
                if one is not None:
                    self._records[one.uid] = record
        return found

    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """Which answer a text gives: the value, the prior, another choice, or none.

        Args:
            context: The source.
            text: What was decoded. Where it gives both value and prior, the value counts if the
                source holds the prior too, else the fact is lost.
        """
        return {slot.key: self._read(context, slot, text) for slot in context.slots}

    def read_answer(self, context: Context, probe: Probe, text: str) -> str | None:
        """As ``read``, with the question's fact also where it is no slot of the text."""
        return self._read(context, Slot(probe.key, "attribute", probe.answer, probe.prior), text)

    def _read(self, context: Context, slot: Slot, text: str) -> str | None:
        record = self._records.get(context.uid)
        others: tuple[str, ...] = ()
        names: _Names = (slot.value,), ((slot.prior,) if slot.prior else ())
        if record is not None:
            names = record.names.get((context.uid, slot.key), names)
            others = record.others.get(slot.key, ())
        return _given(slot, names, others, context.text, text)


def _given(
    slot: Slot,
    names: _Names,
    others: tuple[str, ...],
    source: str,
    text: str,
) -> str | None:
    answers = {name: slot.value for name in names[0]}
    answers |= {name: slot.prior or "" for name in names[1] if name not in answers}
    answers = {**{name: name for name in others}, **answers}
    given = {answers[name] for name in _longest_first(answers, text)}
    if slot.value in given and len(given) > 1:
        also = {answers[name] for name in _longest_first(answers, source)}
        return slot.value if given <= also else None
    return next(iter(given)) if len(given) == 1 else None


def _longest_first(names: Mapping[str, str], text: str) -> list[str]:
    """Names that a text holds; words of a longer one are not read again."""
    left, found = f" {' '.join(normalise(text))} ", []
    for words, name in sorted(((normalise(n), n) for n in names), key=lambda x: (-len(x[0]), x)):
        if words and (needle := f" {' '.join(words)} ") in left:
            found.append(name)
            left = left.replace(needle, " | ")
    return found


# ---- Rows ----------------------------------------------------------------------------------------


def make_record(fields: Fields) -> ConflictRecord:
    """The record of a row.

    Args:
        fields: The row.

    Raises:
        BadRowError: A field is missing or of the wrong kind, there is no answer, or a slot key
            occurs twice.
    """
    text = fields.text("context").strip()
    choices = _choices(fields)
    facts = _own_slots(fields) if fields.has("slots") else [_asked(fields, choices)]
    others = {fact.slot.key: tuple(choices.values()) for fact in facts}
    context, missing = _context(fields.uid, text, facts, fields.where)
    names = {(context.uid, fact.slot.key): (fact.values, fact.priors) for fact in facts}
    memory = None
    if fields.has("memory") and not fields.has("slots"):
        fact = facts[0]
        if fact.slot.prior is None:
            raise fields.bad("prior", "no_prior", "is missing, but the row has evidence for it")
        slot = replace(fact.slot, value=fact.slot.prior)
        uid = f"{fields.uid}/memory"
        turned = replace(fact, slot=slot, values=fact.priors, priors=fact.priors)
        memory, more = _context(uid, fields.text("memory").strip(), [turned], fields.where)
        others[slot.key] = (*others[slot.key], *fact.values[:1])
        names[uid, slot.key] = (fact.priors, ())
        missing += more
    return ConflictRecord(context, memory, others, names, missing)


def _context(uid: str, text: str, facts: Sequence[_Fact], where: str) -> tuple[Context, int]:
    slots, probes = [], []
    for fact in facts:
        spans = [span for name in fact.values for span in _spans(name, text)]
        if spans:
            slots.append(replace(fact.slot, spans=tuple(dict.fromkeys(spans))))
        if fact.question:
            slot = fact.slot
            probes.append(Probe(fact.question, slot.value, slot.prior, "overwriting", slot.key))
    return Context(uid, text, tuple(slots), tuple(probes), where=where), len(facts) - len(slots)


def _spans(name: str, text: str) -> list[tuple[int, int]]:
    """Where a name stands in a text, up to case, punctuation and articles between its words."""
    words = normalise(name)
    if not words:
        return []
    between = r"\W+(?:(?:a|an|the)\W+)?"
    pattern = rf"(?<!\w){between.join(re.escape(word) for word in words)}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


def _asked(fields: Fields, choices: Mapping[str, str]) -> _Fact:
    """The fact that the row's question asks for."""
    question = fields.text("question").strip()
    if fields.has("answer_key") and choices:
        key = fields.text("answer_key", numbers=True).strip()
        if key not in choices:
            has = ", ".join(choices)
            raise fields.bad("answer_key", "bad_key", f"is {key!r}; the choices are {has}")
        answer = choices[key]
    else:
        answer = fields.text("answer", numbers=True).strip()
    prior = fields.text("prior", numbers=True).strip() if fields.has("prior") else None
    if prior is not None and normalise(prior) == normalise(answer):
        raise fields.bad("prior", "no_conflict", f"is the answer itself ({answer[:40]!r})")
    truth = _texts(fields, "truth", fields.row.values.get(fields.columns.get("truth", "")))
    asked = None if choices else question  # of several sentences on one matter none is shortened
    value_names = _names(answer, asked, truth)
    prior_names = () if prior is None else _names(prior, asked, truth)
    prior_names = tuple(name for name in prior_names if name not in value_names)
    return _Fact(
        Slot("answer", "attribute", answer, prior, name="answer"),
        value_names,
        prior_names,
        question,
    )


def _names(answer: str, question: str | None, truth: Sequence[str]) -> tuple[str, ...]:
    """Strings that count as an answer; those of the truth where the answer is one of them."""
    short = answer if question is None else core(answer, question)
    padded = f" {' '.join(normalise(answer))} "
    is_true = any(f" {' '.join(normalise(one))} " in padded for one in truth if normalise(one))
    return tuple(dict.fromkeys([answer, short, *(truth if is_true else ())]))


def _choices(fields: Fields) -> dict[str, str]:
    """Label -> text; FaithEval has two lists, others a mapping or a list."""
    if not fields.has("choices"):
        return {}
    value = fields.value("choices")
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        labels, texts = value["label"], value["text"]
        is_right = isinstance(labels, list) and isinstance(texts, list)
        is_right = is_right and len(labels) == len(texts)
        value = dict(zip(labels, texts, strict=True)) if is_right else None
    elif isinstance(value, list):
        value = {chr(ord("A") + number): text for number, text in enumerate(value)}
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        need = '{"label": [...], "text": [...]}, a mapping or a list of texts is needed'
        raise fields.bad("choices", "bad_choices", f"cannot be read: {need}")
    return {str(label): text.strip() for label, text in value.items()}


def _own_slots(fields: Fields) -> list[_Fact]:
    value = fields.value("slots")
    if not isinstance(value, list) or not value:
        raise fields.bad("slots", "bad_slots", "is no list of objects with key and value")
    facts: dict[str, _Fact] = {}
    for number, one in enumerate(value, start=1):
        needed = [one.get(name) for name in ("key", "value")] if isinstance(one, dict) else [None]
        if not all(isinstance(each, str) and each.strip() for each in needed):
            raise fields.bad("slots", "bad_slots", f"number {number} needs texts key and value")
        key, prior = str(one["key"]), one.get("prior")
        if key in facts:
            raise fields.bad("slots", "slot_twice", f"has the slot {key!r} twice")
        if prior is not None and not isinstance(prior, str):
            raise fields.bad("slots", "bad_slots", f"number {number}: prior is no text")
        slot = Slot(key, "attribute", one["value"].strip(), prior, name=key.rpartition("/")[2])
        values = (slot.value, *_texts(fields, "slots", one.get("aliases")))
        question = str(one.get("question") or "")
        facts[key] = _Fact(slot, values, (prior,) if prior else (), question)
    return list(facts.values())


def _texts(fields: Fields, role: str, value: Any) -> tuple[str, ...]:
    """None, a text or a list of texts."""
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise fields.bad(role, "not_text", "must be a text or a list of texts")
    return tuple(one.strip() for one in found if one.strip())
