"""Searching an index of 100,000 vectors: ``python -m tests.benchmarks.index_search``.

Made vectors of 384 dimensions in 2,000 loose groups (cosines of 0.2 inside one); queries are such
vectors, 256 a call, 20 neighbours each. Every kind is built with its defaults, opened from the
disk, asked once to warm up, and then several times: medians of milliseconds a query by the wall
clock and of the processor. ``recall`` is the share of the exact neighbours that were found.
``ivf`` and ``hnsw`` are also searched more widely. Nothing is asserted; the goal is less than 5 ms.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.index_options import IndexOptions
from datamodules.passage_index import PassageIndex
from tests.benchmarks.embedding_parts import show, write_csv

DEFAULT_CSV = Path("docs/results/index_search_cpu.csv")
NUM_CENTRES, SPREAD = 2000, 2.0
DIGESTS = ("made", "made")
#: What is built, and how else it is searched.
KINDS = {
    "flat": [IndexOptions("flat")],
    "ivf": [IndexOptions("ivf"), IndexOptions("ivf", nprobe=32), IndexOptions("ivf", nprobe=128)],
    "hnsw": [IndexOptions("hnsw"), IndexOptions("hnsw", ef_search=256)],
}


def made_vectors(count: int, width: int, seed: int) -> Tensor:
    """Vectors of length 1 around centres that do not depend on the seed."""
    centres = torch.randn(NUM_CENTRES, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(NUM_CENTRES, (count,), generator=generator)
    vectors = centres[chosen].add_(SPREAD * torch.randn(count, width, generator=generator))
    return torch.nn.functional.normalize(vectors, dim=1)


def timed(index: PassageIndex, queries: Tensor, k: int, repeats: int) -> tuple[float, float, Any]:
    """Medians of wall and processor milliseconds a query, and the places found."""
    places = index.search(queries, k)[1]
    wall, cpu = [], []
    for _ in range(repeats):
        starts = time.perf_counter(), time.process_time()
        index.search(queries, k)
        wall.append(time.perf_counter() - starts[0])
        cpu.append(time.process_time() - starts[1])
    scale = 1000 / len(queries)
    return statistics.median(wall) * scale, statistics.median(cpu) * scale, places


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a kind and way of searching."""
    vectors = made_vectors(args.count, args.width, seed=1)
    queries = made_vectors(args.queries, args.width, seed=2)
    rows: list[dict[str, Any]] = []
    exact: list[set[int]] = []
    for kind, searched in KINDS.items():
        start = time.process_time()
        PassageIndex.build(
            folder / kind, vectors, searched[0], encoder_digest="made", corpus_digest="made"
        )
        built = time.process_time() - start
        size = sum(file.stat().st_size for file in (folder / kind).iterdir())
        for options in searched:
            index = PassageIndex.open(folder / kind, *DIGESTS, options)
            wall, cpu, places = timed(index, queries, args.k, args.repeats)
            exact = exact or [set(row) for row in places.tolist()]
            pairs = zip(places.tolist(), exact, strict=True)
            found = sum(len(known & set(row)) for row, known in pairs)
            rows.append(
                {
                    "kind": kind,
                    "nprobe": options.nprobe if kind == "ivf" else "",
                    "ef_search": options.ef_search if kind == "hnsw" else "",
                    "wall_ms": round(wall, 3),
                    "cpu_ms": round(cpu, 3),
                    "recall": round(found / places.numel(), 4),
                    "build_wall_s": round(index.about["seconds"], 1),
                    "build_cpu_s": round(built, 1),
                    "megabytes": round(size / 1e6),
                    "count": args.count,
                    "width": args.width,
                    "queries": args.queries,
                    "k": args.k,
                    "repeats": args.repeats,
                    "threads": torch.get_num_threads(),
                }
            )
            show(rows[-1])
    return rows


def main() -> None:
    """One line each, also written as CSV; ``--count 10000`` is for busy machines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=DEFAULT_CSV)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_csv(args.output, measure(args, Path(folder)))


if __name__ == "__main__":
    main()
