"""EmbeddingModule: vectors of queries and passages, trained by contrast.

    encode   items -> vectors                      (override for other backbones)
    loss     vectors of queries and passages -> sum and count, with metrics
    evaluate a set -> nDCG@10, MRR@10, recall, MAP; Spearman of scored pairs

A batch may be far larger than what fits into memory: with ``chunk_size`` its items are encoded
chunk by chunk with exact gradients (``grad_cache``). Negatives come from all ranks, with gradients
(``gathering``). Everything else is the house's: one optimizer step a window of micro-batches,
logging once a step, sharding, adapters, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from datamodules.pairs import PairBatch
from datamodules.texts import chunks_of
from lightning_modules.backbones.encoder import Attention, load_encoder
from lightning_modules.embedding.gathering import gather_info, gather_with_grad, joined_mean
from lightning_modules.embedding.grad_cache import cached_step
from lightning_modules.embedding.sentence_transformers import write_sentence_transformers
from lightning_modules.embedding.vectors import VectorModule
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.contrastive import (
    ContrastiveLoss,
    PairInfo,
    info_nce,
    matryoshka_info_nce,
)
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.functional.uniformity import alignment


class EmbeddingModule(VectorModule):
    """The family of embedding methods; by itself InfoNCE on pairs.

    Args:
        temperature: tau of the softmax over similarities.
        normalize: Cosines instead of dot products.
        symmetric: Also passages against queries.
        margin: Drops candidates nearer than the positive minus this, see ``info_nce``; None for
            none. Candidates that are known positives are dropped in any case.
        matryoshka_dims: Lengths of slices trained alike, e.g. ``[384, 128, 32]``; None for whole
            vectors only. Each is also evaluated.
        matryoshka_weights: Of the slices; None for equal ones.
        gather: Take other ranks' passages as negatives.
        attention: ``own`` or ``bidirectional``, see ``TextEncoder``.
        chunk_size: Items encoded at a time, with exact gradients; None for all at once.
        cache_budget_mb: MiB of graphs that are kept rather than computed twice. Not under FSDP:
            ``keep_chunks`` there.
        keep_chunks: Chunks whose graphs are kept, in place of a budget; None for one, which takes
            no more memory: every chunk's graph has its turn anyway.
        **kwargs: Of ``BaseModule``.

    Raises:
        ValueError: A value is out of range.
    """

    #: Stages of ``data.stages`` that the method knows
    stages: ClassVar[tuple[str, ...]] = ("contrastive",)

    def __init__(
        self,
        *,
        temperature: float = 0.02,
        normalize: bool = True,
        symmetric: bool = False,
        margin: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        gather: bool = True,
        attention: Attention = "own",
        chunk_size: int | None = None,
        cache_budget_mb: float | None = None,
        keep_chunks: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(normalize=normalize, matryoshka_dims=matryoshka_dims, **kwargs)
        check_choice("model.attention", attention, ("own", "bidirectional"))
        problems = [
            f"model.{name}={value} must be {bound}"
            for name, value, is_right, bound in (
                ("temperature", temperature, temperature > 0, "above 0"),
                ("chunk_size", chunk_size, chunk_size is None or chunk_size >= 1, "at least 1"),
                (
                    "cache_budget_mb",
                    cache_budget_mb,
                    cache_budget_mb is None or cache_budget_mb >= 0,
                    "at least 0",
                ),
                ("keep_chunks", keep_chunks, keep_chunks is None or keep_chunks >= 0, "0 or more"),
            )
            if not is_right
        ]
        if chunk_size is None and (cache_budget_mb is not None or keep_chunks is not None):
            problems.append("model.cache_budget_mb and model.keep_chunks need model.chunk_size")
        if cache_budget_mb is not None and keep_chunks is not None:
            problems.append("give model.cache_budget_mb or model.keep_chunks, not both")
        if problems:
            raise ValueError("; ".join(problems))
        self.temperature, self.symmetric = temperature, symmetric
        self.margin, self.gather, self.attention = margin, gather, attention
        self.matryoshka_weights = list(matryoshka_weights) if matryoshka_weights else None
        self.chunk_size = chunk_size
        self.cache_budget_mb, self.keep_chunks = cache_budget_mb, keep_chunks

    def build(self) -> None:
        """Load the encoder.

        Raises:
            ValueError: A slice is longer than the vectors, or a budget under sharding.
        """
        self.check_budget()
        self.policy = load_encoder(
            self.backbone_options, self.lora_options, attention=self.attention
        )
        self.check_slices()

    def check_budget(self) -> None:
        """Refuse a budget under sharding: ranks may keep different numbers of chunks, and wait.

        Raises:
            ValueError: There is one.
        """
        if self.cache_budget_mb is not None and self.device_mesh is not None:
            raise ValueError(
                f"model.cache_budget_mb={self.cache_budget_mb}: with trainer=fsdp all ranks must "
                f"keep as many chunks; give model.keep_chunks instead"
            )

    def check_slices(self) -> None:
        """Refuse slices that are longer than the vectors.

        Raises:
            ValueError: One is.
        """
        longest = max(self.matryoshka_dims or [1])
        if longest > self.policy.width:
            raise ValueError(
                f"model.matryoshka_dims={self.matryoshka_dims}: this backbone has vectors of "
                f"{self.policy.width} dimensions"
            )

    def on_fit_start(self) -> None:
        """Refuse stages of ``data.stages`` that this method does not train.

        Raises:
            ValueError: There is one.
        """
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = [stage.name for stage in getattr(data, "stages", [])]
        if odd := [name for name in names if name not in self.stages]:
            raise ValueError(
                f"data.stages has the stage {odd[0]!r}, and this model trains "
                f"{', '.join(self.stages)} only: take model=cocoa, or other stages such as "
                f"'data.stages=[{{name: contrastive, steps: 300}}]'"
            )

    def stage_steps(self, total: int) -> list[int]:
        """Optimizer steps of each bag: the learning rate starts again with it."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return getattr(data, "stage_steps", [total]) if len(data.stage_steps) > 1 else [total]

    # ------------------------------------------------------------------ training

    def encode(self, chunk: Any) -> Tensor:
        """Vectors ``(n, d)`` of a chunk, not normalised.

        Args:
            chunk: See ``datamodules.texts.Chunk``.
        """
        chunk = chunk.to(self.device)
        vectors: Tensor = self.policy(chunk.input_ids, chunk.mask, chunk.pool)
        return vectors

    def loss(self, queries: Tensor, passages: Tensor, info: PairInfo, rows: slice) -> Any:
        """InfoNCE, or its Matryoshka form.

        Args:
            queries: ``(B, d)`` of all ranks.
            passages: ``(B, G, d)``, the positive first.
            info: What is known about the rows.
            rows: Those of this rank.

        Returns:
            ``ContrastiveLoss``.
        """
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "symmetric": self.symmetric,
            "margin": self.margin,
            "info": info,
            "rows": rows,
        }
        if self.matryoshka_dims is None:
            return info_nce(queries, passages, **options)
        return matryoshka_info_nce(
            queries,
            passages,
            dims=self.matryoshka_dims,
            weights=self.matryoshka_weights,
            **options,
        )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Encode all items of the batch, contrast them, return the loss."""
        self.clear_gradients(batch_idx)
        items = [*batch.queries, *batch.passages]
        # a budget goes further on short chunks: memory of attention grows with the square
        by_budget = self.cache_budget_mb is not None
        chunks, places = chunks_of(
            items, self.chunk_size, self.texts.pad_id, longest_first=not by_budget
        )

        def loss(vectors: list[Tensor]) -> Tensor:
            return self.contrast(torch.cat(vectors)[places], batch)

        if self.chunk_size is None or len(chunks) == 1:
            return loss([self.encode(chunk) for chunk in chunks])
        step = cached_step(
            self.encode,
            chunks,
            loss,
            lambda x: (x / self.trainer.accumulate_grad_batches).backward(),
            keep=1 if self.keep_chunks is None and not by_budget else self.keep_chunks,
            cache_budget_mb=self.cache_budget_mb,
            defer_last=True,
        )
        self.record(
            {
                "train/chunks_kept": (float(step.kept), 1.0),
                "train/chunks_recomputed": (float(step.recomputed), 1.0),
            }
        )
        return step.loss

    def clear_gradients(self, batch_idx: int) -> None:
        """First thing in a window: ``optimizer_zero_grad`` would come after the chunks' backwards.

        Args:
            batch_idx: Of the micro-batch.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            for parameter in self.parameters():
                parameter.grad = None

    def optimizer_zero_grad(self, *_: Any, **__: Any) -> None:
        """Nothing: the window's first ``training_step`` clears the gradients."""

    def contrast(self, vectors: Tensor, batch: PairBatch) -> Tensor:
        """Loss of the vectors of a batch, queries first, then passages; records its metrics.

        Args:
            vectors: ``(B + B G, d)``.
            batch: What they stand for.
        """
        size, group = batch.text_ids.shape
        queries, passages = vectors[:size], vectors[size:].unflatten(0, (size, group))
        info, rows = self.info_of(batch), slice(0, size)
        own_queries, own_passages = queries, passages
        if self.gather:
            (queries, passages), rows = gather_with_grad(queries, passages)
            info = gather_info(info)
        found: ContrastiveLoss = self.loss(queries, passages, info, rows)
        loss, metrics = self.combine(found, own_queries, own_passages, batch)
        self.record({f"train/{name}": value for name, value in metrics.items()})
        self.record({f"train/loss/{batch.domain}": metrics["loss"]})
        near = alignment(own_queries.detach(), own_passages[:, 0].detach())
        self.record(
            {
                "train/alignment": masked_sum_count(near, batch.counted),
                "train/items": (float(len(vectors)), 1.0),
            }
        )
        return loss

    def info_of(self, batch: PairBatch) -> PairInfo:
        """What the loss is told about the rows of a batch.

        Args:
            batch: Of this rank.
        """
        return PairInfo(
            in_batch=batch.in_batch,
            counted=batch.counted,
            passage_mask=batch.passage_mask,
            text_ids=batch.text_ids,
            query_ids=batch.query_ids,
            known_positives=batch.known_positives,
        )

    def combine(
        self, found: ContrastiveLoss, queries: Tensor, passages: Tensor, batch: PairBatch
    ) -> tuple[Tensor, Metrics]:
        """What is minimised, and its metrics: here the mean of ``found`` alone.

        Args:
            found: What ``loss`` gave.
            queries: ``(B, d)`` of this rank, with a gradient.
            passages: ``(B, G, d)`` of this rank.
            batch: Their rows.

        Returns:
            0-d loss, and ``name -> (sum, count)`` with ``loss`` among them.
        """
        return self.mean(found.loss_sum, found.num_rows), found.metrics

    def mean(self, loss_sum: Tensor, count: int) -> Tensor:
        """A sum over this rank's part as the mean over all ranks where they share candidates.

        Args:
            loss_sum: 0-d.
            count: Of its terms.
        """
        return joined_mean(loss_sum, count) if self.gather else loss_sum / max(count, 1)

    # ------------------------------------------------------------------ export

    def write_extras(self, folder: Path) -> None:
        """What makes the folder one of sentence-transformers, too."""
        write_sentence_transformers(
            folder,
            self.texts,
            width=self.policy.width,
            normalize=self.normalize,
            without_pooler=getattr(self.policy.base, "pooler", self) is None,
        )
