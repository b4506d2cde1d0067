"""Random-number states in the checkpoint, one a rank: Lightning does not save them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback


class RngState(Callback):
    """Saves and restores the states of Python, NumPy and torch, for every rank.

    A run resumed on another number of ranks keeps the states that it finds for its own rank;
    further ranks start from the seed. Sampling does not depend on them, dropout does.
    """

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks as plain containers (checkpoints load with ``weights_only``)."""
        version, words, gauss = random.getstate()
        state: Any = np.random.get_state()
        name, keys, place, has_gauss, cached = state
        mine: dict[str, Any] = {
            "python": [version, list(words), gauss],
            "numpy": [name, keys.tolist(), place, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put this rank's state back."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if rank >= len(state_dict["ranks"]):
            return
        mine = state_dict["ranks"][rank]
        version, words, gauss = mine["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, place, has_gauss, cached = mine["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
