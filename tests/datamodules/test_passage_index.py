"""The index: kinds, the disk, staleness, what is refused, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.exact_search import exact_search
from datamodules.index_options import IndexOptions, read_index_options
from datamodules.passage_index import PassageIndex

DIGESTS = {"encoder_digest": "encoder-a", "corpus_digest": "corpus-a"}
KINDS: list[Any] = ["flat", "ivf", "hnsw"]


def vectors_of(count: int, width: int = 32, seed: int = 0, clusters: int = 40) -> Tensor:
    """Vectors of length 1 around some centres, as those of texts are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=torch.Generator().manual_seed(99))
    chosen = torch.randint(clusters, (count,), generator=generator)
    made = centres[chosen] + 1.5 * torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(made, dim=1)


def built(folder: Path, vectors: Any, options: IndexOptions | None = None, **more: Any) -> Any:
    return PassageIndex.build(folder, vectors, options, **DIGESTS, progress=False, **more)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (IndexOptions("flat"), 1.0),
        (IndexOptions("ivf"), 0.8),
        (IndexOptions("ivf", nlist=20, nprobe=20), 1.0),
        (IndexOptions("hnsw", m=16, ef_construction=100), 0.95),
    ],
    ids=["flat", "ivf", "ivf whole", "hnsw"],
)
def test_every_kind_finds_the_nearest(options: IndexOptions, least: float, tmp_path: Path) -> None:
    vectors, queries = vectors_of(2000), vectors_of(50, seed=1)
    index = built(tmp_path, vectors, options)
    scores, places = index.search(queries, 20)
    exact = exact_search(queries, vectors.numpy(), 20)[1]
    pairs = zip(places.tolist(), exact.tolist(), strict=True)
    recall = sum(len(set(one) & set(other)) for one, other in pairs) / exact.numel()
    assert recall >= least, recall
    assert torch.allclose(scores, (queries @ vectors.T).gather(1, places), atol=1e-5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    if least == 1:
        assert places.tolist() == exact.tolist()
    again = PassageIndex.open(tmp_path, *DIGESTS.values())
    assert again.options.built_with == options.built_with
    assert len(again) == 2000


def test_more_clusters_looked_into_find_more(tmp_path: Path) -> None:
    vectors, queries = vectors_of(2000), vectors_of(50, seed=1)
    built(tmp_path, vectors, IndexOptions("ivf", nlist=40))
    exact = exact_search(queries, vectors.numpy(), 10)[1].tolist()
    recalls = []
    for nprobe in (1, 4, 40):
        options = IndexOptions("ivf", nlist=40, nprobe=nprobe)
        found = PassageIndex.open(tmp_path, *DIGESTS.values(), options).search(queries, 10)[1]
        pairs = zip(found.tolist(), exact, strict=True)
        recalls.append(sum(len(set(one) & set(other)) for one, other in pairs) / 500)
    assert recalls[0] < recalls[1] < recalls[2] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_make_the_same_index_as_one_tensor(kind: Any, tmp_path: Path) -> None:
    vectors, queries = vectors_of(300), vectors_of(5, seed=1)
    whole = built(tmp_path / "whole", vectors, IndexOptions(kind))
    blocks = iter(vectors.split([1, 99, 150, 50]))
    parts = built(tmp_path / "parts", blocks, IndexOptions(kind), count=300)
    assert torch.equal(whole.search(queries, 30)[1], parts.search(queries, 30)[1])
    names = {"index.json", "vectors.npy" if kind == "flat" else "graph.faiss"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_mapped_not_read(kind: Any, tmp_path: Path) -> None:
    index = built(tmp_path, vectors_of(500), IndexOptions(kind))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    name = "vectors.npy" if kind == "flat" else "graph.faiss"
    assert str(tmp_path / name) in maps.read_text()
    assert index.search(vectors_of(1), 1)[1].shape == (1, 1)


def test_ties_of_a_flat_index_are_by_place(tmp_path: Path) -> None:
    vectors = vectors_of(4)[torch.tensor([2, 0, 1, 0, 3, 0, 2] * 30)]
    index = built(tmp_path, vectors)
    queries = vectors[:5]
    for k in (1, 40, 89, 210):
        scores = (queries.double() @ vectors.double().T).float().tolist()
        expected = [sorted(range(210), key=lambda p: (-row[p], p))[:k] for row in scores]
        assert index.search(queries, k)[1].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_as_there_are_come_back(kind: Any, tmp_path: Path) -> None:
    vectors = torch.cat([vectors_of(60), vectors_of(1).expand(60, -1)])  # many equal ones
    index = built(tmp_path, vectors, IndexOptions(kind, nlist=30, nprobe=1, m=2, ef_search=1))
    scores, places = index.search(vectors_of(3, seed=1), 500)
    assert places.shape == scores.shape == (3, 120)
    assert all(sorted(row) == list(range(120)) for row in places.tolist())
    assert index.num_exhaustive == (0 if kind == "flat" else 3)
    assert index.search(torch.zeros(0, 32), 7)[1].shape == (0, 7)


def test_one_passage_alone_can_be_indexed(tmp_path: Path) -> None:
    for kind in KINDS:
        index = built(tmp_path / kind, vectors_of(1), IndexOptions(kind, nlist=5))
        assert index.search(vectors_of(2, seed=1), 3)[1].tolist() == [[0], [0]]


def test_a_stale_index_is_refused(tmp_path: Path) -> None:
    built(tmp_path, vectors_of(50), IndexOptions("ivf", nlist=2))
    with pytest.raises(ValueError, match="encoder is encoder-b, and it was built with encoder-a"):
        PassageIndex.open(tmp_path, "encoder-b", "corpus-a")
    with pytest.raises(ValueError, match="corpus is corpus-b, and it was built with corpus-a"):
        PassageIndex.open(tmp_path, "encoder-a", "corpus-b")
    with pytest.raises(ValueError, match=r"encoder-b.*; the corpus is corpus-b"):
        PassageIndex.open(tmp_path, "encoder-b", "corpus-b")
    for options in (IndexOptions("flat"), IndexOptions("ivf", nlist=3)):
        with pytest.raises(ValueError, match="stale: (kind|nlist) is"):
            PassageIndex.open(tmp_path, "encoder-a", "corpus-a", options)
    searched = IndexOptions("ivf", nlist=2, nprobe=1)
    assert PassageIndex.open(tmp_path, *DIGESTS.values(), searched).options.nprobe == 1


def test_half_an_index_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no index here"):
        PassageIndex.open(tmp_path, "encoder-a", "corpus-a")
    built(tmp_path, vectors_of(20))
    (tmp_path / "index.json").write_text('{"format": 1, "enc')
    with pytest.raises(ValueError, match="or half of one"):
        PassageIndex.open(tmp_path, "encoder-a", "corpus-a")

    def killed() -> Any:
        yield vectors_of(10)
        raise KeyboardInterrupt

    built(tmp_path, vectors_of(20))
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, killed(), count=20)
    with pytest.raises(ValueError, match="there is no index here"):
        PassageIndex.open(tmp_path, "encoder-a", "corpus-a")
    built(tmp_path, vectors_of(20))
    path = tmp_path / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError):
        PassageIndex.open(tmp_path, "encoder-a", "corpus-a")


