"""``linear_cross_entropy`` against PyTorch's own losses and the definition (card 11.10)."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from torch.nn import functional

from lightning_modules.ops import linear_cross_entropy
from tests.kernels import oracle
from tests.kernels.cases import (
    assert_close,
    errors,
    full_logits,
    make_case,
    run,
)

BACKENDS = ("torch", "reference")
LOSSES = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"label_smoothing": 0.3, "z_loss": 0.1},
]


def losses(case, backend="torch", **more):
    """Our loss as an output by name."""
    loss = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "side": case.side, "backend": backend, **case.options, **more},
    )
    return {"loss": loss}


def defined(case, label_smoothing=0.0, z_loss=0.0, token_weights=None, reduction="mean"):
    """The loss from full logits, by its definition."""
    logits = full_logits(case)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = oracle.quantities(wide, case.targets, **case.options)
    each = oracle.token_losses(found, label_smoothing, z_loss)
    kept = (case.targets != case.options.get("ignore_index", -100)).to(each.dtype)
    weights = kept if token_weights is None else kept * token_weights.to(each.dtype)
    each = weights * each
    total = {"none": each, "sum": each.sum(), "mean": each.sum() / weights.sum()}
    return {"loss": total[reduction]}


def some_case(dtype=torch.float64, **options):
    case = make_case(23, 131, 40, dtype, seed=5, **options)
    case.targets[[0, 3, 4, 22]] = case.options.get("ignore_index", -100)
    return case


def random_weights(n=23):
    generator = torch.Generator().manual_seed(6)
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    weights[n // 3] = 0.0
    return weights


def upstream(reduction, n=23):
    generator = torch.Generator().manual_seed(7)
    shape = (n,) if reduction == "none" else ()
    return {"loss": torch.randn(shape, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 9])
def test_equals_pytorch(backend, reduction, smoothing, ignore_index):
    case = some_case(bias=True, ignore_index=ignore_index)
    grads = upstream(reduction)
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def plain(case):
        logits, index = full_logits(case), ignore_index
        return {
            "loss": functional.cross_entropy(logits, case.targets, ignore_index=index, **options)
        }

    found = run(partial(losses, backend=backend, **options), case, grads)
    assert_close(found, run(plain, case, grads), 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_its_definition(backend, dtype, reduction, options, weighted):
    head = {"bias": True, "rank": 4, "temperature": 0.8, "vocab_limit": 120}
    case = some_case(dtype, **head)
    weights = random_weights() if weighted else None
    options = {**options, "reduction": reduction, "token_weights": weights}
    grads = upstream(reduction)
    found = run(partial(losses, backend=backend, **options), case, grads)
    wanted = run(partial(defined, **options), case.fresh(torch.float64), grads)
    assert found["loss"].dtype == dtype
    assert_close(found, wanted, 1e-10 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", LOSSES)
def test_low_precision_is_as_good_as_eager(backend, dtype, options):
    case = some_case(dtype, bias=True, rank=4)
    grads = upstream("mean")
    wanted = run(partial(defined, **options), case.fresh(torch.float64), grads)
    own = errors(run(partial(losses, backend=backend, **options), case, grads), wanted)
    plain = errors(run(partial(defined, **options), case, grads), wanted)
    for name in own:
        assert own[name] <= 1.5 * plain[name] + 1e-3, (name, own[name], plain[name])
    if backend == "torch":
        assert own["loss"] <= 2e-5


def test_gradcheck():
    """Everything at once, the gradient of the token weights included."""
    case = make_case(4, 9, 5, torch.float64, bias=True, rank=2, temperature=1.3).fresh()
    case.targets[2] = -100
    weights = random_weights(4).requires_grad_()
    leaves = (*case.leaves().values(), weights)

    def loss(*given):
        own = type(case)(case.hidden, case.weight, case.targets, options=case.options)
        for name, value in zip(case.leaves(), given, strict=False):
            setattr(own, name, value)
        more = {"label_smoothing": 0.2, "z_loss": 0.05, "token_weights": given[-1]}
        parts = [losses(own, reduction=r, **more)["loss"] for r in ("none", "sum", "mean")]
        return (*parts, losses(own, normalizer=3.7, **more)["loss"])

    assert torch.autograd.gradcheck(loss, leaves)


linear_loss = getattr(functional, "linear_cross_entropy", None)


@pytest.mark.skipif(linear_loss is None, reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_pytorchs_fused_loss(chunked, reduction):
    """An oracle by other hands; where its options take a chunk size, its chunked path too."""
    case = some_case(torch.float32)
    options = None
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=7)
    assert "linear_weight" in inspect.signature(linear_loss).parameters

    def theirs(case):
        return {
            "loss": linear_loss(
                *(case.hidden, case.weight, case.targets),
                **{"reduction": reduction, "ignore_index": -100, "options": options},
            )
        }

    grads = upstream(reduction)
    found = run(partial(losses, reduction=reduction), case, grads)
    assert_close(found, run(theirs, case, grads), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_are_token_weights(backend):
    """PyTorch's weighted mean divides by the weights of the targets as well."""
    case = some_case()
    of_class = torch.rand(131, dtype=torch.float64)
    weights = of_class[case.targets.clamp(min=0)]
    logits = full_logits(case)
    wanted = functional.cross_entropy(logits, case.targets, weight=of_class)
    found = losses(case, backend, token_weights=weights)["loss"]
    assert torch.allclose(found, wanted, rtol=1e-12)


