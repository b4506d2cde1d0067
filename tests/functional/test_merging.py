"""Merging states: weighted averages against loops, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.functional.merging import (
    linear,
    merge_states,
    merge_tensors,
    normalized_weights,
)


def states(count: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"a": torch.randn(3, 4), "b": torch.randn(5), "steps": torch.tensor([7, 8])}
        for _ in range(count)
    ]


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0], [0.2, 0.0, 0.1], [2.0, -0.5, 1.0]])
def test_linear_is_the_weighted_average(weights: list[float] | None) -> None:
    models = states(3)
    shares = [1 / 3] * 3 if weights is None else [w / sum(weights) for w in weights]
    merged = merge_states(models, weights=weights)
    assert list(merged) == ["a", "b", "steps"]
    for name in ("a", "b"):
        expected = torch.zeros_like(models[0][name])
        for share, model in zip(shares, models, strict=True):
            expected = expected + share * model[name]
        assert torch.allclose(merged[name], expected, atol=1e-6)
    assert merged["steps"].tolist() == [7, 8]


def test_one_model_and_equal_models_come_back_as_they_are() -> None:
    one = states(1)[0]
    for merged in (merge_states([one]), merge_states([one, one], weights=[0.5, 0.5])):
        assert all(torch.equal(merged[name], one[name]) for name in one)


def test_half_precision_is_added_up_in_float32() -> None:
    tensors = [torch.randn(200).bfloat16() for _ in range(7)]
    got = linear(tensors, [1 / 7] * 7)
    assert got.dtype == torch.bfloat16
    wide_sum = torch.zeros(200)
    for tensor in tensors:
        wide_sum = wide_sum + (1 / 7) * tensor.float()
    assert torch.equal(got, wide_sum.bfloat16())
    wide = torch.tensor([1.0], dtype=torch.float64)
    assert linear([wide, wide + 1e-12], [0.5, 0.5]).item() == pytest.approx(1 + 5e-13, abs=1e-14)


def test_inputs_are_left_alone() -> None:
    models = states(2)
    before = {name: value.clone() for name, value in models[0].items()}
    merged = merge_states(models)
    merged["steps"] += 1
    assert all(torch.equal(models[0][name], before[name]) for name in before)


def test_tensors_are_read_one_name_at_a_time() -> None:
    models, seen = states(2), []

    def read(model: int, name: str) -> torch.Tensor:
        seen.append((model, name))
        return models[model][name]

    stream = merge_tensors(["a", "b"], read, 2)
    assert seen == []
    next(stream)
    assert seen == [(0, "a"), (1, "a")]


def test_refusals() -> None:
    one, two = states(2)
    with pytest.raises(ValueError, match="different tensors, such as c"):
        merge_states([one, two | {"c": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"a has different shapes: \(3, 4\), \(4, 3\)"):
        merge_states([one, two | {"a": torch.zeros(4, 3)}])
    with pytest.raises(ValueError, match=r"steps: tensors of torch.int64 differ"):
        merge_states([one, two | {"steps": torch.tensor([7, 9])}])
    with pytest.raises(ValueError, match="method='slurp'"):
        merge_states([one, two], method="slurp")
    with pytest.raises(ValueError, match="no model"):
        merge_states([])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weights="):
            normalized_weights(weights, 2)
