"""``mode=merge``: values are checked together, the folder is written, a table is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from run_tools.merge_command import merge_command
from run_tools.merged import merge_folders

SHAPE = TinyOptions(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    made = [tmp_path / f"bag{seed}" for seed in range(3)]
    for seed, folder in enumerate(made):
        build_tiny(folder, ["a", "b"], SHAPE, seed=seed)
    return [str(folder) for folder in made]


def test_it_merges_as_merge_folders_does(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, options = models[2], {"density": 0.4, "one_d": "linear"}
    output = str(tmp_path / "new" / "out")
    asked = {
        "models": models[:2],
        "method": "ties",
        "weights": [3, 1],
        "base": base,
        "output": output,
        "options": options,
    }
    assert merge_command({"mode": "merge", "merge": asked}) == Path(output)
    expected = merge_folders(
        models[:2], tmp_path / "expected", "ties", [3, 1], base=base, options=options
    )
    got, wanted = (load_file(Path(f) / "model.safetensors") for f in (output, expected))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    printed = capsys.readouterr().out
    for text in ("ties merge of 2", "0.750", "0.250", "distance", f"backbone.path={output}"):
        assert text in printed


def test_a_merge_without_base_prints_no_distances(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"models": models, "method": "multislerp", "output": str(tmp_path / "out")}
    merge_command({"merge": asked})
    printed = capsys.readouterr().out
    assert "distance" not in printed and "0.333" in printed
    assert "norm, by that of the linear average: 1." in printed
    asked |= {"output": str(tmp_path / "measured"), "reference": models[0]}
    merge_command({"merge": asked})
    assert "distance" in capsys.readouterr().out
    got, same = (load_file(tmp_path / f / "model.safetensors") for f in ("measured", "out"))
    assert all(torch.equal(got[name], same[name]) for name in same)


def test_all_wrong_values_are_named_at_once(models: list[str], tmp_path: Path) -> None:
    asked = {
        "models": [models[0], "nowhere"],
        "method": "dare",
        "weights": [1.0, 2.0, 3.0],
        "output": models[1],
        "reference": "gone",
        "options": {"densty": 0.5, "scale": "much"},
    }
    with pytest.raises(ValueError) as caught:
        merge_command({"merge": asked})
    for text in (
        "merge.models: nowhere is no folder",
        "merge.reference: gone is no folder",
        f"merge.output={models[1]} is there already",
        "merge.weights=[1.0, 2.0, 3.0]: 2 numbers are needed",
        "merge.method='dare' needs merge.base",
        "'merge.options.densty' of dare; did you mean 'merge.options.density'?",
        "merge.options.scale='much' must be a finite number",
    ):
        assert text in str(caught.value), text
    with pytest.raises(ValueError) as caught:
        merge_command({"merge": {"models": "a", "wieghts": [1], "weights": ["x"]}})
    for text in ("merge.models='a' must be a list", "merge.wieghts", "did you mean 'weights'"):
        assert text in str(caught.value), text
    assert "merge.weights=['x'] must be a list or null" in str(caught.value)


def test_nothing_given(models: list[str], tmp_path: Path) -> None:
    for config in ({}, {"merge": None}, {"merge": {}}):
        with pytest.raises(ValueError, match=r"merge\.models names 0 .*merge\.output is required"):
            merge_command(config)
    output = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"names 1 folders; two or more .*did you mean 'slerp'"):
        merge_command({"merge": {"models": models[:1], "method": "slurp", "output": output}})
    asked = {"models": models[:1], "method": "task_arithmetic", "output": output}
    with pytest.raises(ValueError, match=r"needs merge\.base") as caught:
        merge_command({"merge": asked})
    assert "names 1" not in str(caught.value)
    asked |= {"base": models[1], "options": {"scale": 0.5}}
    assert merge_command({"merge": asked}) == Path(output)
