"""The engine ``vllm``: vLLM in the trainer's own process, its weights pushed by reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.engines.pushed import Answer, PushedEngine, Request
from datamodules.engines.vllm_guest import Guest, model_config

_LIVE: dict[str, Guest] = {}  # at most one: a second would share the first one's global state


class VLLMEngine(PushedEngine):
    """Writes completions with vLLM in this process (colocated with the trainer).

    It starts at the first ``sync``, from the policy's configuration alone, and then gets the
    weights themselves. Runs after one another in a process (arms) share the running vLLM as long as
    model and options are the same. Greedy tokens are those of Hugging Face's ``generate``.

    Args:
        sync_every: Optimizer steps between pushes during training; evaluations always get the
            current weights. Above 1 use ``model.sampler_correction``.
        max_model_len: Longest sequence (prompt and completion); None takes the model's own bound.
        max_num_seqs: Most completions written at once.
        dtype: Of weights and arithmetic; ``auto`` is the policy's.
        enforce_eager: No graph capture and no compilation; None for true on a CPU only.
        gpu_memory_utilization: Share of the GPU's memory for vLLM's weights and KV cache.
        kv_cache_gib: KV cache in GiB; None leaves it to ``gpu_memory_utilization`` on a GPU and
            takes 0.5 on a CPU.
        tensor_parallel_size: 1; an endpoint (``engine=vllm_server``) can have more.
        sleep_level: Free the GPU between rollouts: 1 moves weights to the CPU, 2 drops them (they
            are pushed anyway); None keeps everything.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> engine = VLLMEngine(max_num_seqs=64)
        >>> engine.sync(policy, 0)  # doctest: +SKIP
        >>> engine.generate(prompts, Sampling(samples=8))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        sync_every: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        enforce_eager: bool | None = None,
        gpu_memory_utilization: float = 0.4,
        kv_cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
        sleep_level: Literal[1, 2] | None = None,
    ) -> None:
        super().__init__(sync_every=sync_every, max_model_len=max_model_len)
        problems = []
        if max_num_seqs < 1:
            problems.append(f"engine.max_num_seqs={max_num_seqs} must be at least 1")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            problems.append(f"engine.dtype={dtype!r}: use auto, float32, bfloat16 or float16")
        if not 0 < gpu_memory_utilization <= 1:
            problems.append(
                f"engine.gpu_memory_utilization={gpu_memory_utilization} must be in (0, 1]"
            )
        if kv_cache_gib is not None and not kv_cache_gib > 0:
            problems.append(f"engine.kv_cache_gib={kv_cache_gib} must be above 0, or null")
        if tensor_parallel_size != 1:
            problems.append(
                f"engine.tensor_parallel_size={tensor_parallel_size}: in the trainer's process it "
                f"can only be 1; engine=vllm_server takes more"
            )
        if sleep_level not in (None, 1, 2):
            problems.append(f"engine.sleep_level={sleep_level} must be 1, 2 or null")
        if problems:
            raise ValueError("; ".join(problems))
        self.max_num_seqs, self.dtype, self.enforce_eager = max_num_seqs, dtype, enforce_eager
        self.gpu_memory_utilization, self.kv_cache_gib = gpu_memory_utilization, kv_cache_gib
        self.sleep_level = sleep_level
        self._guest: Guest | None = None

    def start(self, policy: Any) -> None:
        """Start vLLM, or take the running one if it suits."""
        parameter = next(policy.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        size = self.kv_cache_gib
        if size is None and parameter.device.type == "cpu":
            size = 0.5
        options = {
            "dtype": dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": self.enforce_eager,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if size is None else int(size * 2**30),
            "enable_sleep_mode": self.sleep_level is not None,
            "logprobs_mode": "processed_logprobs",  # those of the distribution drawn from
            "generation_config": "vllm",  # no defaults from the model's folder
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        key = repr((model_config(policy), sorted(options.items())))
        if key not in _LIVE:
            close_guests()
            _LIVE[key] = Guest(policy, options)
        self._guest = _LIVE[key]

    def push(self, weights: Iterator[tuple[str, Tensor]], label: str) -> None:
        """Load the trainer's own tensors, one at a time."""
        assert self._guest is not None
        self._guest.push(weights, label)

    def served_label(self) -> str:
        """What vLLM says of its weights."""
        return "" if self._guest is None else self._guest.label

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests in one batch; vLLM does the scheduling."""
        assert self._guest is not None
        return self._guest.complete(requests)

    def rest(self) -> None:
        """Sleep until the next ``sync`` or ``generate``, where asked for and possible."""
        if self.sleep_level is None or self._guest is None:
            return
        if not self._guest.sleep(self.sleep_level):
            rank_zero_warn(
                f"engine.sleep_level={self.sleep_level} has no effect: vLLM cannot sleep on a CPU"
            )
            self.sleep_level = None

    def close(self) -> None:
        """Stop vLLM and free its memory; the next ``sync`` starts it again."""
        self._guest = None
        self.policy_version = -1
        close_guests()


def close_guests() -> None:
    """Stop the running vLLM, if there is one."""
    while _LIVE:
        _LIVE.popitem()[1].close()
