"""What becomes of every text of a set, as records for a file (``mode=predict``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datamodules.tasks.compression import Context, ContextSet
from lightning_modules.compressor.measuring import decode_texts, set_run
from lightning_modules.functional.fidelity_text import words

#: Part of the noise's key: that of a test, so that records are what a test of these texts measures.
KEY = "test"


def predict_set(module: Any, one: ContextSet) -> list[dict[str, Any]]:
    """Compress this rank's rows of a set and decode them; ranks run equally many batches.

    Args:
        module: A ``CompressorModule`` with a trainer.
        one: The set.

    Returns:
        A record a text: ``set``, ``uid``, ``source``, ``decoded`` (free-running), ``exact`` (equal
        words), ``ce`` (mean nats a token under teacher forcing, EOS included) and ``facts``, each
        with ``key``, ``kind``, ``source``, ``prior`` and ``decoded`` (None where it is lost).
    """
    records = []
    with set_run(module, one, KEY) as run:
        for places in run.batches():
            rows, batch = run.rows(places), run.batch(places)
            memory = module.memory_of(batch, run.key)
            logprob = module.policy.score(memory, batch.target_ids, batch.target_mask).logprob
            ce = -logprob.double().sum(1) / batch.target_mask.sum(1)
            texts = decode_texts(run, memory, batch)
            for place, row, text, nats in zip(places, rows, texts, ce.tolist(), strict=True):
                if place < len(one.contexts):
                    values = module.trainer.datamodule.task.read(row, text)
                    records.append({"set": one.name, **_record(row, text, values), "ce": nats})
    return records


def _record(row: Context, text: str, values: Mapping[str, str | None]) -> dict[str, Any]:
    facts = [
        {
            "key": slot.key,
            "kind": slot.kind,
            "source": slot.value,
            "prior": slot.prior,
            "decoded": values.get(slot.key),
        }
        for slot in row.slots
    ]
    is_exact = words(row.text) == words(text)
    return {
        "uid": row.uid,
        "source": row.text,
        "decoded": text,
        "exact": is_exact,
        "facts": facts,
    }
