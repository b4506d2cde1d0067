"""Questions about contexts as token ids of the decoder: it reads a question, writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.engines.base import sample_seed
from datamodules.tasks.compression import Probe


class QuestionBatch(NamedTuple):
    """One question for each of B texts, padded on the right; a text without one has empty rows.

    Args:
        question_ids: ``(B, q)`` of the decoder's tokenizer, without special tokens.
        question_mask: ``(B, q)`` bool, True on tokens.
        answer_ids: ``(B, a)`` the answer, then one EOS.
        answer_mask: ``(B, a)`` bool, True on tokens, EOS included.
        fact_mask: ``(B, a)`` bool, True on the answer without its EOS.
    """

    question_ids: Tensor
    question_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    fact_mask: Tensor

    def to(self, device: Any) -> QuestionBatch:
        """The same on a device."""
        return QuestionBatch(*(value.to(device) for value in self))


def choose_probes(
    probes: Sequence[Sequence[Probe]], uids: Sequence[str], key: str
) -> list[Probe | None]:
    """One question a text, a pure function of the key and of the text's identity.

    Args:
        probes: Questions of each of B texts.
        uids: B identities.
        key: Such as the step.

    Returns:
        B questions; None for a text without any.
    """
    return [
        own[sample_seed(key, uid, 0) % len(own)] if own else None
        for own, uid in zip(probes, uids, strict=True)
    ]


def encode_questions(
    tokenizer: Any, probes: Sequence[Probe | None], uids: Sequence[str]
) -> QuestionBatch:
    """Questions and their right answers as tensors, each tokenised by itself [our choice].

    Args:
        tokenizer: Of the decoder.
        probes: One a text, or None.
        uids: Of the texts, for messages.

    Raises:
        ValueError: A question or an answer holds the EOS token.
    """
    eos = int(tokenizer.eos_token_id)
    questions, answers = [], []
    for probe, uid in zip(probes, uids, strict=True):
        question = _ids(tokenizer, probe.question) if probe else []
        answer = _ids(tokenizer, probe.answer) if probe else []
        if probe and eos in (*question, *answer):
            raise ValueError(
                f"{uid}: the question {probe.question!r} or its answer {probe.answer!r} holds the "
                f"EOS token {tokenizer.eos_token!r}, at which an answer would end; take it out"
            )
        questions.append(question)
        answers.append([*answer, eos] if probe else [])
    pad = eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    ids = _padded(answers, pad)
    lengths = torch.tensor([len(row) for row in answers])[:, None]
    places = torch.arange(ids.shape[1])
    question_ids = _padded(questions, pad)
    asked = torch.arange(question_ids.shape[1]) < torch.tensor([[len(row)] for row in questions])
    return QuestionBatch(question_ids, asked, ids, places < lengths, places < lengths - 1)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    found = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(found, batch_first=True, padding_value=value)
