"""Ways of weights to a vLLM server: a folder of safetensors, or vLLM's own transfer over NCCL."""

from __future__ import annotations

import os
import shutil
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.engines.policies import named_weights
from datamodules.engines.vllm_guest import model_folder

SHARD_BYTES = 2**30


class WeightFolders:
    """Folders of safetensors, each written under another name and renamed when whole.

    Args:
        root: Where they live. It belongs to one run: what is in it goes at the next push.
        is_removed: Remove it with this object (else somebody else does).
    """

    def __init__(self, root: Path, *, is_removed: bool = True) -> None:
        self.root = root
        self._remove: Any = None
        if is_removed:
            self._remove = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)

    def write(
        self, policy: Any, weights: Iterator[tuple[str, Tensor]], name: str, is_writer: bool
    ) -> Path:
        """Write configuration and weights, at most ``SHARD_BYTES`` in memory at once.

        Args:
            policy: Whose configuration.
            weights: Walked to its end by every rank, since gathering takes all of them.
            name: Of the folder.
            is_writer: Whether this rank writes.
        """
        folder = self.root / name
        unfinished = folder.with_name(f"{name}.unfinished")
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            model_folder(policy, unfinished)
        shard: dict[str, Tensor] = {}
        size, number = 0, 0
        for tensor_name, value in weights:
            if not is_writer:
                continue
            shard[tensor_name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            size += shard[tensor_name].nbytes
            if size >= SHARD_BYTES:
                save_file(shard, unfinished / f"model-{number:05d}.safetensors")
                shard, size, number = {}, 0, number + 1
        if is_writer:
            if shard:
                save_file(shard, unfinished / f"model-{number:05d}.safetensors")
            os.replace(unfinished, folder)
        return folder

    def keep_only(self, folder: Path, is_writer: bool) -> None:
        """Remove what was written before ``folder``."""
        for other in list(self.root.iterdir()) if is_writer else []:
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def leave_to_server(self) -> None:
        """A server of ours reads them, also for other runs, and removes them at its end."""
        if self._remove is not None:
            self._remove.detach()
            self._remove = None

    def close(self) -> None:
        """Remove everything that was written, where that is ours to do."""
        if self._remove is not None:
            self._remove()


def check_transfer(kind: str, device: torch.device) -> None:
    """Refuse a way that cannot work from this device.

    Raises:
        ValueError: NCCL without a GPU.
    """
    if kind == "nccl" and device.type != "cuda":
        raise ValueError(
            "engine.weights=nccl needs GPUs on both sides, and the policy is on the "
            f"{device.type}: use engine.weights=folder"
        )


def send_over_nccl(
    sender: Any,
    policy: Any,
    weights: Iterator[tuple[str, Tensor]],
    ask: Callable[..., Any],
    is_sender: bool,
) -> Any:
    """Push weights by vLLM's own weight-transfer API (``vllm.distributed.weight_transfer``).

    Written against vLLM 0.32.0 and not run: it takes GPUs on both sides.

    Args:
        sender: What the last call returned; None at first.
        policy: Whose weights.
        weights: One pass over them.
        ask: Asks the server, as ``Endpoint.ask``.
        is_sender: Whether this rank talks to the server.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Client:
        """The four calls of the protocol, with our key."""

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            ask("/init_weight_transfer_engine", {"init_info": init_info})

        def start_weight_update(self) -> None:
            ask("/start_weight_update", {})

        def update_weights(self, update_info: Any) -> None:
            ask("/update_weights", {"update_info": update_info})

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            ask("/finish_weight_update", {})

    class Source(WeightSource):  # type: ignore[misc]
        """The policy's weights, gathered one at a time."""

        def metadata(self) -> list[Any]:
            return [ParamMeta(n, w.dtype, tuple(w.shape)) for n, w in named_weights(policy)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return named_weights(policy)

    if sender is None:
        workers = int(ask("/get_world_size")["world_size"]) if is_sender else 0
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        info = NCCLTrainerInitInfo(
            master_address=socket.gethostbyname(socket.gethostname()),
            master_port=port,
            world_size=workers + 1,
            rank=0 if is_sender else 1,
        )
        sender = WeightTransferTrainerFactory.trainer_init(info, client=Client(), source=Source())
    sender.send_weights()
    return sender
