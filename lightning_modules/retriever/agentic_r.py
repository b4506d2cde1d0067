"""Agentic-R: a retriever trained on what helped a search agent (arXiv 2601.11888).

1. An agent answers training questions with the current retriever; every search is a turn.
2. A judge scores the candidates of a turn (local relevance), and the agent goes on from that turn
   with each candidate alone (global answer correctness).
3. Candidates that are best in (global, local) order are positives, others are negatives.
4. A dense encoder, from its original weights, is trained on these rows by contrast.
5. Agent and retriever may be renewed in turn. 1 to 3 and 5 are the datamodule's; 4 is here.

Query text "Q [SEP] q_i", G passages a row with the positive first, W B rows of all ranks, tau 0.01:

    S = Qm Pm^T / tau in (WB, WBG)          L_c = - mean_r log( e^S[r, rG] / sum_c e^S[r, c] )
    L_r = mean over pairs with LR_ri > LR_rj of log(1 + e^(-(S_ri - S_rj)))
    L = (1 - w) L_c + w L_r                 w = rank_loss_weight, 0 by default

Hooks: ``info_of`` (what the loss knows of false negatives), ``combine`` (adds RankNet), ``measure``
(an agent searches with the weights in training). Everything else is ``EmbeddingModule``'s.

Departures: passages that are known to answer a row's query leave its negatives [our choice]. They
are found by their texts and those of the queries, so siblings of one turn are covered, and so are
equal texts of other turns. The release has no mask, and rows of one turn push each other's
positives away (card, 2.6): ``false_negative_mask=False`` is that. Gradients over ranks are those of
``gathering``, without the factor W. The model is measured by search, not by labels: a label is as
good as the agent and the retriever that made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from datamodules.experience import Completion
from datamodules.loader import Rows
from datamodules.pairs import PairBatch
from datamodules.passages import Corpus
from datamodules.retrieval import VectorRetriever
from datamodules.tasks.search_set import SearchSet
from datamodules.tasks.searching import Question
from lightning_modules.embedding.base import EmbeddingModule
from lightning_modules.embedding.vectors import float32_defaults
from lightning_modules.functional.contrastive import ContrastiveLoss, PairInfo
from lightning_modules.functional.rank_net import rank_net
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.retriever.outcomes import (
    episode_record,
    episode_text,
    first_searches,
    outcomes,
)


class AgenticR(EmbeddingModule):
    """Contrast on passages that helped an agent, measured by an agent.

    Args:
        false_negative_mask: Keep passages that are known to answer a row's query out of its
            negatives [our choice]; False is the released code.
        rank_loss_weight: w, the share of RankNet in the loss, 0 to 1 (0.5 where it is used [code]).
            Above 0 every batch needs scores, see ``UtilityBatch``.
        temperature: tau [code: 0.01].
        **kwargs: Of ``EmbeddingModule``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        false_negative_mask: bool = True,
        rank_loss_weight: float = 0.0,
        temperature: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature=temperature, **kwargs)
        if not 0 <= rank_loss_weight <= 1:
            raise ValueError(f"model.rank_loss_weight={rank_loss_weight} must be from 0 to 1")
        self.false_negative_mask, self.rank_loss_weight = false_negative_mask, rank_loss_weight
        self._retrievers: dict[str, VectorRetriever] = {}  # of the evaluation that is running
        self._longest: tuple[SearchSet, Question, Completion] | None = None

    # ------------------------------------------------------------------ training

    def info_of(self, batch: PairBatch) -> PairInfo:
        """What is known about the rows; without the mask no text is known to be another's."""
        info = super().info_of(batch)
        if self.false_negative_mask:
            return info
        return replace(info, text_ids=None, query_ids=None, known_positives=None)

    def combine(
        self, found: ContrastiveLoss, queries: Tensor, passages: Tensor, batch: PairBatch
    ) -> tuple[Tensor, Metrics]:
        """``(1 - w) L_c + w L_r``; see ``EmbeddingModule.combine`` for arguments.

        Returns:
            The loss, and metrics: besides the contrastive ones ``contrastive_loss``, ``rank_loss``,
            ``rank_accuracy`` and ``rank_pairs`` (with w above 0), ``masked_false_negatives`` (a
            row) and, of the row's own negatives, ``hard_negative_cosine`` and ``margin``.

        Raises:
            ValueError: w is above 0 and there are no scores.
        """
        loss, metrics = super().combine(found, queries, passages, batch)
        contrastive = metrics["loss"]
        metrics = metrics | group_metrics(queries, passages, batch)
        metrics["contrastive_loss"] = contrastive
        metrics["masked_false_negatives"] = (metrics["false_negative_share"][0], contrastive[1])
        if not self.rank_loss_weight:
            return loss, metrics
        ranked = rank_net(
            similarities(queries, passages, self.normalize),
            _scores(batch, self.rank_loss_weight),
            temperature=self.temperature,
            mask=batch.passage_mask & batch.counted[:, None],
        )
        rank_loss = self.mean(ranked.loss_sum, ranked.num_pairs)
        loss = (1 - self.rank_loss_weight) * loss + self.rank_loss_weight * rank_loss
        return loss, metrics | ranked.metrics | {"loss": (loss.detach(), 1.0)}

    def on_train_start(self) -> None:
        """Log what labelling found, once a run."""
        super().on_train_start()
        labelled = getattr(self.trainer.datamodule, "labelled", None)  # type: ignore[attr-defined]
        if labelled is None:
            return
        self.results |= labelled.metrics
        if self.global_step:
            return  # logged before the run was killed
        for logger in self.trainer.loggers:
            logger.log_metrics(labelled.metrics, step=self.global_step)
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_histogram"):
                for tag, values in labelled.histograms.items():
                    board.add_histogram(tag, values, self.global_step)

    # ------------------------------------------------------------------ evaluation

    def measure(self, one: Any) -> dict[str, float]:
        """Metrics of an evaluation set; of a ``SearchSet`` what the agent makes of these weights.

        Args:
            one: Of any kind; see ``outcomes`` and ``first_searches`` for those of a search set.
        """
        if not isinstance(one, SearchSet):
            return super().measure(one)
        with float32_defaults():
            retriever = self.retriever_of(one.corpus)
            completions = one.run(retriever)
            if self.trainer.testing:
                self._keep_longest(one, completions)
            return outcomes(one, completions) | first_searches(one, completions, retriever)

    def predict_step(self, batch: Rows, batch_idx: int) -> list[dict[str, Any]]:
        """Episodes of search sets, one record a question, and vectors of sets of other kinds.

        Args:
            batch: Evaluation sets.
            batch_idx: Of the batch.
        """
        records = super().predict_step(batch, batch_idx)
        for one in batch.items:
            if isinstance(one, SearchSet):
                with float32_defaults():
                    episodes = one.run(self.retriever_of(one.corpus))
                pairs = zip(one.questions, episodes, strict=True)
                records += [episode_record(one, question, made) for question, made in pairs]
        return records if self.trainer.is_global_zero else []

    def retriever_of(self, corpus: Corpus) -> VectorRetriever:
        """What searches a corpus with the weights as they are now, one for a whole evaluation.

        Every rank must call it, and search the same texts in the same order: they share the work.

        Args:
            corpus: Encoded once an evaluation.
        """
        if corpus.digest not in self._retrievers:
            texts = [passage.encoded_text for passage in corpus]
            vectors = self.shared_vectors(texts, "passage", "")
            self._retrievers[corpus.digest] = VectorRetriever(
                corpus, vectors, self._embed_queries, _fingerprint(vectors, corpus)
            )
        return self._retrievers[corpus.digest]

    def _embed_queries(self, texts: Sequence[str]) -> Tensor:
        return self.shared_vectors(texts, "query", "")

    def on_validation_epoch_start(self) -> None:
        """Forget the vectors of earlier weights."""
        self._retrievers = {}

    def on_test_epoch_start(self) -> None:
        """Forget the vectors of earlier weights, and earlier episodes."""
        self._retrievers, self._longest = {}, None

    def on_predict_epoch_start(self) -> None:
        """Forget the vectors of earlier weights."""
        self._retrievers = {}

    def finish_evaluation(self, split: str) -> dict[str, float]:
        """Metrics of an evaluation; its vectors are dropped."""
        self._retrievers = {}
        return super().finish_evaluation(split)

    def on_predict_epoch_end(self) -> None:
        """Drop the vectors."""
        self._retrievers = {}

    def on_test_epoch_end(self) -> None:
        """Log the test, with the episode of the most searches as ``test/episode``."""
        super().on_test_epoch_end()
        if self._longest is None or not self.trainer.is_global_zero:
            return
        one, question, completion = self._longest
        record = episode_record(one, question, completion)
        text = episode_text(one, record, question.supporting)
        for logger in self.trainer.loggers:
            board: Any = getattr(logger, "experiment", None)
            if hasattr(board, "add_text"):
                board.add_text("test/episode", text, self.trainer.global_step)

    def _keep_longest(self, one: SearchSet, completions: Sequence[Completion]) -> None:
        for question, completion in zip(one.questions, completions, strict=True):
            most = -1 if self._longest is None else len(self._longest[2].trace.turns)
            if len(completion.trace.turns) > most:
                self._longest = (one, question, completion)