def test_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    odd = vectors_of(20)
    odd[13, 3] = float("inf")
    cases: list[tuple[Any, int | None, str]] = [
        (odd, None, r"vectors\[13\] is not finite"),
        (iter(odd.split(10)), 20, r"vectors\[13\] is not finite"),
        (torch.zeros(0, 3), None, "count=0"),
        (iter([vectors_of(5)]), None, "count=None"),
        (iter([vectors_of(5)]), 6, "there are 5 vectors for 6 passages"),
        (iter([vectors_of(5), vectors_of(5)]), 6, "there are 10 vectors for 6 passages"),
        (iter([vectors_of(3), vectors_of(3, width=8)]), 6, "vectors of 8 and 32 dimensions"),
        (iter([vectors_of(3)[0]]), 1, r"must be \(C, d\)"),
    ]
    for vectors, count, message in cases:
        with pytest.raises(ValueError, match=message):
            built(tmp_path, vectors, count=count)
    for kind in KINDS:
        index = built(tmp_path, vectors_of(50), IndexOptions(kind))
        with pytest.raises(ValueError, match="k=0"):
            index.search(vectors_of(1), 0)
        with pytest.raises(ValueError, match=r"must be \(Q, 32\)"):
            index.search(vectors_of(1, width=8), 1)
        with pytest.raises(ValueError, match=r"queries\[1\] is not finite"):
            index.search(odd[12:14], 1)


def test_the_build_is_repeatable_and_tells_what_it_did(tmp_path: Path, capsys: Any) -> None:
    vectors = vectors_of(500)
    for kind in KINDS:
        for name in ("one", "two"):
            folder = tmp_path / f"{kind}-{name}"
            PassageIndex.build(folder, vectors, IndexOptions(kind), **DIGESTS)
        assert f"index ({kind}): 500 passages in" in capsys.readouterr().err
        files = [tmp_path / f"{kind}-{name}" for name in ("one", "two")]
        file = "vectors.npy" if kind == "flat" else "graph.faiss"
        assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes()
        about = json.loads((files[0] / "index.json").read_text())
        assert (about["count"], about["width"], about["kind"]) == (500, 32, kind)
        assert np.isclose(about["longest"], 1) and about["seconds"] >= 0
    built(tmp_path / "quiet", vectors)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "flatt"}, "k.i.kind='flatt' must be one of flat, ivf, hnsw.*'flat'"),
        ({"nlist": 0}, "k.i.nlist=0 must be a whole number, at least 1"),
        ({"nprobe": 0, "m": 1}, "k.i.nprobe=0 .*; k.i.m=1 must be a whole number, at least 2"),
        ({"ef_search": 2.5}, "k.i.ef_search=2.5"),
        ({"ef_construction": True}, "k.i.ef_construction=True"),
        ({"seed": -1}, "k.i.seed=-1"),
        ({"nlists": 3}, "k.i.nlists is no option.*did you mean 'nlist'"),
        ({"key": "x"}, "k.i.key is no option"),
    ],
)
def test_bad_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_index_options(values, "k.i")


def test_options_of_a_config() -> None:
    assert read_index_options(None) == IndexOptions()
    assert read_index_options({"kind": "ivf", "nlist": None}) == IndexOptions("ivf")
    assert IndexOptions("ivf", nprobe=1).built_with == IndexOptions("ivf").built_with
    assert IndexOptions("hnsw", m=8).built_with != IndexOptions("hnsw").built_with
    assert [IndexOptions("ivf").num_lists(count) for count in (1, 50, 2000, 10**6)] == [
        1, 1, 51, 4000,
    ]  # fmt: skip
    assert IndexOptions("ivf", nlist=100).num_lists(7) == 7
