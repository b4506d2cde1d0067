"""Retrieval by an encoder folder and an index on the disk, and the retriever of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.dense_encoder import DenseEncoder
from datamodules.index_options import IndexOptions, read_index_options
from datamodules.lexical import LexicalRetriever
from datamodules.passage_index import PassageIndex
from datamodules.passages import Corpus
from datamodules.prepared import digest, prepare
from datamodules.retrieval import CACHE_SIZE, CachedRetriever
from datamodules.sources import nearest
from datamodules.texts import TextEncoding

BLOCK_BATCHES = 16  # batches of passages that are sorted by length together
#: Options of a retriever by kind, beside ``path`` and ``cache_size``.
LEXICAL_OPTIONS, DENSE_OPTIONS = ("k1", "b"), ("index", "batch_size", "normalize")


class DenseRetriever(CachedRetriever):
    """Nearest passages by an encoder.

    The index is built on first use and kept under the hash of encoder, corpus and options: another
    encoder makes another one, and of several processes one builds while the others wait.

    Args:
        corpus: The passages.
        encoder: Reads passages and texts; the latter as queries.
        index_options: How the vectors are kept and searched; None for exactly.
        cache_dir: Where prepared folders live.
        cache_size: Answers that are kept.
        progress: Show the build on standard error.
        key: Config key of these options, for messages.

    Raises:
        ValueError: A passage cannot be encoded.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: DenseEncoder,
        index_options: IndexOptions | None,
        cache_dir: str | Path,
        *,
        cache_size: int = CACHE_SIZE,
        progress: bool = True,
        key: str = "data.retriever",
    ) -> None:
        options = index_options or IndexOptions()
        made = {"dense": 1, "encoder": encoder.digest, "corpus": corpus.digest}
        name = f"dense-{digest({**made, 'index': asdict(options)})}"
        super().__init__(corpus, name, cache_size=cache_size, key=key)
        self.encoder = encoder

        def build(folder: Path) -> None:
            PassageIndex.build(
                folder,
                self._blocks(),
                options,
                encoder_digest=encoder.digest,
                corpus_digest=corpus.digest,
                count=len(corpus),
                progress=progress,
            )

        folder = prepare(cache_dir, "index", {**made, "index": options.built_with}, build)
        self.index = PassageIndex.open(folder, encoder.digest, corpus.digest, options)

    def _blocks(self) -> Iterator[Tensor]:
        size = BLOCK_BATCHES * self.encoder.batch_size
        for start in range(0, len(self.corpus), size):
            passages = self.corpus.passages[start : start + size]
            texts, where = zip(*((one.encoded_text, one.where) for one in passages), strict=True)
            yield self.encoder.encode(texts, "passage", where)

    def find(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """Places of the best passages; see ``Retriever.search``."""
        found: list[list[int]] = self.index.search(self.encoder.encode(texts, "query"), k)[
            1
        ].tolist()
        return found


def retriever_from(
    options: Mapping[str, Any],
    corpus: Corpus,
    cache_dir: str | Path,
    encoding: TextEncoding,
    *,
    key: str = "data.retriever",
) -> CachedRetriever:
    """The retriever of a config: lexical where ``path`` is null, else dense.

    Args:
        options: ``path`` (an encoder's folder or hub name) and ``cache_size``; where lexical
            ``k1`` and ``b``, where dense ``index`` (see ``IndexOptions``), ``batch_size`` and
            ``normalize``. Options that are null stand for their defaults. Those of
            dense search may be there without a ``path``, where they do nothing.
        corpus: The passages.
        cache_dir: Where indexes live.
        encoding: How a dense one reads texts.
        key: Config key of the options, for messages.

    Raises:
        ValueError: An option or a value is not allowed.

    Example:
        >>> retriever_from({"path": None, "k1": 1.2}, corpus, "", encoding)  # doctest: +SKIP
    """
    given = {name: value for name, value in options.items() if value is not None}
    path = given.pop("path", None)
    _check_names(options, path, key)
    index = read_index_options(given.pop("index", None), f"{key}.index")
    if path is None:
        given = {name: value for name, value in given.items() if name not in DENSE_OPTIONS}
        return LexicalRetriever(corpus, **given, key=key)
    own = {name: given[name] for name in ("cache_size",) if name in given}
    rest = {name: given[name] for name in ("batch_size", "normalize") if name in given}
    encoder = DenseEncoder(path, encoding, **rest, key=key)
    return DenseRetriever(corpus, encoder, index, cache_dir, **own, key=key)


def _check_names(options: Mapping[str, Any], path: str | None, key: str) -> None:
    """Refuse unknown options, and those of the other kind that are set."""
    known = ("path", "cache_size", *LEXICAL_OPTIONS, *DENSE_OPTIONS)
    problems = [
        f"{key}.{name} is no option; there are {', '.join(known)}{nearest(name, known)}"
        for name in options
        if name not in known
    ]
    if path is not None:
        problems += [
            f"{key}.{name}={options[name]} needs {key}.path=null: it is of lexical search"
            for name in LEXICAL_OPTIONS
            if options.get(name) is not None
        ]
    if problems:
        raise ValueError("; ".join(problems))
