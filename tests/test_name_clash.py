"""Our folder ``kernels`` beside the Hugging Face package of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNEL_FILES = sorted((ROOT / "kernels").glob("*.py"))

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib.util, sys
import transformers
import lightning_modules.ops
from transformers import Qwen3Config, Qwen3ForCausalLM
import kernels
from pathlib import Path
assert Path(kernels.__file__).parent == Path({installed!r}) / "kernels", kernels.__file__
print("fine")
"""

# Files with relative imports need a package around them; the name is the one that ops.py uses.
LOAD_KERNEL = """
import importlib, sys, types
import lightning_modules.ops
if "litpost_kernels" not in sys.modules:
    package = types.ModuleType("litpost_kernels")
    package.__path__ = [{folder!r}]
    sys.modules["litpost_kernels"] = package
module = importlib.import_module("litpost_kernels.{stem}")
from pathlib import Path
assert Path(module.__file__) == Path({folder!r}) / "{stem}.py", module.__file__
print("fine")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder that holds the real ``kernels`` package of Hugging Face."""
    folder = tmp_path_factory.mktemp("hub") / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1"]
    done = subprocess.run(
        [*command, "--target", str(folder), "kernels"], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        unreachable = ("No matching distribution", "Could not find a version", "Connection")
        if any(text in done.stderr for text in unreachable):
            pytest.skip("pip cannot reach an index that has `kernels`")
        pytest.fail(done.stderr)
    return folder


def run(code: str | list[str], *path: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run ``code`` (or a command) in a subprocess with ``path`` in front of everything else."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONSAFEPATH": "",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = ["-c", code] if isinstance(code, str) else code
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in_the_repository"])
def test_both_import_in_either_order(first, inside, installed, tmp_path):
    path = (installed, ROOT) if first == "theirs" else (ROOT, installed)
    code = IMPORT_ALL.format(installed=str(installed))
    done = run(code, *path, cwd=ROOT if inside else tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.name)
def test_every_kernel_file_loads_beside_theirs(file, installed, tmp_path):
    if "import triton" in file.read_text(encoding="utf-8"):
        pytest.importorskip("triton")
    code = LOAD_KERNEL.format(folder=str(file.parent), stem=file.stem)
    done = run(code, installed, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


@pytest.mark.skipif(not (ROOT / "kernels" / "bench.py").exists(), reason="no kernels/bench.py")
def test_the_benchmark_starts_beside_theirs(installed, tmp_path):
    done = run([str(ROOT / "kernels" / "bench.py"), "--help"], installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
