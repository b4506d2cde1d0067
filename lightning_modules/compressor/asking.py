"""Questions answered from the memory itself: the route that leaves out the rebuilt text.

The other route reads the facts from the text that was rebuilt (``measuring``). A fact that only one
of them finds tells whether the memory lacks it or the decoder does not write it [card, section 2,
step 5]. Answers are greedy, whatever the temperature of rebuilding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.question_encoding import encode_questions
from datamodules.tasks.compression import Context, ContextSet, Probe
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.memory import Memory
from lightning_modules.functional.fidelity import (
    flip_metrics,
    negation_flips,
    number_flips,
    slot_outcomes,
)
from lightning_modules.functional.sums import Metrics

Answer = tuple[Context, Probe, "str | None"]


def answer_questions(
    module: Any,
    one: ContextSet,
    memory: Memory,
    rows: Sequence[Context],
    *,
    forbidden: Sequence[int] = (),
    steps_of: Callable[[int, Any], int] | None = None,
) -> list[list[Answer]]:
    """Ask every question about some texts of a set.

    Each pass asks one question of every text. Ranks make equally many passes, since they all know
    the whole set.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.
        memory: Of the B texts.
        rows: The texts.
        forbidden: Tokens that are never written.
        steps_of: Longest of all ranks, of a number and a device; None where a rank may run by
            itself.

    Returns:
        B lists: text, question and what the task reads in the answer.
    """
    task = module.trainer.datamodule.task
    tokenizer = module.trainer.datamodule.encoding.target_tokenizer
    found: list[list[Answer]] = [[] for _ in rows]
    for number in range(max(len(context.probes) for context in one.contexts)):
        probes = [row.probes[number] if number < len(row.probes) else None for row in rows]
        asked = encode_questions(tokenizer, probes, [row.uid for row in rows])
        limits = [_room(tokenizer, probe, module.extra_tokens) for probe in probes]
        decoded = greedy_decode(
            module.policy,
            memory,
            limits,
            eos_ids=[int(tokenizer.eos_token_id)],
            forbidden=forbidden,
            prompt="qa",
            question=(asked.question_ids.to(module.device), asked.question_mask.to(module.device)),
            fixed_steps=None if steps_of is None else steps_of(max(limits), module.device),
        )
        for i, (probe, ids) in enumerate(zip(probes, decoded.texts(), strict=True)):
            if probe is not None:
                read = task.read_answer(rows[i], probe, str(tokenizer.decode(ids)))
                found[i].append((rows[i], probe, read))
    return found


def answer_metrics(answers: Iterable[Answer]) -> Metrics:
    """Fidelity, overwriting and flips of answers, by kind of the fact that was asked for.

    Args:
        answers: Text, question and what was read.

    Returns:
        Below ``qa/`` the rates of ``slot_outcomes``, with the kind before them where it is not
        ``attribute``, and flips: a name for the other one of its relation (``role_flip``), yes for
        no (``negation_flip``), another number.
    """
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        context, probe, _ = answer
        kind = next((slot.kind for slot in context.slots if slot.key == probe.key), "attribute")
        kinds.setdefault(kind, []).append(answer)
    found: Metrics = {}
    for kind, own in kinds.items():
        right = [probe.answer for _, probe, _ in own]
        read = [said for _, _, said in own]
        outcomes = slot_outcomes(right, [probe.prior for _, probe, _ in own], read)
        name = "" if kind == "attribute" else f"{kind}/"
        found |= {f"qa/{name}{key}": value for key, value in outcomes.metrics().items()}
        flips: dict[str, Tensor] = {}
        if kind == "relation":
            flips["role_flip"] = torch.tensor(
                [said in _others(text, probe) for text, probe, said in own]
            )
        elif kind == "negation":
            flips["negation_flip"] = negation_flips(right, read)
        elif kind == "number":
            flips["number_flip"] = number_flips(right, read)
        for flip, marks in flips.items():
            metrics = flip_metrics(flip, marks, outcomes.right)
            found |= {f"qa/{key}": value for key, value in metrics.items()}
    return found


def _others(context: Context, probe: Probe) -> set[str]:
    """The other name of the relation that is asked for; none where the answer is no name of it."""
    value = next(slot.value for slot in context.slots if slot.key == probe.key)
    words = value.split()
    names = {words[0], words[-1]}
    return names - {probe.answer} if probe.answer in names else set()


def _room(tokenizer: Any, probe: Probe | None, extra: int) -> int:
    """Tokens of the longer one of answer and prior, EOS, and what a wrong answer may add."""
    if probe is None:
        return 1
    texts = [text for text in (probe.answer, probe.prior) if text]
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return max(sizes, default=0) + 1 + extra
