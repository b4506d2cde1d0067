"""Candidates: the most probable tokens that engines report with a completion."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.sample_table import SampleTable
from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.pushed import top_candidates
from datamodules.engines.scripted import ScriptedEngine
from datamodules.engines.vllm_endpoint import read_answer
from datamodules.experience import Completion, Prompt, Rollouts
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.options import BackboneOptions

SAMPLED = Sampling(samples=3, max_new_tokens=7, temperature=0.8, candidates=5)
TASK = PrefixAudit()
PROMPTS = [Prompt("a", (5, 6, 7), TASK), Prompt("b", (8, 9, 10, 11), TASK, max_new_tokens=4)]


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Any:
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "norm" not in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return policy


def generate(policy: Any, sampling: Sampling, decoder: Any = "loop") -> list[list[Completion]]:
    engine = HFEngine(decoder=decoder)
    engine.key = "k"
    engine.sync(policy, 0)
    return engine.generate(PROMPTS, sampling)


def expected(policy: Any, prompt: Prompt, one: Completion, sampling: Sampling) -> torch.Tensor:
    """Log-probs ``(L, V)`` of a forward pass without a cache."""
    ids = torch.tensor([prompt.token_ids + one.token_ids])
    with torch.no_grad():
        logits = policy(ids).logits[0, len(prompt.token_ids) - 1 : -1].float()
    return (logits / (sampling.temperature or 1.0)).log_softmax(-1)


@pytest.mark.parametrize("decoder", ["loop", "generate"])
@pytest.mark.parametrize(
    "sampling", [SAMPLED, Sampling(temperature=0.0, max_new_tokens=7, candidates=3)]
)
def test_they_are_those_of_the_distribution(policy: Any, decoder: str, sampling: Sampling) -> None:
    groups = generate(policy, sampling, decoder)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            logprobs = expected(policy, prompt, one, sampling)
            values, ids = logprobs.topk(sampling.candidates)
            assert one.candidates is not None
            assert len(one.candidates) == len(one.token_ids)
            assert torch.allclose(one.candidates.logprobs, values, atol=1e-4)
            assert torch.equal(one.candidates.ids, ids)
    plain = generate(policy, Sampling(**{**vars(sampling), "candidates": 0}), decoder)
    assert plain == groups, "asking for them must not change a token"
    assert all(one.candidates is None for group in plain for one in group)


def test_no_more_than_the_vocabulary(policy: Any) -> None:
    (one, *_), _ = generate(policy, Sampling(max_new_tokens=2, candidates=1000))
    assert one.candidates is not None
    assert one.candidates.ids.shape == (2, policy.config.vocab_size)
    assert torch.allclose(one.candidates.logprobs.exp().sum(-1), torch.ones(2), atol=1e-5)


def test_filtered_tokens_are_impossible(policy: Any) -> None:
    (one, *_), _ = generate(policy, Sampling(max_new_tokens=3, candidates=4, top_k=2))
    assert one.candidates is not None
    assert bool(torch.isinf(one.candidates.logprobs[:, 2:]).all())
    assert torch.allclose(one.candidates.logprobs[:, :2].exp().sum(-1), torch.ones(3), atol=1e-5)


def test_vllm_reports_the_sampled_token_as_well() -> None:
    found = top_candidates([{7: -5.0, 3: -0.1, 4: -2.5}, {9: -0.2, 8: -2.0}], 2)
    assert found is not None
    assert found.ids.tolist() == [[3, 4], [9, 8]]
    assert found.logprobs[0].tolist() == pytest.approx([-0.1, -2.5])
    assert top_candidates([], 0) is None
    assert top_candidates([], 2).ids.shape == (0, 2)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="3 candidates a position"):
        top_candidates([{9: -0.2, 8: -2.0}], 3)


def served(top: Any) -> dict[str, Any]:
    content = [{"logprob": -0.5, "token_id": 5, "top_logprobs": top}]
    choice = {"token_ids": [5], "finish_reason": "stop", "logprobs": {"content": content},
              "weight_versions": [{"version": "v1"}]}  # fmt: skip
    return {"choices": [choice]}


def test_a_servers_candidates_are_read() -> None:
    good = [{"token_id": 5, "logprob": -0.5}, {"token_id": 4, "logprob": -0.4}]
    read = read_answer(served(good), "here", 2).candidates
    assert read is not None
    assert read.ids.tolist() == [[4, 5]]
    assert read_answer(served(good), "here").candidates is None


@pytest.mark.parametrize(
    ("top", "fragment"),
    [
        (None, "top_logprobs"),
        ([{"token_id": "5", "logprob": -1.0}], "token_id"),
        ([{"token_id": 5, "logprob": "x"}], "log-probability"),
        ([{"token_id": 5, "logprob": float("nan")}], "log-probability"),
        ([{"token_id": 5, "logprob": -0.5}], "2 candidates a position"),
    ],
)
def test_strange_candidates_of_a_server(top: Any, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        read_answer(served(top), "here", 2)


def test_a_record_brings_them_back_bit_for_bit(policy: Any, tmp_path: Path) -> None:
    groups = generate(policy, SAMPLED)
    task = SimpleNamespace(render=str)
    named = [Prompt(p.uid, p.token_ids, task) for p in PROMPTS]  # type: ignore[arg-type]
    rollouts = Rollouts.from_groups(named, groups)
    rollouts.reward = rollouts.advantages = torch.arange(6.0)
    rollouts.parts = {"reward": rollouts.reward}
    table = SampleTable(path=str(tmp_path / "samples.jsonl"), keep="all")
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(last_rollouts=rollouts), is_global_zero=True,
        accumulate_grad_batches=1, global_step=1, loggers=[],
    )  # fmt: skip
    table.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    again = ScriptedEngine(path=str(tmp_path / "samples.jsonl")).generate(PROMPTS, SAMPLED)
    for group, replayed in zip(groups, again, strict=True):
        for one, two in zip(group, replayed, strict=True):
            assert one.token_ids == two.token_ids
            assert torch.equal(one.candidates.ids, two.candidates.ids)  # type: ignore[union-attr]
            assert torch.equal(one.candidates.logprobs, two.candidates.logprobs)  # type: ignore[union-attr]
    bad = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    bad["candidates"] = {"ids": [[1, 2]], "logprobs": [[0.0]]}
    with pytest.raises(ValueError, match=r"candidates\.ids"):
        ScriptedEngine(records=[bad])
