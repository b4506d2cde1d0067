"""PEFT adapters on the fused head give what PEFT's own logits give."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftModel, TrainableTokensConfig
from peft import get_peft_model as peft_model
from torch import nn

from lightning_modules.ops import FusedLMHead, fuse_lm_head
from tests.kernels.head_worker import Policy, gap, gradients, lora, loss_of, tiny, tokens

MORE = {"target_modules": ["q_proj", "down_proj", "lm_head"]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
ORDERS = pytest.mark.parametrize("first", ["peft", "fuse"])


def build(first: str = "peft", **options: Any) -> tuple[Any, Any]:
    """A fused PEFT model and its plain twin; ``first`` says who wraps the head first."""
    base = tiny()
    if first == "fuse":
        fuse_lm_head(base)
    return fuse_lm_head(lora(base, **options)), lora(tiny(), **options)


def assert_same(fused: Any, plain: Any, *names: str, atol: float = 1e-5) -> None:
    """Values, and gradients of all trainable parameters, among them those that hold ``names``."""
    one, other = Policy(fused), Policy(plain)
    torch.manual_seed(5)
    found = one(tokens())
    torch.manual_seed(5)
    wanted = other(tokens(), fused=False)
    assert gap(found[0], wanted[0]) < atol and gap(found[1], wanted[1]) < atol
    loss_of(found).backward()
    loss_of(wanted).backward()
    mine, expected = gradients(one), gradients(other)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert gap(mine[name], value) < atol, name
    for name in names:
        values = [float(v.abs().max()) for k, v in mine.items() if f"lm_head.{name}" in k]
        assert values and min(values) > 1e-3, f"{name}: no gradient"


# --- LoRA on the head -----------------------------------------------------------------------------


@ORDERS
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, MORE], ids=["", "rs", "more"])
def test_lora_equals_peft(first: str, options: dict[str, Any]) -> None:
    fused, plain = build(first, **options)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert torch.equal(fused(tokens()).logits, plain(tokens()).logits)
    assert_same(fused, plain, "lora_A", "lora_B")
    base = fused.get_output_embeddings().base_layer
    assert type(base) is FusedLMHead and base.weight.grad is None, "the base stays frozen"


def test_a_base_weight_that_trains_too() -> None:
    fused, plain = build()
    for model in (fused, plain):
        model.get_output_embeddings().base_layer.weight.requires_grad_(True)
    assert_same(fused, plain, "lora_A", "lora_B", "base_layer.weight")


def test_dropout_draws_what_peft_draws() -> None:
    fused, plain = build(lora_dropout=0.4)
    hidden, ids = torch.randn(3, 16), torch.tensor([1, 2, 3])
    head = fused.get_output_embeddings()
    values = [head(hidden, ids).logprob for _ in range(2)]
    assert not torch.equal(*values), "the dropout is on"
    assert_same(fused, plain, "lora_A", "lora_B")
    assert_same(fused.eval(), plain.eval(), "lora_A", "lora_B")
    assert torch.equal(head(hidden, ids).logprob, head(hidden, ids).logprob)


def test_disabled_adapters_leave_the_base() -> None:
    fused, plain = build()
    bare, adapted = Policy(tiny())(tokens(), fused=False), Policy(fused)(tokens())
    with fused.disable_adapter():
        off = Policy(fused)(tokens())
        assert torch.equal(fused(tokens()).logits, tiny()(tokens()).logits)
    assert gap(off[0], bare[0]) < 1e-5
    assert gap(adapted[0], bare[0]) > 0.1, "the adapter matters"
    assert_same(fused, plain, "lora_A", "lora_B")


def test_merged_adapters_are_not_added_twice() -> None:
    fused, plain = build()
    wanted = Policy(plain)(tokens(), fused=False)
    fused.merge_adapter()
    merged = Policy(fused)(tokens())
    assert gap(merged[0], wanted[0]) < 1e-5
    with fused.disable_adapter():  # PEFT unmerges then, and so must we
        off = Policy(fused)(tokens())
        assert gap(off[0], Policy(tiny())(tokens(), fused=False)[0]) < 1e-5
    assert not fused.get_output_embeddings().merged
    assert_same(fused, plain, "lora_A", "lora_B", atol=2e-5)
    unloaded = fused.merge_and_unload()
    assert type(unloaded.lm_head) is FusedLMHead
    assert gap(Policy(unloaded)(tokens())[0], wanted[0]) < 1e-5


def test_bfloat16_base_with_float32_adapters() -> None:
    """What PEFT makes of a bfloat16 model: ours adds the adapter before rounding, not after."""
    fused = fuse_lm_head(lora(tiny().to(torch.bfloat16)))
    exact = lora(tiny().to(torch.bfloat16)).float()
    head, plain = fused.get_output_embeddings(), exact.get_output_embeddings()
    assert head.lora_A["default"].weight.dtype == torch.float32
    hidden, ids = torch.randn(5, 16).to(torch.bfloat16), torch.tensor([1, 2, 3, 4, 5])
    found = head(hidden, ids).logprob
    wanted = plain(hidden.float()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert found.dtype == torch.float32 and gap(found, wanted) < 0.05
    found.sum().backward()
    wanted.sum().backward()
    for name in ("lora_A", "lora_B"):
        mine, expected = (getattr(h, name)["default"].weight.grad for h in (head, plain))
        assert mine.dtype == torch.float32
        assert gap(mine, expected) < 0.03 * float(expected.abs().max())


def test_autocast() -> None:
    fused, plain = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Policy(fused)(tokens())
        wanted = Policy(plain)(tokens(), fused=False)
    assert gap(found[0], wanted[0]) < 0.1
    loss_of(found).backward()
    loss_of(wanted).backward()
    for name, value in gradients(plain).items():
        assert gap(gradients(fused)[name], value) < 0.05 * float(value.abs().max()), name


def test_other_modes_and_keywords() -> None:
    fused, plain = build()
    head, hidden = fused.get_output_embeddings(), torch.randn(3, 16)
    ids = torch.tensor([4, 5, 6])
    logits = plain.get_output_embeddings()(hidden)
    wanted = nn.functional.cross_entropy(logits / 0.7, ids)
    assert gap(head(hidden, ids, mode="ce", temperature=0.7), wanted) < 1e-5
    assert torch.equal(head(hidden, ids, mode="logits"), logits)
    with pytest.raises(ValueError, match="mode='x'"):
        head(hidden, ids, mode="x")
    with pytest.raises(ValueError, match="mode='x'"):
        head(hidden, mode="x")
    with pytest.raises(TypeError, match="plain logits take no temperature"):
        head(hidden, temperature=0.7)


def test_a_second_call_and_copies() -> None:
    fused, _ = build()
    head = fused.get_output_embeddings()
    kind, wanted = type(head), Policy(fused)(tokens())
    fuse_lm_head(fused, backend="reference", workspace_mb=3)
    assert type(fused.get_output_embeddings()) is kind
    assert (head.base_layer.backend, head.base_layer.workspace_mb) == ("reference", 3)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(twin.get_output_embeddings()) is kind
        assert gap(Policy(twin)(tokens())[0], wanted[0]) < 1e-5


@pytest.mark.parametrize("options", [{}, SAVED], ids=["lora", "modules_to_save"])
def test_saved_adapters_load(options: dict[str, Any], tmp_path: Path) -> None:
    fused, plain = build(**options)
    for model in (fused, plain):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    files = [tmp_path / f / "adapter_model.safetensors" for f in ("fused", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = fuse_lm_head(PeftModel.from_pretrained(tiny(), tmp_path / "fused"))
    wanted = Policy(plain)(tokens(), fused=False)
    assert gap(Policy(loaded)(tokens())[0], wanted[0]) < 1e-5


# --- a whole copy of the head ---------------------------------------------------------------------


@ORDERS
def test_modules_to_save_equals_peft(first: str) -> None:
    fused, plain = build(first, **SAVED)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for model in (fused, plain):
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    assert torch.equal(fused(tokens()).logits, plain(tokens()).logits)
    assert_same(fused, plain, "modules_to_save")
    with fused.disable_adapter():
        off = Policy(fused)(tokens())[0]
    assert gap(off, Policy(tiny())(tokens(), fused=False)[0]) < 1e-5


def test_modules_to_save_needs_no_second_call() -> None:
    fused, plain = lora(fuse_lm_head(tiny()), **SAVED), lora(tiny(), **SAVED)
    assert_same(fused, plain, "modules_to_save")


def test_modules_to_save_of_a_tied_model() -> None:
    """PEFT's copy is a weight of its own; the embedding keeps its own."""
    with pytest.warns(UserWarning, match="tie"):
        fused, plain = (lora(tiny(tied=True), **SAVED) for _ in range(2))
    assert_same(fuse_lm_head(fused), plain, "modules_to_save")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, copy.deepcopy], ids=["itself", "copy"])
