"""Layouts: rows without gaps, equal segments, labels that end in their only EOS."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.compressor.segments import cut, pack


def test_parts_follow_one_another_whatever_the_padding():
    a = torch.arange(1.0, 7.0).view(2, 3, 1)
    b = torch.arange(10.0, 14.0).view(2, 2, 1)
    left = torch.tensor([[False, True, True], [True, True, True]])
    right = torch.tensor([[True, False], [False, True]])
    packed = pack([(a, left), (b, right)])
    assert packed.embeds[:, :, 0].tolist() == [[2, 3, 10, 0], [4, 5, 6, 13]]
    assert [start.tolist() for start in packed.starts] == [[0, 0], [2, 3]]
    assert packed.mask.tolist() == [[True, True, True, False], [True] * 4]
    packed = pack([(a, left), (b, right)], pad_left=True)
    assert packed.embeds[:, :, 0].tolist() == [[0, 2, 3, 10], [4, 5, 6, 13]]
    assert [start.tolist() for start in packed.starts] == [[1, 0], [3, 3]]
    assert packed.mask.tolist() == [[False, True, True, True], [True] * 4]


def test_a_part_may_be_empty():
    a, none = torch.ones(2, 3, 1), torch.ones(2, 0, 1)
    packed = pack([(a, torch.ones(2, 3)), (none, torch.ones(2, 0)), (a, torch.ones(2, 3))])
    assert packed.mask.all() and packed.embeds.shape == (2, 6, 1)
    assert packed.starts[2].tolist() == [3, 3]


@pytest.mark.parametrize("most", [1, 3, 4, 7, 100, None])
def test_segments_hold_every_token_once_and_in_order(most):
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, :5] = False
    mask[2, 1:] = False
    mask[3, 3] = False
    segments = cut(mask, most)
    for row in range(4):
        own = (segments.rows == row).nonzero()[:, 0]
        kept = [segments.columns[one][segments.mask[one]].tolist() for one in own]
        assert sum(kept, []) == mask[row].nonzero()[:, 0].tolist()
        sizes = [len(part) for part in kept]
        assert max(sizes) - min(sizes) <= 1
        length = int(mask[row].sum())
        assert len(kept) == int(segments.counts[row]) == (-(-length // most) if most else 1)
        assert segments.numbers[own].tolist() == list(range(len(kept)))


def test_values_of_segments_are_joined_in_their_rows():
    segments = cut(torch.tensor([[True] * 5, [True] * 2 + [False] * 3]), 2)
    values = torch.arange(1.0, 9.0).view(4, 2, 1)
    joined = segments.join(values)[:, :, 0]
    assert joined.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]
    assert segments.joined_mask(2).tolist() == [[True] * 6, [True] * 2 + [False] * 4]


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text 1 of the batch has no tokens"):
        cut(torch.tensor([[True, True], [False, False]]), None)
