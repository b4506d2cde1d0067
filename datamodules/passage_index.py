"""An index of passages in a folder: built once, searched from the disk, tied to its encoder.

    index.json     what was indexed: digests of encoder and corpus, kind, sizes, seconds
    vectors.npy    of a ``flat`` index, searched exactly, block by block
    graph.faiss    of an ``ivf`` or ``hnsw`` index

All three are mapped into memory, not read, so a corpus may be larger than memory. Building holds
one block of ``flat``, a sample and all lists of ``ivf``, and all vectors of ``hnsw``. Scores are
inner products: cosines where the encoder normalises.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.exact_search import (
    blocks_of,
    checked_queries,
    exact_search,
    load_faiss,
    longest_of,
    ordered,
)
from datamodules.index_options import ROUNDS, TRAINING_POINTS, IndexOptions
from datamodules.progress import advancing

ABOUT, VECTORS, GRAPH = "index.json", "vectors.npy", "graph.faiss"
ADDED_BYTES = 1 << 24  # of vectors that faiss is given at once: often enough for a bar


class PassageIndex:
    """Nearest passages of vectors. Made by ``build`` and ``open``.

    Args:
        folder: Where it lies.
        about: Content of ``index.json``.
        options: How to search; see ``IndexOptions``.
    """

    def __init__(self, folder: Path, about: dict[str, Any], options: IndexOptions) -> None:
        self.folder, self.about, self.options = folder, about, options
        #: Queries whose clusters or graph gave too few passages and that were searched exactly.
        self.num_exhaustive = 0
        self._vectors: np.ndarray | None = None
        self._graph: Any = None
        if options.kind == "flat":
            self._vectors = np.lib.format.open_memmap(folder / VECTORS, mode="r")
        else:
            faiss = load_faiss()
            self._graph = faiss.read_index(str(folder / GRAPH), faiss.IO_FLAG_MMAP_IFC)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        vectors: Tensor | Iterable[Tensor],
        options: IndexOptions | None = None,
        *,
        encoder_digest: str,
        corpus_digest: str,
        count: int | None = None,
        progress: bool = True,
    ) -> PassageIndex:
        """Write an index and open it.

        A graph of ``hnsw`` depends a little on the timing of threads: with one thread
        (``trainer.num_threads=1``) it is the same every time.

        Args:
            folder: Made if it is not there; other files in it stay.
            vectors: ``(C, d)``, or blocks ``(n, d)`` of them in order.
            options: Kind and its numbers; None for the defaults.
            encoder_digest: Of what made the vectors.
            corpus_digest: Of what they stand for.
            count: C, needed with blocks.
            progress: Show progress and the time it took on standard error.

        Raises:
            ValueError: No vectors, not ``count`` of them, of several widths, or not finite.
        """
        options, target, start = options or IndexOptions(), Path(folder), time.monotonic()
        if isinstance(vectors, Tensor):
            count = len(vectors)
            vectors = vectors.split(4096)
        if not count or count < 1:
            raise ValueError(f"count={count}: an index needs the number of its vectors, 1 or more")
        target.mkdir(parents=True, exist_ok=True)
        (target / ABOUT).unlink(missing_ok=True)  # while the rest does not fit it
        stored, longest = _store(target / VECTORS, vectors, count, progress)
        if options.kind != "flat":
            _build_graph(stored, options, target / GRAPH, progress)
            (target / VECTORS).unlink()
        seconds = time.monotonic() - start
        about = {
            "format": 1,
            "encoder": encoder_digest,
            "corpus": corpus_digest,
            **options.built_with,
            "count": count,
            "width": stored.shape[1],
            "longest": longest,
            "seconds": round(seconds, 3),
        }
        (target / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if progress:
            print(f"index ({options.kind}): {count:,} passages in {seconds:.1f} s", file=sys.stderr)
        return cls.open(target, encoder_digest, corpus_digest, options)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        encoder_digest: str,
        corpus_digest: str,
        options: IndexOptions | None = None,
    ) -> PassageIndex:
        """Map an index that was built before.

        Args:
            folder: Where it lies.
            encoder_digest: Of what will encode the queries.
            corpus_digest: Of the passages that places will mean.
            options: How to search; None for what it was built with, and the defaults.

        Raises:
            ValueError: There is none, or another encoder, corpus or kind made it [card section 8,
                pitfall 11].
        """
        about = _about(Path(folder))
        made = {"encoder": encoder_digest, "corpus": corpus_digest}
        stale = [
            f"the {name} is {wanted}, and it was built with {about.get(name)}"
            for name, wanted in made.items()
            if about.get(name) != wanted
        ]
        if options is None:
            known = IndexOptions(about["kind"])
            options = replace(known, **{name: about[name] for name in known.built_with})
        stale += [
            f"{name} is {wanted!r}, and it was built with {about.get(name)!r}"
            for name, wanted in options.built_with.items()
            if about.get(name) != wanted
        ]
        if stale:
            raise ValueError(f"{folder}: this index is stale: {'; '.join(stale)}; build it again")
        return cls(Path(folder), about, options)

    def __len__(self) -> int:
        return int(self.about["count"])

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best passages of each vector.

        A ``flat`` index is exact, and of equal scores the lower place comes first. The others
        order what they find in that way. Where they find fewer than k they look at everything.

        Args:
            vectors: ``(Q, d)``, may be empty.
            k: Passages a vector, 1 or more.

        Returns:
            Scores ``(Q, K)``, float32, falling, and places ``(Q, K)``, int64, with
            ``K = min(k, C)``.

        Raises:
            ValueError: Another width, queries that are not finite, or k below 1.
        """
        if self._vectors is not None:
            return exact_search(vectors, self._vectors, k, longest=self.about["longest"])
        queries, k = checked_queries(vectors, self.about["width"], k), min(k, len(self))
        if not len(queries):
            return torch.empty(0, k), torch.empty(0, k, dtype=torch.long)
        scores, places = self._search_graph(queries, k, whole=False)
        short = (places < 0).any(dim=1).nonzero()[:, 0]
        if len(short):
            self.num_exhaustive += len(short)
            scores[short], places[short] = self._search_graph(queries[short], k, whole=True)
        return ordered(scores, places)

    def _search_graph(self, queries: Tensor, k: int, *, whole: bool) -> tuple[Tensor, Tensor]:
        faiss = load_faiss()
        if self.options.kind == "ivf":
            probed = self._graph.nlist if whole else self.options.nprobe
            parameters = faiss.SearchParametersIVF(nprobe=min(probed, self._graph.nlist))
            found = self._graph.search(queries.numpy(), k, params=parameters)
        elif whole:
            found = faiss.downcast_index(self._graph.storage).search(queries.numpy(), k)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=max(self.options.ef_search, k))
            found = self._graph.search(queries.numpy(), k, params=parameters)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: there is no index here, or half of one ({error})") from error
    return about