# -------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", LOSSES)
def test_mean_over_nothing_is_zero(backend, n, weighted, options):
    case = make_case(n, 131, 40, bias=True, rank=3)
    case.targets[:] = -100
    case.hidden[:] = torch.nan
    weights = torch.full((n,), torch.inf) if weighted else None
    compute = partial(losses, backend=backend, token_weights=weights, **options)
    found = run(compute, case, {"loss": torch.tensor(1.0)})
    assert found.pop("loss").item() == 0.0
    for name, grad in found.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_weights_of_zero_everywhere_give_zero():
    found = run(
        partial(losses, token_weights=torch.zeros(23)), some_case(), {"loss": torch.tensor(1.0)}
    )
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("value", [0.1, 37.3, 19])
def test_normalizer_replaces_the_denominator(as_tensor, value):
    case = some_case()
    total = losses(case, reduction="sum")["loss"].item()
    given = torch.tensor(value, dtype=torch.float64) if as_tensor else value
    found = losses(case, normalizer=given)["loss"]
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(total / value, rel=1e-14)


def test_normalizer_makes_micro_batches_add_up():
    case = some_case()
    weights = random_weights()
    whole = run(partial(losses, token_weights=weights), case, {"loss": torch.tensor(1.0)})
    total = weights[case.targets != -100].sum()
    halves = []
    for rows in (slice(0, 6), slice(6, 23)):
        part = type(case)(case.hidden[rows], case.weight, case.targets[rows])
        more = {"token_weights": weights[rows], "normalizer": total}
        halves.append(run(partial(losses, **more), part, {"loss": torch.tensor(1.0)}))
    for name in ("loss", "d weight"):
        assert torch.allclose(halves[0][name] + halves[1][name], whole[name], rtol=1e-12), name
    assert torch.allclose(
        torch.cat([half["d hidden"] for half in halves]), whole["d hidden"], rtol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights_act_before_the_sum(backend):
    case = some_case(rank=3)
    weights = random_weights()
    each = losses(case, backend, reduction="none")["loss"]
    weighted = losses(case, backend, reduction="none", token_weights=weights)["loss"]
    assert torch.allclose(weighted, each * weights, rtol=1e-14)
    total = losses(case, backend, reduction="sum", token_weights=weights)["loss"]
    assert torch.allclose(total, (each * weights).sum(), rtol=1e-14)
    assert not torch.allclose(total, each.sum() * weights.mean(), rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_of_losses_and_weights(backend):
    case = make_case(0, 131, 8, shape=(3, 4))
    weights = torch.rand(3, 4)
    each, stats = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"token_weights": weights, "reduction": "none", "return_stats": True, "backend": backend},
    )
    assert each.shape == (3, 4)
    assert all(value.shape == (3, 4) for value in stats)
    wanted = functional.cross_entropy(
        (case.hidden @ case.weight.T).view(12, -1), case.targets.view(-1), reduction="none"
    )
    assert torch.allclose(each, wanted.view(3, 4) * weights, atol=1e-5)


# ------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LOSSES)
def test_stats(backend, options):
    """Of the plain distribution, whatever the loss; detached; zero on ignored rows."""
    case = some_case(bias=True, rank=3, temperature=0.8, vocab_limit=100)
    logits = full_logits(case)
    best = logits[:, :100].argmax(1)
    case.targets[10:15] = best[10:15]
    case.hidden.requires_grad_()
    loss, stats = linear_cross_entropy(
        *(case.hidden, case.weight, case.targets),
        **{"bias": case.bias, "side": case.side, "backend": backend, **case.options, **options},
        return_stats=True,
        token_weights=random_weights(),
    )
    assert loss.requires_grad
    wanted = oracle.quantities(logits, case.targets, **case.options)
    kept = case.targets != -100
    assert torch.allclose(stats.nll, -wanted["logprob"], atol=1e-10)
    assert torch.allclose(stats.lse, wanted["lse"], atol=1e-10)
    assert torch.allclose(stats.entropy, wanted["entropy"], atol=1e-10)
    assert torch.equal(stats.accuracy, ((best == case.targets) & kept).double())
    assert stats.accuracy.sum() >= 5
    assert not any(value.requires_grad for value in stats)
    assert not any(value[~kept].any() for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_counts_the_lowest_id_among_equals(backend):
    hidden, weight = torch.ones(3, 1), torch.zeros(10, 1)
    weight[[4, 6, 9]] = 1.0
    loss = linear_cross_entropy(
        hidden, weight, torch.tensor([4, 6, 0]), return_stats=True, backend=backend
    )
    assert loss[1].accuracy.tolist() == [1.0, 0.0, 0.0]


def test_stats_of_an_ignored_id_zero():
    """Ignored rows hold argmax 0, which must not count as a hit of token 0."""
    hidden, weight = torch.ones(2, 1), torch.zeros(10, 1)
    stats = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 0]), ignore_index=0, return_stats=True, backend="torch"
    )[1]
    assert stats.accuracy.tolist() == [0.0, 0.0]
