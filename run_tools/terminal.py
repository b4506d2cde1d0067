"""What a run says on the terminal besides its table and its bar."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from transformers import dynamic_module_utils
from transformers.utils import logging as hf_logging


def quiet() -> None:
    """Leave the terminal to our own lines, and never ask there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hf_logging.disable_progress_bar()
    # backbone.trust_remote_code decides; transformers would ask on the terminal
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # values are gathered before they are logged
        ".*module.s. in eval mode.*",
        ".*does not have many workers.*",
        ".*smaller than the logging.*",
        ".*Total length of .list. across ranks is zero.*",  # a split without rows
    ):
        warnings.filterwarnings("ignore", message=text)


def footer_lines(typed: Sequence[str], output_dir: str, run_dir: str | Path) -> list[str]:
    """Where things are and what to type next.

    Args:
        typed: Words of the command line.
        output_dir: Holds all runs.
        run_dir: Of this run; a test is only offered for one that has trained.
    """
    lines = [f"run folder:  {run_dir}", f"TensorBoard: tensorboard --logdir {output_dir}"]
    last = Path(run_dir, "checkpoints", "last.ckpt")
    if last.is_file():
        left_out = ("mode=", "ckpt_path=", "resume=", "overwrite=")
        again = [shlex.quote(word) for word in typed if not word.startswith(left_out)]
        words = " ".join([*again, "mode=test", f"ckpt_path={shlex.quote(str(last))}"])
        lines.append(f"test again:  python train.py {words}")
    return lines


def leave_group(status: int = 0, wait: float = 0.0) -> None:
    """End a run of several processes, all together; does nothing in a run of one.

    With FSDP2 on gloo, torch 2.13 sometimes aborts an interpreter that is being taken down
    ("terminate called without an active exception"), which a scheduler takes for a failure. By now
    everything is written, so such a process leaves without taking the interpreter down.

    Args:
        status: Exit status; other than 0 it is not left to the interpreter on any backend.
        wait: Seconds behind the others: Lightning kills a launcher whose children end first with a
            status of their own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if not status and dist.get_backend() != "gloo":
        return
    with contextlib.suppress(RuntimeError):  # another rank may have left already
        dist.barrier()
        if not status:
            dist.destroy_process_group()
    time.sleep(wait)
    leave_now(status)


def leave_now(status: int) -> None:
    """End this process as it is: a group that lost a rank cannot be taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
