"""Whether data and module that a config built fit together: their first items go through."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from tests.models import has_contexts, has_rollouts


def probe(config: Any, data: Any, module: Any, path: str) -> None:
    """The probe of a config's kind of data.

    Args:
        config: Of the run.
        data: Its datamodule.
        module: Its module, with its parts built.
        path: Folder of the backbone.
    """
    if has_rollouts(config):
        return probe_policy(data, module, path)
    return (probe_contexts if has_contexts(config) else probe_embedding)(data, module, path)


def probe_policy(data: Any, module: Any, path: str) -> None:
    """A prompt of each evaluation has finite logits."""
    data.bind(AutoTokenizer.from_pretrained(path))
    for split in ("val", "test"):
        batch = next(iter(getattr(data, f"{split}_dataloader")()))
        prompt = data.task.prompt(batch.items[0])
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            assert module.policy(ids).logits.isfinite().all()


def probe_embedding(data: Any, module: Any, path: str) -> None:
    """The first items of each evaluation have finite vectors."""
    data.prepare(path, "unused", for_training=False)
    module.after_load(data)
    for split in ("val", "test"):
        one = next(iter(getattr(data, f"{split}_dataloader")())).items[0]
        items = [question.text for question in getattr(one, "questions", ())]
        items = items or (one.queries if hasattr(one, "queries") else one.first)
        vectors = module.embed(items[:2], "query")
        assert vectors.shape == (2, module.policy.width)
        assert vectors.isfinite().all()
        assert not torch.equal(vectors[0], vectors[1])


def probe_contexts(data: Any, module: Any, path: str) -> None:
    """A batch of each evaluation goes through the pair with finite log-probs of every label."""
    data.prepare(path, "unused", for_training=False)
    module.after_load(data)
    module.policy.eval()
    for split in ("val", "test"):
        one = next(iter(getattr(data, f"{split}_dataloader")())).items[0]
        batch = data.evaluation_batch(one.contexts[:2])
        with torch.no_grad():
            memory = module.memory_of(batch, "probe")
            scores = module.token_loss(memory, batch, "ae")
        assert scores.logprob.isfinite().all()
        assert (scores.logprob[batch.target_mask] < 0).all()
