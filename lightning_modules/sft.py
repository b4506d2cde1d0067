"""Supervised warm start: next-token cross-entropy on completions.

The loss is the sum over domains of the mean token loss in each, so that a domain of short
completions (four tokens of a reflection beside twenty-five of an analysis) is not drowned
[our choice: it is what the measured recipe used].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.demonstrations import Supervised
from lightning_modules.backbones.causal_lm import completion_logprobs
from lightning_modules.base import BaseModule
from lightning_modules.functional.sums import masked_sum_count


class SFT(BaseModule):
    """Fits a backbone to demonstrations.

    Args:
        **kwargs: Of ``BaseModule``.
    """

    def training_step(self, batch: Supervised, batch_idx: int) -> Tensor:
        """Sum over domains of the mean negative log-prob of a completion token."""
        logprobs = completion_logprobs(
            self.policy,
            batch.input_ids,
            batch.prompt_lengths,
            batch.mask,
            with_entropy=False,
        ).logprob
        total = logprobs.new_zeros(())
        metrics: dict[str, Any] = {}
        for index, name in enumerate(batch.domain_names):
            mask = batch.mask & (batch.domains == index)[:, None]
            loss = -(logprobs * mask).sum() / mask.sum().clamp(min=1)
            metrics[f"train/loss/{name}"] = masked_sum_count(-logprobs, mask)
            total = total + loss
        self.record(metrics | {"train/loss": (total.detach(), torch.ones(()))})
        return total
