"""The callback on real trainers: what it does to gradients, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.gradient_surgery import GradientSurgery
from callbacks.surgery_checks import domain_of
from datamodules.demonstrations import Supervised
from datamodules.loader import Loader
from tests.callbacks.surgery_parts import ORDER, Batches, Net, domain_gradients, fit


def slow_pcgrad(vectors: list[Tensor], orders: list[list[int]]) -> Tensor:
    """PCGrad on whole vectors, as it is told in the paper."""
    total = torch.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        mine = vector.clone()
        for j in orders[i]:
            dot = mine @ vectors[j]
            if j != i and dot < 0:
                mine = mine - dot / vectors[j].square().sum() * vectors[j]
        total = total + mine
    return total


# --- gradients ------------------------------------------------------------------------------------


def test_one_domain_is_the_plain_gradient_bit_for_bit() -> None:
    source = Batches(("math",) * 3)
    plain, cut = (fit(s, source=source, steps=3) for s in (None, GradientSurgery()))
    for one, other in zip(plain.grads, cut.grads, strict=True):
        assert one["unused"] is None and other["unused"] is None
        assert all(torch.equal(one[n], other[n]) for n in one if n != "unused")
    assert torch.equal(plain.layers[0].weight, cut.layers[0].weight)


def test_method_none_is_the_sum() -> None:
    plain, cut = (fit(s, steps=2) for s in (None, GradientSurgery(method="none")))
    torch.testing.assert_close(plain.grads, cut.grads, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["global", "layer", "module", "tensor"])
def test_gradient_is_that_of_pcgrad_on_whole_vectors(granularity: str) -> None:
    source, seed = Batches(), 5
    domains = domain_gradients(Net(), source)
    names = sorted(domains)
    surgery = GradientSurgery(granularity=granularity, seed=seed)  # type: ignore[arg-type]
    module = fit(surgery, source=source)
    assert surgery.domains == names
    units: dict[int, list[str]] = {}
    for (name, _), unit in zip(module.named_parameters(), surgery.units.unit_of, strict=True):
        if name != "unused":
            units.setdefault(unit, []).append(name)
    expected_units = {"global": 1, "layer": 2, "module": 2, "tensor": 3}  # a bias of 4 joins
    assert len(units) == expected_units[granularity]
    count = len(surgery.units.names)
    generator = torch.Generator().manual_seed(seed * 1_000_003)
    orders = torch.rand(count, 3, 3, generator=generator).argsort(-1).tolist()
    conflicts = 0
    for unit, members in units.items():
        flat = [torch.cat([domains[d][n].flatten() for n in members]) for d in names]
        conflicts += sum(bool(a @ b < 0) for a in flat for b in flat)
        wanted = slow_pcgrad(flat, orders[unit])
        got = torch.cat([module.grads[0][n].flatten() for n in members])
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert conflicts, "nothing was projected"


@pytest.mark.parametrize("order", [ORDER[::-1], ("math", "chat", "math", "if")])
def test_order_of_micro_batches_does_not_matter(order: tuple[str, ...]) -> None:
    one = fit(GradientSurgery(), source=Batches())
    other = fit(GradientSurgery(), source=Batches(order))
    assert sorted(order) == sorted(ORDER)
    torch.testing.assert_close(one.grads, other.grads, atol=1e-6, rtol=1e-5)


class Halves(Batches):
    """The same rows in half as many a micro-batch."""

    def __init__(self) -> None:
        super().__init__(tuple(d for d in ORDER for _ in range(2)))
        self.whole = Batches()

    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        full = self.whole.batch(epoch, index // 2)
        rows = slice(0, 3) if index % 2 == 0 else slice(3, 6)
        return {"domain": full["domain"], "x": full["x"][rows], "y": full["y"][rows]}


def test_size_of_micro_batches_does_not_matter() -> None:
    one, other = fit(GradientSurgery()), fit(GradientSurgery(), source=Halves())
    torch.testing.assert_close(one.grads, other.grads, atol=1e-6, rtol=1e-5)


def test_clipping_comes_after() -> None:
    module = Net()
    start = module.layers[0].weight.detach().clone(), module.layers[2].weight.detach().clone()
    fit(GradientSurgery(), module=module, gradient_clip_val=0.01)
    whole = torch.cat([g.flatten() for g in module.grads[0].values() if g is not None])
    assert whole.norm() > 0.1
    moved = torch.cat([
        (module.layers[i].weight.detach() - old).flatten()
        for i, old in zip((0, 2), start, strict=True)
    ])  # fmt: skip
    assert 0.005 < moved.norm() <= 0.01 + 1e-6


def test_frozen_parameters_keep_no_gradient() -> None:
    module = fit(GradientSurgery(), module=Net(frozen=True))
    assert module.grads[0]["layers.0.weight"] is None
    assert module.grads[0]["layers.2.weight"] is not None


def test_excluded_parameters_keep_the_sum() -> None:
    plain, whole = fit(None), fit(GradientSurgery())
    cut = fit(GradientSurgery(exclude=["layers.0.*"]))
    for name, same in (("layers.0.weight", plain), ("layers.2.weight", whole)):
        torch.testing.assert_close(cut.grads[0][name], same.grads[0][name])
    assert not torch.allclose(plain.grads[0]["layers.2.weight"], whole.grads[0]["layers.2.weight"])


def test_steps_without_surgery_are_plain() -> None:
    plain = fit(None, module=Net(lr=0.0), steps=5)
    cut = fit(GradientSurgery(start_step=1, every_n_steps=2), module=Net(lr=0.0), steps=5)
    is_same = [
        torch.allclose(one["layers.2.weight"], other["layers.2.weight"])
        for one, other in zip(plain.grads, cut.grads, strict=True)
    ]
    assert is_same == [True, False, True, False, True]


def test_mean_and_equal_domains() -> None:
    total = fit(GradientSurgery()).grads[0]["layers.0.weight"]
    mean = fit(GradientSurgery(reduce="mean")).grads[0]["layers.0.weight"]
    torch.testing.assert_close(mean * 3, total)
    equal = fit(GradientSurgery(method="none", per_domain_mean=True)).grads[0]["layers.0.weight"]
    found = domain_gradients(Net(), Batches())
    count = {d: ORDER.count(d) for d in found}
    wanted = sum(4 / (3 * count[d]) * g["layers.0.weight"] for d, g in found.items())
    torch.testing.assert_close(equal, wanted)


def test_bfloat16_buffers_are_near() -> None:
    one, other = fit(GradientSurgery()), fit(GradientSurgery(buffer_dtype="bfloat16"))
    pairs = [(one.grads[0][n], other.grads[0][n]) for n in ("layers.0.weight", "layers.2.weight")]
    for a, b in pairs:
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).norm() < 0.02 * a.norm()


class Silent(Net):
    """No gradient from one domain."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float(batch["domain"] != "chat")


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_a_zero_gradient_gives_no_nan(method: Any) -> None:
    module = fit(GradientSurgery(method=method), module=Silent(), steps=2)
    for name in ("layers.0.weight", "layers.2.bias"):
        assert all(grads[name].isfinite().all() for grads in module.grads)