@pytest.mark.parametrize("mode", ["logprob", "ce"])
def test_adapters_after_fuse_ask_for_a_second_call(wrap: Callable[[Any], Any], mode: str) -> None:
    """PEFT's own forward would add the adapter's logits to a loss."""
    model = lora(wrap(fuse_lm_head(tiny())))
    head, hidden, ids = model.get_output_embeddings(), torch.randn(2, 16), torch.tensor([1, 2])
    assert torch.equal(model(tokens()).logits, lora(tiny())(tokens()).logits)
    with pytest.raises(RuntimeError, match=r"call fuse_lm_head\(model\) once more"):
        head(hidden, ids, mode=mode)
    assert fuse_lm_head(model).get_output_embeddings()(hidden, ids).logprob.shape == (2,)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "LoRA bias")],
    ids=["dora", "bias"],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_more_than_plain_lora_is_refused(options: dict[str, Any], what: str) -> None:
    model = lora(tiny(), **options)
    with pytest.raises(NotImplementedError, match=rf'{what}.*modules_to_save=\["lm_head"\]'):
        fuse_lm_head(model)
    assert not isinstance(model.get_output_embeddings().base_layer, FusedLMHead)


def test_several_active_adapters_are_refused() -> None:
    model = lora(tiny())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match=r"several active adapters.*set_adapter"):
        fuse_lm_head(model)
    model.set_adapter("other")
    fuse_lm_head(model)
    hidden, ids = torch.randn(2, 16), torch.tensor([1, 2])
    model.get_output_embeddings()(hidden, ids)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match="several active adapters"):
        model.get_output_embeddings()(hidden, ids)


@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_lora_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r'tied to the embedding.*modules_to_save=\["lm_head"\]'):
        fuse_lm_head(lora(tiny(tied=True)))
    both = lora(tiny(tied=True), target_modules=["lm_head", "embed_tokens"])
    with pytest.raises(ValueError, match="tied to the embedding"):
        fuse_lm_head(both)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["lm_head"], total_step=10, task_type="CAUSAL_LM"),
        LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        TrainableTokensConfig(target_modules=["lm_head"], token_indices=[3]),
    ],
    ids=["adalora", "loha", "trainable tokens"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_adapters_are_refused(config: Any) -> None:
    with pytest.raises(NotImplementedError, match=r'not LoRA.*modules_to_save=\["lm_head"\]'):
        fuse_lm_head(peft_model(tiny(), config))
