"""Merging states: weighted averages against loops, options, tied weights, figures, refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from lightning_modules.functional import merge_methods, task_vectors
from lightning_modules.functional.merge_figures import MergeFigures
from lightning_modules.functional.merging import (
    METHODS,
    argument_problems,
    linear,
    merge_states,
    merge_tensors,
    normalized_weights,
    used_weights,
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


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_merges_states(method: str) -> None:
    """Names, shapes, dtypes and buffers stay, and each tensor is what its function gives."""
    *models, base = [state | {"half": torch.randn(4, 2).bfloat16()} for state in states(3)]
    start = base if METHODS[method].needs_base else None
    merged = merge_states(models, method=method, weights=[3, 1], base=start)
    assert list(merged) == list(models[0])
    assert {name: t.dtype for name, t in merged.items()} == {
        name: t.dtype for name, t in models[0].items()
    }
    assert merged["steps"].tolist() == [7, 8]
    module = task_vectors if start is not None else merge_methods
    for name in ("a", "b", "half"):
        tensors = [model[name] for model in models]
        own = {"name": name} if method == "dare" else {}
        origin = None if start is None else start[name]
        expected = getattr(module, method)(tensors, [0.75, 0.25], origin, **own)
        assert torch.equal(merged[name], expected), name
    with pytest.raises(ValueError, match="steps: tensors of torch.int64 differ"):
        changed = models[1] | {"steps": torch.tensor([7, 9])}
        merge_states([models[0], changed], method=method, base=start)


@pytest.mark.parametrize("method", list(METHODS))
def test_options_are_those_of_the_functions(method: str) -> None:
    parameters = inspect.signature(METHODS[method].merge).parameters.values()
    own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"name"}
    assert set(METHODS[method].options) == own
    defaults = {p.name: p.default for p in parameters if p.name in own} | {"one_d": "same"}
    count = 2
    assert not argument_problems(method, count, has_base=True, options=defaults)


def test_one_d_leaves_gains_and_biases_to_the_average() -> None:
    models = [state | {"scalar": torch.randn(())} for state in states(2)]
    average = merge_states(models)
    same = merge_states(models, method="multislerp")
    linear_1d = merge_states(models, method="multislerp", options={"one_d": "linear"})
    assert torch.equal(linear_1d["a"], same["a"])
    for name in ("b", "scalar"):
        assert torch.equal(linear_1d[name], average[name])
    assert not torch.allclose(same["b"], average["b"])
    with_base = merge_states(
        models, method="ties", base=models[0], options={"one_d": "linear", "density": 0.3}
    )
    for name in ("b", "scalar"):
        assert torch.allclose(with_base[name], average[name], atol=1e-6)
    assert not torch.allclose(with_base["a"], average["a"], atol=1e-6)


def test_what_dare_draws_does_not_depend_on_the_order_of_names() -> None:
    *models, base = states(3)
    merged = merge_states(models, method="dare", base=base)
    turned = [{name: state[name] for name in ("steps", "b", "a")} for state in (*models, base)]
    again = merge_states(turned[:2], method="dare", base=turned[2])
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    alone = merge_states(
        [{"b": model["b"]} for model in models], method="dare", base={"b": base["b"]}
    )
    assert torch.equal(alone["b"], merged["b"])


def test_tied_weights_are_merged_once_and_stay_tied() -> None:
    models = states(2)
    for model in models:
        model["head"] = model["a"]
    seen = []
    base = states(1)[0]
    base["head"] = base["a"].clone()  # loaded from a file that holds both
    merged = merge_states(
        models, method="dare", base=base, observe=lambda name, *_: seen.append(name)
    )
    assert seen == ["a", "b", "steps"]
    assert list(merged) == ["a", "b", "steps", "head"]
    assert merged["head"] is merged["a"]
    models[1]["head"] = models[1]["a"] + 1
    with pytest.raises(ValueError, match="head is a in model 1 .tied., but not in model 2"):
        merge_states(models)
    apart = merge_states(models[::-1])  # the first has two tensors: both are merged
    assert torch.allclose(apart["head"], apart["a"] + 0.5)


def test_weights_that_stay_as_they_are() -> None:
    one, two, base = states(3)
    options = {"normalize": False}
    merged = merge_states(
        [one, two], method="task_arithmetic", weights=[-1, 2], base=base, options=options
    )
    expected = base["a"] - (one["a"] - base["a"]) + 2 * (two["a"] - base["a"])
    assert torch.allclose(merged["a"], expected, atol=1e-5)
    assert used_weights(None, 3, options) == [1.0, 1.0, 1.0]
    assert used_weights([2, 2], 2) == [0.5, 0.5]
    average = merge_states([one, two], method="task_arithmetic", weights=[1, 3], base=base)
    assert torch.allclose(average["a"], 0.25 * one["a"] + 0.75 * two["a"], atol=1e-6)


def test_all_wrong_arguments_are_named_at_once() -> None:
    found = argument_problems(
        "ties",
        2,
        weights=[3, -1],
        options={"densty": 0.2, "scale": "big", "density": 1.5, "one_d": "linera", "seed": 1},
        key="merge.",
    )
    assert [text.split(";")[0] for text in found] == [
        "merge.method='ties' needs merge.base: it works on differences from it",
        "merge.weights=[3, -1]: ties takes none below 0",
        "unknown key 'merge.options.densty' of ties",
        "merge.options.scale='big' must be a finite number",
        "merge.options.density=1.5 must be a number in (0, 1]",
        "merge.options.one_d='linera' must be same or linear",
        "unknown key 'merge.options.seed' of ties",
    ]
    assert found[2].endswith("did you mean 'merge.options.density'?")
    assert "did you mean 'multislerp'" in argument_problems("multislerb", 2)[0]
    assert "merges 2 models, not 3" in argument_problems("slerp", 3)[0]
    assert argument_problems("linear", 3, weights=[1, 1, 0], key="merge.") == []
    assert argument_problems("linear", 2, weights=[1], key="merge.")[0].startswith("merge.weights=")
    for bad in (True, 0, 1.5, math.nan, "1"):
        assert argument_problems("dare", 2, has_base=True, options={"density": bad}), bad
    for name, bad in (("normalize", 1), ("seed", -1), ("seed", 1.0), ("scale", math.inf)):
        assert argument_problems("dare", 2, has_base=True, options={name: bad}), name
    for name, bad in (("iterations", 0), ("tolerance", 0.0)):
        assert argument_problems("karcher", 2, options={name: bad}), name
    with pytest.raises(ValueError, match="needs base.*unknown key 'options.densty'"):
        merge_states(states(2), method="ties", options={"densty": 1})


def test_a_base_has_the_names_and_shapes_of_the_models() -> None:
    one, two, base = states(3)
    with pytest.raises(ValueError, match="the base have different tensors, such as b"):
        merge_states([one, two], base={"a": base["a"], "steps": base["steps"]})
    with pytest.raises(ValueError, match=r"b has different shapes: \(5,\), \(5,\), \(6,\)"):
        merge_states([one, two], base=base | {"b": torch.zeros(6)})


def test_figures_are_those_of_the_whole_vectors() -> None:
    *models, base = [{n: s[n] for n in ("a", "b")} | {"k": s["steps"]} for s in states(4)]
    weights, figures = [0.5, 0.2, 0.3], MergeFigures([0.5, 0.2, 0.3])

    def observe(name: str, tensors: list, _: object, merged: torch.Tensor) -> None:
        figures.add(name, tensors, merged, reference=base[name])

    merged = merge_states(models, method="multislerp", weights=weights, observe=observe)
    report = figures.report()

    def flat(state: dict) -> torch.Tensor:
        return torch.cat([state[name].flatten() for name in ("a", "b")]).double()

    rows = torch.stack([flat(model) for model in models])
    updates = rows - flat(base)
    for got, vectors in ((report.cosines, rows), (report.update_cosines, updates)):
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        assert torch.allclose(torch.tensor(got).double(), unit @ unit.T, atol=1e-7)
    assert report.distances == pytest.approx(updates.norm(dim=1).tolist())
    assert report.distance == pytest.approx(float((flat(merged) - flat(base)).norm()))
    average = merge_states(models, weights=weights)
    factors = {name: float(merged[name].norm() / average[name].norm()) for name in ("a", "b")}
    assert report.norm_factors == pytest.approx(factors, rel=1e-5)
    assert report.norm_factor == pytest.approx(float(flat(merged).norm() / flat(average).norm()))
    assert min(factors.values()) > 1.05


def test_figures_of_updates_zeros_and_values_that_are_not_finite() -> None:
    base = torch.zeros(2)
    figures = MergeFigures([0.5, 0.5])
    pair = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])]
    figures.add("w", pair, torch.tensor([3.0, 3.0]), base=base, reference=base)
    assert figures.report().norm_factors == {"w": pytest.approx(3.0)}
    far = MergeFigures([0.5, 0.5])  # the factor is that of updates from the base it worked on
    far.add("w", pair, torch.tensor([3.0, 3.0]), base=base + 1, reference=base)
    assert far.report().norm_factors["w"] is None  # the updates cancel out
    assert far.report().distance == pytest.approx(18**0.5)
    still = MergeFigures([0.5, 0.5])
    still.add("w", [base, pair[0]], pair[0] / 2)
    assert still.report().cosines == [[None, None], [None, 1.0]]
    assert still.report().distances is None and still.report().update_cosines is None
    with pytest.raises(ValueError, match="w: model 2 has values that are not finite"):
        still.add("w", [base, pair[0] * math.nan], base)
    with pytest.raises(ValueError, match="w: the merge has values that are not finite"):
        still.add("w", pair, pair[0] / 0)
