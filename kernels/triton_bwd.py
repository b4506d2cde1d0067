"""Triton: gradient of the logits, a tile at a time (kernel B1).

The logits of a tile are made again and turned into their gradient before they are stored; the
products with it are ordinary matrix products, see ``backward.py`` [our choice: 6.3 of our notes].
No GPU has run this file yet: it is tested with the interpreter and compiled for CUDA.
"""

import triton
import triton.language as tl

from .triton_fwd import LOG2E, logits_tile, unpack_grouped

#: Log-probs below it are of tokens with p = 0; a finite value keeps 0 * -inf away.
FLOOR = tl.constexpr(-1e4)


@triton.jit
def fill_kernel(
    hidden,
    weight,
    bias,
    side_hidden,
    side_weight,
    targets,
    row_max,
    log_sum,
    flat,
    tilted,
    at_target,
    everywhere,
    region_flat,
    region_tilted,
    threshold,
    tie_column,
    out,
    start,
    stop,
    first_column,
    last_column,
    width,
    side_width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    num_row_blocks,
    num_column_blocks,
    HAS_BIAS: tl.constexpr,
    HAS_SIDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_TILTED: tl.constexpr,
    HAS_EVERYWHERE: tl.constexpr,
    HAS_REGION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write rows ``start:stop`` and columns ``first_column:last_column`` of dZ into ``out``.

    The terms are those of ``Coefficients``; what is None there is compiled away.
    """
    block, part = unpack_grouped(tl.program_id(0), num_row_blocks, num_column_blocks, GROUP)
    row = start + block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = first_column + part * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end are read as the last one and not stored
    rows = tl.minimum(row, stop - 1)
    columns = tl.minimum(column, last_column - 1)
    z = logits_tile(
        hidden,
        weight,
        bias,
        side_hidden,
        side_weight,
        rows,
        columns.to(tl.int64),
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
    d = z - tl.load(row_max + rows)[:, None]
    lp = d - tl.load(log_sum + rows)[:, None]
    p = tl.exp2(lp * LOG2E)
    lp = tl.maximum(lp, FLOOR)
    if HAS_TILTED:
        factor = tl.load(flat + rows)[:, None] + tl.load(tilted + rows)[:, None] * lp
    else:
        factor = tl.load(flat + rows)[:, None]
    if HAS_REGION:
        limit = tl.load(threshold + rows)[:, None]
        tie = tl.load(tie_column + rows)[:, None]
        is_inside = (d > limit) | ((d == limit) & (columns[None, :] <= tie))
        extra = tl.load(region_flat + rows)[:, None] + tl.load(region_tilted + rows)[:, None] * lp
        factor += tl.where(is_inside, extra, 0.0)
    gradient = p * factor
    target = tl.load(targets + rows).to(tl.int32)
    chosen = tl.load(at_target + rows)
    gradient += tl.where(columns[None, :] == target[:, None], chosen[:, None], 0.0)
    if HAS_EVERYWHERE:
        gradient += tl.load(everywhere + rows)[:, None]
    # int64 only for the corner: pointers of a whole tile would take the registers
    stride = last_column - first_column
    corner = out + block.to(tl.int64) * BLOCK_M * stride + part * BLOCK_N
    inside = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
    keep = (row < stop)[:, None] & (column < last_column)[None, :]
    tl.store(corner + inside, gradient.to(out.dtype.element_ty), mask=keep)
