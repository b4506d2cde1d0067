"""Forking tokens and KL-Cov choose the shares of tokens that their papers name."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_modules.functional.exploration import forking_weights, kl_cov_tokens


def random_mask(rows: int = 6, width: int = 9) -> torch.Tensor:
    sizes = torch.randint(0, width + 1, (rows,))
    return torch.arange(width)[None, :] < sizes[:, None]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_forking_keeps_the_most_uncertain_and_keeps_the_mean(share: float) -> None:
    mask, entropy = random_mask(), torch.rand(6, 9)
    weights = forking_weights(entropy, mask, share=share)
    total, kept = int(mask.sum()), int((weights > 0).sum())
    assert kept == max(1, math.ceil(round(share * total, 9)))
    assert not weights[~mask].any()
    chosen = weights > 0
    assert entropy[chosen].min() >= entropy[mask & ~chosen].max() if kept < total else True
    loss = torch.randn(6, 9)
    torch.testing.assert_close((loss * weights)[mask].mean(), loss[chosen].mean())


def test_forking_share_of_one_changes_nothing() -> None:
    mask = random_mask()
    assert torch.equal(forking_weights(torch.rand(6, 9), mask, share=1.0), mask.float())


def test_among_equal_entropies_the_first_wins_and_nothing_is_chosen_from_nothing() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1]])
    assert forking_weights(torch.ones(1, 5), mask, share=0.2)[0].tolist() == [5.0, 0, 0, 0, 0]
    assert not forking_weights(torch.ones(1, 5), mask * 0, share=0.2).any()
    assert not kl_cov_tokens(torch.ones(1, 5), torch.ones(1, 5), mask * 0).any()


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5])
def test_kl_cov_takes_the_largest_products_of_deviations(share: float) -> None:
    mask = random_mask()
    logprobs, gain = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    chosen = kl_cov_tokens(logprobs, gain, mask, share=share)
    assert not chosen.requires_grad
    lived = [(float(logprobs[i, j].detach()), float(gain[i, j]), (i, j)) for i, j in mask.nonzero()]
    mean = [sum(row[k] for row in lived) / len(lived) for k in (0, 1)]
    ranked = sorted(lived, key=lambda row: -(row[0] - mean[0]) * (row[1] - mean[1]))
    wanted = {tuple(map(int, row[2])) for row in ranked[: max(1, int(share * len(lived)))]}
    assert {tuple(place) for place in chosen.nonzero().tolist()} == wanted
