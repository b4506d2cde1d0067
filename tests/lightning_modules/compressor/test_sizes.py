"""Sizes of a pair, and what a tied head changes: nothing that a sweep of sizes sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import build_tiny
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.compressor.pair import Pair
from lightning_modules.compressor.sizes import pair_sizes
from lightning_modules.options import BackboneOptions, LoraOptions
from tests.lightning_modules.compressor.small_pair import NARROW, SOURCE_WORDS, source, targets


def pair_of(folder: Path, folders: Path, *, lora: bool = False, train: str = "frozen") -> Pair:
    compressor = load_causal_lm(BackboneOptions(str(folder)), LoraOptions(r=4) if lora else None)
    decoder = load_causal_lm(BackboneOptions(str(folders / "decoder")))
    return Pair(compressor, decoder, MemoryOptions(tokens=2), ProjectorOptions(), train)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two compressors of one shape."""
    folder = tmp_path_factory.mktemp("heads")
    for name in ("tied", "untied"):
        shape = replace(NARROW, tie_embeddings=name == "tied")
        build_tiny(folder / name, SOURCE_WORDS, shape, seed=0)
    return {name: folder / name for name in ("tied", "untied")}


@pytest.mark.parametrize("lora", [False, True])
def test_tied_and_untied_compressors_count_alike(both, folders, lora) -> None:
    tied, untied = (
        pair_sizes(pair_of(both[name], folders, lora=lora)) for name in ("tied", "untied")
    )
    assert (tied.pop("size/tied"), untied.pop("size/tied")) == (1, 0)
    assert tied == untied
    width, words = NARROW.hidden_size, len(SOURCE_WORDS) + 3
    attention = 2 * (4 * width * width + 2 * NARROW.head_dim)  # q, k, v, o and norms of q and k
    layers = attention + 2 * (3 * width * NARROW.intermediate_size + 2 * width)
    assert tied["size/compressor_params"] == layers + width + words * width
    if lora:
        assert 0 < tied["size/trained_params"] < tied["size/compressor_params"]


def test_what_is_trained_is_counted(both, folders) -> None:
    frozen, full = (pair_of(both["untied"], folders, train=train) for train in ("frozen", "full"))
    sizes, more = pair_sizes(frozen), pair_sizes(full)
    bridge = sum(value.numel() for value in frozen.bridge.parameters())
    assert sizes["size/trained_params"] == sizes["size/compressor_params"] + bridge
    gained = more["size/trained_params"] - sizes["size/trained_params"]
    assert gained == sizes["size/decoder_params"] == more["size/decoder_params"]


def test_a_tied_compressor_still_learns_its_embeddings(both, folders) -> None:
    for name in ("tied", "untied"):
        pair = pair_of(both[name], folders)
        head = pair.compressor.base.get_output_embeddings().weight
        table = pair.compressor.base.get_input_embeddings().weight
        assert (head is table) == (name == "tied")
        _, scores = pair(*source([6, 5]), *targets([5, 4]))
        scores.loss.mean().backward()
        assert table.requires_grad and float(table.grad.abs().max()) > 0
        assert head.requires_grad == (name == "tied"), "only an unused matrix is frozen"
