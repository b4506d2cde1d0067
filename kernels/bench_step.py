"""One policy step of a 0.6B model with the plain head and with the fused one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bench_measure import MIB, Stopwatch, peak_bytes, spread
from .head import fuse_lm_head

#: Shape of Qwen3-0.6B.
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SAMPLES, TOKENS = 8, 1024
CLIP, ENTROPY_BONUS = 0.2, 0.001


class Policy:
    """A random model, tokens and a clipped policy loss.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: Of the weights.
        shape: Changes to ``SHAPE``.
        samples: Sequences.
        tokens: Tokens of each.
    """

    def __init__(
        self,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        shape: dict[str, Any] | None = None,
        samples: int = SAMPLES,
        tokens: int = TOKENS,
    ) -> None:
        name = "transformers"
        transformers = importlib.import_module(name)
        config = transformers.Qwen3Config(**(SHAPE | (shape or {})))
        torch.manual_seed(0)
        self.model: nn.Module = transformers.Qwen3ForCausalLM(config).to(device, dtype)
        self.model.config.use_cache = False
        size = (samples, tokens)
        self.ids = torch.randint(config.vocab_size, size, device=device)
        self.advantages = torch.randn((samples, 1), device=device)
        self.old = torch.full((samples, tokens - 1), -float(torch.tensor(config.vocab_size).log()))
        self.old = self.old.to(device)

    def plain(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies from full logits."""
        logits: Tensor = nn.functional.linear(hidden, self.model.get_parameter("lm_head.weight"))
        logprobs = logits.float().log_softmax(-1)
        chosen = logprobs.gather(-1, targets[..., None])[..., 0]
        return chosen, -(logprobs.exp() * logprobs).sum(-1)

    def fused(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same without logits."""
        found = fuse_lm_head(self.model).lm_head(hidden, targets)
        return found.logprob, found.entropy

    def loss(self, head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """PPO's clipped loss with an entropy bonus."""
        hidden = self.model.get_submodule("model")(self.ids).last_hidden_state[:, :-1]
        logprob, entropy = head(hidden, self.ids[:, 1:])
        ratio = (logprob - self.old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * self.advantages, clipped * self.advantages)
        return -(gain + ENTROPY_BONUS * entropy).mean()

    def clear(self) -> None:
        """Forget gradients."""
        self.model.zero_grad(set_to_none=True)


def report(repeats: int, device: str = "cuda", **options: Any) -> list[str]:
    """Lines with the time and peak memory of forward and backward of both heads, in turn.

    Args:
        repeats: Timed runs, after two that are not.
        device: ``cuda`` or ``cpu``.
        **options: Of ``Policy``.
    """
    policy = Policy(device, **options)
    watch = Stopwatch(device)
    heads = {"eager": policy.plain, "fused": policy.fused}
    times: dict[str, list[float]] = {name: [] for name in heads}
    peaks: dict[str, float] = {}
    for number in range(repeats + 2):
        for name, head in heads.items():
            policy.clear()
            found = watch.run(lambda own=head: policy.loss(own), lambda loss: loss.backward())
            if number >= 2:
                times[name].append(found.both)
    for name, head in heads.items():
        policy.clear()
        peaks[name] = peak_bytes(lambda own=head: policy.loss(own).backward(), device) / MIB
    medians = {name: spread(values).median for name, values in times.items()}
    samples, tokens = policy.ids.shape
    lines = [f"Forward and backward of a policy, {samples} x {tokens} tokens:"]
    lines += [f"- {n}: {medians[n]:.1f} ms, {peaks[n]:.0f} MiB beyond the weights" for n in heads]
    memory, time = peaks["fused"] / peaks["eager"], medians["fused"] / medians["eager"]
    return [*lines, f"memory {memory:.2f} of eager, time {time:.2f} of eager"]
