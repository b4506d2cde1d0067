"""The wheel: built from a copy of the tree, installed elsewhere, run from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "callbacks",
    "conf",
    "datamodules",
    "lightning_modules",
    "litpost_kernels",
    "run_tools",
    "train.py",
}

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, timeout: int = 500) -> subprocess.CompletedProcess:
    """Run ``command`` without anything of this checkout on the path; fail with its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Wheel built from a copy, so that the checkout gets no build folders."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "outputs",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "shared",
    )
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    run(*build, folder / "tree", cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Scripts folder of a fresh environment that holds the wheel and shares our dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=home).stdout.strip())
    # A .pth inside a folder that a .pth names is not read: an editable install of ours stays out.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "shared_dependencies.pth").write_text("\n".join(sorted(shared)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    run(*pip, "--no-index", wheel, cwd=home)
    return scripts


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == TOP_LEVEL
    for pattern in ("conf", "kernels"):
        target = "litpost_kernels" if pattern == "kernels" else pattern
        suffix = ".py" if pattern == "kernels" else ".yaml"
        here = {
            f"{target}/{path.relative_to(ROOT / pattern).as_posix()}"
            for path in (ROOT / pattern).rglob(f"*{suffix}")
        }
        assert here <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_console_script_helps_from_another_folder(installed, tmp_path):
    where = run(installed / "python", "-c", "import train; print(train.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    assert "model" in run(installed / "litpost", "--help", cwd=tmp_path).stdout


def test_console_script_runs_from_another_folder(installed, tmp_path):
    out = tmp_path / "out"
    run(installed / "litpost", "model=grpo", "experiment=smoke", f"output_dir={out}", cwd=tmp_path)
    (file,) = out.rglob("metrics.json")
    metrics = json.loads(file.read_text(encoding="utf-8"))
    assert metrics["steps"] > 0
