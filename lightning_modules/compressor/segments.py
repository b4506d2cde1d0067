"""Layouts of token vectors: rows without gaps, and long texts cut into equal segments.

Every row is packed to the left and padded on the right only. Causal attention never looks at
padding on the right, so no attention mask is needed and a row does not depend on its batch mates,
whatever side its texts were padded on (card, section 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Parts of a row one after another, without gaps.

    Args:
        embeds: ``(R, L, d)``, zero on padding.
        mask: ``(R, L)`` True on vectors.
        starts: ``(R,)`` for each part: where it begins.
    """

    embeds: Tensor
    mask: Tensor
    starts: tuple[Tensor, ...]


class Segments(NamedTuple):
    """Which token belongs to which segment; R segments in the order of their rows.

    Args:
        rows: ``(R,)`` row of the batch.
        numbers: ``(R,)`` number of the segment in its row.
        columns: ``(R, L)`` columns of its tokens in the batch; any column off the mask.
        mask: ``(R, L)`` True on tokens.
        counts: ``(B,)`` segments of each row.
    """

    rows: Tensor
    numbers: Tensor
    columns: Tensor
    mask: Tensor
    counts: Tensor

    def join(self, values: Tensor) -> Tensor:
        """Values ``(R, m, ...)`` of segments as ``(B, S * m, ...)``: a row's one after another.

        Rows with fewer than S segments end in zeros; see ``joined_mask``.
        """
        width = values.shape[1]
        columns = self.numbers[:, None] * width + torch.arange(width, device=values.device)
        shape = (len(self.counts), int(self.counts.max()) * width, *values.shape[2:])
        return values.new_zeros(shape).index_put((self.rows[:, None], columns), values)

    def joined_mask(self, width: int) -> Tensor:
        """``(B, S * width)`` True where ``join`` of ``width`` values a segment has put some."""
        return _below(self.counts * width, int(self.counts.max()) * width)


def pack(parts: Sequence[tuple[Tensor, Tensor]], *, pad_left: bool = False) -> Packed:
    """Put the parts of every row one after another and close the gaps.

    Args:
        parts: ``(values (R, n, d), mask (R, n))`` each; n differs from part to part and may be 0.
        pad_left: Padding comes first, so that all rows end together (a window of attention that
            goes on token by token would count padding behind them).

    Example:
        >>> values, mask = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[False, True]])
        >>> pack([(values, mask), (values, ~mask)]).embeds.flatten()
        tensor([2., 1.])
    """
    values = torch.cat([part for part, _ in parts], 1)
    mask = torch.cat([part for _, part in parts], 1).bool()
    sizes = torch.stack([part.bool().sum(1) for _, part in parts])
    ends = sizes.cumsum(0)
    lengths = ends[-1]
    longest = int(lengths.max())
    shift = longest - lengths if pad_left else torch.zeros_like(lengths)
    places = torch.arange(longest, device=mask.device) - shift[:, None]
    is_live = (places >= 0) & (places < lengths[:, None])
    order = _left(mask).gather(1, places.clamp(min=0))
    embeds = values.take_along_dim(order[:, :, None], 1).where(is_live[:, :, None], 0.0)
    return Packed(embeds, is_live, tuple(ends - sizes + shift))


def cut(mask: Tensor, most: int | None) -> Segments:
    """Cut texts into segments of equal length (to one token) with at most ``most`` tokens.

    Args:
        mask: ``(B, n)`` True on tokens, padded on any side.
        most: Tokens of a segment; None makes one of each text.

    Raises:
        ValueError: A text has no tokens.

    Example:
        >>> cut(torch.ones(1, 5, dtype=torch.bool), 3).mask.sum(1)
        tensor([2, 3])
    """
    mask = mask.bool()
    sizes = mask.sum(1)
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"text {empty[0]} of the batch has no tokens to compress")
    counts = torch.ones_like(sizes) if most is None else -(-sizes // most)
    rows, numbers = _below(counts, int(counts.max())).nonzero(as_tuple=True)
    first = numbers * sizes[rows] // counts[rows]
    lengths = (numbers + 1) * sizes[rows] // counts[rows] - first
    longest = int(lengths.max())
    places = first[:, None] + torch.arange(longest, device=mask.device)
    columns = _left(mask)[rows].gather(1, places.clamp(max=mask.shape[1] - 1))
    return Segments(rows, numbers, columns, _below(lengths, longest), counts)


def _left(mask: Tensor) -> Tensor:
    """``(B, n)`` columns of each row, those under the mask first, in their order."""
    return torch.argsort((~mask).int(), dim=1, stable=True)


def _below(lengths: Tensor, width: int) -> Tensor:
    """``(R, width)`` True in the first ``lengths`` columns."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
