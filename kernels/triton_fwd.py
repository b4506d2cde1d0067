"""Triton: row statistics of the head's logits in one stream over the vocabulary (kernel F1).

A program owns a block of rows and a range of column tiles (a split). It makes a tile of logits in
float32 accumulators, takes from it what is asked for and forgets it; ``merge`` joins the splits.
Statistics are kept relative to the running maximum ``m``: ``S = sum exp(z - m)``,
``A = sum exp(z - m) (z - m)``, so an offset of the logits costs no digits [our choice: 5 of our
notes; the usual ``sum exp(z) z`` is off by 4.9 at an offset of 1e4].

``z - m`` is taken in natural units and log2(e) is multiplied into the exponent afterwards, not into
the logits [our choice: the maximum then needs no conversion, which would round an offset of 1e4 by
1e-3, and the gradient kernel finds bit for bit the same ``z - m``]. No GPU has run this file yet:
it is tested with the interpreter and compiled for CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def unpack_grouped(program, num_row_blocks, num_parts, GROUP: tl.constexpr):
    """Row block and part of the vocabulary of a program of a 1-D grid, row blocks fastest.

    Groups of ``GROUP`` row blocks stay in the L2 cache while the weight streams by; grid axis y
    would end at 65535 blocks.
    """
    in_group = GROUP * num_parts
    first = (program // in_group) * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    local = program % in_group
    return first + local % size, local // size


@triton.jit
def logits_tile(
    hidden,
    weight,
    bias,
    side_hidden,
    side_weight,
    rows,
    columns,
    width,
    side_width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Scaled logits ``(BLOCK_M, BLOCK_N)`` in float32 of int64 rows and columns that all exist.

    ``UPCAST`` is for the interpreter, whose bfloat16 ``dot`` multiplies bit patterns.
    """
    inner = tl.arange(0, BLOCK_K)
    left = hidden + rows[:, None] * hidden_row + inner[None, :] * hidden_column
    right = weight + columns[None, :] * weight_row + inner[:, None] * weight_column
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(width, BLOCK_K)):
        if EVEN:
            a = tl.load(left)
            b = tl.load(right)
        else:
            live = inner < width - k * BLOCK_K
            a = tl.load(left, mask=live[None, :], other=0.0)
            b = tl.load(right, mask=live[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K * hidden_column
        right += BLOCK_K * weight_column
    if HAS_SIDE:
        rank = tl.arange(0, BLOCK_R)
        for k in range(0, tl.cdiv(side_width, BLOCK_R)):
            at = k * BLOCK_R + rank
            a = tl.load(
                side_hidden + rows[:, None] * side_width + at[None, :],
                mask=at[None, :] < side_width,
                other=0.0,
            )
            b = tl.load(
                side_weight + columns[None, :] * side_width + at[:, None],
                mask=at[:, None] < side_width,
                other=0.0,
            )
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns).to(tl.float32)[None, :]
    if HAS_SCALE:
        total *= scale
    return total


@triton.jit
def keep_top(
    work, tile_max, first_column, top_values, top_ids, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Insert a tile into the running top-K of every row; the lowest id wins among equals.

    Maxima are taken out one at a time while any beats the row's K-th best, at most K of a tile and
    after the first tiles hardly any. Later tiles have higher ids, so an equal never displaces.
    """
    local = tl.arange(0, BLOCK_N)
    worst = tl.min(top_values, 1)
    best = tile_max
    while tl.max((best > worst).to(tl.int32), 0) > 0:
        is_better = best > worst
        at = tl.argmax(work, 1).to(tl.int32)
        # of several worst ones the highest id goes
        drop = tl.max(tl.where(top_values == worst[:, None], top_ids, -1), 1)
        place = (top_values == worst[:, None]) & (top_ids == drop[:, None]) & is_better[:, None]
        top_values = tl.where(place, best[:, None], top_values)
        top_ids = tl.where(place, (first_column + at)[:, None], top_ids)
        work = tl.where(local[None, :] == at[:, None], float("-inf"), work)
        worst = tl.min(top_values, 1)
        best = tl.max(work, 1)
    return top_values, top_ids


@triton.jit
def forward_kernel(
    hidden,
    weight,
    bias,
    side_hidden,
    side_weight,
    targets,
    part_max,
    part_sum,
    part_tilted,
    part_total,
    part_argmax,
    target_logit,
    part_values,
    part_ids,
    num_rows,
    vocab_limit,
    width,
    side_width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    num_row_blocks,
    num_splits,
    split_tiles,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_ARGMAX: tl.constexpr,
    TOP: tl.constexpr,
    TOP_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Partial statistics ``(num_splits, N)`` of every split; see ``merge`` for what they are."""
    block, split = unpack_grouped(tl.program_id(0), num_row_blocks, num_splits, GROUP)
    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    # rows and columns past the end are read as the last one; what comes of them is masked
    rows = tl.minimum(row, num_rows - 1)
    target = tl.load(targets + rows).to(tl.int32)
    local = tl.arange(0, BLOCK_N)

    running = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    exp_sum = tl.zeros((BLOCK_M,), tl.float32)
    tilted = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    best_id = tl.zeros((BLOCK_M,), tl.int32)
    slot = tl.arange(0, TOP_SLOTS)
    # a slot that is never filled holds -inf; slots past K hold +inf and are never the worst
    top_values = tl.zeros((BLOCK_M, TOP_SLOTS), tl.float32) + tl.where(
        slot[None, :] < TOP, float("-inf"), float("inf")
    )
    top_ids = tl.zeros((BLOCK_M, TOP_SLOTS), tl.int32) + slot[None, :]

    first_tile = split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, tl.cdiv(vocab_limit, BLOCK_N))
    for tile in range(first_tile, last_tile):
        first = tile * BLOCK_N
        column = first + local
        z = logits_tile(
            hidden,
            weight,
            bias,
            side_hidden,
            side_weight,
            rows,
            tl.minimum(column, vocab_limit - 1).to(tl.int64),
            width,
            side_width,
            hidden_row,
            hidden_column,
            weight_row,
            weight_column,
            scale,
            HAS_BIAS,
            HAS_SIDE,
            HAS_SCALE,
            EVEN,
            UPCAST,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
        )
        is_column = column < vocab_limit
        z = tl.where(is_column[None, :], z, float("-inf"))

        # the target's column lies in one tile of one split, so a plain store is enough
        is_here = is_row & (target >= first) & (target < first + BLOCK_N)
        if tl.max(is_here.to(tl.int32), 0) > 0:
            chosen = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
            tl.store(target_logit + rows, chosen, mask=is_here)

        tile_max = tl.max(z, 1)
        largest = tl.maximum(running, tile_max)
        # a row without any finite logit so far: subtract 0, so that -inf - -inf never happens
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        is_first = running == float("-inf")
        delta = tl.where(is_first, 0.0, running - safe)
        carry = tl.where(is_first, 0.0, tl.exp2(delta * LOG2E))
        d = z - safe[:, None]
        if WITH_MEAN:
            seen = (first - first_tile * BLOCK_N).to(tl.float32)
            total += delta * seen + tl.sum(tl.where(is_column[None, :], d, 0.0), 1)
        if WITH_ARGMAX:
            at = first + tl.argmax(z, 1).to(tl.int32)
            best_id = tl.where(tile_max > running, at, best_id)
        e = tl.exp2(d * LOG2E)
        d = tl.where(e > 0.0, d, 0.0)  # 0 * -inf would be NaN
        tilted = carry * (tilted + delta * exp_sum) + tl.sum(e * d, 1)
        exp_sum = carry * exp_sum + tl.sum(e, 1)
        running = largest
        if TOP > 0:
            top_values, top_ids = keep_top(
                z, tile_max, first, top_values, top_ids, BLOCK_M, BLOCK_N
            )

    at = split.to(tl.int64) * num_rows + rows
    tl.store(part_max + at, running, mask=is_row)
    tl.store(part_sum + at, exp_sum, mask=is_row)
    tl.store(part_tilted + at, tilted, mask=is_row)
    if WITH_MEAN:
        tl.store(part_total + at, total, mask=is_row)
    if WITH_ARGMAX:
        tl.store(part_argmax + at, best_id, mask=is_row)
    if TOP > 0:
        spot = at[:, None] * TOP + slot[None, :]
        keep = is_row[:, None] & (slot[None, :] < TOP)
        tl.store(part_values + spot, top_values, mask=keep)
        tl.store(part_ids + spot, top_ids, mask=keep)


def merge(
    part_max: Tensor, part_sum: Tensor, part_tilted: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the splits of every row (F2), relative to the row's maximum.

    A few launches on ``(splits, N)`` values: nothing beside the stream over the vocabulary
    [our choice: PyTorch lines instead of a kernel].

    Args:
        part_max: ``(splits, N)`` maximum of the split, ``-inf`` where it has no finite logit.
        part_sum: ``(splits, N)`` ``sum exp(z - part_max)``.
        part_tilted: ``(splits, N)`` ``sum exp(z - part_max) (z - part_max)``.

    Returns:
        Row maximum, log-sum of ``exp(z - max)`` and entropy, ``(N,)`` each, and ``(splits, N)``
        what to add to ``z - part_max``. All are NaN for a row with a NaN; of a row without a
        finite logit the maximum is ``-inf`` (a shard of the vocabulary may be such).
    """
    row_max = part_max.amax(0)
    shift = torch.where(part_max.isneginf(), 0.0, part_max - row_max)
    factor = torch.where(part_max.isneginf(), 0.0, shift.exp())
    exp_sum = (factor * part_sum).sum(0)
    tilted = (factor * (part_tilted + shift * part_sum)).sum(0)
    # NaN logits do not show in a maximum, but they do in the sums of their split
    is_nan = part_sum.isnan().any(0)
    log_sum = torch.where(is_nan | row_max.isneginf(), torch.nan, exp_sum.log())
    row_max = torch.where(is_nan, torch.nan, row_max)
    return row_max, log_sum, log_sum - tilted / exp_sum, shift


def merge_top(
    part_values: Tensor, part_ids: Tensor, k: int, vocab_limit: int
) -> tuple[Tensor, Tensor]:
    """The K largest of the splits' candidates, lowest id first among equals.

    Args:
        part_values: ``(splits, N, K)`` scaled logits in any order; ``-inf`` is an empty slot.
        part_ids: ``(splits, N, K)`` int32.
        k: K.
        vocab_limit: Number of columns, at least K.

    Returns:
        Values and int64 ids ``(N, K)``, largest value first. A row with fewer than K finite logits
        is filled up with the lowest other ids, as a stable sort does.
    """
    values = part_values.transpose(0, 1).flatten(1)
    ids = part_ids.transpose(0, 1).flatten(1).long()
    ids, order = ids.sort(1)
    values = values.gather(1, order)
    values, order = values.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :k], ids.gather(1, order)[:, :k]
    # some of the first 2 K ids are free: at most K are taken
    spare = torch.arange(min(2 * k, vocab_limit), device=ids.device)
    is_empty = values.isneginf()
    is_taken = ((ids[:, :, None] == spare) & ~is_empty[:, :, None]).any(1)
    free = is_taken.int().sort(dim=1, stable=True).indices
    rank = (is_empty.cumsum(1) - 1).clamp(min=0)
    return values, torch.where(is_empty, free.gather(1, rank), ids)