def _store(
    path: Path, blocks: Iterable[Tensor], count: int, progress: bool
) -> tuple[np.ndarray, float]:
    """Write blocks of vectors as one file; gives it mapped, and the longest vector's length."""
    stored: np.ndarray | None = None
    done, longest = 0, 0.0
    with advancing("encode passages", count, is_shown=progress) as advance:
        for block in blocks:
            values = block.detach().to("cpu", torch.float32).numpy()
            if values.ndim != 2 or not values.size:
                raise ValueError(f"vectors must be (C, d), not empty, got {values.shape}")
            if stored is None:
                shape = (count, values.shape[1])
                stored = np.lib.format.open_memmap(path, "w+", np.dtype("<f4"), shape)
            if values.shape[1] != stored.shape[1]:
                raise ValueError(f"vectors of {values.shape[1]} and {stored.shape[1]} dimensions")
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                row = done + int(np.flatnonzero(~finite)[0])
                raise ValueError(f"vectors[{row}] is not finite in float32")
            if done + len(values) <= count:
                stored[done : done + len(values)] = values
            done, longest = done + len(values), max(longest, longest_of(values))
            advance(len(values))
    if stored is None or done != count:
        raise ValueError(f"there are {done} vectors for {count} passages")
    del stored  # writes what is left
    return np.lib.format.open_memmap(path, mode="r"), longest


def _build_graph(stored: np.ndarray, options: IndexOptions, path: Path, progress: bool) -> None:
    faiss = load_faiss()
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20  # clusters are made 3 times as fast
    try:
        graph = _made_graph(faiss, stored, options, progress)
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
    faiss.write_index(graph, str(path))


def _made_graph(faiss: Any, stored: np.ndarray, options: IndexOptions, progress: bool) -> Any:
    count, width = stored.shape
    if options.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, options.m, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = options.ef_construction
    else:
        num_lists = options.num_lists(count)
        coarse = faiss.IndexFlatIP(width)
        graph = faiss.IndexIVFFlat(coarse, width, num_lists, faiss.METRIC_INNER_PRODUCT)
        graph.cp.seed, graph.cp.niter, graph.cp.min_points_per_centroid = options.seed, ROUNDS, 1
        graph.train(_sample(stored, TRAINING_POINTS * num_lists, options.seed))
    with advancing(f"build {options.kind}", count, is_shown=progress) as advance:
        for _, block in blocks_of(stored, ADDED_BYTES):
            graph.add(block)
            advance(len(block))
    return graph


def _sample(stored: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Vectors that clusters are made of, drawn by the seed, in their order."""
    if len(stored) <= most:
        return np.ascontiguousarray(stored)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(stored), generator=generator)[:most].sort().values
    return np.asarray(stored[rows.numpy()])
