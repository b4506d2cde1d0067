"""CoCoA: reconstruct content through one bridge token, then contrast it (arXiv 2603.01471).

A causal language model never has to put a whole input into one vector. CoCoA makes it, in three
stages over the same weights, before and while it is trained by contrast:

    warmup       attention becomes bidirectional; masked caption tokens (read one place to the left,
                 MNTP) and masked patches are rebuilt:     L = L_MNTP + weight * L_MAE
    bridge       [A] [EOS] [B], the attention between A and B cut: EOS alone connects them; most of
                 B is masked and rebuilt:                  L = L_MNTP on B
    contrastive  images and texts apart, EOS last, its hidden state is the vector:   InfoNCE

Hooks: ``warmup_loss``, ``bridge_loss``, and those of ``EmbeddingModule``. The stages and their
lengths are ``data.stages``; optimizer states are cleared and the learning rate starts again with
each. [paper: figure; code: masks, data format, scripts] The trainers and collators of the release
are missing, so what is drawn and how losses are averaged is [our choice]: always the mask token,
the mean over the masked tokens of all ranks. A row's draws depend on the row alone, so that ranks
that share a batch mask what one process would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.image_text import ReconstructionBatch
from datamodules.images import EncodedImages, join_images
from datamodules.sources import stable_hash
from datamodules.tasks.embedding import BridgeSet
from datamodules.texts import Encoded, chunk_of
from lightning_modules.backbones.loading import fold_adapters
from lightning_modules.backbones.vl_encoder import VisionLanguageEncoder, load_vl_encoder
from lightning_modules.embedding.base import EmbeddingModule
from lightning_modules.embedding.gathering import joined_mean
from lightning_modules.functional.attention_masks import (
    MaskedTokens,
    bidirectional_mask,
    bridge_mask,
    causal_mask,
    mask_tokens,
    span_draws,
)
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.states import reshard
from lightning_modules.functional.sums import masked_sum_count


class CoCoA(EmbeddingModule):
    """Warm-up, bridge and contrast of a vision-language model.

    Args:
        text_mask: Share of caption tokens masked in the warm-up (0.2 [paper: figure; code]).
        image_mask: Share of image tokens masked there, at least one an image (0.5 [paper: figure],
            0.3 [code]); 0 for none.
        image_weight: Of the patches' loss (0.5 [code]); with 0 no patches are masked.
        bridge_mask: Share of B's tokens masked (0.7 [paper: figure; code]).
        eos_sees_b: Whether the bridge attends to B [paper, code]; without it the bridge is what the
            third stage will use, where there is no B [our choice of an ablation].
        a_sees_eos: Whether A attends to the bridge.
        mask_token: Token that stands for what is masked; None for the tokenizer's own.
        read: ``bidirectional`` or ``causal`` (the baseline of VLM2Vec): attention of the vectors.
        merge_lora_between_stages: Add adapters to the weights at the end of a stage and start the
            next one with fresh ones [code: merge; at which ends is not said]. Checkpoints then hold
            all weights.
        **kwargs: Of ``EmbeddingModule``; ``attention`` is not for this method.

    Raises:
        ValueError: A value is out of range.
    """

    policy: VisionLanguageEncoder

    stages = ("warmup", "bridge", "contrastive")

    def __init__(
        self,
        *,
        text_mask: float = 0.2,
        image_mask: float = 0.5,
        image_weight: float = 0.5,
        bridge_mask: float = 0.7,
        eos_sees_b: bool = True,
        a_sees_eos: bool = True,
        mask_token: str | None = None,
        read: Literal["bidirectional", "causal"] = "bidirectional",
        merge_lora_between_stages: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("model.read", read, ("bidirectional", "causal"))
        shares = {"text_mask": text_mask, "bridge_mask": bridge_mask}
        problems = [
            f"model.{name}={value} must be above 0, at most 1"
            for name, value in shares.items()
            if not 0 < value <= 1
        ]
        if not 0 <= image_mask <= 1:
            problems.append(f"model.image_mask={image_mask} must be from 0 to 1")
        if image_weight < 0:
            problems.append(f"model.image_weight={image_weight} must be at least 0")
        if self.attention != "own":
            problems.append(f"model.attention={self.attention!r}: use model.read here")
        if problems:
            raise ValueError("; ".join(problems))
        self.text_mask, self.image_mask, self.image_weight = text_mask, image_mask, image_weight
        self.bridge_mask, self.eos_sees_b, self.a_sees_eos = bridge_mask, eos_sees_b, a_sees_eos
        self.mask_token, self.read = mask_token, read
        self.merge_lora_between_stages = merge_lora_between_stages

    def build(self) -> None:
        """Load the model, with a decoder of patches where their loss counts.

        Raises:
            ValueError: Nothing says which token masks, a slice is longer than the vectors, or a
                budget under sharding.
        """
        self.check_budget()
        self.policy = load_vl_encoder(
            self.backbone_options,
            self.lora_options,
            kernel=self.kernel_options,
            mask_token=self.mask_token,
            image_decoder=self.image_weight > 0 and self.image_mask > 0,
        )
        if self.policy.mask_id is None:
            raise ValueError(
                "the tokenizer has no mask token: name a token that your texts do not use, such "
                "as model.mask_token='<|box_end|>'"
            )
        self.check_slices()

    # ------------------------------------------------------------------ stages

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """First micro-batch of a stage: optimizer states are gone, adapters are in the weights."""
        super().on_train_batch_start(batch, batch_idx)
        steps = self.stage_steps(0)
        borders = [sum(steps[: number + 1]) for number in range(len(steps) - 1)]
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if not is_first or self.global_step not in borders:
            return
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        if self.merge_lora_between_stages and self.lora_options is not None:
            fold_adapters(self.policy, seed=self.global_step)
            self.saves_all = True

    def _is_saved(self, name: str) -> bool:
        # beside adapters it is the one part that is trained whole
        return name.startswith("policy.image_decoder.") or super()._is_saved(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the batch's stage."""
        if not isinstance(batch, ReconstructionBatch):
            return super().training_step(batch, batch_idx)
        self.clear_gradients(batch_idx)
        return self.warmup_loss(batch) if batch.stage == "warmup" else self.bridge_loss(batch)

    def warmup_loss(self, batch: ReconstructionBatch) -> Tensor:
        """Masked captions and masked patches, everything seeing everything (section 2.1)."""
        chunk = self.padded(batch.items)
        masked = self.mask(chunk, batch.spans, self.text_mask, batch.seeds)
        images = join_images(chunk.images)
        where, pixels = None, None
        if images is not None and self.policy.image_decoder is not None:
            images, where, pixels = self.mask_images(chunk, images, batch.seeds)
        rebuilt = self.policy(
            masked.input_ids,
            chunk.mask,
            bidirectional_mask(chunk.mask),
            images,
            masked=masked,
            image_rows=where,
        )
        loss = self.token_loss("warmup", rebuilt.logprobs)
        if rebuilt.pixels is not None and pixels is not None:
            gaps = (rebuilt.pixels.float() - pixels.to(rebuilt.pixels.device)).square().mean(1)
            self.record({"train/warmup/pixel_loss": masked_sum_count(gaps.detach())})
            loss = loss + self.image_weight * joined_mean(gaps.sum(), len(gaps))
        self.record({"train/loss": (loss.detach(), 1.0)})
        return loss

    def bridge_loss(self, batch: ReconstructionBatch) -> Tensor:
        """Block B from the bridge alone (section 2.2)."""
        logprobs = self.bridged(batch.items, batch.spans, batch.bridges, batch.seeds)
        loss = self.token_loss("bridge", logprobs)
        self.record({"train/loss": (loss.detach(), 1.0)})
        return loss

    def bridged(
        self,
        items: list[Encoded],
        spans: list[tuple[int, int]],
        bridges: list[int],
        seeds: list[int],
    ) -> Tensor:
        """Log-probs ``(K,)`` of the masked tokens of B, through the cut attention."""
        chunk = self.padded(items)
        masked = self.mask(chunk, spans, self.bridge_mask, seeds)
        attention = bridge_mask(
            chunk.mask,
            torch.tensor(bridges, device=self.device),
            eos_sees_b=self.eos_sees_b,
            a_sees_eos=self.a_sees_eos,
        )
        images = join_images(chunk.images)
        rebuilt = self.policy(masked.input_ids, chunk.mask, attention, images, masked=masked)
        logprobs: Tensor = rebuilt.logprobs
        return logprobs

    def padded(self, items: list[Encoded]) -> Any:
        """One padded chunk of sequences, on the device."""
        return chunk_of(items, self.texts.pad_id).to(self.device)

    def mask(
        self, chunk: Any, spans: list[tuple[int, int]], share: float, seeds: list[int]
    ) -> MaskedTokens:
        """Mask a share of the tokens of each span, at least one."""
        length = chunk.input_ids.shape[1]
        places = torch.arange(length, device=self.device)
        limits = torch.tensor(spans, device=self.device)
        assert self.policy.mask_id is not None
        return mask_tokens(
            chunk.input_ids,
            (places >= limits[:, :1]) & (places < limits[:, 1:]),
            chunk.mask,
            probability=share,
            mask_id=self.policy.mask_id,
            special_ids=self.policy.special_ids,
            draws=span_draws(spans, seeds, length),
        )

    def mask_images(
        self, chunk: Any, images: EncodedImages, seeds: list[int]
    ) -> tuple[EncodedImages, tuple[Tensor, Tensor], Tensor]:
        """Noise in place of a share of the image tokens' pixels (MoCa [code]).

        At least one token of each row that has an image [our choice].

        Returns:
            The images with noise, rows and places of the masked tokens, and their true pixels
            ``(J, merge^2 C)``.
        """
        config = self.policy.config
        merge = config.vision_config.spatial_merge_size**2
        patches = images.pixel_values.unflatten(0, (-1, merge))
        is_image = chunk.input_ids == config.image_token_id
        masks, noises = [], []
        for seed, count in zip(seeds, is_image.sum(1).tolist(), strict=True):
            if not count:
                continue
            generator = torch.Generator().manual_seed(seed + 1)  # the seed itself masks the text
            draws = torch.rand(count, generator=generator, dtype=torch.float32)
            masks.append((draws < self.image_mask) | (draws == draws.min()))
            shape = (int(masks[-1].sum()), *patches.shape[1:])
            noises.append(torch.randn(shape, generator=generator, dtype=torch.float32))
        chosen = torch.cat(masks)
        true = patches[chosen].flatten(1)
        noisy = patches.clone()
        noisy[chosen] = torch.cat(noises).to(noisy)
        rows, places = is_image.nonzero(as_tuple=True)
        where = chosen.to(rows.device)
        masked = EncodedImages(noisy.flatten(0, 1), images.image_grid_thw)
        return masked, (rows[where], places[where]), true.float()

    def token_loss(self, stage: str, logprobs: Tensor) -> Tensor:
        """Mean over the masked tokens of all ranks (a rank of short texts counts less)."""
        self.record(
            {
                f"train/{stage}/loss": masked_sum_count(-logprobs.detach()),
                f"train/{stage}/masked_tokens": (float(len(logprobs)), 1.0),
            }
        )
        return joined_mean(-logprobs.sum(), len(logprobs))

    # ------------------------------------------------------------------ vectors and evaluation

    def finish_evaluation(self, split: str) -> dict[str, float]:
        """Metrics of an evaluation; in the contrastive stage also the area under its curve.

        ``val/area`` is the mean of ``val/retrieval/recall_at_1`` over the validations of that stage
        so far: what arms of equal contrastive steps are compared by (card, section 9).
        """
        values = super().finish_evaluation(split)
        tag = "val/retrieval/recall_at_1"
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        stage = data.stage_at(self.global_step) if hasattr(data, "stage_at") else "contrastive"
        if split == "val" and stage == "contrastive" and tag in values:
            points = self.results.get("val/area_points", 0.0) + 1.0
            mean = self.results.get("val/area", 0.0)
            values["val/area"] = mean + (values[tag] - mean) / points
            values["val/area_points"] = points
        return values

    def encode(self, chunk: Any) -> Tensor:
        """Vectors ``(n, d)``: the hidden state of EOS (section 2.3)."""
        chunk = chunk.to(self.device)
        sees = bidirectional_mask if self.read == "bidirectional" else causal_mask
        vectors: Tensor = self.policy(
            chunk.input_ids,
            chunk.mask,
            sees(chunk.mask),
            join_images(chunk.images),
            pool=chunk.pool,
        )
        return vectors

    def measure(self, one: Any) -> dict[str, float]:
        """Metrics of an evaluation set; of a ``BridgeSet`` how well B is rebuilt.

        ``gap`` is what the bridge tells: the loss with another row's A minus the loss, on the same
        masked tokens, in nats a token. At 0 the stage has taught nothing (card, section 8).
        """
        if not isinstance(one, BridgeSet):
            return super().measure(one)
        own, other = (self._bridge_logprobs(one, shift) for shift in (0, 1))
        return {"loss": -own, "gap": own - other}

    @torch.no_grad()
    def _bridge_logprobs(self, one: BridgeSet, shift: int) -> float:
        """Mean log-prob of a masked token, with the A of ``shift`` rows further on."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = [
            (one.rows[(place + shift) % len(one.rows)].source, row.target, row.where or row.uid)
            for place, row in enumerate(one.rows)
        ]
        seeds = [stable_hash("bridge", row.uid) % 2**62 for row in one.rows]
        was_training = self.policy.training
        self.policy.eval()
        total, count = 0.0, 0
        try:
            for start in range(0, len(rows), data.eval_batch_size):
                part = slice(start, start + data.eval_batch_size)
                items, spans, bridges = self.texts.bridge(rows[part])
                logprobs = self.bridged(items, spans, bridges, seeds[part])
                total, count = total + float(logprobs.sum()), count + len(logprobs)
        finally:
            self.policy.train(was_training)
            reshard(self.policy)
        return total / max(count, 1)

    # ------------------------------------------------------------------ export

    def write_extras(self, folder: Path) -> None:
        """The image processor. None for sentence-transformers: it would read texts causally."""
        self.policy.image_processor.save_pretrained(folder)
