"""Progress where there is no terminal, and the bar where there is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.progress import advancing, track


def test_lines_come_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with advancing("label turns", 10, line_seconds=0.0) as advance:
        advance(4)
        advance(6)
    with advancing("unknown", line_seconds=0.0) as advance:
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "label turns 4/10",
        "label turns 10/10",
        "unknown 1/?",
    ]
    with advancing("hidden", 10, line_seconds=0.0, is_shown=False) as advance:
        advance(4)
    assert list(track(range(3), "quick")) == [0, 1, 2]
    assert capsys.readouterr().err == "", "nothing for what is done at once"


def test_a_terminal_gets_a_bar(repo: Path) -> None:
    code = "from datamodules.progress import track\nfor _ in track('abc', 'letters'): pass"
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as output:
        environment = {**os.environ, "TERM": "xterm"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=repo, stderr=follower, env=environment
        )
        os.close(follower)
        text = b""
        try:
            while piece := output.read(4096):
                text += piece
        except OSError:  # what Linux says at the end
            pass
        assert process.wait() == 0
    assert b"letters" in text and b"3/3" in text
