"""Runs a command until it ends, or until the process that started us is gone.

``python -m datamodules.engines.vllm_watch <folder> -- command ...``: standard input is a pipe that
nobody writes to; it closes when its other end does, also after SIGKILL. The command and all it
started (a process group of their own) are then ended, and the folder is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

PATIENCE = 10.0  # seconds between the request to end and the end


def main(arguments: list[str]) -> int:
    """Run the command after ``--``, then remove the folder before it; returns its status."""
    cut = arguments.index("--")
    folder, command = arguments[cut - 1], arguments[cut + 1 :]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        _end(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=PATIENCE)
        _end(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end(child, signal.SIGTERM))
    status = child.wait()
    _end(child, signal.SIGKILL)  # what the command left running
    shutil.rmtree(folder, ignore_errors=True)
    return status


def _end(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