class Bad(Net):
    """One domain's loss is not finite."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (
            float("nan") if batch["domain"] == "if" else 1.0
        )


def test_a_bad_gradient_reaches_the_module() -> None:
    surgery = GradientSurgery(method="gradvac")
    module = fit(surgery, module=Bad())
    assert module.grads[0]["layers.0.weight"].isnan().all()
    assert surgery.weights is not None and torch.equal(
        surgery.weights, torch.ones_like(surgery.weights)
    )
    assert not surgery.state_dict()["targets"], "running cosines must stay clean"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"granularity": "tensors"}, r"gradient_surgery\.granularity='tensors'.*mean 'tensor'"),
        ({"method": "pc_grad"}, "did you mean 'pcgrad'"),
        ({"reduce": "max"}, "'sum', 'mean'"),
        ({"threshold": 1.5}, r"gradient_surgery\.threshold=1.5 must be at least 0 and below 1"),
        ({"every_n_steps": 0, "start_step": -1}, "start_step=-1.*; .*every_n_steps=0"),
        ({"buffer_dtype": "float16"}, "buffer_dtype='float16'"),
    ],
)
def test_bad_options(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        GradientSurgery(**options)


@pytest.mark.parametrize("method", ["upgrad", "cagrad", "nash_mtl", "aligned_mtl"])
def test_a_missing_package_is_named(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ValueError, match=rf"method={method}.*pip install -e '\.\[surgery\]'"):
        GradientSurgery(method=method)


def test_exclude_must_match() -> None:
    with pytest.raises(ValueError, match=r"exclude='layer\.\*' matches no .* look like unused"):
        fit(GradientSurgery(exclude=["layer.*"]), module=Net())


class Mixed(Batches):
    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        both = torch.tensor([0, 1, 0, 0, 0, 0])
        return super().batch(epoch, index) | {"domain": None, "domains": both, "domain_names": "ab"}


def test_a_mixed_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"number 0 of this window has none or .*data\.shares"):
        fit(GradientSurgery(), source=Mixed())


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match="automatic_optimization=False"):
        fit(GradientSurgery(), module=Manual(), accumulate_grad_batches=1)


def test_one_micro_batch_a_step_is_told() -> None:
    with pytest.warns(UserWarning, match="has no effect.*data.shares"):
        fit(GradientSurgery(), source=Batches(("math",)))


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        ({"domain": "math"}, "math"),
        ({"domain": ["math", "math"]}, "math"),
        ({"domain": ["math", "chat"]}, None),
        ({"x": 1}, None),
        ([1, 2], None),
    ],
)
def test_domain_of_a_batch(batch: Any, wanted: str | None) -> None:
    assert domain_of(batch) == wanted


def test_domain_of_a_supervised_batch() -> None:
    zeros = torch.zeros(2, 3)
    batch = Supervised(zeros, zeros, zeros, torch.tensor([1, 1]), ["chat", "math"])
    assert domain_of(batch) == "math"
    batch.domains = torch.tensor([0, 1])
    assert domain_of(batch) is None


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, method: Any) -> None:
    def run(steps: int, path: str | None = None) -> tuple[Net, GradientSurgery, Trainer]:
        surgery, module, source = GradientSurgery(method=method), Net(lr=0.1), Batches()
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False,
            accumulate_grad_batches=source.window, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[surgery],
        )  # fmt: skip
        trainer.fit(module, Loader(source), ckpt_path=path, weights_only=True)
        return module, surgery, trainer

    whole, _, _ = run(4)
    _, _, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    half, surgery, _ = run(4, str(tmp_path / "half.ckpt"))
    assert len(half.grads) == 2
    assert torch.equal(half.layers[0].weight, whole.layers[0].weight)
    assert bool(surgery._targets) is (method == "gradvac")


def test_orders_depend_on_seed_and_step() -> None:
    def weights(seed: int, step: int) -> Tensor:
        surgery = GradientSurgery(seed=seed)
        fit(surgery, module=Net(lr=0.0), steps=step + 1)
        assert surgery.weights is not None
        return surgery.weights

    first = weights(0, 0)
    assert torch.equal(weights(0, 0), first)
    assert any(not torch.equal(weights(seed, 0), first) for seed in (1, 2, 3, 4))
    assert any(not torch.equal(weights(0, step), first) for step in (1, 2, 3, 4))
