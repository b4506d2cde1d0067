"""Questions as tensors: labels on answers alone, one EOS, a choice that nothing else decides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from datamodules.context_encoding import ContextEncoding
from datamodules.contexts import ContextDataModule, ContextTrainingSource
from datamodules.question_encoding import choose_probes, encode_questions
from datamodules.tasks.compression import Context, Probe, Slot
from datamodules.tasks.prior_world import PriorWorld
from datamodules.tasks.twin_nouns import TwinNouns
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer

WORDS = ["what", "who", "a1", "b2", "red", "dark", "v3", "n0"]
PROBES = [Probe("what a1 b2", "dark red"), None, Probe("who v3", "n0")]


def test_labels_are_the_answer_and_one_eos() -> None:
    tokenizer = word_tokenizer(WORDS)
    found = encode_questions(tokenizer, PROBES, ["x", "y", "z"])
    eos = tokenizer.eos_token_id
    rows = [ids[mask].tolist() for ids, mask in zip(found[2], found[3], strict=True)]
    assert [tokenizer.decode(row[:-1]) for row in rows] == ["dark red", "", "n0"]
    assert [row[-1:] for row in rows] == [[eos], [], [eos]]
    assert [row.count(eos) for row in rows] == [1, 0, 1]
    asked = [ids[mask] for ids, mask in zip(found[0], found[1], strict=True)]
    assert [tokenizer.decode(ids) for ids in asked] == ["what a1 b2", "", "who v3"]
    assert found.question_ids.shape == (3, 3) and found.answer_ids.shape == (3, 3)
    assert found.fact_mask.sum(1).tolist() == [2, 0, 1]
    assert not (found.fact_mask & (found.answer_ids == eos)).any()
    assert all(ids.dtype == torch.long for ids in (found.question_ids, found.answer_ids))
    assert (found.answer_ids[~found.answer_mask] == tokenizer.pad_token_id).all()
    assert found.to("meta").answer_mask.is_meta


def test_padding_of_the_same_id_as_eos_is_no_label() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    found = encode_questions(tokenizer, PROBES, ["x", "y", "z"])
    is_end = found.answer_ids == tokenizer.eos_token_id
    assert is_end.sum() > 2 and (is_end & found.answer_mask).sum(1).tolist() == [1, 0, 1]


def test_a_batch_without_questions_is_empty() -> None:
    found = encode_questions(word_tokenizer(WORDS), [None, None], ["x", "y"])
    assert [tuple(value.shape) for value in found] == [(2, 0)] * 5
    assert found.answer_ids.dtype == torch.long and found.answer_mask.dtype == torch.bool


@pytest.mark.parametrize("probe", [Probe("what <eos>", "red"), Probe("what", "red <eos>")])
def test_an_eos_inside_is_refused(probe: Probe) -> None:
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer.eos_token == "<eos>"
    with pytest.raises(ValueError, match=r"u7: the question .* holds the EOS token '<eos>'"):
        encode_questions(tokenizer, [probe], ["u7"])


def test_which_question_goes_by_the_key_and_the_text_alone() -> None:
    probes = [[Probe(f"q{i}/{n}", "a") for n in range(3)] for i in range(300)]
    uids = [f"u{i}" for i in range(300)]
    first = choose_probes(probes, uids, "qa/5")
    assert choose_probes(probes, uids, "qa/5") == first
    rows = list(range(299, -1, -2))  # another rank, another order
    assert choose_probes([probes[i] for i in rows], [uids[i] for i in rows], "qa/5") == [
        first[i] for i in rows
    ]
    numbers = Counter(probe.question[-1] for probe in first if probe)
    assert set(numbers) == {"0", "1", "2"} and min(numbers.values()) > 70
    other = choose_probes(probes, uids, "qa/6")
    assert 0.2 < sum(a == b for a, b in zip(first, other, strict=True)) / 300 < 0.5
    assert choose_probes([[]], ["u"], "k") == [None]


def test_batches_carry_the_questions_of_their_texts() -> None:
    task = TwinNouns(num_train=64, num_val=2, num_test=2)
    data = ContextDataModule(task=task, batch_size=8)
    data.bind(word_tokenizer(task.vocabulary()))
    batch = ContextTrainingSource(data).batch(0, 1)
    known = {context.uid: context.probes for context in task.contexts("train")}
    assert batch.probes == [known[uid] for uid in batch.uids]
    assert {len(own) for own in batch.probes} == {2}
    assert batch.to("cpu").probes == batch.probes
    assert "probes" not in batch.state()


def test_questions_behind_a_cut_are_gone() -> None:
    slots = (Slot("a", "attribute", "red", None, ((0, 3),)), Slot("b", "attribute", "n0", None,
             ((9, 11),)))  # fmt: skip
    probes = (Probe("what a1", "red", key="a"), Probe("what b2", "n0", key="b"))
    encoding = ContextEncoding(max_tokens=2, on_too_long="cut")
    tokenizer = word_tokenizer(WORDS)
    encoding.bind(tokenizer, tokenizer, [])
    batch = encoding.batch([Context("u", "red dark n0", slots, probes)])
    assert batch.probes == [probes[:1]]


@pytest.mark.parametrize(
    "task", [TwinNouns(relations=1), PriorWorld(num_val=2, num_test=2, num_numbers=3)]
)
def test_worlds_have_words_for_their_questions(task: Any) -> None:
    tokenizer = word_tokenizer(task.vocabulary())
    for context in (*task.neutral_contexts(0, 0, 40), *task.pretraining_contexts(0, 0, 40)):
        assert context.probes and context.slots
        for probe in context.probes:
            for text in (probe.question, probe.answer, probe.prior or ""):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    found = task.neutral_contexts(3, 4, 5)
    assert [context.text for context in found] == task.neutral_texts(3, 4, 5)
    found = task.pretraining_contexts(3, 4, 5)
    assert [context.text for context in found] == task.pretraining_texts(3, 4, 5)
