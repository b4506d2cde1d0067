"""What the vLLM tests share: when they run, a policy that vLLM can run, prompts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.engines.base import Sampling
from datamodules.experience import Completion, Prompt
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.causal_lm import completion_logprobs, load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.options import BackboneOptions, LoraOptions

#: Marks of every file here.
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"
    ),
]
TOKENS = [(5, 6, 7), (8, 9, 10, 11, 12), (4, 13), tuple(range(3, 20)), (3,)]
GREEDY = Sampling(temperature=0.0, max_new_tokens=16)


def shape(head_dim: int = 32, tie_embeddings: bool = False) -> TinyOptions:
    """Of a small Qwen3; vLLM's CPU attention starts at heads of 32."""
    return TinyOptions(
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=head_dim,
        tie_embeddings=tie_embeddings,
    )


def build(folder: Path, options: TinyOptions | None = None) -> Path:
    """A random policy with the words of the procedural task."""
    build_tiny(folder, PrefixAudit().vocabulary(), options or shape(), seed=0)
    return folder


def load(folder: Path, lora: LoraOptions | None = None) -> Any:
    """The policy, its weights spread so that tokens are neither certain nor all alike."""
    policy = load_causal_lm(BackboneOptions(path=str(folder)), lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "norm" not in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return policy


def prompts(*tokens: Sequence[int], **options: Any) -> list[Prompt]:
    """Prompts named after their tokens."""
    given: Any = tokens or TOKENS
    return [Prompt("-".join(map(str, ids)), tuple(ids), None, **options) for ids in given]


def step(policy: Any) -> None:
    """One real optimizer step, large enough to change what is written."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    ids = torch.tensor([TOKENS[3]])
    policy(ids, labels=ids).loss.backward()
    optimizer.step()


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    """The tokens alone."""
    return [[completion.token_ids for completion in group] for group in groups]


def trainer_logprobs(
    policy: Any, prompt: Prompt, completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """What the training step computes for the same tokens."""
    ids = torch.tensor([prompt.token_ids + completion.token_ids])
    mask = torch.ones(1, len(completion.token_ids), dtype=torch.bool)
    lengths = torch.tensor([len(prompt.token_ids)])
    with torch.no_grad():
        result = completion_logprobs(policy, ids, lengths, mask, temperature=temperature)
    return result.logprob[0]
