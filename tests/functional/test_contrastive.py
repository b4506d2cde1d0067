"""InfoNCE against a slow loop: masks, both directions, Matryoshka, metrics; alignment, evenness."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.functional.contrastive import (
    PairInfo,
    info_nce,
    matryoshka_info_nce,
)
from lightning_modules.functional.sums import means, merge
from lightning_modules.functional.uniformity import alignment, uniformity_sums

B, G, D = 5, 3, 6
INFO = PairInfo(
    in_batch=torch.tensor([True, True, False, True, True]),
    counted=torch.tensor([True, True, True, True, False]),
    passage_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool(),
    text_ids=torch.tensor([[1, 2, -1], [4, 5, 6], [7, 7, 9], [1, 10, -1], [12, 4, 13]]),
    query_ids=torch.tensor([20, 21, 22, 21, -1]),
    known_positives=torch.tensor([[1, 5], [4, -1], [7, -1], [1, 2], [12, -1]]),
)


def vectors(seed: int = 0, batch: int = B, group: int = G) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(batch, 1 + group, D, generator=generator, dtype=torch.float64)
    return made[:, 0].clone().requires_grad_(), made[:, 1:].clone().requires_grad_()


def known_pair(info: PairInfo, i: int, j: int, h: int) -> bool:
    """Whether passage h of row j is known to answer query i."""
    if info.text_ids is not None:
        text = int(info.text_ids[j, h])
        answers = {int(info.text_ids[i, 0])}
        if info.known_positives is not None:
            answers |= set(info.known_positives[i].tolist())
        if text >= 0 and text in answers:
            return True
    if info.query_ids is not None and h == 0:
        return bool(info.query_ids[i] == info.query_ids[j] >= 0)
    return False


def slow(
    queries: Tensor,
    passages: Tensor,
    info: PairInfo,
    tau: float,
    symmetric: bool = False,
    margin: float | None = None,
    normalize: bool = True,
) -> list[Tensor]:
    """Losses of the rows that count, one after the other."""
    q = F.normalize(queries, dim=-1) if normalize else queries
    p = F.normalize(passages, dim=-1) if normalize else passages
    yes = torch.ones(len(q), dtype=torch.bool)
    in_batch = yes if info.in_batch is None else info.in_batch
    counted = yes if info.counted is None else info.counted
    shared = in_batch & counted
    losses = []
    for i in range(len(q)):
        if not counted[i]:
            continue
        own = q[i] @ p[i, 0]
        limit = math.inf if margin is None else float(own.detach()) - margin
        terms, back = [own / tau], [own / tau]
        for j in range(len(q)):
            if j != i and not (shared[i] and shared[j]):
                continue
            for h in range(p.shape[1]):
                score = q[i] @ p[j, h]
                valid = info.passage_mask is None or info.passage_mask[j, h]
                if (j, h) != (i, 0) and valid and not known_pair(info, i, j, h):
                    if float(score.detach()) <= limit:
                        terms.append(score / tau)
            score = q[j] @ p[i, 0]
            if j != i and not known_pair(info, j, i, 0) and float(score.detach()) <= limit:
                back.append(score / tau)
        loss = torch.stack(terms).logsumexp(0) - own / tau
        if symmetric and shared[i]:
            loss = (loss + torch.stack(back).logsumexp(0) - own / tau) / 2
        losses.append(loss)
    return losses


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("margin", [None, -0.1, 0.2])
@pytest.mark.parametrize(
    "info",
    [
        PairInfo(),
        INFO,
        replace(INFO, known_positives=None, query_ids=None),
        PairInfo(query_ids=INFO.query_ids),
        PairInfo(in_batch=torch.zeros(B, dtype=torch.bool)),
    ],
)
def test_equals_a_slow_loop(symmetric, normalize, margin, info):
    q, p = vectors()
    options: dict[str, Any] = {"symmetric": symmetric, "normalize": normalize, "margin": margin}
    found = info_nce(q, p, temperature=0.3, info=info, **options)
    expected = slow(q, p, info, 0.3, **options)
    assert found.num_rows == len(expected)
    torch.testing.assert_close(found.loss_sum, torch.stack(expected).sum(), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(found.loss_sum, (q, p))
    wanted = torch.autograd.grad(torch.stack(expected).sum(), (q, p))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_plain_case_is_cross_entropy_of_the_score_matrix():
    q, p = vectors()
    scores = F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).flatten(0, 1).T / 0.02
    expected = F.cross_entropy(scores, torch.arange(B) * G, reduction="sum")
    torch.testing.assert_close(info_nce(q, p, temperature=0.02).loss_sum, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("info", [PairInfo(), INFO])
def test_shares_of_the_rows_add_up(symmetric, info):
    q, p = vectors()
    options: dict[str, Any] = {"temperature": 0.3, "symmetric": symmetric, "info": info}
    whole = info_nce(q, p, **options)
    shares = [info_nce(q, p, rows=rows, **options) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(share.loss_sum for share in shares), whole.loss_sum)
    assert sum(share.num_rows for share in shares) == whole.num_rows
    both = merge(shares[0].metrics, shares[1].metrics)
    assert means(both) == pytest.approx(means(whole.metrics))
    empty = info_nce(q, p, rows=slice(5, 5), **options)
    assert empty.num_rows == 0 and empty.loss_sum == 0
    gradients = torch.autograd.grad(empty.loss_sum, (q, p))  # has a graph: no rank may stay away
    assert all(not gradient.any() for gradient in gradients)


def test_rows_without_in_batch_negatives_are_alone():
    """Neither value nor gradient of such a row changes with the others, nor theirs with it."""
    q, p = vectors()
    info = PairInfo(in_batch=torch.tensor([True, True, False, True, False]))
    alone = info_nce(q[2:3], p[2:3], temperature=0.1)
    among = info_nce(q, p, temperature=0.1, info=info, rows=slice(2, 3), symmetric=True)
    torch.testing.assert_close(among.loss_sum, alone.loss_sum)
    gradient_q, gradient_p = torch.autograd.grad(among.loss_sum, (q, p))
    assert gradient_q[2].any() and gradient_p[2].any()
    assert not gradient_q[[0, 1, 3, 4]].any() and not gradient_p[[0, 1, 3, 4]].any()
    others = info_nce(q, p, temperature=0.1, info=info, rows=slice(0, 2))
    gradient_q, gradient_p = torch.autograd.grad(others.loss_sum, (q, p))
    assert not gradient_p[[2, 4]].any() and gradient_p[3].any()


def test_false_negatives_get_no_gradient_and_are_counted():
    q, p = vectors(batch=3, group=1)
    info = PairInfo(text_ids=torch.tensor([[1], [1], [2]]))
    found = info_nce(q, p, temperature=0.1, info=info, rows=slice(0, 1))
    (gradient,) = torch.autograd.grad(found.loss_sum, p)
    assert not gradient[1].any() and gradient[2].any()
    assert means(found.metrics)["false_negative_share"] == 0.5
    assert means(found.metrics)["negatives"] == 1.0


def test_a_positive_margin_leaves_a_collapsed_model_without_negatives():
    same = torch.ones(4, D, dtype=torch.float64, requires_grad=True)
    passages = torch.ones(4, 2, D, dtype=torch.float64)
    found = info_nce(same, passages, temperature=0.1, margin=0.1)
    assert found.loss_sum == 0 and means(found.metrics)["false_negative_share"] == 1
    assert "accuracy" not in means(found.metrics)  # there was nothing to be told apart from
    kept = info_nce(same, passages, temperature=0.1, margin=-0.1)
    assert float(kept.loss_sum.detach()) == pytest.approx(4 * math.log(8))
    assert means(kept.metrics)["accuracy"] == 0  # ties earn nothing


def test_metrics_by_hand():
    q = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    found = means(info_nce(q, p, temperature=1.0).metrics)
    half = math.sqrt(0.5)
    # row 0: positive 1, but passage (1, 0) of row 1 ties; row 1: positive 0 below (1, 1) of row 0
    assert found["accuracy"] == 0.0
    assert found["positive_cosine"] == pytest.approx(0.5)
    assert found["hardest_negative_cosine"] == pytest.approx((1 + half) / 2)
    assert found["negatives"] == 3 and found["false_negative_share"] == 0
    dots = means(info_nce(q, p, temperature=1.0, normalize=False).metrics)
    assert dots["accuracy"] == 0.5  # 6 above 2, 0 below 1
    assert dots["hardest_negative_cosine"] == found["hardest_negative_cosine"]
    assert dots["positive_cosine"] == pytest.approx(0.5)


def test_accuracy_of_both_directions():
    q = torch.eye(3)
    p = torch.stack([torch.eye(3)[0], torch.eye(3)[1], torch.tensor([0.9, 0.1, 0.8])])[:, None]
    found = means(info_nce(q, p, temperature=1.0, symmetric=True).metrics)
    assert found["accuracy"] == 1.0
    assert found["accuracy_backward"] == pytest.approx(2 / 3)


def test_half_precision_and_autocast_are_widened():
    q, p = (x.detach().float() for x in vectors())
    plain = info_nce(q, p, temperature=0.02).loss_sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(q, p, temperature=0.02).loss_sum
    assert torch.equal(plain, inside)
    assert info_nce(q.bfloat16(), p.bfloat16()).loss_sum.dtype == torch.float32


def test_a_learnt_temperature_has_a_gradient():
    q, p = vectors()
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: info_nce(q, p, temperature=t).loss_sum, (tau,))


def test_matryoshka_is_the_weighted_mean_of_slices_normalised_again():
    q, p = vectors()
    options: dict[str, Any] = {"temperature": 0.2, "symmetric": True, "info": INFO}
    parts = {d: info_nce(q[:, :d], p[..., :d], **options) for d in (2, 6)}
    found = matryoshka_info_nce(q, p, dims=[2, 6], **options)
    torch.testing.assert_close(found.loss_sum, (parts[2].loss_sum + parts[6].loss_sum) / 2)
    uneven = matryoshka_info_nce(q, p, dims=[6, 2], weights=[3, 1], **options)
    wanted = 0.75 * parts[6].loss_sum + 0.25 * parts[2].loss_sum
    torch.testing.assert_close(uneven.loss_sum, wanted)
    unit = F.normalize(q, dim=-1), F.normalize(p, dim=-1)
    raw = matryoshka_info_nce(*unit, dims=[2], normalize=False, temperature=0.2)
    again = matryoshka_info_nce(*unit, dims=[2], temperature=0.2)
    assert abs(float((raw.loss_sum - again.loss_sum).detach())) > 0.1
    metrics = means(found.metrics)
    assert metrics["loss"] == pytest.approx(float(found.loss_sum.detach()) / found.num_rows)
    assert metrics["accuracy_6"] == metrics["accuracy"] == means(parts[6].metrics)["accuracy"]
    assert metrics["accuracy_2"] == means(parts[2].metrics)["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"info": PairInfo(in_batch=torch.ones(4))}, r"in_batch must have shape \(5,\)"),
        ({"info": PairInfo(text_ids=torch.ones(5, 2))}, r"text_ids must have shape \(5, 3\)"),
        ({"info": PairInfo(query_ids=torch.ones(5))}, "query_ids must hold integers"),
        ({"info": PairInfo(known_positives=torch.ones(5, 1).long())}, "without text_ids"),
        ({"info": replace(INFO, passage_mask=torch.zeros(5, 3))}, r"passage_mask\[0, 0\]"),
    ],
)
def test_bad_options_are_refused(change, message):
    q, p = vectors()
    with pytest.raises(ValueError, match=message):
        info_nce(q, p, **change)


def test_bad_shapes_and_dims_are_refused():
    q, p = vectors()
    for bad in ((q, p[:, 0]), (q[:4], p), (q[:, :2], p), (q[:0], p[:0])):
        with pytest.raises(ValueError, match="queries"):
            info_nce(*bad)
    for dims in ([], [2, 2], [0], [7]):
        with pytest.raises(ValueError, match="dims="):
            matryoshka_info_nce(q, p, dims=dims)
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(ValueError, match="weights="):
            matryoshka_info_nce(q, p, dims=[2, 4], weights=weights)


# --- alignment and uniformity ---------------------------------------------------------------------


def test_alignment_is_two_minus_twice_the_cosine():
    q, p = vectors()
    expected = 2 - 2 * F.cosine_similarity(q, p[:, 0])
    torch.testing.assert_close(alignment(q, p[:, 0]), expected)
    torch.testing.assert_close(alignment(q, p[:, 0], alpha=1.0), expected.sqrt())
    with pytest.raises(ValueError, match="alpha"):
        alignment(q, p[:, 0], alpha=0)
    with pytest.raises(ValueError, match="shape"):
        alignment(q, p)


@pytest.mark.parametrize("count", [2, 7, 1500])
def test_uniformity_equals_all_pairs(count):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = torch.pdist(F.normalize(x, dim=-1)).square()
    total, pairs = uniformity_sums(x * 3, t=1.5)
    assert pairs == count * (count - 1) / 2 == len(squares)
    torch.testing.assert_close(total, torch.exp(-1.5 * squares).sum())


def test_uniformity_of_one_vector_and_bad_values():
    assert [float(x) for x in uniformity_sums(torch.ones(1, 3))] == [0, 0]
    with pytest.raises(ValueError, match="t above 0"):
        uniformity_sums(torch.ones(2, 3), t=0)
