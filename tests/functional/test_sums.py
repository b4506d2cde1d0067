"""Sums and counts: masks, merging, dividing, and summaries against torch's own statistics."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.sums import (
    Summary,
    masked_sum_count,
    means,
    merge,
    merge_summaries,
    moments,
    summary_scalars,
)

torch.set_num_threads(1)

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], None, (10.0, 4.0)),
        ([[1.0, NAN], [3.0, -math.inf]], [[1, 0], [1, 0]], (4.0, 2.0)),
        ([[NAN]], [[0]], (0.0, 0.0)),
        ([True, False, True], [1, 1, 0], (1.0, 2.0)),
        ([[1.0, 2.0], [3.0, 4.0]], [[True], [False]], (3.0, 2.0)),
        ([], None, (0.0, 0.0)),
    ],
)
def test_masked_sum_count(values, mask, expected):
    tensor = torch.tensor(values)
    if tensor.is_floating_point():
        tensor.requires_grad_()
    total, count = masked_sum_count(tensor, None if mask is None else torch.tensor(mask))
    assert (total.item(), count.item()) == expected
    assert total.dtype == count.dtype and not total.requires_grad
    assert torch.stack([total, count]).shape == (2,)


def test_sums_do_not_lose_small_values():
    total, _ = masked_sum_count(torch.tensor([1e8] + [1.0] * 10))
    assert total.item() == 1e8 + 10


def test_mean_of_merged_micro_batches_is_the_mean_of_all():
    values = torch.arange(10.0)
    pieces = [{"x": masked_sum_count(piece)} for piece in values.split([1, 7, 2])]
    merged = merge(merge(pieces[0], pieces[1]), pieces[2])
    assert means(merged) == {"x": 4.5}
    assert means(pieces[0]) == {"x": 0.0}  # merging changed none of its arguments


def test_merge_keeps_names_of_one_side_and_mixes_numbers_with_tensors():
    a = {"x": (1.0, 2), "only_a": (1.0, 1)}
    b = {"x": (torch.tensor(3.0), torch.tensor(2)), "only_b": (5.0, 2)}
    assert means(merge(a, b)) == {"x": 1.0, "only_a": 1.0, "only_b": 2.5}
    assert merge({}, a) == a == merge(a, {}) and merge({}, a) is not a


def test_means_drops_what_was_never_counted():
    empty = masked_sum_count(torch.ones(2), torch.zeros(2))
    assert means({"absent": empty, "also": (0.0, 0), "zero": (0.0, 3)}) == {"zero": 0.0}


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_summary_equals_torch(pieces):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator) * 3 + 1
    mask = torch.rand(50, generator=generator) < 0.6
    merged: dict[str, Summary] = {}
    for part, keep in zip(values.chunk(pieces), mask.chunk(pieces), strict=True):
        merged = merge_summaries(merged, moments("x", part.where(keep, NAN), keep))
    kept = values[mask]
    expected = {
        "x_mean": kept.mean().item(),
        "x_std": kept.std(correction=0).item(),
        "x_min": kept.min().item(),
        "x_max": kept.max().item(),
    }
    assert summary_scalars(merged) == pytest.approx(expected, rel=1e-6)
    assert merged["x"].count == int(mask.sum())


def test_empty_summary_is_neutral_and_not_logged():
    empty = moments("x", torch.ones(3), torch.zeros(3))
    full = moments("x", torch.tensor([2.0, 4.0]))
    assert merge_summaries(empty, full) == full == merge_summaries(full, empty)
    assert summary_scalars(empty) == {} == summary_scalars(moments("x", torch.zeros(0)))
    assert math.isnan(empty["x"].mean) and math.isnan(empty["x"].std)


def test_std_of_equal_values_is_never_nan_but_nan_is_kept():
    assert moments("x", torch.full((7,), 0.1, dtype=torch.float64))["x"].std < 1e-8
    assert moments("x", torch.tensor([0.1]))["x"].std < 1e-8
    assert math.isnan(moments("x", torch.tensor([1.0, NAN]))["x"].std)


def test_check_choice():
    check_choice("mode", "sum", ["sum", "mean"])
    with pytest.raises(ValueError, match="mode='Sums' is not known; allowed: 'sum', 'mean'; did"):
        check_choice("mode", "Sums", ["sum", "mean"])
    with pytest.raises(ValueError, match="mode=None"):
        check_choice("mode", None, ["sum", "mean"])
