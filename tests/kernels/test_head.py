"""``fuse_lm_head`` leaves a model as it was, and its head gives what plain logits give."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3Model

from lightning_modules.ops import (
    CEStats,
    FusedLMHead,
    TopK,
    fuse_lm_head,
    linear_logprob_entropy,
    load_kernels,
)
from tests.kernels.head_worker import VOCABULARY, Policy, gap, gradients, loss_of, tiny, tokens

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def pair(tied: bool = False) -> tuple[Any, Any]:
    """A fused model and its plain twin."""
    return fuse_lm_head(tiny(tied)), tiny(tied)


class Bare(nn.Module):
    """The least that has a head."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.lm_head = head

    def get_output_embeddings(self) -> Any:
        return self.lm_head


# --- what must not change -------------------------------------------------------------------------


@TIED
def test_parameters_keys_and_modes_stay(tied: bool) -> None:
    model = tiny(tied)
    model.lm_head.eval()
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    keys, head = list(model.state_dict()), model.lm_head
    assert fuse_lm_head(model) is model
    assert type(model.lm_head) is FusedLMHead
    assert model.lm_head is head and isinstance(head, nn.Linear)
    after = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert after == before
    assert list(model.state_dict()) == keys
    assert not head.training and model.training
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.to(torch.float64)
    assert head.weight.dtype == torch.float64
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_second_call_updates_the_settings() -> None:
    model = fuse_lm_head(tiny(), backend="reference", workspace_mb=7, vocab_limit=30)
    head = model.lm_head
    assert (head.backend, head.workspace_mb, head.vocab_limit) == ("reference", 7, 30)
    fuse_lm_head(model)
    assert model.lm_head is head and type(head) is FusedLMHead
    assert (head.backend, head.workspace_mb, head.vocab_limit) == ("auto", None, None)


@TIED
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_bit_for_bit_those_of_linear(tied: bool, bias: bool) -> None:
    head = FusedLMHead(16, 9, bias=bias)
    hidden = torch.randn(2, 3, 16)
    plain = nn.functional.linear(hidden, head.weight, head.bias)
    assert torch.equal(head(hidden), plain)
    assert torch.equal(head(hidden, torch.zeros(2, 3, dtype=torch.int64), mode="logits"), plain)
    fused, unfused = pair(tied)
    ids = tokens()
    assert torch.equal(fused(ids).logits, unfused(ids).logits)
    assert torch.equal(fused(ids, labels=ids).loss, unfused(ids, labels=ids).loss)


@TIED
def test_generate_is_the_same(tied: bool) -> None:
    fused, plain = (model.eval() for model in pair(tied))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(3, 8)}
    assert torch.equal(fused.generate(tokens(), **options), plain.generate(tokens(), **options))


@TIED
def test_save_and_load(tied: bool, tmp_path: Path) -> None:
    fused, plain = pair(tied)
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    one, other = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("fused", "plain"))
    assert one == other, "the files are equal, byte for byte"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert isinstance(loaded, Qwen3ForCausalLM) and type(loaded.lm_head) is nn.Linear
    again = fuse_lm_head(loaded)
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    again.load_state_dict(plain.state_dict())


@TIED
def test_copies_and_pickles_work(tied: bool) -> None:
    fused, _ = pair(tied)
    fused.lm_head.workspace_mb = 5
    ids = tokens()
    wanted = Policy(fused)(ids)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(twin.lm_head) is FusedLMHead and twin.lm_head.workspace_mb == 5
        assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
        assert torch.equal(Policy(twin)(ids)[0], wanted[0])


class NamedHead(nn.Linear):
    """A subclass that adds nothing to ``forward``."""


def test_a_subclass_with_the_same_forward_is_fused() -> None:
    model = fuse_lm_head(Bare(NamedHead(4, 8)))
    assert isinstance(model.lm_head, FusedLMHead) and isinstance(model.lm_head, NamedHead)
    twin = pickle.loads(pickle.dumps(model.lm_head))
    assert type(twin) is type(model.lm_head) and torch.equal(twin.weight, model.lm_head.weight)
    hidden, ids = torch.randn(2, 4), torch.tensor([0, 7])
    assert torch.equal(twin(hidden, ids).logprob, model.lm_head(hidden, ids).logprob)


# --- what the head computes -----------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_values_and_gradients_are_those_of_logits(tied: bool, checkpointing: bool) -> None:
    fused, plain = map(Policy, pair(tied))
    if checkpointing:
        fused.model.gradient_checkpointing_enable({"use_reentrant": False})
    found, wanted = fused(tokens()), plain(tokens(), fused=False)
    assert gap(found[0], wanted[0]) < 1e-5 and gap(found[1], wanted[1]) < 1e-5
    loss_of(found).backward()
    loss_of(wanted).backward()
    mine, expected = gradients(fused), gradients(plain)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-4, name
        assert gap(mine[name], value) < 1e-5, name
    if tied:
        assert "model.lm_head.weight" not in mine, "one parameter, both gradients"


def test_a_bias_counts() -> None:
    head, hidden, ids = FusedLMHead(16, 9), torch.randn(2, 16), torch.tensor([1, 8])
    nn.init.normal_(head.bias)
    found = head(hidden, ids).logprob
    wanted = head(hidden).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert gap(found, wanted) < 1e-6
    one, other = (torch.autograd.grad(v.sum(), head.bias)[0] for v in (found, wanted))
    assert gap(one, other) < 1e-6 and float(one.abs().max()) > 0.1


