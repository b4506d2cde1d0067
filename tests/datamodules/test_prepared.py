"""Preparation: one process builds, the others wait, a killed build is made again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules.prepared import digest, fingerprint, prepare

BUILD = """
import sys, time
from pathlib import Path
from datamodules.prepared import prepare

cache, wait = Path(sys.argv[1]), sys.argv[2] == "wait"

def build(folder):
    with open(cache.parent / "marker", "a") as marker:
        marker.write("built\\n")
    (folder / "half").write_text("half")
    print("building", flush=True)
    time.sleep(600 if wait else 1.0)
    (folder / "whole").write_text("whole")

print("ready", flush=True)
sys.stdin.readline()
print(prepare(cache, "things", {"a": 1}, build), flush=True)
"""


@pytest.fixture
def builder(repo: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that is about to build into ``tmp_path/cache`` and waits for a line."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(tmp_path / "cache"), mode], cwd=repo, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_build_once(builder: Any, tmp_path: Path) -> None:
    both = [builder("build"), builder("build")]
    for process in both:
        go(process)
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in both]
    folder = tmp_path / "cache" / f"things-{digest({'a': 1})}"
    assert [output[-1] for output in outputs] == [str(folder)] * 2
    assert sorted(output[0] == "building" for output in outputs) == [False, True]
    assert (tmp_path / "marker").read_text() == "built\n"
    assert (folder / "whole").is_file() and json.loads((folder / "prepared.json").read_text())


def test_a_killed_build_is_made_again(builder: Any, tmp_path: Path) -> None:
    victim = builder("wait")
    go(victim)
    assert victim.stdout.readline() == "building\n"
    folder = tmp_path / "cache" / f"things-{digest({'a': 1})}"
    unfinished = folder.with_suffix(".unfinished")
    assert (unfinished / "half").is_file() and not folder.exists()
    victim.kill()
    victim.wait()
    (unfinished / "stale").write_text("from the killed build")
    second = builder("build")
    go(second)
    assert second.communicate(timeout=60)[0].splitlines() == ["building", str(folder)]
    assert (tmp_path / "marker").read_text() == "built\n" * 2
    names = {path.name for path in folder.iterdir()}
    assert names == {"half", "whole", "prepared.json"} and not unfinished.exists()


def test_a_failing_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        prepare(tmp_path, "things", {"a": 1}, fail)
    assert not (tmp_path / f"things-{digest({'a': 1})}").exists()
    folder = prepare(tmp_path, "things", {"a": 1}, lambda folder: None)
    assert [path.name for path in folder.iterdir()] == ["prepared.json"]


def test_digest_depends_on_values_and_not_on_their_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest({"a": 1}), digest({"a": 2}), digest({"b": 1}), digest({"a": 1.5})}) == 4


def test_fingerprint_is_what_made_a_folder_or_what_is_in_it(tmp_path: Path) -> None:
    assert fingerprint("org/model") == "org/model"
    (tmp_path / "weights").write_text("12")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "weights").write_text("123")
    assert fingerprint(tmp_path) != before
    made = [prepare(tmp_path / name, "x", {"a": 1}, lambda folder: None) for name in "pq"]
    assert fingerprint(made[0]) == fingerprint(made[1])
    assert fingerprint(prepare(tmp_path, "x", {"a": 2}, lambda folder: None)) != fingerprint(
        made[0]
    )
