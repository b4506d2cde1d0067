"""Retrievers: what they remember, when an index is built, and which one a config gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from datamodules.dense_encoder import DenseEncoder
from datamodules.dense_retrieval import DenseRetriever, retriever_from
from datamodules.exact_search import exact_search
from datamodules.index_options import IndexOptions
from datamodules.lexical import LexicalRetriever
from datamodules.retrieval import VectorRetriever
from datamodules.texts import TextEncoding
from tests.datamodules.retrieval_parts import bert, made_corpus
from tests.runs import environment

CORPUS = made_corpus()
QUERIES = ["w01 w02", "w03", "w04 w05 w06"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("backbones") / "bert")


class Embedder:
    """Vectors of a random BERT, which keeps what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.encoder, self.asked = DenseEncoder(folder, TextEncoding()), [""][:0]

    def vectors(self) -> Tensor:
        return self.encoder.encode([one.encoded_text for one in CORPUS], "passage")

    def __call__(self, texts: list[str]) -> Tensor:
        self.asked += texts
        return self.encoder.encode(texts, "query")


def dense(folder: Path, cache_dir: Path, **options: Any) -> DenseRetriever:
    encoder = DenseEncoder(folder, TextEncoding(query_template="w59 {text}"))
    return DenseRetriever(CORPUS, encoder, IndexOptions(**options), cache_dir, progress=False)


def indexes(cache_dir: Path) -> set[str]:
    return {path.name for path in cache_dir.glob("index-*") if path.is_dir()}


def expected_of(encoder: DenseEncoder, texts: Sequence[str], k: int) -> list[list[int]]:
    passages = encoder.encode([one.encoded_text for one in CORPUS], "passage")
    found: list[list[int]] = exact_search(encoder.encode(texts, "query"), passages.numpy(), k)[
        1
    ].tolist()
    return found


# ------------------------------------------------------------------ remembering


def test_a_text_is_searched_for_once(folder: Path) -> None:
    embed = Embedder(folder)
    retriever = VectorRetriever(CORPUS, embed.vectors(), embed, "weights-0")
    first = retriever.search(["w01", "w02", "w01"], 3)
    assert embed.asked == ["w01", "w02"]
    assert first[0] == first[2] != first[1]
    assert (retriever.num_searches, retriever.num_hits) == (3, 1)
    assert retriever.search(["w02", "w03"], 3)[0] == first[1]
    assert embed.asked == ["w01", "w02", "w03"]
    assert (retriever.num_searches, retriever.num_hits) == (5, 2)
    assert retriever.search(["w02"], 2) == [first[1][:2]]
    assert embed.asked[3:] == ["w02"], "another k is another question"
    first[1].append(99)
    assert 99 not in retriever.search(["w02"], 3)[0], "answers are copies"
    assert retriever.search([], 3) == []
    assert retriever.search(["w09"], 999) == retriever.search(["w09"], len(CORPUS))
    assert embed.asked[4:] == ["w09"], "there are no more than all passages"


def test_what_was_used_least_recently_is_forgotten(folder: Path) -> None:
    embed = Embedder(folder)
    retriever = VectorRetriever(CORPUS, embed.vectors(), embed, "weights-0", cache_size=2)
    retriever.search(["w01", "w02"], 1)
    retriever.search(["w01"], 1)
    retriever.search(["w03"], 1)  # instead of w02
    retriever.search(["w01", "w03"], 1)
    assert embed.asked == ["w01", "w02", "w03"]
    retriever.search(["w02"], 1)
    assert embed.asked == ["w01", "w02", "w03", "w02"]
    many = [f"w{number:02d}" for number in range(9)]
    assert retriever.search(many, 1) == [row[:1] for row in retriever.search(many, 5)]
    none = VectorRetriever(CORPUS, embed.vectors(), embed, "weights-0", cache_size=0)
    assert none.search(["w01"], 1) == none.search(["w01"], 1)
    assert none.num_hits == 0


def test_vectors_are_searched_exactly(folder: Path) -> None:
    embed = Embedder(folder)
    retriever = VectorRetriever(CORPUS, embed.vectors(), embed, "weights-0")
    assert retriever.fingerprint == "weights-0" and retriever.corpus is CORPUS
    assert retriever.search(QUERIES, 7) == expected_of(embed.encoder, QUERIES, 7)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        retriever.search(["w01"], 0)
    with pytest.raises(ValueError, match="must be one a passage: 40"):
        VectorRetriever(CORPUS, embed.vectors()[1:], embed, "x")
    odd = embed.vectors()
    odd[4, 1] = float("nan")
    with pytest.raises(ValueError, match=r"vectors\[4\] is not finite"):
        VectorRetriever(CORPUS, odd, embed, "x")


# ------------------------------------------------------------------ indexes


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_dense_search_is_that_of_the_vectors(kind: Any, folder: Path, tmp_path: Path) -> None:
    retriever = dense(folder, tmp_path, kind=kind, nlist=2, nprobe=2)
    assert retriever.search(QUERIES, 7) == expected_of(retriever.encoder, QUERIES, 7)
    assert retriever.search(QUERIES[:1], 99)[0] != list(range(40))


