"""Options of an index of passages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any, Literal

from datamodules.sources import nearest

IndexKind = Literal["flat", "ivf", "hnsw"]
KINDS = ("flat", "ivf", "hnsw")
TRAINING_POINTS, ROUNDS = 64, 10  # vectors a list that k-means looks at, and how often
POINTS_PER_LIST = 39  # fewest that make a centroid worth something [faiss]
#: Options that decide what is built, by kind; the others may change without another build.
BUILT_WITH: dict[str, tuple[str, ...]] = {
    "flat": (),
    "ivf": ("nlist", "seed"),
    "hnsw": ("m", "ef_construction"),
}


@dataclass(frozen=True)
class IndexOptions:
    """How vectors are kept and searched.

    Args:
        kind: ``flat`` compares with all of them, exactly [code: the card's section 3]; ``ivf``
            looks into some clusters only; ``hnsw`` walks a graph (in memory about twice as large
            as the vectors where those are short, and slow to build).
        nlist: Clusters of ``ivf``; None for ``4 sqrt(C)``, with 39 vectors each at least [our
            choice, after faiss' guide].
        nprobe: Clusters that a query looks into.
        m: Neighbours of a node of ``hnsw``; twice as many on the lowest level.
        ef_construction: Candidates while the graph is built.
        ef_search: Candidates of a query; never fewer than passages asked for.
        seed: Of the clusters.
        key: Config key of these options, for messages.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> IndexOptions("ivf").num_lists(10_000)
        256
    """

    kind: IndexKind = "flat"
    nlist: int | None = None
    nprobe: int = 8
    m: int = 32
    ef_construction: int = 200
    ef_search: int = 64
    seed: int = 0
    key: InitVar[str] = "data.index"

    def __post_init__(self, key: str) -> None:
        problems = []
        if self.kind not in KINDS:
            close = nearest(str(self.kind), KINDS)
            problems.append(f"{key}.kind={self.kind!r} must be one of {', '.join(KINDS)}{close}")
        least = {"nlist": 1, "nprobe": 1, "m": 2, "ef_construction": 1, "ef_search": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if name == "nlist" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < bound:
                problems.append(f"{key}.{name}={value!r} must be a whole number, at least {bound}")
        if problems:
            raise ValueError("; ".join(problems))

    def num_lists(self, count: int) -> int:
        """Clusters of an ``ivf`` index: never more than vectors.

        Args:
            count: Vectors, C.
        """
        if self.nlist is not None:
            return min(self.nlist, count)
        return max(1, min(round(4 * math.sqrt(count)), count // POINTS_PER_LIST))

    @property
    def built_with(self) -> dict[str, Any]:
        """The kind and the options that decide what is built."""
        return {"kind": self.kind, **{name: asdict(self)[name] for name in BUILT_WITH[self.kind]}}


def read_index_options(
    values: Mapping[str, Any] | IndexOptions | None, key: str = "data.index"
) -> IndexOptions:
    """Options of a config.

    Args:
        values: By name; None for the defaults.
        key: Of the config, for messages.

    Raises:
        ValueError: A name or a value is not allowed.

    Example:
        >>> read_index_options({"kind": "hnsw", "m": 16}).m
        16
    """
    if isinstance(values, IndexOptions):
        return values
    known = [field.name for field in fields(IndexOptions)]
    given = dict(values or {})
    problems = [
        f"{key}.{name} is no option; there are {', '.join(known)}{nearest(name, known)}"
        for name in given
        if name not in known
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return IndexOptions(**given, key=key)
