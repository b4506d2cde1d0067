"""The engine ``vllm_server``: vLLM behind an HTTP endpoint, started by us or by the user."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from torch import Tensor

from datamodules.engines.policies import named_weights
from datamodules.engines.pushed import Answer, PushedEngine, Request
from datamodules.engines.vllm_endpoint import SERVER_NEEDS, Endpoint, LocalServer, check_url
from datamodules.engines.vllm_guest import missing_vllm, model_config
from datamodules.engines.vllm_transfer import WeightFolders, check_transfer, send_over_nccl

T = TypeVar("T")
_LIVE: dict[str, LocalServer] = {}  # at most one of ours a purpose, shared by runs of one process


class VLLMServerEngine(PushedEngine):
    """Writes completions through an HTTP endpoint that all ranks share.

    Without ``url`` rank 0 starts a server on this machine: loopback, a free port, a random key, and
    it ends with the run. With ``url`` the user starts it, with what ``SERVER_NEEDS`` says. Weights
    go through a folder of safetensors that the server reloads, or over NCCL. Every answer names the
    weights that wrote it, so an endpoint that was restarted or that another run uses is noticed.

    Args:
        url: ``http://host:port`` of a running server; None starts one.
        api_key_env: Name of the environment variable with its key; only with ``url``. The key
            itself is never a config value.
        sync_every: Optimizer steps between pushes during training; see ``VLLMEngine``.
        max_model_len: Longest sequence (prompt and completion); None takes the model's own bound.
        max_num_seqs: Most completions asked for, and written, at once.
        dtype: Of the server's weights and arithmetic; ``auto`` is the policy's.
        enforce_eager: No graph capture and no compilation; None for true on a CPU only.
        gpu_memory_utilization: Share of the GPU's memory that the server takes.
        kv_cache_gib: KV cache in GiB; None as in ``VLLMEngine``.
        tensor_parallel_size: GPUs of the server that share each layer.
        devices: Numbers of the server's GPUs, such as ``"6,7"``; None leaves it to CUDA.
        server_args: Further arguments of the server.
        startup_timeout: Seconds until it must answer.
        request_timeout: Seconds that one answer may take.
        weights: ``folder`` writes safetensors and lets the server reload them; ``nccl`` uses vLLM's
            weight-transfer API (GPUs on both sides).
        weights_dir: Folder for ``weights=folder``, seen by the server under the same path; None
            is the temporary folder, for a user's server the one that ``log`` is in. What is written
            goes when the run ends.
        log: File of the output of a server of ours.

    Raises:
        ValueError: A value is out of range, or the endpoint is open to a network without a key.
    """

    is_shared = True
    purpose = "policy"  # a judge beside it has a server of its own

    def __init__(
        self,
        *,
        url: str | None = None,
        api_key_env: str | None = None,
        sync_every: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        enforce_eager: bool | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gib: float | None = None,
        tensor_parallel_size: int = 1,
        devices: str | None = None,
        server_args: Sequence[str] = (),
        startup_timeout: float = 600.0,
        request_timeout: float = 600.0,
        weights: Literal["folder", "nccl"] = "folder",
        weights_dir: str | None = None,
        log: str | None = None,
    ) -> None:
        super().__init__(sync_every=sync_every, max_model_len=max_model_len)
        positive = {
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "startup_timeout": startup_timeout,
            "request_timeout": request_timeout,
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        problems = [
            f"engine.{name}={value} must be above 0"
            for name, value in positive.items()
            if value is not None and not value > 0
        ]
        if weights not in ("folder", "nccl"):
            problems.append(f"engine.weights={weights!r}: use folder or nccl")
        if api_key_env is not None and url is None:
            problems.append("engine.api_key_env goes with engine.url: our own server has a key")
        if problems:
            raise ValueError("; ".join(problems))
        self.url, self.api_key_env = url, api_key_env
        if url is not None:
            check_url(url, self._users_key())
        self.max_num_seqs, self.dtype, self.enforce_eager = max_num_seqs, dtype, enforce_eager
        self.gpu_memory_utilization, self.kv_cache_gib = gpu_memory_utilization, kv_cache_gib
        self.tensor_parallel_size, self.devices = tensor_parallel_size, devices
        self.server_args = [str(argument) for argument in server_args]
        self.startup_timeout, self.request_timeout = startup_timeout, request_timeout
        self.weights: Literal["folder", "nccl"] = weights
        self.weights_dir = weights_dir
        self.log = Path(log) if log else Path(tempfile.gettempdir(), f"vllm_{os.getpid()}.log")
        self._endpoint: Endpoint | None = None
        self._folders: WeightFolders | None = None
        self._sender: Any = None
        self._policy: Any = None

    def _users_key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key.strip():
            raise ValueError(
                f"engine.api_key_env={self.api_key_env}: there is no such environment variable; "
                f"export {self.api_key_env}=<the server's VLLM_API_KEY>"
            )
        return key.strip()

    # ------------------------------------------------------------------ starting

    def start(self, policy: Any) -> None:
        """Find or start the server; all ranks then know where it is."""
        self._policy = policy
        check_transfer(self.weights, next(policy.parameters()).device)
        if self.url is not None:
            if self._folders is None:
                root = self._root(self.log.parent)
                self._folders = WeightFolders(root, is_removed=is_first_rank())
            self._endpoint = Endpoint(self.url, self._users_key(), timeout=self.request_timeout)
            self._check_users_server()
            return
        _same_machine()
        options = self._arguments(policy)
        key = f"{self.purpose}: {(model_config(policy), options, self.devices)!r}"

        def find() -> bool:
            running = key in _LIVE and _LIVE[key].is_running
            if not running and (hint := missing_vllm()):
                raise ValueError(f"engine=vllm_server: {hint}")
            return running

        first = None
        if not _on_first_rank(find):
            self._folders = WeightFolders(self._root(Path(tempfile.gettempdir())))
            first = self._folders.write(policy, named_weights(policy), "start", is_first_rank())
            self._folders.keep_only(first, is_first_rank())
        elif self._folders is None:
            server = _LIVE.get(key)  # none but on rank 0, which alone writes
            theirs = server.weights if server is not None else Path(os.devnull)
            self._folders = WeightFolders(theirs, is_removed=False)

        def begin() -> tuple[str, str]:
            if first is not None and self._folders is not None:
                close_servers(self.purpose)
                _LIVE[key] = LocalServer(
                    first,
                    options,
                    log=self.log,
                    startup_timeout=self.startup_timeout,
                    weights=first.parent,
                    devices=self.devices,
                )
                self._folders.leave_to_server()
            return _LIVE[key].url, _LIVE[key].key

        url, secret = _on_first_rank(begin)
        server = _LIVE.get(key)
        explain = server.tail if server is not None else str
        self._endpoint = Endpoint(url, secret, timeout=self.request_timeout, explain=explain)

    def _root(self, default: Path) -> Path:
        """Folder of this run's weights."""
        if self.weights_dir is None and self.url is not None:
            return default / "vllm_weights"
        return Path(self.weights_dir or default, f"litpost-weights-{secrets.token_hex(6)}")

    def _arguments(self, policy: Any) -> list[str]:
        parameter = next(policy.parameters())
        is_cpu = parameter.device.type == "cpu"
        dtype = str(parameter.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        size = 0.5 if self.kv_cache_gib is None and is_cpu else self.kv_cache_gib
        eager = is_cpu if self.enforce_eager is None else self.enforce_eager
        values: dict[str, Any] = {
            "dtype": dtype,
            "max-num-seqs": self.max_num_seqs,
            "gpu-memory-utilization": self.gpu_memory_utilization,
            "tensor-parallel-size": self.tensor_parallel_size,
            "max-model-len": self.max_model_len,
            "kv-cache-memory-bytes": None if size is None else int(size * 2**30),
        }
        words = [w for k, v in values.items() if v is not None for w in (f"--{k}", str(v))]
        words += ["--enforce-eager"] if eager else []
        words += ["--no-enable-chunked-prefill"] if is_cpu else []  # see vllm_guest.Guest
        if self.weights == "nccl":
            words += ["--weight-transfer-config", '{"backend": "nccl"}']
        return words + self.server_args

    def _check_users_server(self) -> None:
        """Its options must be those that our log-probs and limits rest on."""
        info = self._ask("/server_info?config_format=json")
        config = info.get("vllm_config") if isinstance(info, dict) else None
        model = config.get("model_config") if isinstance(config, dict) else None
        mode = model.get("logprobs_mode") if isinstance(model, dict) else None
        length = model.get("max_model_len") if isinstance(model, dict) else None
        if mode != "processed_logprobs" or not isinstance(length, int):
            raise ValueError(
                f"engine.url={self.url}: the server has logprobs_mode={mode!r} and max_model_len="
                f"{length!r}; it must be started with {SERVER_NEEDS}"
            )
        self.max_model_len = min(self.max_model_len or length, length)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        assert self._endpoint is not None
        return self._endpoint.ask(path, body)

    # ------------------------------------------------------------------ weights and completions

    def push(self, weights: Iterator[tuple[str, Tensor]], label: str) -> None:
        """Let the server load the weights; every rank helps to gather them, rank 0 talks."""
        assert self._folders is not None
        if self.weights == "nccl":
            self._sender = send_over_nccl(
                self._sender, self._policy, weights, self._ask, is_first_rank()
            )
            _on_first_rank(lambda: self._confirm(label))
            return
        folder = self._folders.write(self._policy, weights, label, is_first_rank())

        def reload() -> None:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
            self._ask("/collective_rpc", body)
            self._confirm(label)

        _on_first_rank(reload)
        self._folders.keep_only(folder, is_first_rank())

    def _confirm(self, label: str) -> None:
        answer = self._ask("/reset_prefix_cache", {})
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise RuntimeError(f"the vLLM endpoint kept its prefix cache: {str(answer)[:200]}")
        self._ask("/update_weight_version", {"new_version": label})

    def agreed(self, label: str) -> str:
        """Rank 0's label."""
        return _on_first_rank(lambda: label)

    def served_label(self) -> str:
        """What the server says of its weights; an empty string before the first push."""
        if self._endpoint is None:
            return ""
        answer = self._ask("/weight_info")
        found = answer.get("weight_version") if isinstance(answer, dict) else None
        if not isinstance(found, str):
            raise ValueError(f"{self._endpoint.url}/weight_info: no weight_version in the answer")
        return found

    def complete(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests at once; the server does the scheduling."""
        assert self._endpoint is not None
        count = min(len(requests), self.max_num_seqs)
        with ThreadPoolExecutor(max_workers=max(count, 1)) as pool:
            return list(pool.map(self._endpoint.complete, requests))

    def rest(self) -> None:
        """Nothing: the server's GPUs are its own."""

    def close(self) -> None:
        """End a server of ours and remove the weights on disk."""
        self._endpoint, self.policy_version = None, -1
        if self.url is None:
            close_servers(self.purpose)
        if self._folders is not None:
            self._folders.close()
            self._folders = None


def close_servers(purpose: str = "") -> None:
    """End the servers that we started.

    Args:
        purpose: Of those to end; empty for all.
    """
    for key in [key for key in _LIVE if key.startswith(purpose)]:
        _LIVE.pop(key).close()


atexit.register(close_servers)


def is_first_rank() -> bool:
    """Whether this process talks to the server."""
    return not _is_group() or dist.get_rank() == 0


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _on_first_rank(work: Callable[[], T]) -> T:
    """Result of ``work`` on rank 0, for every rank; its failure is every rank's."""
    if not _is_group():
        return work()
    outcome: list[Any] = [None, None]
    if is_first_rank():
        try:
            outcome = [work(), None]
        except Exception as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _same_machine() -> None:
    if not _is_group():
        return
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    if len(set(names)) > 1:
        raise ValueError(
            "engine=vllm_server: a server that we start answers on its own machine alone, and this "
            "run has several; start one yourself and give engine.url and engine.api_key_env"
        )
