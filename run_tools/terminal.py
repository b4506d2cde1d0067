"""What a run says on the terminal besides its table and its bar."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging as hf_logging


def quiet() -> None:
    """Leave the terminal to our own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hf_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # values are gathered before they are logged
        ".*module.s. in eval mode.*",
        ".*does not have many workers.*",
        ".*smaller than the logging.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def footer_lines(model: str, output_dir: str, run_dir: str | Path) -> list[str]:
    """Where things are and what to type next."""
    last = Path(run_dir, "checkpoints", "last.ckpt")
    return [
        f"run folder:  {run_dir}",
        f"TensorBoard: tensorboard --logdir {output_dir}",
        f"test again:  python train.py model={model} mode=test ckpt_path={last}",
    ]


def leave_group() -> None:
    """End a finished run of several gloo processes, all together.

    With FSDP2 on gloo, torch 2.13 sometimes aborts an interpreter that is being taken down
    ("terminate called without an active exception"), which a scheduler takes for a failure. By now
    everything is written, so such a process leaves without taking the interpreter down.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"):
        return
    with contextlib.suppress(RuntimeError):  # another rank may have left already
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
