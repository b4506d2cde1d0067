"""Optional plans: golden cases of both readers, fuzz, and spans that agree with decoded text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import Pair
from datamodules.tasks.chat_prompts import Chat, answer_part
from datamodules.tasks.planning import (
    Kind,
    Mode,
    PlannedTask,
    PlannedText,
    decoded_spans,
    read_plan_ids,
    read_plan_text,
)
from datamodules.tasks.verdict_format import token_ids, token_text
from lightning_modules.backbones.tiny import byte_tokenizer, word_tokenizer

WORDS = ["<think>", "</think>", "a", "b", "c"]
#: Words, then span, plan tokens, content, content tokens, has plan, error.
GOLDEN = [
    ("a b", (0, 0), 0, "a b", 2, False, None),
    ("<think> a b </think> c", (0, 4), 2, "c", 1, True, None),
    ("<think> a </think> b c", (0, 3), 1, "b c", 2, False, None),
    ("<think> </think> b c", (0, 2), 0, "b c", 2, False, None),
    ("<think> a b </think>", (0, 4), 2, "", 0, True, "empty"),
    ("<think> </think>", (0, 2), 0, "", 0, False, "empty"),
    ("", (0, 0), 0, "", 0, False, "empty"),
    ("<think> a b", (0, 0), 0, "", 0, False, "unclosed"),
    ("a <think>", (0, 0), 0, "", 0, False, "unclosed"),
    ("<think> a <think> b </think> </think> c", (0, 0), 0, "", 0, False, "nested"),
    ("<think> a <think> b", (0, 0), 0, "", 0, False, "nested"),
    ("<think> a b </think> c <think> a b </think> c", (0, 0), 0, "", 0, False, "second_span"),
    ("<think> a b </think> c <think>", (0, 0), 0, "", 0, False, "second_span"),
    ("<think> a b </think> c </think>", (0, 0), 0, "", 0, False, "stray_close"),
    ("a </think> b", (0, 0), 0, "", 0, False, "stray_close"),
    ("</think> <think> a", (0, 0), 0, "", 0, False, "stray_close"),
    ("a <think> b c </think> c", (0, 0), 0, "", 0, False, "late_span"),
]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case[0] or "nothing")
def test_golden_cases_of_both_readers(case: tuple[Any, ...]) -> None:
    text, *expected = case
    tokenizer = word_tokenizer(WORDS)
    ids = token_ids(tokenizer, text)
    for end in ([], [tokenizer.eos_token_id]):  # an engine may keep the end token for itself
        by_ids, by_text = read_both(tokenizer, ids + end)
        assert by_ids == PlannedText(*expected) == by_text


def read_both(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], is_finished: bool = True
) -> tuple[PlannedText, PlannedText]:
    known = tokenizer.get_vocab()
    by_ids = read_plan_ids(
        ids,
        (known["<think>"], known["</think>"]),
        decode=lambda some: token_text(tokenizer, some),
        is_finished=is_finished,
        ends=(tokenizer.eos_token_id,),
        min_plan_tokens=2,
    )
    return by_ids, read_plan_text(ids, tokenizer, is_finished=is_finished, min_plan_tokens=2)


def test_what_did_not_end_is_no_text_but_is_counted() -> None:
    tokenizer = word_tokenizer(WORDS)
    for text, *expected in GOLDEN:
        wanted = replace(PlannedText(*expected), content="", error="unfinished")
        assert read_both(tokenizer, token_ids(tokenizer, text), False) == (wanted, wanted)


def test_both_readers_agree_on_random_words() -> None:
    tokenizer, rng = word_tokenizer(WORDS), Random(0)
    errors = set()
    for _ in range(600):
        words = rng.choices(WORDS, (1, 1, 1, 1, 1), k=rng.randrange(9))
        by_ids, by_text = read_both(tokenizer, token_ids(tokenizer, " ".join(words)))
        assert by_ids == by_text, words
        errors.add(by_ids.error)
    assert errors == {e for *_, e in GOLDEN}


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens run across tags, spaces and letters."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    corpus = ["k>a", "k>ba", "k>b", "k> a", "a</", "b<th", "<think>ab</think>ab"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As of Llama: spaces at the start of words, the first one stripped, bytes for the rest."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"abc<>/think", "\u2581", "\u2581a", "\n"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("\u2581", "a")]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer, "merging": merging_tokenizer, "llama": fallback_tokenizer}
PIECES = ["a", "b", "ba", " ", "\n", "\U0001f600", "\u4f60", ">", "</", "a>a", "c c"]


def random_text(rng: Random, k: int) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(k)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_of_real_tokenizers_agree_with_the_decoded_text(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind](), Random(1)
    straddled = 0
    for _ in range(300):
        blank, plan, rest = rng.choice(["", " ", "\n"]), random_text(rng, 9), random_text(rng, 9)
        ids = token_ids(tokenizer, f"{blank}<think>{plan}</think>{rest}")
        text = token_text(tokenizer, ids)
        read = read_plan_text(ids, tokenizer, is_finished=True, min_plan_tokens=1)
        assert read.error == (None if rest.strip() else "empty"), text
        assert read.content == rest.strip() == answer_part(text)
        assert read.has_plan == bool(plan.strip()) == (read.plan_tokens > 0)
        assert (read.content_tokens > 0) == bool(rest.strip())
        start, stop = read.plan_span
        span = f"<think>{plan}</think>"
        decode = lambda some: token_text(tokenizer, some)  # noqa: E731
        assert span in decode(ids[start:stop])
        assert span not in decode(ids[start + 1 : stop]), "one token too many in front"
        assert span not in decode(ids[start : stop - 1]), "one token too many behind"
        is_whole = decode(ids[:stop]).endswith("</think>")
        straddled += not is_whole
        if is_whole:
            assert decode(ids[stop:]).strip() == read.content
            tokens = [t for t in ids[stop:] if decode([t]).strip()]
            assert read.content_tokens == len(tokens)
    assert (straddled > 5) == (kind == "merging")


def test_tokens_that_hold_a_tag_and_words_count_for_both() -> None:
    tokenizer = merging_tokenizer()
    ids = token_ids(tokenizer, "<think>ab</think>ab")
    assert len(ids) == 1, "the corpus made one token of it"
    read = read_plan_text(ids, tokenizer, is_finished=True, min_plan_tokens=1)
    assert read == PlannedText((0, 1), 1, "ab", 1, True, None)


def test_plans_of_eight_tokens_by_default_and_other_tags() -> None:
    tokenizer = byte_tokenizer()
    for plan, has_plan in (("1234567", False), ("12345678", True), ("1 2 3 4\n 5 6 7", False)):
        ids = token_ids(tokenizer, f"<think>{plan}</think>text")
        assert read_plan_text(ids, tokenizer, is_finished=True).has_plan == has_plan
    ids = token_ids(tokenizer, "[[12345678]]text <think>")
    read = read_plan_text(ids, tokenizer, is_finished=True, tags=("[[", "]]"))
    assert read == PlannedText((0, 12), 8, "text <think>", 11, True, None)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_decoded_spans_are_those_of_decoded_prefixes(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind](), Random(2)
    decode = lambda some: token_text(tokenizer, some)  # noqa: E731
    for _ in range(200):
        ids = token_ids(tokenizer, random_text(rng, 12))
        text = decode(ids)
        spans = decoded_spans(ids, decode, text)
        assert len(spans) == len(ids)
        assert (spans[-1][1] if spans else 0) == len(text)
        for place, (start, end) in enumerate(spans, start=1):
            whole = decode(ids[:place])
            if "\ufffd" not in whole:
                assert (text[:end], text[start:end]) == (whole, whole[start:])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_ids_never_raise(kind: str) -> None:
    tokenizer, rng = TOKENIZERS[kind](), Random(3)
    odd = [-1, 10**6, 2**40]
    tags = [*token_ids(tokenizer, "<think>"), *token_ids(tokenizer, "</think>")]
    for number in range(300):
        ids = rng.choices(range(len(tokenizer)), k=rng.randrange(30))
        ids += tags[: rng.randrange(len(tags) + 1)] + ids[:3]
        ids += [rng.choice(odd)] if number % 5 == 0 else []
        read = read_plan_text(ids, tokenizer, is_finished=number % 7 > 0)
        assert isinstance(read, PlannedText)
        assert (read.content == "") == (read.error is not None)
        assert 0 <= read.plan_span[0] <= read.plan_span[1] <= len(ids)
    assert read_plan_text([-1], tokenizer, is_finished=True).error == "undecodable"


def test_a_decoder_that_fails_is_an_error() -> None:
    def decode(ids: Sequence[int]) -> str:
        raise KeyError(ids[0])

    read = read_plan_ids([1, 2], (8, 9), decode=decode, is_finished=True)
    assert read == PlannedText(error="undecodable")


class Bare(PlannedTask):
    """A planned task without a judge in code."""

    name = "bare"

    def records(self, split: Any) -> list[str]:
        return ["x"]

    def prompt(self, record: str) -> Prompt:
        return Prompt(record, (0,), self)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        return {"reward": 0.0}

    def read_plan(self, prompt: Prompt, completion: Completion) -> PlannedText:
        return PlannedText()

    def kind(self, prompt: Prompt) -> Kind:
        return "long"

    def conversation(self, prompt: Prompt, completion: Completion) -> tuple[Chat, str]:
        return (), ""

    def plan_prefix(self, mode: Mode) -> tuple[int, ...]:
        return ()


def test_without_a_judge_in_code() -> None:
    with pytest.raises(ValueError, match=r"task 'bare' cannot .* reward=judge"):
        Bare().compare(Pair("u", "q", ("a", "b")))
