"""From texts to token ids: templates, truncation, pooled tokens, EOS, chunks, padding."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from datamodules.tasks.embedding import ImageText
from datamodules.texts import Encoded, TextEncoding, chunk_of, chunks_of, with_eos
from lightning_modules.backbones.encoder import load_encoder
from lightning_modules.backbones.tiny import TinyOptions, build_tiny, word_tokenizer
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from lightning_modules.options import BackboneOptions

WORDS = ["a", "b", "c", "d", "e", "query:", "Instruct:"]
POOLINGS = ("mean", "last", "eos", "cls")


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer(WORDS)


def encoding(tokenizer: Any, **options: Any) -> TextEncoding:
    made = TextEncoding(**options)
    made.bind(tokenizer)
    return made


def words_of(tokenizer: Any, encoded: Encoded) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(encoded.ids))


def pooled(tokenizer: Any, encoded: Encoded) -> list[str]:
    return words_of(tokenizer, encoded)[slice(*encoded.pool)]


@pytest.mark.parametrize(
    ("pooling", "words", "vector"),
    [
        ("mean", ["a", "b", "c"], ["a", "b", "c"]),
        ("last", ["a", "b", "c"], ["c"]),
        ("eos", ["a", "b", "<eos>"], ["<eos>"]),
        ("cls", ["a", "b", "c"], ["a"]),
    ],
)
def test_what_is_cut_keeps_its_pooled_token(
    pooling: Any, words: list[str], vector: list[str], tokenizer: Any
) -> None:
    made = encoding(tokenizer, pooling=pooling, max_query_tokens=3, max_passage_tokens=9)
    (query,) = made.encode(["a b c d e"], "query")
    assert words_of(tokenizer, query) == words
    assert pooled(tokenizer, query) == vector
    (passage,) = made.encode(["a b c d e"], "passage")
    assert words_of(tokenizer, passage)[:5] == ["a", "b", "c", "d", "e"], "the limits are two"


def test_eos_is_put_at_the_end_exactly_once(tokenizer: Any, tmp_path: Path) -> None:
    eos = tokenizer.eos_token_id
    before = tokenizer("a b")["input_ids"]
    first = TextEncoding(pooling="eos")
    used = first.bind(tokenizer)
    assert tokenizer("a b")["input_ids"] == before, "the backbone's own is left as it was"
    used.save_pretrained(tmp_path)
    for given in (tokenizer, used, with_eos(tokenizer), AutoTokenizer.from_pretrained(tmp_path)):
        for texts in (["a"], ["a b c", "d"]):
            found = encoding(given, pooling="eos").encode(texts, "passage")
            assert all(one.ids.count(eos) == 1 and one.ids[-1] == eos for one in found)
            assert [len(one.ids) for one in found] == [len(text.split()) + 1 for text in texts]
    for pooling in ("mean", "last", "cls"):
        (one,) = encoding(tokenizer, pooling=pooling).encode(["a b"], "query")
        assert eos not in one.ids
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match="pooling=eos: the tokenizer has no EOS token"):
        encoding(bare, pooling="eos")


def test_templates_instructions_and_what_they_pool(tokenizer: Any) -> None:
    options: dict[str, Any] = {
        "query_template": "Instruct: {instruction} query: {text}",
        "passage_template": "e {text}",
    }
    whole = encoding(tokenizer, **options)
    assert whole.render("a b", "query", "c d") == "Instruct: c d query: a b"
    assert whole.render("a", "passage", "c") == "e a"
    (one,) = whole.encode(["a b"], "query", "c d")
    assert pooled(tokenizer, one) == ["Instruct:", "c", "d", "query:", "a", "b"]
    text_only = encoding(tokenizer, pool_template=False, max_query_tokens=5, **options)
    for instruction, text, words in (
        ("c d", "a", ["a"]),
        ("c", "a b d e", ["a", "b"]),  # cut at five tokens
        ("", "a b", ["a", "b"]),
        ("c d e", "a", ["query:"]),  # nothing of the text is left: never an empty mean
    ):
        (one,) = text_only.encode([text], "query", instruction)
        assert pooled(tokenizer, one) == words
    ended = encoding(tokenizer, pool_template=False, pooling="eos", **options)
    (one,) = ended.encode(["a"], "passage")
    assert pooled(tokenizer, one) == ["<eos>"]
    special = encoding(with_eos(tokenizer), pool_template=False, **options)
    (one,) = special.encode(["a"], "passage")
    assert pooled(special.tokenizer, one) == ["a", "<eos>"], "the prefix's own EOS is none of it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "data.encoding.pooling='max' must be one of mean, last, eos, cls"),
        ({"query_template": "{text} ?"}, "query_template='{text} \\?' must end with its one"),
        ({"passage_template": "title"}, "passage_template='title' must end with its one {text}"),
        ({"query_template": "{text} or {text}"}, "must end with its one {text}"),
        ({"max_query_tokens": 1}, "data.encoding.max_query_tokens=1 must be at least 2"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoding(**options)
    with pytest.raises(ValueError, match="max_passage_tokens=0 must be"):
        TextEncoding(**options, max_passage_tokens=0)


def test_texts_without_a_token_and_images_are_refused_with_their_place(tokenizer: Any) -> None:
    made = encoding(tokenizer)
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: the text ' ' has no token"):
        made.encode(["a", " "], "query", where=["pairs.jsonl:1", "pairs.jsonl:2"])
    with pytest.raises(ValueError, match="^the text '' has no token: nothing is left to embed"):
        made.encode([""], "query")
    with pytest.raises(ValueError, match=r"f:3: this backbone reads texts only.*model=cocoa"):
        made.encode([ImageText("x", None)], "query", where=["f:3"])
    assert made.encode([], "query") == []


def test_chunks_pad_on_the_right_and_hide_it() -> None:
    chunk = chunk_of([Encoded((5, 6, 7), (1, 3)), Encoded((8,), (0, 1))], 9)
    assert chunk.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert chunk.mask.tolist() == [[True, True, True], [True, False, False]]
    assert chunk.pool.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize("longest_first", [True, False])
def test_chunks_are_of_similar_lengths_and_every_item_is_found_again(longest_first: bool) -> None:
    lengths = [2, 7, 1, 7, 3, 5, 4]
    items = [Encoded((place,) * length, (0, length)) for place, length in enumerate(lengths)]
    chunks, places = chunks_of(items, 3, 0, longest_first=longest_first)
    assert [len(chunk.input_ids) for chunk in chunks] == [3, 3, 1]
    widths = [chunk.input_ids.shape[1] for chunk in chunks]
    assert widths == ([7, 4, 1] if longest_first else [3, 7, 7])
    firsts = torch.cat([chunk.input_ids[:, 0] for chunk in chunks])
    assert firsts[places].tolist() == list(range(7))
    (whole,), _ = chunks_of(items, None, 0)
    assert whole.input_ids.shape == (7, 7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("backbones")
    bert = TinyEncoderOptions(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)
    build_tiny_encoder(base / "bert", WORDS, bert, seed=0)
    qwen = TinyOptions(
        hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8
    )
    build_tiny(base / "qwen", WORDS, qwen, seed=0)
    return {"bert": base / "bert", "qwen": base / "qwen"}


@pytest.mark.parametrize(
    ("name", "attention"), [("bert", "own"), ("qwen", "own"), ("qwen", "bidirectional")]
)
def test_padding_changes_no_vector(name: str, attention: Any, folders: dict[str, Path]) -> None:
    encoder = load_encoder(BackboneOptions(path=str(folders[name])), attention=attention).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    texts = ["a", "b c d e a b c d e a", "c b a"]
    for pooling in POOLINGS:
        items = encoding(tokenizer, pooling=pooling).encode(texts, "query")

        def vectors(size: int | None, pad: int) -> torch.Tensor:
            chunks, places = chunks_of(items, size, pad)  # noqa: B023
            with torch.no_grad():
                return torch.cat([encoder(c.input_ids, c.mask, c.pool) for c in chunks])[places]

        alone = vectors(1, 0)
        assert (alone[0] - alone[1]).abs().max() > 1e-3
        for size, pad in ((None, 0), (2, 0), (None, 4)):
            assert torch.allclose(vectors(size, pad), alone, atol=1e-6), (pooling, size, pad)


def test_an_exported_tokenizer_ends_with_eos_in_plain_use(tokenizer: Any, tmp_path: Path) -> None:
    made = TextEncoding(pooling="eos", max_query_tokens=4)
    made.bind(tokenizer).save_pretrained(tmp_path)
    made.encode(["a b c d e"], "query")
    said = json.loads((tmp_path / "tokenizer.json").read_text())
    assert said["truncation"] is None and said["padding"] is None
    ids = AutoTokenizer.from_pretrained(tmp_path)("a b c d e")["input_ids"]
    assert len(ids) == 6 and ids[-1] == tokenizer.eos_token_id
