"""What a retriever is: texts in, places of passages out. They remember what they found.

    LexicalRetriever   BM25, in ``datamodules.lexical``
    DenseRetriever     an encoder and an index on the disk, in ``datamodules.dense_retrieval``
    VectorRetriever    vectors of a model in training, in memory, exact

In rollouts the same query comes again and again, so an answer is looked for once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from datamodules.exact_search import exact_search, longest_of
from datamodules.passages import Corpus

CACHE_SIZE = 100_000  # answers: some 50 MB at k = 20


class Retriever(ABC):
    """Finds passages of one corpus.

    ``fingerprint`` names everything that its answers depend on (encoder, corpus, index): labels
    that were made with another one are stale.
    """

    corpus: Corpus
    fingerprint: str

    @abstractmethod
    def search(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """Places of the ``min(k, len(corpus))`` best passages of each text, the best first.

        Args:
            texts: What is searched for; may be empty.
            k: Passages a text, 1 or more.
        """


class CachedRetriever(Retriever):
    """A retriever that looks for each text once and remembers what it found.

    The answers used least recently are forgotten first. ``num_searches`` counts the texts that
    were asked for, ``num_hits`` those of them that were known, or twice in one call.

    Args:
        corpus: The passages.
        fingerprint: See ``Retriever``.
        cache_size: Answers that are kept; 0 for none.
        key: Config key of these options, for messages.

    Raises:
        ValueError: ``cache_size`` is below 0.
    """

    def __init__(
        self,
        corpus: Corpus,
        fingerprint: str,
        *,
        cache_size: int = CACHE_SIZE,
        key: str = "data.retriever",
    ) -> None:
        if cache_size < 0:
            raise ValueError(f"{key}.cache_size={cache_size} must be at least 0")
        self.corpus, self.fingerprint, self.cache_size = corpus, fingerprint, cache_size
        self.num_searches, self.num_hits = 0, 0
        self._known: OrderedDict[tuple[str, int], tuple[int, ...]] = OrderedDict()

    @abstractmethod
    def find(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """What ``search`` gives, for texts that differ, at least one, without remembering.

        Args:
            texts: What is searched for.
            k: From 1 to the number of passages.
        """

    def search(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """Places of the best passages of each text; see ``Retriever.search``.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        k = min(k, len(self.corpus))
        wanted = dict.fromkeys(texts)
        answers = {text: self._known[text, k] for text in wanted if (text, k) in self._known}
        new = [text for text in wanted if text not in answers]
        if new:
            found = self.find(new, k)
            answers |= {text: tuple(row) for text, row in zip(new, found, strict=True)}
        self.num_searches += len(texts)
        self.num_hits += len(texts) - len(new)
        self._remember(answers, k)
        return [list(answers[text]) for text in texts]

    def _remember(self, answers: Mapping[str, tuple[int, ...]], k: int) -> None:
        for text, places in answers.items():
            self._known[text, k] = places
            self._known.move_to_end((text, k))
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)


class VectorRetriever(CachedRetriever):
    """Nearest passages by vectors in memory, exactly: those of a model in training.

    Args:
        corpus: The passages.
        vectors: ``(C, d)`` of the passages, on any device.
        embed: Vectors ``(n, d)`` of n texts, by the weights that made ``vectors``.
        fingerprint: Names these weights; another one for others.
        cache_size: Answers that are kept.

    Raises:
        ValueError: Not a vector a passage, or vectors that are not finite.
    """

    def __init__(
        self,
        corpus: Corpus,
        vectors: Tensor,
        embed: Callable[[list[str]], Tensor],
        fingerprint: str,
        *,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        super().__init__(corpus, fingerprint, cache_size=cache_size)
        if vectors.dim() != 2 or len(vectors) != len(corpus):
            raise ValueError(f"vectors {tuple(vectors.shape)} must be one a passage: {len(corpus)}")
        self.vectors: np.ndarray = vectors.detach().float().cpu().contiguous().numpy()
        finite = np.isfinite(self.vectors).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise ValueError(f"vectors[{row}] is not finite in float32")
        self._embed, self._longest = embed, longest_of(self.vectors)

    def find(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """Places of the best passages; see ``Retriever.search``."""
        queries = self._embed(list(texts))
        _, places = exact_search(queries, self.vectors, k, longest=self._longest)
        found: list[list[int]] = places.tolist()
        return found
