"""How much memory a merge of folders takes, and what the files that it streams look like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from run_tools.merge_output import Spec, write_shards

ROOT = Path(__file__).resolve().parents[2]
COUNT, TENSORS, ROWS = 5, 32, 2048

MEASURE = """
import ctypes, json, sys
from pathlib import Path
import torch
from run_tools.merged import merge_folders

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

def merge(kind, method):
    *folders, base = sorted(root.glob(kind + "-*"))
    base = None if method == "linear" else base
    merge_folders(folders, root / (kind + "_" + method), method, base=base)

torch.set_num_threads(1)
root = Path(sys.argv[1])
for method in sys.argv[2:]:
    merge("small", method)  # libraries load on the first call
for method in sys.argv[2:]:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = status("VmRSS")
    merge("large", method)
    print(json.dumps([method, status("VmHWM") - before]))
"""


def can_measure() -> bool:
    """Linux with glibc lets a process reset its own peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(), reason="peaks are read from /proc")
def test_memory_stays_below_two_models_and_a_tensor(tmp_path: Path) -> None:
    """Of five models (and a base) of 64 MiB in 32 tensors; mapped pages of files count too."""
    for kind, rows in (("small", 4), ("large", ROWS)):
        for place in range(COUNT + 1):
            folder = tmp_path / f"{kind}-{place}"
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            state = {f"w{i:02d}": torch.randn(rows, 256) for i in range(TENSORS)}
            save_file(state, folder / "model.safetensors")
    tensor = ROWS * 256 * 4
    methods = ["linear", "karcher", "ties", "dare"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), *methods],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peaks = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert list(peaks) == methods
    for method, peak in peaks.items():
        # less than one tensor would mean that nothing was measured
        assert tensor < peak < (2 * TENSORS + 1) * tensor, (method, peaks)


def test_streamed_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "a.half": torch.randn(3, 5).half(),
        "b.brain": torch.randn(7).bfloat16(),
        "c.wide": torch.randn(2, 2).double(),
        "d.turned": torch.randn(4, 3).T,
        "e.scalar": torch.tensor(2.5),
        "f.none": torch.zeros(0, 4),
        "g.whole": torch.arange(5),
        "h.bytes": torch.arange(3, dtype=torch.uint8),
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs.safetensors")
    specs = {}
    with safe_open(tmp_path / "theirs.safetensors", framework="pt") as file:
        for name in tensors:
            about = file.get_slice(name)
            specs[name] = Spec(about.get_dtype(), tuple(about.get_shape()))
            assert specs[name].size == tensors[name].numel() * tensors[name].element_size()
    asked = []

    def make(names):
        for name in names:
            asked.append(name)
            yield name, tensors[name]

    for limit, files in ((10_000, 1), (40, 5)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        asked.clear()
        write_shards(specs, make, folder, limit)
        assert sorted(asked) == sorted(tensors)
        found = {}
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == files
        for shard in shards:
            found |= load_file(shard)
            header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
            assert header % 8 == 0
            assert len(load_file(shard)) == 1 or shard.stat().st_size - header <= limit
            with safe_open(shard, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    index = json.loads((tmp_path / "40" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(spec.size for spec in specs.values())


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="w: .* is not Spec"):
            write_shards({"w": Spec("F32", (2,))}, lambda _, t=wrong: iter([("w", t)]), tmp_path, 9)
