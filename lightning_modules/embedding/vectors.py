"""Vectors of items, and what evaluation sets say of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.loader import Rows, gather_objects
from datamodules.tasks.embedding import Item, RetrievalSet, StsSet
from datamodules.texts import Encoded, Role, TextEncoding, chunks_of
from lightning_modules.evaluation import EvaluatedModule
from lightning_modules.functional.retrieval_metrics import retrieval_metrics, sts_metrics
from lightning_modules.functional.search import top_k
from lightning_modules.functional.states import reshard
from lightning_modules.functional.sums import Metrics
from lightning_modules.functional.uniformity import alignment, uniformity_sums

SEARCHED = 100  # places of a ranking that metrics see


class VectorModule(EvaluatedModule):
    """Encodes items and measures their vectors; how they are trained is another matter.

    Args:
        normalize: Vectors of length 1: cosines instead of dot products.
        matryoshka_dims: Lengths of slices that are measured beside whole vectors.
        **kwargs: Of ``BaseModule``.
    """

    def __init__(
        self,
        *,
        normalize: bool = True,
        matryoshka_dims: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.normalize = normalize
        self.matryoshka_dims = list(matryoshka_dims) if matryoshka_dims else None
        #: How texts become tokens; the datamodule's, or what ``train.load`` gave.
        self.encoding: TextEncoding | None = None

    @property
    def texts(self) -> Any:
        """How items become tokens: what ``train.load`` gave, or the datamodule's."""
        return self.encoding or self.trainer.datamodule.encoding  # type: ignore[attr-defined]

    @abstractmethod
    def encode(self, chunk: Any) -> Tensor:
        """Vectors ``(n, d)`` of a chunk, not normalised.

        Args:
            chunk: See ``datamodules.texts.Chunk``.
        """

    def after_load(self, data: Any) -> None:
        """Take the encoding, so that ``embed`` works without a trainer.

        Args:
            data: The datamodule, bound to the tokenizer.
        """
        self.encoding = data.encoding

    def embed(
        self,
        items: Sequence[Item],
        role: Role = "passage",
        *,
        instruction: str = "",
        batch_size: int = 64,
    ) -> Tensor:
        """Vectors of items in their order, normalised where training normalises.

        Args:
            items: Texts (or images, where the backbone reads them).
            role: Which template: ``query`` or ``passage``.
            instruction: Of the template.
            batch_size: Items a forward pass.

        Returns:
            ``(N, d)`` float32 on the CPU.

        Example:
            >>> module.embed(["a dog", "a cat"]).shape  # doctest: +SKIP
            torch.Size([2, 64])
        """
        encoded = self.texts.encode(items, role, instruction)
        return self.vectors(encoded, batch_size, self.texts.pad_id)

    @torch.no_grad()
    def vectors(self, items: Sequence[Encoded], batch_size: int, pad_id: int) -> Tensor:
        """Vectors ``(N, d)`` of encoded items, in their order, on the CPU.

        Args:
            items: May be empty.
            batch_size: Items a forward pass.
            pad_id: What fills up.
        """
        if not items:
            return torch.zeros(0, self.policy.width, dtype=torch.float32)
        was_training = self.policy.training
        self.policy.eval()
        try:
            chunks, places = chunks_of(items, batch_size, pad_id)
            found = torch.cat([self.encode(chunk).float().cpu() for chunk in chunks])[places]
        finally:
            self.policy.train(was_training)
            reshard(self.policy)
        return F.normalize(found, dim=-1) if self.normalize else found

    def evaluate(self, batch: Rows, split: str) -> Mapping[str, Metrics]:
        """Metrics of evaluation sets; all ranks share the encoding of each.

        Args:
            batch: Evaluation sets.
            split: ``val`` or ``test``.
        """
        found: dict[str, Metrics] = {}
        for one, is_counted in zip(batch.items, batch.counted, strict=True):
            if not is_counted:
                continue
            values = self.measure(one)
            if not values:
                continue
            for arm in dict.fromkeys(["", one.group, one.name] if one.group else ["", one.name]):
                known = found.setdefault(arm, {})
                for name, value in values.items():
                    total, count = known.get(name, (0.0, 0.0))
                    known[name] = (total + value, count + 1.0)
        return found

    def predict_step(self, batch: Rows, batch_idx: int) -> list[dict[str, Any]]:
        """Vectors of evaluation sets, one record an item; ranks other than 0 give none.

        Args:
            batch: Evaluation sets.
            batch_idx: Of the batch.
        """
        records = []
        for one in batch.items:
            if not isinstance(one, RetrievalSet | StsSet):
                continue
            parts: dict[str, tuple[Any, Role]] = (
                {"query": (one.queries, "query"), "passage": (one.corpus, "passage")}
                if isinstance(one, RetrievalSet)
                else {"first": (one.first, "query"), "second": (one.second, "query")}
            )
            for name, (items, role) in parts.items():
                vectors = self.shared_vectors(items, role, one.instruction)
                records += [
                    {"set": one.name, "part": name, "place": place, "vector": vector}
                    for place, vector in enumerate(vectors.tolist())
                ]
        return records if self.trainer.is_global_zero else []

    def measure(self, one: Any) -> dict[str, float]:
        """Metrics of one evaluation set, equal on every rank.

        Args:
            one: A ``RetrievalSet`` or ``StsSet``; a set of another kind has no metrics here.
        """
        if isinstance(one, RetrievalSet):
            queries = self.shared_vectors(one.queries, "query", one.instruction)
            corpus = self.shared_vectors(one.corpus, "passage", one.instruction)
            with float32_defaults():
                return self._measure_retrieval(one, queries, corpus)
        if not isinstance(one, StsSet):
            return {}
        first = self.shared_vectors(one.first, "query", one.instruction)
        second = self.shared_vectors(one.second, "query", one.instruction)
        with float32_defaults():
            scores = torch.tensor(list(one.scores))
            values = sts_metrics(first, second, scores)
            for dim in self._shorter():
                short = sts_metrics(first[:, :dim], second[:, :dim], scores)
                values |= {f"{name}_dim_{dim}": value for name, value in short.items()}
        return values

    def _measure_retrieval(
        self, one: RetrievalSet, queries: Tensor, corpus: Tensor
    ) -> dict[str, float]:
        values = self._retrieval(queries, corpus, one.relevant)
        for dim in self._shorter():
            short = self._retrieval(queries[:, :dim], corpus[:, :dim], one.relevant)
            values |= {f"{name}_dim_{dim}": value for name, value in short.items()}
        best = torch.tensor([places[0] for places in one.relevant])
        values["alignment"] = float(alignment(queries, corpus[best]).mean())
        total, count = uniformity_sums(corpus)
        values["uniformity"] = float((total / count).log())
        return values

    def _retrieval(
        self, queries: Tensor, corpus: Tensor, relevant: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        scores, places = top_k(queries, corpus, SEARCHED, normalize=self.normalize)
        return retrieval_metrics(scores, places, relevant)

    def _shorter(self) -> list[int]:
        return [dim for dim in self.matryoshka_dims or [] if dim < self.policy.width]

    def shared_vectors(self, items: Sequence[Item], role: Role, instruction: str) -> Tensor:
        """Vectors ``(N, d)`` of items, of which every rank encodes a part.

        Args:
            items: Equal on every rank.
            role: Which template.
            instruction: Of the template.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rank, world = self.trainer.global_rank, self.trainer.world_size
        encoded = self.texts.encode(items, role, instruction)
        share = -(-len(encoded) // world)  # equal on every rank: sharded forward passes wait
        mine = [encoded[place % len(encoded)] for place in range(rank, share * world, world)]
        parts = gather_objects(self.vectors(mine, data.eval_batch_size, self.texts.pad_id))
        whole = torch.stack(parts, dim=1).flatten(0, 1) if world > 1 else parts[0]
        return whole[: len(encoded)]


@contextmanager
def float32_defaults() -> Iterator[None]:
    """New tensors are float32: ``bf16-true`` would make them coarse, and the measures with them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
