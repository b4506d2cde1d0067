"""Exports read by plain transformers and by sentence-transformers: the same vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from datamodules.texts import TextEncoding, with_eos
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.embedding.base import EmbeddingModule
from tests.embedding_runs.parts import TEXTS, plain_vectors
from tests.lightning_modules.embedding.small_module import encoder, world

sentence_transformers = pytest.importorskip("sentence_transformers")
TEMPLATES = {"query_template": "n05 n06 {text}", "passage_template": "n07 {text}"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random BERT, one whose tokenizer puts a token at the end, and a decoder."""
    base = tmp_path_factory.mktemp("backbones")
    shape = TinyOptions(
        hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
    )
    build_tiny(base / "decoder", world().vocabulary(), shape, seed=0)
    ended = encoder(base / "ended", num_layers=1)
    with_eos(AutoTokenizer.from_pretrained(ended)).save_pretrained(ended)
    return {
        "bert": encoder(base / "bert", num_layers=1),
        "ended": ended,
        "decoder": base / "decoder",
    }


def exported(backbone: Path, folder: Path, options: dict[str, Any], **more: Any) -> EmbeddingModule:
    """A module in evaluation mode, exported as a run does it."""
    module = EmbeddingModule(backbone=str(backbone), **more)
    module.configure_model()
    module.eval()
    module.encoding = TextEncoding(**options)
    module.export(folder, module.encoding.bind(AutoTokenizer.from_pretrained(backbone)))
    return module


@pytest.mark.parametrize("templates", [{}, TEMPLATES, TEMPLATES | {"pool_template": False}],
                         ids=["bare", "templates", "template not pooled"])  # fmt: skip
@pytest.mark.parametrize("pooling", ["mean", "last", "eos", "cls"])
@pytest.mark.parametrize("name", ["bert", "ended", "decoder"])
def test_sentence_transformers_gives_the_same_vectors(
    name: str, pooling: str, templates: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"pooling": pooling, **templates}
    module = exported(folders[name], tmp_path / "export", options)
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert reader.get_embedding_dimension() == 32
    queries, passages = module.embed(TEXTS, "query"), module.embed(TEXTS, "passage")
    for ours, encode in ((queries, reader.encode_query), (passages, reader.encode_document)):
        theirs = encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
        assert torch.allclose(ours, theirs.cpu(), atol=1e-5)
    assert torch.allclose(queries, passages, atol=1e-3) == (not templates)
    if not templates:
        theirs = reader.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
        assert torch.allclose(queries, theirs.cpu(), atol=1e-5)
        plain = plain_vectors(tmp_path / "export", TEXTS, pooling)
        assert torch.allclose(queries, plain, atol=1e-5)


def test_lengths_and_similarity(folders: dict[str, Path], tmp_path: Path) -> None:
    long = [" ".join(TEXTS * 4), TEXTS[2]]
    for normalize in (True, False):
        folder = tmp_path / str(normalize)
        options: dict[str, Any] = {"max_query_tokens": 7, "max_passage_tokens": 7, "pooling": "eos"}
        module = exported(folders["bert"], folder, options, normalize=normalize)
        reader = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        theirs = reader.encode(long, convert_to_tensor=True, show_progress_bar=False).cpu()
        ours = module.embed(long, "query")
        assert torch.allclose(ours, theirs, atol=1e-5), "cut at the same token, EOS kept"
        lengths = theirs.norm(dim=1)
        assert torch.allclose(lengths, torch.ones(2), atol=1e-5) == normalize
        assert reader.similarity_fn_name == ("cosine" if normalize else "dot")


def test_a_decoder_read_in_both_directions_is_exported_as_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    both = exported(folders["decoder"], tmp_path / "both", {}, attention="bidirectional")
    own = exported(folders["decoder"], tmp_path / "own", {})
    vectors = both.embed(TEXTS, "query")
    assert not torch.allclose(vectors, own.embed(TEXTS, "query"), atol=1e-3)
    assert torch.allclose(plain_vectors(tmp_path / "both", TEXTS, "mean"), vectors, atol=1e-5)
    reader = sentence_transformers.SentenceTransformer(str(tmp_path / "both"), device="cpu")
    theirs = reader.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False).cpu()
    assert torch.allclose(theirs, vectors, atol=1e-5)
    again = EmbeddingModule(backbone=str(tmp_path / "both"))
    again.configure_model()
    again.encoding = both.encoding
    assert torch.allclose(again.embed(TEXTS, "query"), vectors, atol=1e-6)
