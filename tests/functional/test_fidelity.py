"""Outcomes of slots: decoders whose failures are known, brute force, and what is refused."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from lightning_modules.functional.fidelity import (
    exact_matches,
    flip_metrics,
    negation_flips,
    net_overwriting,
    number_flips,
    read_number,
    role_flips,
    slot_outcomes,
)
from lightning_modules.functional.sums import means, merge

COLOURS = ["red", "green", "blue", "white", "black"]
NAMES = ["ann", "bob", "cid", "dan"]


def world(size: int, seed: str) -> tuple[list[str], list[str | None]]:
    """Values and priors: some equal, some in conflict, some without a prior."""
    rng = random.Random(seed)
    return rng.choices(COLOURS, k=size), rng.choices([*COLOURS, None], k=size)


def counterfactual(size: int) -> tuple[list[str], list[str]]:
    rng = random.Random("counterfactual")
    rows = [rng.sample(COLOURS, 2) for _ in range(size)]
    return [row[0] for row in rows], [row[1] for row in rows]


def test_a_decoder_that_always_says_the_prior():
    source, prior = counterfactual(20)
    found = means(slot_outcomes(source, prior, prior).metrics())
    assert found["knowledge_overwriting"] == found["overwriting_share"] == 1
    assert found["fact_fidelity"] == found["fact_fidelity_conflict"] == found["other_error"] == 0
    assert found["slot_lost"] == 0 and "fact_fidelity_agree" not in found


def test_a_perfect_copy():
    source, prior = counterfactual(20)
    found = means(slot_outcomes(source, prior, source).metrics())
    assert found["knowledge_overwriting"] == found["other_error"] == 0
    assert found["fact_fidelity"] == found["fact_fidelity_conflict"] == 1
    assert "overwriting_share" not in found  # nothing is wrong: no share of errors, and no 0


def test_a_decoder_that_says_nothing():
    source, prior = counterfactual(5)
    found = means(slot_outcomes(source, prior, [None] * 5).metrics())
    assert found["slot_lost"] == found["other_error"] == 1
    assert found["fact_fidelity"] == found["knowledge_overwriting"] == 0


def test_what_agrees_with_its_prior_is_never_overwritten():
    found = means(slot_outcomes(["red"], ["red"], ["red"]).metrics())
    assert found == {"fact_fidelity": 1, "fact_fidelity_agree": 1, "slot_lost": 0}
    assert not slot_outcomes(["red"], ["red"], ["red"]).overwritten.any()
    lost = slot_outcomes(["red"], [None], [None])
    assert not lost.overwritten.any() and not lost.conflict.any() and not lost.agree.any()


def test_rates_by_brute_force_and_in_pieces():
    source, prior = world(300, "source")
    decoded = random.Random("decoded").choices([*COLOURS, None], k=300)
    rows = list(zip(source, prior, decoded, strict=True))
    clash = [row for row in rows if row[1] is not None and row[1] != row[0]]
    agree = [row for row in rows if row[1] == row[0]]
    wrong = [row for row in clash if row[2] != row[0]]
    over = sum(row[2] == row[1] for row in clash)
    expected = {
        "fact_fidelity": sum(s == d for s, _, d in rows) / 300,
        "fact_fidelity_conflict": sum(s == d for s, _, d in clash) / len(clash),
        "fact_fidelity_agree": sum(s == d for s, _, d in agree) / len(agree),
        "knowledge_overwriting": over / len(clash),
        "other_error": (len(wrong) - over) / len(clash),
        "overwriting_share": over / len(wrong),
        "slot_lost": sum(d is None for d in decoded) / 300,
    }
    whole = means(slot_outcomes(source, prior, decoded).metrics())
    assert whole == pytest.approx(expected)
    parts = [
        slot_outcomes(source[a:b], prior[a:b], decoded[a:b]).metrics()
        for a, b in ((0, 7), (7, 7), (7, 200), (200, 300))
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    assert means(merged) == whole
    one = whole["fact_fidelity_conflict"] + whole["knowledge_overwriting"] + whole["other_error"]
    assert one == pytest.approx(1)


def test_a_blind_choice_overwrites_its_share_by_chance():
    source, prior = counterfactual(20_000)
    decoded = random.Random("blind").choices(COLOURS, k=20_000)
    found = means(slot_outcomes(source, prior, decoded).metrics())
    assert found["overwriting_share"] == pytest.approx(1 / (len(COLOURS) - 1), abs=0.01)


def test_net_overwriting():
    source, prior = counterfactual(40)
    decoded = [*prior[:10], *source[10:40]]
    clash = slot_outcomes(source, prior, decoded).metrics()
    same = slot_outcomes(prior, prior, [*prior[:38], None, None]).metrics()
    shuffled = slot_outcomes(source, prior, [*prior[:4], *[None] * 36]).metrics()
    assert net_overwriting(clash, shuffled) == pytest.approx(0.25 - 0.1)
    assert net_overwriting(same, shuffled) is None


def test_role_flips_are_the_exchange_and_nothing_else():
    rng = random.Random("roles")
    rows = [rng.sample(NAMES, 2) for _ in range(12)]
    source = [f"{a} hit {b}" for a, b in rows]
    assert role_flips(source, [f"{b} hit {a}" for a, b in rows]).all()
    assert not role_flips(source, source).any()
    others = ["bob saw ann", "bob hit cid", "cid hit ann", "ann hit ann", "bob hit", "", None]
    assert not role_flips(["ann hit bob"] * len(others), others).any()


def test_verbs_may_have_several_words():
    source = ["ann did not hit bob"] * 3
    decoded = ["bob did not  hit ann", "bob hit ann", "bob hit not did ann"]
    assert role_flips(source, decoded).tolist() == [True, False, False]


@pytest.mark.parametrize("value", ["ann", "ann bob", "", "ann hit ann"])
def test_a_relation_without_two_names_is_refused(value):
    with pytest.raises(ValueError, match=r"source\[1\]=.* must be 'agent verb patient'"):
        role_flips(["ann hit bob", value], [None, None])


def test_negations():
    source, decoded = ["yes", "yes", "no", "no", "no"], ["no", "yes", "yes", None, "maybe"]
    assert negation_flips(source, decoded).tolist() == [True, False, True, False, False]
    with pytest.raises(ValueError, match=r"source\[0\]='not' must be 'yes' or 'no'"):
        negation_flips(["not"], ["no"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        (" +3.0 ", 3),
        ("-0.25", Fraction(-1, 4)),
        ("1,234,567", 1234567),
        ("0", 0),
        ("zero", 0),
        ("Nineteen", 19),
        ("ninety-nine", 99),
        ("twenty one", 21),
        *[(text, None) for text in ("", "-", ".", "1,2", "12,34", "3 4", "--3", "3e5", "a 3")],
        *[(text, None) for text in ("one two", "twenty eleven", "twenty zero", "-five", "\u0663")],
    ],
)
def test_numbers_are_read(text, number):
    assert read_number(text) == number


def test_number_flips():
    decoded = ["13", "12.0", "twelve", "dozen", None, "-12"]
    assert number_flips(["12"] * 6, decoded).tolist() == [True, False, False, False, False, True]
    with pytest.raises(ValueError, match=r"source\[0\]='many' must be a number"):
        number_flips(["many"], ["3"])


def test_flips_as_share_of_the_errors():
    source = ["ann hit bob", "cid hit bob", "dan hit ann", "bob hit cid"]
    decoded = ["bob hit ann", "cid hit bob", None, "cid hit bob"]
    flips, right = role_flips(source, decoded), slot_outcomes(source, source, decoded).right
    found = means(flip_metrics("role_flip", flips, right))
    assert found == pytest.approx({"role_flip": 0.5, "role_flip_share": 2 / 3})
    with pytest.raises(ValueError, match="never both"):
        flip_metrics("role_flip", flips, flips)


def test_exact_matches_of_any_form_of_text():
    assert exact_matches(["a b", "a"], ["a b", "a "]).tolist() == [True, False]
    assert exact_matches([(1, 2), [1], []], [[1, 2], [2], ()]).tolist() == [True, False, True]
    assert exact_matches([], []).dtype == torch.bool


def test_values_that_are_not_aligned_are_refused():
    with pytest.raises(ValueError, match="1 of source, 1 of prior, 2 of decoded"):
        slot_outcomes(["a"], [None], ["a", "b"])
    for function in (role_flips, negation_flips, number_flips, exact_matches):
        with pytest.raises(ValueError, match="1 of source, 0 of decoded"):
            function(["yes"], [])
