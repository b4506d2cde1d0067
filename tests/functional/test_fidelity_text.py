"""Drift of texts against textbook tables, brute force, and sentences whose drift is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from lightning_modules.functional.fidelity_text import (
    bag_drift,
    common_subsequence,
    corpus_bleu,
    drift_metrics,
    drift_rows,
    edit_distance,
    rouge_l,
    semantic_drift_index,
    sentence_bleu,
    words,
)
from lightning_modules.functional.sums import means, merge


def table_distance(one: Sequence[int], two: Sequence[int]) -> int:
    row = list(range(len(two) + 1))
    for i, x in enumerate(one, 1):
        last, row = row, [i]
        for j, y in enumerate(two, 1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def table_common(one: Sequence[int], two: Sequence[int]) -> int:
    @lru_cache(None)
    def best(i: int, j: int) -> int:
        if not i or not j:
            return 0
        if one[i - 1] == two[j - 1]:
            return best(i - 1, j - 1) + 1
        return max(best(i - 1, j), best(i, j - 1))

    return best(len(one), len(two))


def random_pairs(count: int, longest: int, kinds: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(f"{count}/{longest}/{kinds}")
    sizes = [(rng.randint(1, longest), rng.randint(0, longest)) for _ in range(count)]
    tokens = range(kinds)
    return [(rng.choices(tokens, k=a), rng.choices(tokens, k=b)) for a, b in sizes]


@pytest.mark.parametrize(("longest", "kinds"), [(6, 2), (12, 4), (80, 5), (150, 60)])
def test_distance_and_common_subsequence_equal_their_tables(longest, kinds):
    for one, two in random_pairs(60, longest, kinds):
        assert edit_distance(one, two) == edit_distance(two, one) == table_distance(one, two)
        assert common_subsequence(one, two) == table_common(tuple(one), tuple(two))


def test_distance_at_the_ends():
    assert edit_distance([], [1, 2]) == 2 and edit_distance([1, 2], []) == 2
    assert edit_distance([], []) == common_subsequence([], [1]) == common_subsequence([1], []) == 0
    assert edit_distance([1] * 70, [2] * 70) == 70


def slow_bleu(pairs: Sequence[tuple[list[int], list[int]]], add: int) -> float:
    """Papineni et al. over all pairs; ``add`` is added to hits and totals from 2 tokens on."""
    logs = []
    for order in range(1, 5):
        hits = total = 0
        for one, two in pairs:
            grams = [two[at : at + order] for at in range(len(two) - order + 1)]
            left = [one[at : at + order] for at in range(len(one) - order + 1)]
            total += len(grams)
            for gram in grams:
                if gram in left:
                    left.remove(gram)
                    hits += 1
        more = add if order > 1 else 0
        if not hits + more:
            return 0.0
        logs.append(math.log((hits + more) / (total + more)))
    made, wanted = sum(len(two) for _, two in pairs), sum(len(one) for one, _ in pairs)
    return min(1.0, math.exp(1 - wanted / made)) * math.exp(sum(logs) / 4)


def test_bleu_by_hand():
    source, decoded = [1, 2, 3, 4, 5], [1, 2, 3, 9]
    expected = (3 / 4 * (2 + 1) / (3 + 1) * (1 + 1) / (2 + 1) * (0 + 1) / (1 + 1)) ** 0.25
    assert sentence_bleu(source, decoded) == pytest.approx(expected * math.exp(1 - 5 / 4))


def test_bleu_by_brute_force():
    pairs = random_pairs(80, 14, 3)
    for pair in pairs:
        assert sentence_bleu(*pair) == pytest.approx(slow_bleu([pair], add=1))
    metrics = drift_metrics([one for one, _ in pairs], [two for _, two in pairs])
    assert corpus_bleu(metrics) == pytest.approx(slow_bleu(pairs, add=0))


def test_metrics_add_over_batches():
    pairs = random_pairs(30, 12, 3)
    one, two = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    whole = drift_metrics(one, two)
    merged = merge(drift_metrics(one[:11], two[:11]), drift_metrics(one[11:], two[11:]))
    assert means(merged) == pytest.approx(means(whole))
    assert corpus_bleu(merged) == pytest.approx(corpus_bleu(whole))
    rows = drift_rows(one, two)
    assert {name: values.shape for name, values in rows.items()} == dict.fromkeys(rows, (30,))
    assert means(whole)["rouge_l"] == pytest.approx(rows["rouge_l"].mean().item())


def drift(source: str, decoded: str) -> dict[str, float]:
    rows = drift_rows([words(source)], [words(decoded)])
    return {name: values.item() for name, values in rows.items()}


@pytest.mark.parametrize("source", ["ann", "ann hit bob", "the red fruit is in the old kitchen ."])
def test_a_perfect_copy_has_no_drift(source):
    copied = drift(source, source)
    drifts = {"edit_drift": 0, "bag_drift": 0}
    assert copied == pytest.approx({"exact_match": 1, "rouge_l": 1, "bleu": 1, **drifts})
    assert corpus_bleu(drift_metrics([words(source)], [words(source)])) == 1


def test_exchanged_roles_leave_the_bag_of_words():
    found = drift("ann hit bob", "bob hit ann")
    assert found["bag_drift"] == 0 and found["exact_match"] == 0
    assert found["edit_drift"] == pytest.approx(2 / 3)
    assert found["rouge_l"] == pytest.approx(1 / 3)


def test_a_passive_paraphrase_drifts():
    found = drift("ann hit bob", "bob was hit by ann")
    assert found["exact_match"] == 0 and min(found["edit_drift"], found["bag_drift"]) > 0
    assert found["bag_drift"] == pytest.approx(1 - 2 * 3 / 8)


def test_nothing_decoded_and_a_decoder_that_does_not_stop():
    nothing = drift("ann hit bob", "")
    worst = {"edit_drift": 1, "bag_drift": 1}
    assert nothing == {"exact_match": 0, "rouge_l": 0, "bleu": 0, **worst}
    endless = drift("ann hit bob", "ann hit bob ann hit bob ann hit bob")
    assert endless["edit_drift"] == 2 and endless["rouge_l"] == pytest.approx(0.5)
    assert corpus_bleu(drift_metrics([[1, 2]], [[]])) == 0


def test_rouge_is_the_harmonic_mean_of_precision_and_recall():
    for one, two in random_pairs(30, 9, 3):
        common = table_common(tuple(one), tuple(two))
        if common:
            precision, recall = common / len(two), common / len(one)
            expected = 2 * precision * recall / (precision + recall)
            assert rouge_l(one, two) == pytest.approx(expected)
        else:
            assert rouge_l(one, two) == 0


def test_bag_drift_counts_repeated_tokens():
    assert bag_drift([1, 1, 2], [1, 2, 2]) == pytest.approx(1 / 3)
    assert bag_drift([1], [1, 1]) == pytest.approx(1 / 3)


def test_semantic_drift_index():
    cosines = torch.tensor([1.0, 0.9, -0.5], requires_grad=True)
    found = semantic_drift_index(cosines, torch.tensor([1.0, 0.2, 0.0]))
    assert found.tolist() == pytest.approx([0.0, 0.7, -0.5]) and not found.requires_grad
    for values in ([1.1], [-1.1], [math.nan]):
        with pytest.raises(ValueError, match=r"cosines\[0\]=.* must be in \[-1, 1\]"):
            semantic_drift_index(torch.tensor(values), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"overlaps\[0\]=-0.5"):
        semantic_drift_index(torch.tensor([0.0]), torch.tensor([-0.5]))
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        semantic_drift_index(torch.ones(2), torch.ones(3))


def test_strings_empty_sources_and_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"decoded\[0\] is a string"):
        drift_rows([["a"]], ["a"])
    with pytest.raises(ValueError, match=r"sources\[1\] has no token"):
        drift_metrics([["a"], []], [["a"], ["a"]])
    with pytest.raises(ValueError, match="1 sources have 0 decoded texts"):
        drift_rows([["a"]], [])
