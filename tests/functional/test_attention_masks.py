"""Masks entry by entry against loops; which tokens are masked."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch

from lightning_modules.functional import attention_masks
from lightning_modules.functional.attention_masks import (
    BLOCK_B,
    additive,
    bidirectional_mask,
    blocks,
    bridge_mask,
    causal_mask,
    eos_positions,
    mask_tokens,
    span_draws,
)

MASK, EOS, PAD = 3, 2, 0
SPECIAL = [PAD, EOS, MASK]


def layout(sizes, side, extra):
    """Block names of rows (n_A, n_B), padded on a side with ``extra`` places in the longest row."""
    length = max(a + 1 + b for a, b in sizes) + extra
    rows = []
    for a, b in sizes:
        tokens, padding = ["A"] * a + ["E"] + ["B"] * b, ["-"] * (length - a - b - 1)
        rows.append(tokens + padding if side == "right" else padding + tokens)
    return rows


def spans(rows):
    valid = torch.tensor([[name != "-" for name in row] for row in rows])
    return valid, torch.tensor([row.index("E") for row in rows])


def slow(rows, allowed):
    """Three loops: row, query, key."""
    made = torch.zeros(len(rows), 1, len(rows[0]), len(rows[0]), dtype=torch.bool)
    for number, row in enumerate(rows):
        for q, query in enumerate(row):
            for k, key in enumerate(row):
                if query == "-":
                    made[number, 0, q, k] = q == k
                else:
                    made[number, 0, q, k] = key != "-" and allowed(query, key, q, k)
    return made


CASES = [
    (side, extra, tuple((int(a), int(b)) for a, b in torch.randint(0, 7, (3, 2), generator=g)))
    for g in [torch.Generator().manual_seed(0)]
    for side, extra, _ in itertools.product(("left", "right"), (0, 3), range(4))
]


@pytest.mark.parametrize(("side", "extra", "sizes"), CASES)
def test_masks_equal_three_loops(side, extra, sizes):
    rows = layout(sizes, side, extra)
    valid, eos_pos = spans(rows)
    assert torch.equal(bidirectional_mask(valid), slow(rows, lambda *_: True))
    assert torch.equal(causal_mask(valid), slow(rows, lambda query, key, q, k: k <= q))
    table = {"AA", "AE", "EA", "EE", "EB", "BE", "BB"}
    for eos_sees_b, a_sees_eos in itertools.product((True, False), repeat=2):
        kept = table - (set() if eos_sees_b else {"EB"}) - (set() if a_sees_eos else {"AE"})
        made = bridge_mask(valid, eos_pos, eos_sees_b=eos_sees_b, a_sees_eos=a_sees_eos)
        assert torch.equal(made, slow(rows, lambda query, key, q, k: query + key in kept))  # noqa: B023
    names = {-1: "-", 0: "A", 1: "E", 2: "B"}
    assert [[names[value] for value in row] for row in blocks(valid, eos_pos).tolist()] == rows


def test_a_mask_as_numbers_does_as_a_mask_of_bools():
    valid, eos_pos = spans(layout([(2, 1), (1, 3)], "left", 1))
    assert torch.equal(bridge_mask(valid.long(), eos_pos), bridge_mask(valid, eos_pos))
    assert torch.equal(bidirectional_mask(valid.long()), bidirectional_mask(valid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_additive_form_leaves_no_row_without_a_zero(dtype):
    valid, eos_pos = spans(layout([(2, 2), (0, 1)], "left", 2))
    mask = bridge_mask(valid, eos_pos)
    numbers = additive(mask, dtype)
    assert numbers.dtype == dtype and numbers.isfinite().all()
    assert torch.equal(numbers == 0, mask)
    assert (numbers[~mask] == torch.finfo(dtype).min).all()
    assert mask.any(dim=-1).all()
    assert (torch.randn(2, 1, 7, 7).to(dtype) + numbers).softmax(-1)[~mask].eq(0).all()


def test_masks_refuse_what_does_not_fit():
    valid = torch.tensor([[True, True, True], [False, True, True]])
    with pytest.raises(ValueError, match=r"eos_pos\[1\] is 0, on padding"):
        bridge_mask(valid, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"eos_pos\[0\] is 3, outside 0 to 2"):
        bridge_mask(valid, torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=r"eos_pos\[0\] is -1, outside"):
        bridge_mask(valid, torch.tensor([-1, 1]))
    with pytest.raises(ValueError, match=r"eos_pos must have shape \(2,\)"):
        bridge_mask(valid, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"must have shape \(B, L\)"):
        bidirectional_mask(valid[0])
    with pytest.raises(TypeError, match="mask must be bool"):
        additive(valid.int())
    with pytest.raises(TypeError, match="floating-point"):
        additive(valid, torch.int64)


def test_eos_is_found_once_and_not_in_padding():
    ids = torch.tensor([[EOS, EOS, 7, EOS, 8], [6, 7, EOS, EOS, EOS]])  # padded with the same id
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    assert eos_positions(ids, valid, EOS).tolist() == [3, 2]
    with pytest.raises(ValueError, match="row 0 has 3 EOS tokens"):
        eos_positions(ids, torch.ones_like(valid), EOS)
    with pytest.raises(ValueError, match="row 1 has 0 EOS tokens"):
        eos_positions(ids, valid & (torch.arange(5) != 2), EOS)


# --- masked tokens --------------------------------------------------------------------------------


def rows_to_mask(seed, side="left"):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 8, (6, 2), generator=g).tolist()
    valid, eos_pos = spans(layout([(a, b) for a, b in sizes], side, 1))
    ids = torch.randint(4, 30, valid.shape, generator=g).masked_fill(~valid, PAD)
    ids[torch.arange(len(ids)), eos_pos] = EOS
    return ids, blocks(valid, eos_pos) == BLOCK_B, valid


def mask(ids, span, valid, probability=0.5, seed=0, special=SPECIAL):
    return mask_tokens(
        ids,
        span,
        valid,
        probability=probability,
        mask_id=MASK,
        special_ids=special,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("probability", [0.01, 0.7, 1.0])
def test_masked_tokens_are_in_their_span(seed, side, probability):
    ids, span, valid = rows_to_mask(seed, side)
    before = ids.clone()
    taken = mask(ids, span, valid, probability, seed)
    assert torch.equal(ids, before), "the given ids were changed"
    chosen = torch.zeros_like(valid)
    chosen[taken.rows, taken.positions] = True
    assert chosen.sum() == len(taken.rows), "a token was taken twice"
    assert not (chosen & ~span).any() and chosen.any(dim=1).all()
    assert torch.equal(taken.input_ids, torch.where(chosen, MASK, ids))
    assert torch.equal(taken.targets, ids[taken.rows, taken.positions])
    assert torch.equal(taken.rows, taken.rows.sort().values)
    if probability == 1.0:
        assert torch.equal(chosen, span)
    if probability == 0.01:
        assert len(taken.rows) < len(ids) + 3


def test_first_token_of_b_is_read_from_the_bridge():
    ids = torch.tensor([[8, 9, EOS, 11, 12]])
    valid = torch.ones_like(ids).bool()
    span = blocks(valid, torch.tensor([2])) == BLOCK_B
    taken = mask(ids, span, valid, 1.0)
    assert taken.read_positions.tolist() == [2, 3] and taken.targets.tolist() == [11, 12]
    assert ids[0, taken.read_positions[0]] == EOS


@pytest.mark.parametrize("side", ["left", "right"])
def test_oracle_of_the_shift_has_no_loss(side):
    """Card, section 10, item 4: a model that says x_{i+1} at i is right, one that says x_i not."""
    ids, span, valid = rows_to_mask(0, side)
    taken = mask(ids, span, valid, 0.7)
    saying = 100.0 * torch.nn.functional.one_hot(ids, 30).float()  # says x_i at i
    shifted = torch.cat([saying[:, 1:], saying[:, :1]], dim=1)
    losses = [
        torch.nn.functional.cross_entropy(says[taken.rows, taken.read_positions], taken.targets)
        for says in (shifted, saying)
    ]
    assert losses[0] < 1e-6 and losses[1] > 50


def test_special_tokens_and_the_first_token_are_never_masked():
    ids = torch.tensor([[PAD, 9, EOS, 11, MASK], [8, EOS, 10, EOS, 12]])
    valid = ids != PAD
    taken = mask(ids, torch.ones_like(valid), valid, 1.0)
    # 9 is the first of its row behind padding, 8 the first of all: nothing to be read from
    found = list(zip(taken.rows.tolist(), taken.positions.tolist(), strict=True))
    assert found == [(0, 3), (1, 2), (1, 4)]
    assert not torch.isin(taken.targets, torch.tensor(SPECIAL)).any()


def test_probability_is_that_of_each_token_and_the_forced_one_is_any():
    ids = torch.full((20_000, 6), 9)
    valid = torch.ones_like(ids).bool()
    span = torch.arange(6) >= 2
    taken = mask(ids, span.expand_as(valid), valid, 0.7)
    # one of 4 is forced where all four were spared
    expected = 0.7 + 0.3**4 / 4
    shares = torch.bincount(taken.positions, minlength=6) / len(ids)
    assert shares[:2].eq(0).all() and (shares[2:] - expected).abs().max() < 0.02
    forced = mask(ids, span.expand_as(valid), valid, 1e-9)
    assert len(forced.rows) == len(ids)
    shares = torch.bincount(forced.positions, minlength=6) / len(ids)
    assert (shares[2:] - 0.25).abs().max() < 0.02


def test_the_generator_alone_decides():
    ids, span, valid = rows_to_mask(1)
    first, again, other = (mask(ids, span, valid, 0.5, seed) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.input_ids, other.input_ids)
    state = torch.get_rng_state()
    mask(ids, span, valid)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_masking_refuses_what_cannot_work():
    ids, span, valid = rows_to_mask(2)
    for bad in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability="):
            mask(ids, span, valid, bad)
    span[3] = False
    with pytest.raises(ValueError, match="row 3 has no token that can be masked"):
        mask(ids, span, valid)
    with pytest.raises(ValueError, match="input_ids have shape"):
        mask(ids, span[:, 1:], valid)


def test_examples():
    result = doctest.testmod(attention_masks)
    assert result.attempted and not result.failed


def test_draws_of_a_span_depend_on_its_seed_alone():
    spans, seeds = [(1, 5), (3, 7), (0, 2)], [4, 4, 9]
    draws = span_draws(spans, seeds, 9)
    assert torch.equal(draws[0, 1:5], draws[1, 3:7]), "wherever the span is"
    assert torch.equal(draws[2], span_draws(spans[2:], seeds[2:], 9)[0]), "in whatever batch"
    assert torch.equal(draws[0], span_draws(spans[:1], [4], 20)[0, :9]), "however long the row"
    assert not torch.equal(draws[0, 1:3], draws[2, :2])
    inside = torch.zeros(3, 9, dtype=torch.bool)
    for row, (first, end) in enumerate(spans):
        inside[row, first:end] = True
    assert draws[~inside].eq(1).all() and draws[inside].lt(1).all()
    many = span_draws([(0, 4000)], [0], 4000)
    assert abs(float((many < 0.3).float().mean()) - 0.3) < 0.03
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(span_draws(spans, seeds, 9), draws), (
            "also where bf16-true is the default"
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_draws_decide_what_is_masked():
    ids = torch.tensor([[5, 6, 7, 8]])
    everything = torch.ones_like(ids).bool()
    common = {"probability": 0.5, "mask_id": MASK, "special_ids": []}
    draws = torch.tensor([[0.0, 0.4, 0.6, 0.49]])
    taken = mask_tokens(ids, everything, everything, draws=draws, **common)
    assert taken.positions.tolist() == [1, 3] and taken.targets.tolist() == [6, 8]
    none = mask_tokens(ids, everything, everything, draws=draws + 0.5, **common)
    assert none.positions.tolist() == [1], "the least draw that may be taken"
    generator = torch.Generator()
    for wrong in ({}, {"draws": draws[:, 1:]}, {"draws": draws, "generator": generator}):
        with pytest.raises(ValueError, match="draws"):
            mask_tokens(ids, everything, everything, **common, **wrong)
