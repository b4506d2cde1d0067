"""Merged folders: they load, give the averaged weights, and unlike folders are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from run_tools.merged import merge_folders

SHAPE = TinyOptions(
    hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8
)
WORDS = ["a", "b", "c"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"expert{seed}" for seed in range(3)]
    for seed, folder in enumerate(made):
        build_tiny(folder, WORDS, SHAPE, seed=seed)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_merged_folder_is_the_weighted_average_and_loads(
    folders: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()  # as a prepared folder is
    assert merge_folders(folders, output, weights=[1, 1, 2]) == output
    each = [weights(folder) for folder in folders]
    merged = weights(output)
    assert merged.keys() == each[0].keys()
    for name, value in merged.items():
        expected = each[0][name] / 4 + each[1][name] / 4 + each[2][name] / 2
        assert torch.allclose(value, expected, atol=1e-6), name
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.state_dict()["lm_head.weight"], merged["lm_head.weight"])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (output, folders[0])]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    info = json.loads((output / "litpost.json").read_text())
    assert info["weights"] == [0.25, 0.25, 0.5]
    assert not list(tmp_path.glob("*.unfinished"))


def test_shards(folders: list[Path], tmp_path: Path) -> None:
    whole = merge_folders(folders, tmp_path / "whole")
    sharded = merge_folders(folders, tmp_path / "sharded", max_shard_bytes=3000)
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = merge_folders([sharded, sharded], tmp_path / "again", max_shard_bytes=3000)
    joined = merge_folders([sharded, sharded], tmp_path / "joined")
    assert not list(joined.glob("*.index.json")), "the index of the first is not that of the merge"
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (whole, sharded, again, joined)
        ]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"backbone\.merge names 1 folders"):
        merge_folders(folders[:1], output)
    with pytest.raises(ValueError, match="weights="):
        merge_folders(folders[:2], output, weights=[1.0])
    with pytest.raises(ValueError, match="method='slurp'"):
        merge_folders(folders[:2], output, method="slurp")
    with pytest.raises(ValueError, match="no config.json"):
        merge_folders([folders[0], tmp_path / "nothing"], output)
    wide = tmp_path / "wide"
    build_tiny(wide, [*WORDS, "d"], SHAPE, seed=0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(7, 16\) there and \(6, 16\) here"):
        merge_folders([folders[0], wide], output)
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(ValueError, match=r"its architecture is \['Other'\]"):
        merge_folders([folders[0], other], output)
    (other / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no readable safetensors"):
        merge_folders([folders[0], other], output)
    (other / "model.safetensors").unlink()
    (other / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="it has no safetensors"):
        merge_folders([folders[0], other], output)
    with pytest.raises(ValueError, match="not empty"):
        merge_folders(folders, folders[2])
    assert not output.exists()
