"""Who owns a run folder: a model may be measured before it is trained under the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from run_tools.folder import RunFolder
from run_tools.terminal import footer_lines

FRESH = {"resume": False, "overwrite": False}


@pytest.mark.parametrize("mode", ["validate", "test", "predict"])
def test_what_only_measured_stands_in_no_runs_way(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "s0"
    RunFolder.open(path / mode, resume=True, overwrite=False).write_json("x.json", {})
    folder = RunFolder.open(path, **FRESH)
    assert (folder.metrics, folder.checkpoint) == (None, None)
    folder.write_text("config.yaml", "a: 1\n")
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        RunFolder.open(path, **FRESH)
    folder.discard_if_empty()
    assert (path / mode / "x.json").is_file(), "what was measured stays"
    assert [one.name for one in path.iterdir()] == [mode]
    RunFolder.open(path, **FRESH).write_json("metrics.json", {})
    with pytest.raises(FileExistsError, match="holds a finished run"):
        RunFolder.open(path, **FRESH)


def test_a_run_that_did_nothing_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "s0", **FRESH)
    folder.write_text("config.yaml", "a: 1\n")
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / "events").write_text("x")
    folder.discard_if_empty()
    assert not folder.path.exists()
    folder.discard_if_empty()


def test_the_footer_offers_a_test_of_what_was_trained(tmp_path: Path) -> None:
    typed = ["model=contrastive", "data.path=a b.jsonl", "mode=fit", "overwrite=true"]
    assert len(footer_lines(typed, "outputs", tmp_path)) == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert footer_lines(typed, "outputs", tmp_path)[2] == (
        f"test again:  python train.py model=contrastive 'data.path=a b.jsonl' mode=test "
        f"ckpt_path={last}"
    )