def similarities(queries: Tensor, passages: Tensor, normalize: bool) -> Tensor:
    """Similarities ``(B, G)`` of queries to the passages of their own rows, in float32 or wider.

    Args:
        queries: ``(B, d)``.
        passages: ``(B, G, d)``.
        normalize: Cosines instead of dot products.
    """
    q, p = (x.float() if x.element_size() < 4 else x for x in (queries, passages))
    if normalize:
        q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    return (q[:, None] * p).sum(-1)


def group_metrics(queries: Tensor, passages: Tensor, batch: PairBatch) -> Metrics:
    """Cosines of the rows' own negatives, and how far the hardest is below the positive.

    Args:
        queries: ``(B, d)``.
        passages: ``(B, G, d)``.
        batch: Says which of them count.
    """
    cosines = similarities(queries.detach(), passages.detach(), normalize=True)
    given = batch.passage_mask[:, 1:] & batch.counted[:, None]
    if not given.shape[1]:
        return {}
    hardest = cosines[:, 1:].masked_fill(~given, -2.0).amax(1)
    return {
        "hard_negative_cosine": masked_sum_count(cosines[:, 1:], given),
        "margin": masked_sum_count(cosines[:, 0] - hardest, given.any(1)),
    }


def _scores(batch: PairBatch, weight: float) -> Tensor:
    """Scores ``(B, G)`` of a batch that has them."""
    scores: Tensor | None = getattr(batch, "scores", None)
    if scores is None:
        raise ValueError(
            f"model.rank_loss_weight={weight} needs scores of the passages, and these data have "
            f"none: take model.rank_loss_weight=0"
        )
    return scores


def _fingerprint(vectors: Tensor, corpus: Corpus) -> str:
    """Of the vectors themselves: whatever made them, other weights give other ones."""
    found = blake2b(vectors.contiguous().numpy().tobytes(), digest_size=16)
    return f"{found.hexdigest()}-{corpus.digest}"
