"""Triton: everything about rows whose logits exist, with the exact nucleus (kernel R1).

R1 is two launches of one program a row, so that what one thread wrote for another is ordered by the
launch and not by barriers [our choice]. ``row_kernel`` reads the row for its statistics and copies
the candidates of the nucleus to a buffer; ``nucleus_kernel`` searches them.

Lemma [our choice, 6.2 of our notes]: every token of the nucleus has
``p_j >= (1 - p) / V``, for those below carry less than ``1 - p`` together. The candidates are those
and a margin for rounding. Where they overflow the buffer the row itself is searched: same code.

Search: four parts of the integers between the largest key and the cutoff, three pivots a sweep
(pivots with duplicates handled: [paper] arXiv 2602.01518; keys and bracket are ours). Keys are the
order-preserving integers of ``d + 0.0``; 16 sweeps or so find the last kept key exactly.
No GPU has run this file yet: it is tested with the interpreter and compiled for CUDA.
"""

import triton
import triton.language as tl

from .triton_fwd import LOG2E

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def order_key(d):
    """int32 key that orders floats as their values do; ``+ 0.0`` merges -0.0 with 0.0."""
    bits = (d + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def row_kernel(
    logits,
    targets,
    row_max,
    log_sum,
    exp_total,
    entropy,
    target_value,
    mean,
    argmax,
    num_candidates,
    best_rejected,
    scratch,
    width,
    log_cut,
    capacity,
    WITH_MEAN: tl.constexpr,
    WITH_ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of one row of ``logits (R, width)`` and its candidates into ``scratch``.

    ``scratch (R, capacity)`` takes the candidates' logits in the order of their ids;
    ``num_candidates`` counts also those that did not fit; ``best_rejected`` is the largest
    ``d`` of the rest. A row with a NaN or without a finite logit is NaN and has no candidates;
    the maximum of the latter is ``-inf``.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * width
    lane = tl.arange(0, BLOCK)

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        z = tl.load(source + column, mask=column < width, other=float("-inf"))
        largest = tl.maximum(largest, z)
    top = tl.max(largest, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)

    exp_sum = tl.zeros((BLOCK,), tl.float32)
    tilted = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    lowest_id = tl.full((BLOCK,), 2147483647, tl.int32)
    for first in range(0, width, BLOCK):
        column = first + lane
        is_column = column < width
        z = tl.load(source + column, mask=is_column, other=float("-inf"))
        d = z - safe
        if WITH_MEAN:
            total += tl.where(is_column, d, 0.0)
        if WITH_ARGMAX:
            is_top = (z == top) & is_column
            lowest_id = tl.minimum(lowest_id, tl.where(is_top, column, 2147483647))
        e = tl.exp2(d * LOG2E)
        exp_sum += e
        tilted += e * tl.where(e > 0.0, d, 0.0)  # 0 * -inf would be NaN
    whole = tl.sum(exp_sum, 0)
    is_dead = whole == 0.0
    whole = tl.where(is_dead, float("nan"), whole)
    own_log = tl.log2(whole) * LN2
    is_sound = whole == whole
    target = tl.load(source + tl.load(targets + row)) - safe
    tl.store(row_max + row, tl.where(is_sound | is_dead, top, float("nan")))
    tl.store(log_sum + row, own_log)
    tl.store(exp_total + row, whole)
    tl.store(entropy + row, own_log - tl.sum(tilted, 0) / whole)
    tl.store(target_value + row, tl.where(is_sound, target, float("nan")))
    if WITH_MEAN:
        tl.store(mean + row, tl.where(is_sound, tl.sum(total, 0) / width, float("nan")))
    if WITH_ARGMAX:
        tl.store(argmax + row, tl.minimum(tl.min(lowest_id, 0), width - 1))

    cutoff = own_log + log_cut
    count = 0
    rejected = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + lane
        z = tl.load(source + column, mask=column < width, other=float("-inf"))
        d = z - safe
        is_candidate = (d >= cutoff) & (column < width)
        rejected = tl.maximum(rejected, tl.where(is_candidate, float("-inf"), d))
        number = is_candidate.to(tl.int32)
        found = tl.sum(number, 0)
        if found > 0:
            place = count + tl.cumsum(number, 0) - number
            fits = is_candidate & (place < capacity)
            tl.store(scratch + row * capacity + place, z, mask=fits)
        count += found
    tl.store(num_candidates + row, count)
    tl.store(best_rejected + row, tl.max(rejected, 0))


@triton.jit
def mass_above(source, count, top, pivot_1, pivot_2, pivot_3, BLOCK: tl.constexpr):
    """Sums of ``exp(d)`` and numbers of the ``count`` values of ``source`` above three keys."""
    lane = tl.arange(0, BLOCK)
    mass_1 = tl.zeros((BLOCK,), tl.float32)
    mass_2 = tl.zeros((BLOCK,), tl.float32)
    mass_3 = tl.zeros((BLOCK,), tl.float32)
    number_1 = tl.zeros((BLOCK,), tl.int32)
    number_2 = tl.zeros((BLOCK,), tl.int32)
    number_3 = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        at = first + lane
        is_item = at < count
        d = tl.load(source + at, mask=is_item, other=float("-inf")) - top
        key = order_key(d)
        e = tl.exp2(d * LOG2E)
        is_1 = is_item & (key > pivot_1)
        is_2 = is_item & (key > pivot_2)
        is_3 = is_item & (key > pivot_3)
        mass_1 += tl.where(is_1, e, 0.0)
        mass_2 += tl.where(is_2, e, 0.0)
        mass_3 += tl.where(is_3, e, 0.0)
        number_1 += is_1.to(tl.int32)
        number_2 += is_2.to(tl.int32)
        number_3 += is_3.to(tl.int32)
    return (
        tl.sum(mass_1, 0),
        tl.sum(mass_2, 0),
        tl.sum(mass_3, 0),
        tl.sum(number_1, 0),
        tl.sum(number_2, 0),
        tl.sum(number_3, 0),
    )


@triton.jit
def find_last_key(source, count, top, goal, most, lowest, BLOCK: tl.constexpr):
    """Smallest key above ``lowest`` with less than ``goal`` mass and ``most`` items above it.

    The masses are sums in a fixed order, so the condition only ever becomes false as keys fall.
    """
    low = lowest
    high = lowest * 0  # the key of d = 0, the row's maximum: nothing is above it
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        pivot_1 = low + step
        pivot_2 = tl.minimum(pivot_1 + step, high)
        pivot_3 = tl.minimum(pivot_2 + step, high)
        mass_1, mass_2, mass_3, number_1, number_2, number_3 = mass_above(
            source, count, top, pivot_1, pivot_2, pivot_3, BLOCK
        )
        is_1 = (mass_1 < goal) & (number_1 < most)
        is_2 = ((mass_2 < goal) & (number_2 < most)) | (pivot_2 >= high)
        is_3 = ((mass_3 < goal) & (number_3 < most)) | (pivot_3 >= high)
        below = tl.where(is_3, pivot_2, pivot_3)
        below = tl.where(is_2, pivot_1, below)
        low = tl.where(is_1, low, below)
        high = tl.where(is_3, pivot_3, high)
        high = tl.where(is_2, pivot_2, high)
        high = tl.where(is_1, pivot_1, high)
    return high


@triton.jit
def edge_of_nucleus(source, count, top, last_key, BLOCK: tl.constexpr):
    """Smallest ``d`` with a key of at least ``last_key`` and the largest below (or -inf)."""
    lane = tl.arange(0, BLOCK)
    lowest_kept = tl.full((BLOCK,), float("inf"), tl.float32)
    next_lower = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        at = first + lane
        is_item = at < count
        d = tl.load(source + at, mask=is_item, other=float("-inf")) - top
        is_kept = is_item & (order_key(d) >= last_key)
        lowest_kept = tl.minimum(lowest_kept, tl.where(is_kept, d, float("inf")))
        next_lower = tl.maximum(next_lower, tl.where(is_kept, float("-inf"), d))
    theta = tl.min(lowest_kept, 0)
    return tl.where(theta <= 0.0, theta, float("nan")), tl.max(next_lower, 0)


@triton.jit
def number_of_ties(mass_kept, num_above, num_equal, weight, goal, most):
    """How many of ``num_equal`` tokens of ``exp(d) = weight`` are kept, lowest ids first.

    The n-th is kept while ``mass_kept + n * weight < goal`` and there is room; the first always.
    """
    short = (goal - mass_kept) / tl.where(weight > 0.0, weight, 1.0)
    short = tl.where(short >= 1.0, short, 1.0)  # NaN too
    enough = tl.ceil(tl.minimum(short, 1e9)).to(tl.int32)
    enough = tl.where(weight > 0.0, enough, num_equal)
    return tl.minimum(tl.minimum(enough, num_equal), most - num_above)


@triton.jit
def nth_equal(source, width, top, theta, needed, BLOCK: tl.constexpr):
    """Column of the ``needed``-th value of the row, counted from 1, that equals ``theta``."""
    lane = tl.arange(0, BLOCK)
    seen = 0
    found = tl.full((BLOCK,), -1, tl.int32)
    for first in range(0, width, BLOCK):
        column = first + lane
        d = tl.load(source + column, mask=column < width, other=float("-inf")) - top
        is_equal = ((d == theta) & (column < width)).to(tl.int32)
        rank = seen + tl.cumsum(is_equal, 0)
        found = tl.where((is_equal > 0) & (rank == needed), column, found)
        seen += tl.sum(is_equal, 0)
    return tl.max(found, 0)


@triton.jit
def nucleus_kernel(
    logits,
    row_max,
    exp_total,
    log_sum,
    num_candidates,
    best_rejected,
    scratch,
    region_log_sum,
    region_entropy,
    region_size,
    region_tilt,
    threshold,
    tie_column,
    width,
    log_cut,
    capacity,
    mass,
    most,
    INCLUDE_TIES: tl.constexpr,
    WITH_TILT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The nucleus of one row: fewest largest tokens whose mass reaches ``mass``, at most ``most``.

    ``most`` limits the count inside the search: a token is kept while the mass before it is below
    ``mass`` and fewer than ``most`` tokens are before it, so no list of that length is needed.
    Outputs are those of ``RegionStats``.
    """
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(row_max + row)
    goal = mass * tl.load(exp_total + row)
    count = tl.load(num_candidates + row)
    lane = tl.arange(0, BLOCK)
    source = scratch + row * capacity
    if count > capacity:  # the candidates did not fit: the row itself holds them
        source = logits + row * width
        count = count * 0 + width
    lowest = order_key(tl.load(log_sum + row) + log_cut) - 1
    last_key = find_last_key(source, count, top, goal, most, tl.minimum(lowest, -1), BLOCK)
    theta, lower = edge_of_nucleus(source, count, top, last_key, BLOCK)
    lower = tl.maximum(lower, tl.load(best_rejected + row))

    above = tl.zeros((BLOCK,), tl.float32)
    tilted = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    square_tilted = tl.zeros((BLOCK,), tl.float32)
    number = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        at = first + lane
        d = tl.load(source + at, mask=at < count, other=float("-inf")) - top
        is_above = d > theta
        d_above = tl.where(is_above, d, 0.0)
        e = tl.where(is_above, tl.exp2(d * LOG2E), 0.0)
        above += e
        tilted += e * d_above
        if WITH_TILT:
            square += e * e
            square_tilted += e * e * d_above
        number += is_above.to(tl.int32)
        equal += ((d == theta) & (at < count)).to(tl.int32)
    num_above = tl.sum(number, 0)
    num_equal = tl.sum(equal, 0)
    mass_kept = tl.sum(above, 0)
    weight = tl.exp2(theta * LOG2E)
    needed = num_equal
    if not INCLUDE_TIES:
        needed = number_of_ties(mass_kept, num_above, num_equal, weight, goal, most)
    needed = tl.maximum(needed, 1)  # a NaN row has none

    size = num_above + needed
    inside = mass_kept + needed * weight
    own_log = tl.log2(inside) * LN2
    own_entropy = own_log - (tl.sum(tilted, 0) + needed * weight * theta) / inside
    own_entropy = tl.where((size == 1) & (inside == inside), 0.0, own_entropy)
    tl.store(region_log_sum + row, own_log)
    tl.store(region_entropy + row, own_entropy)
    tl.store(region_size + row, size)
    if WITH_TILT:
        squares = tl.sum(square, 0) + needed * weight * weight
        tilt = tl.sum(square_tilted, 0) + needed * weight * weight * theta
        tl.store(region_tilt + row, tilt / squares - own_log + own_entropy)

    # half-way to the next lower value, so that rounding of a recomputed logit flips nothing
    limit = (theta + lower) * 0.5
    limit = tl.where(limit < theta, limit, lower)  # neighbours among floats
    limit = tl.where(lower == float("-inf"), theta - 1.0, limit)
    last_tie = -1  # no column ties
    if needed < num_equal:
        limit = theta
        last_tie = nth_equal(logits + row * width, width, top, theta, needed, BLOCK)
    tl.store(threshold + row, limit)
    tl.store(tie_column + row, last_tie)
