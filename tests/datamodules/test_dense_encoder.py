"""An encoder folder read by plain transformers: the module's vectors, and what its digest sees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from datamodules.dense_encoder import DenseEncoder
from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.embedding.base import EmbeddingModule
from tests.datamodules.retrieval_parts import WORDS, bert, made_corpus
from tests.runs import command, main

TEXTS = ["w01 w02 w03 w04", "w05", " ".join(WORDS[:30]), "w07 w08"]
TEMPLATES = {"query_template": "w58 {text}", "passage_template": "w59 w57 {text}"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random BERT and a random decoder."""
    base = tmp_path_factory.mktemp("backbones")
    shape = TinyOptions(
        hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
    )
    build_tiny(base / "decoder", WORDS, shape, seed=0)
    return {"bert": bert(base / "bert"), "decoder": base / "decoder"}


@pytest.mark.parametrize("pooling", ["mean", "last", "eos", "cls"])
@pytest.mark.parametrize(
    ("name", "attention"), [("bert", "own"), ("decoder", "own"), ("decoder", "bidirectional")]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_an_export_gives_the_vectors_of_its_module(
    name: str, attention: Any, pooling: Any, normalize: bool, folders: Any, tmp_path: Path
) -> None:
    module = EmbeddingModule(backbone=str(folders[name]), attention=attention, normalize=normalize)
    module.configure_model()
    module.eval()
    settings: dict[str, Any] = {
        "pooling": pooling, "max_query_tokens": 9, "pool_template": False, **TEMPLATES,
    }  # fmt: skip
    module.encoding = TextEncoding(**settings)
    module.export(tmp_path, module.encoding.bind(AutoTokenizer.from_pretrained(folders[name])))
    encoder = DenseEncoder(tmp_path, TextEncoding(**settings), normalize=normalize, batch_size=2)
    for role in ("query", "passage"):
        expected = module.embed(TEXTS, role)
        assert torch.allclose(encoder.encode(TEXTS, role), expected, atol=1e-5)
    assert not torch.allclose(module.embed(TEXTS, "query"), module.embed(TEXTS, "passage"))
    assert encoder.encode([], "query").shape == (0, encoder.width) == (0, 32)


@pytest.mark.slow
def test_the_export_of_a_run_gives_the_vectors_of_the_run(tmp_path: Path, warm_cache: Path) -> None:
    import train

    overrides = ["model=contrastive", "hydra/job_logging=none", "data.task.num_pretrain=16"]
    status, _, errors = main(*command(*overrides, output_dir=tmp_path, cache_dir=warm_cache)[2:])
    assert status == 0, errors
    (folder,) = tmp_path.glob("*/s0")
    loaded, texts = train.load(folder), ["d0c1a d0c2b n01", "n01 d1c5a d0c3a d0c17b"]
    encoder = DenseEncoder(folder / "export", loaded.encoding)
    assert torch.allclose(encoder.encode(texts, "query"), loaded.embed(texts, "query"), atol=1e-5)


def test_encoding_leaves_the_world_as_it_was(folders: Any) -> None:
    encoding = TextEncoding()
    encoder, state = DenseEncoder(folders["bert"], encoding), torch.get_rng_state()
    vectors = encoder.encode(TEXTS, "passage")
    assert torch.equal(torch.get_rng_state(), state)
    assert encoding.tokenizer is None, "the encoding is another one's"
    assert not vectors.requires_grad and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(TEXTS, "passage"), vectors), "training has its own"
    other = torch.stack([encoder.encode([text], "passage")[0] for text in TEXTS])
    assert torch.allclose(vectors, other, atol=1e-6), "padding changes nothing"


def test_the_digest_sees_what_the_vectors_depend_on(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert")
    known = DenseEncoder(folder, TextEncoding()).digest
    assert known == DenseEncoder(bert(tmp_path / "copy"), TextEncoding(), batch_size=3).digest
    (folder / "litpost.json").write_text("{}")
    os.utime(folder / "model.safetensors")
    assert known == DenseEncoder(folder, TextEncoding()).digest
    found = [known, DenseEncoder(folder, TextEncoding(), normalize=False).digest]
    for options in (
        {"pooling": "cls"}, {"max_query_tokens": 7}, {"max_passage_tokens": 7},
        {"pool_template": False}, {"query_template": "w01 {text}"},
        {"passage_template": "w01 {text}"},
    ):  # fmt: skip
        made: dict[str, Any] = options
        found.append(DenseEncoder(folder, TextEncoding(**made)).digest)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found.append(DenseEncoder(folder, TextEncoding()).digest)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    found.append(DenseEncoder(folder, TextEncoding()).digest)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("w01", "u01"))
    found.append(DenseEncoder(folder, TextEncoding()).digest)
    assert len(set(found)) == len(found) == 11


def test_a_folder_that_changes_before_it_is_loaded_is_refused(tmp_path: Path) -> None:
    encoder = DenseEncoder(bert(tmp_path / "bert"), TextEncoding())
    bert(tmp_path / "bert", seed=1)
    with pytest.raises(ValueError, match=r"data.retriever.path='.*' has changed"):
        encoder.encode(["w01"], "query")


def test_what_cannot_be_loaded_or_read_is_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.retriever.path='.*nothing' cannot be loaded"):
        DenseEncoder(tmp_path / "nothing", TextEncoding())
    with pytest.raises(ValueError, match=r"k.batch_size=0 must be at least 1"):
        DenseEncoder(folders["bert"], TextEncoding(), batch_size=0, key="k")
    folder = bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"k.path=.* cannot be loaded"):
        DenseEncoder(folder, TextEncoding(), key="k").encode(["w01"], "query")
    folder = bert(tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights .* embeddings.word_embeddings.weight"):
        DenseEncoder(folder, TextEncoding()).encode(["w01"], "query")
    encoder = DenseEncoder(folders["bert"], TextEncoding(max_passage_tokens=1000))
    with pytest.raises(ValueError, match="has positions for 512: lower max_query_tokens"):
        encoder.encode([" ".join(WORDS * 10)], "passage")
    with pytest.raises(ValueError, match=r"wiki:3: .* has no token"):
        encoder.encode(["w01", ""], "passage", ["wiki:2", "wiki:3"])
    assert len(encoder.encode([one.text for one in made_corpus()], "passage")) == 40
