"""Contrastive losses over explicit scores: InfoNCE, one direction or both, and its Matryoshka form.

Shape legend: ``B`` rows (a query with its group of passages), ``H`` hard negatives a row, ``G = 1 +
H`` passages a row with the positive first, ``d`` dimensions, ``C = B G`` candidates, ``R`` of the
``B`` rows that are anchors here. With several ranks the tensors hold the rows of *all* ranks and
``rows`` says which are this rank's own: the sums of the ranks then add up to those of one process
(see ``lightning_modules.embedding.gathering``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.sums import Metrics, masked_sum_count


@dataclass(frozen=True)
class PairInfo:
    """What is known about the rows besides their vectors; None for what is not known.

    Args:
        in_batch: ``(B,)`` bool; False for a row that uses its own group alone, as rows of labelled
            data do, where two rows of one label would be false negatives (BOOM, arXiv 2602.05787
            [code]). Such a row is no negative of others either [our choice]. None: all True.
        counted: ``(B,)`` bool; False for a filling row: no loss, no metrics, nobody's negative.
        passage_mask: ``(B, G)`` bool; False where a row has fewer hard negatives than others.
        text_ids: ``(B, G)`` integers, equal for passages of one text; negative for unknown.
        query_ids: ``(B,)`` integers, equal for queries of one text; negative for unknown.
        known_positives: ``(B, K)`` text ids of all known positives of the query, filled up with
            negative numbers.
    """

    in_batch: Tensor | None = None
    counted: Tensor | None = None
    passage_mask: Tensor | None = None
    text_ids: Tensor | None = None
    query_ids: Tensor | None = None
    known_positives: Tensor | None = None


class ContrastiveLoss(NamedTuple):
    """A loss as sum and count, with metrics.

    Args:
        loss_sum: 0-d, with a gradient; float32 or wider.
        num_rows: Rows in that sum.
        metrics: ``name -> (sum, count)``, detached.
    """

    loss_sum: Tensor
    num_rows: int
    metrics: Metrics


def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    normalize: bool = True,
    symmetric: bool = False,
    margin: float | None = None,
    info: PairInfo | None = None,
    rows: slice | None = None,
) -> ContrastiveLoss:
    """Cross-entropy of a query's positive among its candidates (InfoNCE, arXiv 1807.03748).

    ``L_i = -log( exp(s_ii / tau) / sum_c exp(s_ic / tau) )`` with ``s = q . p``. Candidates of a
    row are the passages of every row, hard negatives included, or its own group alone
    (``PairInfo.in_batch``). False negatives leave the sum; the positive itself never does:

    - with ids: a candidate with the text of the positive, or of a known positive of the query, and
      the positive of another row with the same query;
    - with a margin: a candidate whose similarity is above the positive's minus ``margin``. Positive
      margins drop even harmless hard negatives, and all that a collapsed model has; Qwen3
      Embedding (arXiv 2506.05176) drops what is above the positive *plus* 0.1: ``margin=-0.1``.

    ``symmetric`` adds the same loss of the positive passage against all queries and takes the mean
    of both (CLIP, arXiv 2103.00020). Rows without in-batch negatives have no second direction:
    theirs is the first alone [our choice]. Computed in float32 or wider, also under autocast.

    Args:
        queries: ``(B, d)``.
        passages: ``(B, G, d)``, the positive first.
        temperature: tau, above 0; a 0-d tensor may be learnt.
        normalize: Divide vectors by their length, so that similarities are cosines.
        symmetric: Train both directions.
        margin: See above, on the scale of ``s``; None for none.
        info: What is known about the rows.
        rows: The rows that are anchors (this rank's own); None for all. The others are candidates.

    Returns:
        Summed loss over the anchors that count, their number, and metrics: ``loss``, ``accuracy``
        (positive strictly above every negative) and ``hardest_negative_cosine`` over anchors with
        a negative, ``positive_cosine``, ``negatives`` (a row), ``false_negative_share`` (of the
        candidates but the positive) and, if symmetric, ``accuracy_backward``.

    Raises:
        ValueError: For shapes that do not fit or a temperature of 0 or below.

    Example:
        >>> q = torch.eye(2)
        >>> found = info_nce(q, q[:, None], temperature=1.0)
        >>> round(found.loss_sum.item(), 4), found.num_rows  # 2 log(1 + exp(-1))
        (0.6265, 2)
    """
    info = info or PairInfo()
    _check(queries, passages, temperature, info)
    batch, group = passages.shape[:2]
    counted = _or_true(info.counted, queries)
    shared = _or_true(info.in_batch, queries) & counted
    anchors = torch.arange(batch, device=queries.device)[rows or slice(None)]
    if info.counted is not None:
        anchors = anchors[counted[anchors]]
    own = anchors[:, None] == torch.arange(batch, device=queries.device)
    reach = own | (shared[anchors][:, None] & shared)  # (R, B): whose passages are candidates
    with torch.autocast(queries.device.type, enabled=False):
        wide = torch.promote_types(queries.dtype, torch.float32)
        q, p = queries.to(wide), passages.to(wide)
        if normalize:
            q, p = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
        candidates = reach[:, :, None].expand(-1, -1, group)
        if info.passage_mask is not None:
            candidates = candidates & info.passage_mask.to(q.device, torch.bool)
        forward = _Direction.of(
            q[anchors] @ p.flatten(0, 1).T,
            anchors * group,
            candidates.flatten(1),
            _known_passages(anchors, info, batch, group).flatten(1),
            margin,
            temperature,
        )
        losses, backward = forward.losses, None
        if symmetric:
            known = _known_queries(anchors, info, batch)
            back = p[anchors, 0] @ q.T
            backward = _Direction.of(back, anchors, reach, known, margin, temperature)
            both = 0.5 * (losses + backward.losses)
            losses = torch.where(shared[anchors], both, losses)
        cosines = forward.scores.detach()
        if not normalize:
            cosines = _cosines(q[anchors], p.flatten(0, 1), cosines)
    metrics = forward.metrics(cosines) | {"loss": masked_sum_count(losses)}
    if backward is not None:
        metrics["accuracy_backward"] = backward.accuracy()
    return ContrastiveLoss(losses.sum(), len(anchors), metrics)


def matryoshka_info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    **options: Any,
) -> ContrastiveLoss:
    """Weighted mean over ``dims`` of the loss of the vectors' first entries (arXiv 2205.13147).

    With ``normalize`` a slice is normalised by itself, as a cosine on short vectors will be at
    evaluation [our choice]; the trainer of BOOM slices normalised vectors and leaves them so [code]
    (normalise first, then pass ``normalize=False``).

    Args:
        queries: ``(B, d)``.
        passages: ``(B, G, d)``.
        dims: Different lengths of slices, 1 to d.
        weights: One a slice, at least 0, in any proportion; None for equal ones.
        **options: Of ``info_nce``.

    Returns:
        As ``info_nce``: metrics are those of the longest slice, but ``loss`` is the whole one, and
        ``accuracy_<dim>`` stands for each slice.

    Raises:
        ValueError: For dims or weights that cannot be.

    Example:
        >>> q = torch.eye(4)
        >>> sorted(matryoshka_info_nce(q, q[:, None], dims=[4, 2]).metrics)[:3]
        ['accuracy', 'accuracy_2', 'accuracy_4']
    """
    width = queries.shape[-1]
    if not dims or len(set(dims)) < len(dims) or not all(1 <= dim <= width for dim in dims):
        raise ValueError(f"dims={list(dims)} must be different numbers from 1 to {width}")
    given = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(dims) or min(given) < 0 or not 0 < sum(given) < float("inf"):
        raise ValueError(
            f"weights={given} must be {len(dims)} numbers, at least 0 and not all 0, one a dim"
        )
    parts = {dim: info_nce(queries[..., :dim], passages[..., :dim], **options) for dim in dims}
    total = torch.stack(
        [part.loss_sum * (w / sum(given)) for part, w in zip(parts.values(), given, strict=True)]
    ).sum()
    longest = parts[max(dims)]
    metrics = dict(longest.metrics) | {"loss": (total.detach(), longest.metrics["loss"][1])}
    metrics |= {f"accuracy_{dim}": part.metrics["accuracy"] for dim, part in parts.items()}
    return ContrastiveLoss(total, longest.num_rows, metrics)


class _Direction(NamedTuple):
    """One direction: scores of R anchors against C candidates, and which of them take part."""

    scores: Tensor
    target: Tensor
    negatives: Tensor
    dropped: Tensor
    losses: Tensor

    @classmethod
    def of(
        cls,
        scores: Tensor,
        target: Tensor,
        candidates: Tensor,
        known: Tensor,
        margin: float | None,
        temperature: float | Tensor,
    ) -> _Direction:
        """Drop the false negatives and take the losses ``(R,)``; ``target`` is the positive."""
        positives = torch.zeros_like(scores, dtype=torch.bool).scatter(1, target[:, None], True)
        candidates = candidates & ~positives
        positive = scores.gather(1, target[:, None]).squeeze(1)
        if margin is not None:
            known = known | (scores.detach() > positive.detach()[:, None] - margin)
        negatives = candidates & ~known
        logits = (scores / temperature).masked_fill(~(negatives | positives), -torch.inf)
        losses = logits.logsumexp(dim=1) - positive / temperature
        return cls(scores, target, negatives, candidates & known, losses)

    def positive(self, values: Tensor) -> Tensor:
        """Entry ``(R,)`` of the positive in ``(R, C)``."""
        return values.gather(1, self.target[:, None]).squeeze(1)

    def accuracy(self) -> tuple[Tensor, Tensor]:
        """Rows whose positive is strictly above all negatives, over the rows that have any."""
        scores = self.scores.detach()
        right = self.positive(scores) > _hardest(scores, self.negatives)
        return masked_sum_count(right, self.negatives.any(dim=1))

    def metrics(self, cosines: Tensor) -> Metrics:
        """Metrics of this direction; ``cosines`` has the shape of the scores."""
        dropped, kept = self.dropped.sum(dim=1), self.negatives.sum(dim=1)
        total_dropped, total = masked_sum_count(dropped)[0], masked_sum_count(dropped + kept)[0]
        return {
            "accuracy": self.accuracy(),
            "positive_cosine": masked_sum_count(self.positive(cosines)),
            "hardest_negative_cosine": masked_sum_count(_hardest(cosines, self.negatives), kept),
            "negatives": masked_sum_count(kept),
            "false_negative_share": (total_dropped, total),
        }


def _hardest(values: Tensor, negatives: Tensor) -> Tensor:
    """Largest value of a negative in each row ``(R,)``; -inf without one."""
    return values.masked_fill(~negatives, -torch.inf).amax(dim=1)


def _cosines(queries: Tensor, passages: Tensor, scores: Tensor) -> Tensor:
    """Dot products ``(R, C)`` divided by the lengths of ``(R, d)`` and ``(C, d)``."""
    lengths = queries.norm(dim=-1)[:, None] * passages.norm(dim=-1)
    return (scores / lengths.clamp(min=1e-12)).detach()


def _or_true(mask: Tensor | None, queries: Tensor) -> Tensor:
    """The mask as booleans; all True if there is none."""
    if mask is None:
        return torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    return mask.to(queries.device, torch.bool)


def _known_passages(anchors: Tensor, info: PairInfo, batch: int, group: int) -> Tensor:
    """Passages ``(R, B, G)`` that are known to answer the anchors' queries."""
    known = torch.zeros(len(anchors), batch, group, dtype=torch.bool, device=anchors.device)
    if info.text_ids is not None:
        ids = info.text_ids.to(anchors.device)
        known |= _equal(ids[anchors, 0], ids)
        if info.known_positives is not None:
            for column in info.known_positives.to(anchors.device)[anchors].unbind(1):
                known |= _equal(column, ids)
    if info.query_ids is not None:
        ids = info.query_ids.to(anchors.device)
        known[:, :, 0] |= _equal(ids[anchors], ids)
    return known


def _known_queries(anchors: Tensor, info: PairInfo, batch: int) -> Tensor:
    """Queries ``(R, B)`` that the anchors' positives are known to answer."""
    known = torch.zeros(len(anchors), batch, dtype=torch.bool, device=anchors.device)
    if info.text_ids is not None:
        own = info.text_ids.to(anchors.device)[anchors, 0]
        known |= _equal(own, info.text_ids.to(anchors.device)[:, 0])
        if info.known_positives is not None:
            for column in info.known_positives.to(anchors.device).unbind(1):
                known |= _equal(own, column)
    if info.query_ids is not None:
        ids = info.query_ids.to(anchors.device)
        known |= _equal(ids[anchors], ids)
    return known


def _equal(mine: Tensor, ids: Tensor) -> Tensor:
    """Where ``ids`` of any shape equal ``mine`` ``(R,)`` and are known: ``(R, *ids.shape)``."""
    return (mine.reshape(-1, *[1] * ids.dim()) == ids) & (ids >= 0)


def _check(queries: Tensor, passages: Tensor, temperature: float | Tensor, info: PairInfo) -> None:
    """Refuse what would give silent nonsense."""
    if queries.dim() != 2 or passages.dim() != 3 or not queries.numel() or not passages.numel():
        shapes = f"{tuple(queries.shape)} and {tuple(passages.shape)}"
        raise ValueError(f"queries must be (B, d) and passages (B, G, d), not empty, got {shapes}")
    batch, group, width = passages.shape
    if queries.shape != (batch, width):
        shapes = f"{tuple(queries.shape)} and {tuple(passages.shape)}"
        raise ValueError(f"queries (B, d) and passages (B, G, d) must share B and d, got {shapes}")
    if not isinstance(temperature, Tensor) and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be above 0")
    wanted: dict[str, tuple[int, ...]] = {
        "in_batch": (batch,),
        "counted": (batch,),
        "passage_mask": (batch, group),
        "text_ids": (batch, group),
        "query_ids": (batch,),
        "known_positives": (batch, -1),
    }
    for name, shape in wanted.items():
        value = getattr(info, name)
        if value is None:
            continue
        if value.dim() != len(shape) or any(
            b not in (-1, a) for a, b in zip(value.shape, shape, strict=True)
        ):
            shown = str(shape).replace("-1", "K")
            raise ValueError(f"{name} must have shape {shown}, got {tuple(value.shape)}")
        if name in ("text_ids", "query_ids", "known_positives") and value.is_floating_point():
            raise ValueError(f"{name} must hold integers, got {value.dtype}")
    if info.known_positives is not None and info.text_ids is None:
        raise ValueError("known_positives says nothing without text_ids")
    if info.passage_mask is not None and not info.passage_mask[:, 0].all():
        row = int((~info.passage_mask[:, 0].to(torch.bool)).nonzero()[0])
        raise ValueError(f"passage_mask[{row}, 0] is False, but every row needs its positive")