def test_an_index_is_built_once_for_encoder_corpus_and_options(
    folder: Path, tmp_path: Path
) -> None:
    cache, one = tmp_path / "cache", dense(folder, tmp_path / "cache")
    (first,) = indexes(cache)
    made = (cache / first / "index.json").stat().st_mtime_ns
    again = dense(folder, cache)
    assert (cache / first / "index.json").stat().st_mtime_ns == made, "it was built again"
    assert again.fingerprint == one.fingerprint
    prints = {one.fingerprint}
    for options in ({"kind": "ivf"}, {"kind": "ivf", "nprobe": 1}, {"kind": "hnsw"}):
        prints.add(dense(folder, cache, **options).fingerprint)
    assert len(indexes(cache)) == 3, "nprobe changes answers, not the index"
    assert len(prints) == 4
    other = DenseRetriever(made_corpus(seed=1), one.encoder, None, cache, progress=False)
    assert len(indexes(cache)) == 4
    assert other.fingerprint not in prints


def test_another_encoder_gets_another_index(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", bert(tmp_path / "bert")
    before = dense(folder, cache)
    expected = before.search(QUERIES, 5)
    bert(folder, seed=1)  # the same folder, trained further
    after = dense(folder, cache)
    assert after.search(QUERIES, 5) == expected_of(after.encoder, QUERIES, 5) != expected
    assert after.fingerprint != before.fingerprint
    assert len(indexes(cache)) == 2
    bert(folder)
    assert dense(folder, cache).search(QUERIES, 5) == expected, "its old index is good again"
    assert len(indexes(cache)) == 2
    with pytest.raises(ValueError, match="this index is stale: the encoder is"):
        type(after.index).open(before.index.folder, after.encoder.digest, CORPUS.digest)


BUILD = """
import sys
from datamodules.dense_encoder import DenseEncoder
from datamodules.dense_retrieval import DenseRetriever
from datamodules.passages import Corpus, Passage
from datamodules.texts import TextEncoding

corpus = Corpus([Passage(str(i), "", f"w{i % 60:02d} w{i // 60:02d}") for i in range(600)])
encoder = DenseEncoder(sys.argv[1], TextEncoding())
print("ready", flush=True)
sys.stdin.readline()
retriever = DenseRetriever(corpus, encoder, None, sys.argv[2])
print(retriever.search(["w01 w02"], 3)[0])
"""


@pytest.mark.slow
def test_of_two_processes_one_builds(folder: Path, tmp_path: Path, repo: Path) -> None:
    arguments = [sys.executable, "-c", BUILD, str(folder), str(tmp_path)]
    started = [
        subprocess.Popen(
            arguments, cwd=repo, env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for one in started:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        ends = []
        for one in started:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        ends = [one.communicate(timeout=120) for one in started]
    finally:
        for one in started:
            one.kill()
    assert ends[0][0] == ends[1][0] != ""
    builds = [errors.count("600 passages in") for _, errors in ends]
    assert sorted(builds) == [0, 1], ends
    assert len(indexes(tmp_path)) == 1


# ------------------------------------------------------------------ configs


def test_a_config_gets_its_retriever(folder: Path, tmp_path: Path) -> None:
    encoding = TextEncoding(query_template="w59 {text}")
    for options in ({}, {"path": None, "k1": None, "index": {"kind": "flat"}}):
        found = retriever_from(options, CORPUS, tmp_path, encoding)
        assert isinstance(found, LexicalRetriever)
        assert found.search(QUERIES, 5) == LexicalRetriever(CORPUS).search(QUERIES, 5)
    given: dict[str, Any] = {"path": str(folder), "index": {"kind": "hnsw", "m": 8}, "k1": None}
    made = retriever_from(given | {"cache_size": 3}, CORPUS, tmp_path, encoding)
    assert isinstance(made, DenseRetriever)
    assert made.index.options == IndexOptions("hnsw", m=8)
    assert made.cache_size == 3
    assert made.fingerprint == dense(folder, tmp_path, kind="hnsw", m=8).fingerprint
    bare = retriever_from(given | {"normalize": False}, CORPUS, tmp_path, encoding)
    assert bare.fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pth": None}, r"data.retriever.pth is no option; .*did you mean 'path'"),
        ({"path": "x", "k1": 1.0}, r"data.retriever.k1=1.0 needs data.retriever.path=null"),
        ({"path": "x", "b": 0.0, "z": 1}, r"retriever.z is no option.*; data.retriever.b=0.0"),
        ({"index": {"kind": "tree"}}, r"data.retriever.index.kind='tree'"),
        ({"b": 2.0}, r"data.retriever.b=2.0"),
        ({"path": "no/such/folder"}, r"data.retriever.path='no/such/folder' cannot be loaded"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        retriever_from(options, CORPUS, tmp_path, TextEncoding())