def test_cross_entropy_mode() -> None:
    head, hidden = FusedLMHead(16, 9), torch.randn(2, 3, 16)
    ids = torch.tensor([[1, 2, -100], [0, 8, 8]])
    wanted = nn.functional.cross_entropy(head(hidden).view(6, 9), ids.view(6))
    assert gap(head(hidden, ids, mode="ce"), wanted) < 1e-6
    loss, stats = head(hidden, ids, mode="ce", reduction="none", return_stats=True)
    assert loss.shape == ids.shape and isinstance(stats, CEStats)
    assert not loss._is_view(), "in-place use of a view would drop the hooks of fully_shard"


def test_settings_are_defaults_of_the_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def spy(*args: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return linear_logprob_entropy(*args, **keywords)

    monkeypatch.setattr(load_kernels("head"), "linear_logprob_entropy", spy)
    options = {"backend": "torch", "workspace_mb": 2, "vocab_limit": 6}
    head = fuse_lm_head(Bare(nn.Linear(4, 8)), **options).lm_head
    hidden, ids = torch.zeros(1, 4), torch.tensor([0])
    head(hidden, ids)
    other = {"backend": "reference", "workspace_mb": 1, "vocab_limit": 8}
    head(hidden, ids, region=TopK(2), temperature=0.5, **other)
    assert options.items() <= seen[0].items() and other.items() <= seen[1].items()
    assert seen[1]["region"] == TopK(2) and seen[1]["temperature"] == 0.5
    with pytest.raises(IndexError, match="target 7"):
        head(hidden, torch.tensor([7]))


def test_autocast() -> None:
    fused, plain = map(Policy, pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = fused(tokens()), plain(tokens(), fused=False)
    assert found[0].dtype == torch.float32
    assert gap(found[0], wanted[0]) < 0.05
    loss_of(found).backward()
    loss_of(wanted).backward()
    mine, expected = fused.model.lm_head.weight.grad, plain.model.lm_head.weight.grad
    assert mine.dtype == torch.float32
    assert gap(mine, expected) < 0.02 * float(expected.abs().max())


# --- refusals -------------------------------------------------------------------------------------


def test_what_forward_refuses() -> None:
    head, hidden, ids = FusedLMHead(4, 8), torch.zeros(1, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="mode='nll': give 'logprob', 'ce', 'logits'"):
        head(hidden, ids, mode="nll")
    with pytest.raises(ValueError, match="mode='nll'"):
        head(hidden, mode="nll")
    with pytest.raises(TypeError, match="plain logits take no temperature, region"):
        head(hidden, temperature=2.0, region=TopK(2))
    with pytest.raises(TypeError, match="plain logits take no backend"):
        head(hidden, ids, mode="logits", backend="torch")
    with pytest.raises(ValueError, match="mode='ce' has no region"):
        head(hidden, ids, mode="ce", region=TopK(2))
    with pytest.raises(TypeError, match="bias"):
        head(hidden, ids, bias=torch.zeros(8))


def test_models_without_a_linear_head_are_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no output embeddings.*no such method"):
        fuse_lm_head(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Qwen3Model has no output embeddings.*gives None"):
        fuse_lm_head(Qwen3Model(tiny().config))
    with pytest.raises(TypeError, match="lm_head is Sequential"):
        fuse_lm_head(Bare(nn.Sequential(nn.Linear(4, 8))))
    with pytest.raises(ValueError, match=f"vocab_limit=99: give 1 to {VOCABULARY}"):
        fuse_lm_head(tiny(), vocab_limit=99)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


def test_quantised_heads_are_refused() -> None:
    integers = nn.Linear(4, 8, bias=False)
    integers.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    for head in (integers, OwnForward(4, 8)):
        kind = type(head)
        with pytest.raises(NotImplementedError, match=r'modules_to_save=\["lm_head"\]'):
            fuse_lm_head(Bare(head))
        assert type(head) is kind, "a refused model stays as it was"


def test_two_fused_heads_at_once_are_refused() -> None:
    def fused_elsewhere(self: Any, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        return hidden

    model = tiny()
    model.lm_head.forward = MethodType(fused_elsewhere, model.lm_head)
    with pytest.raises(RuntimeError, match=r"test_head.*fused_elsewhere.*undo that patch"):
        fuse_lm_head(model)
    model = tiny()
    fused_elsewhere.__module__ = "liger_kernel.transformers.model.qwen3"
    model.forward = MethodType(fused_elsewhere, model)
    with pytest.raises(RuntimeError, match=r"Qwen3ForCausalLM.*liger_kernel\.transformers"):
        fuse_lm_head(model)


# --- a whole policy step --------------------------------------------------------------------------


def loss_curve(backend: str | None) -> list[float]:
    """20 steps of PPO's clipped loss with an entropy bonus; ``None`` is the unfused model."""
    policy = Policy(tiny(qwen2=True))
    if backend is not None:
        fuse_lm_head(policy.model, backend=backend)
    keywords: dict[str, Any] = {"fused": backend is not None}
    draws = torch.Generator().manual_seed(3)
    advantages, curve = torch.randn(3, 7, generator=draws), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(20):
        if step % 5 == 0:  # the old policy moves along, so that ratios leave 1 and are clipped
            with torch.no_grad():
                old = policy(tokens(), **keywords)[0].clone()
        logprob, entropy = policy(tokens(), **keywords)
        ratio = (logprob - old).exp()
        clipped = ratio.clamp(0.8, 1.2)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -surrogate.mean() - 0.05 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def test_twenty_policy_steps_are_the_same() -> None:
    plain, fused, reference = loss_curve(None), loss_curve("torch"), loss_curve("reference")
    assert max(plain) - min(plain) > 0.1, "the loss must move"
    for other in (fused, reference):
        assert max(abs(a - b) for a, b in zip(plain, other, strict=True)) < 1e-4
