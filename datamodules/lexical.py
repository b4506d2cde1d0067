"""Lexical retrieval: BM25 with an inverted index, no weights to train and nothing to load.

    score(q, p) = sum over words w of q   n_q(w) idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b l / L))
    idf(w)      = log(1 + (C - df + 0.5) / (df + 0.5))        never below 0

tf is the count of w in p, df the number of passages with w, l the words of p, L their mean.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from datamodules.passages import Corpus
from datamodules.prepared import digest
from datamodules.retrieval import CACHE_SIZE, CachedRetriever

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, without punctuation.

    Args:
        text: Any text.

    Example:
        >>> words_of("Where was Ada Lovelace born?")
        ['where', 'was', 'ada', 'lovelace', 'born']
    """
    return _WORD.findall(text.lower())


class LexicalRetriever(CachedRetriever):
    """BM25 (Okapi) over titles and bodies.

    Of equal scores the lower place comes first; passages without any word of the text score 0 and
    fill up the list.

    Args:
        corpus: The passages.
        k1: How soon more of a word stops to count [our choice: 0.9].
        b: How much long passages are held back, 0 to 1 [our choice: 0.4].
        cache_size: Answers that are kept.
        key: Config key of these options, for messages.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        cache_size: int = CACHE_SIZE,
        key: str = "data.retriever",
    ) -> None:
        problems = []
        if not k1 >= 0:
            problems.append(f"{key}.k1={k1} must be at least 0")
        if not 0 <= b <= 1:
            problems.append(f"{key}.b={b} must be in [0, 1]")
        if problems:
            raise ValueError("; ".join(problems))
        made = digest({"lexical": 1, "k1": k1, "b": b, "corpus": corpus.digest})
        super().__init__(corpus, f"lexical-{made}", cache_size=cache_size, key=key)
        self._postings = _postings(corpus, k1, b)

    def scores(self, text: str) -> np.ndarray:
        """BM25 of every passage, ``(C,)`` float64.

        Args:
            text: What is searched for.
        """
        total = np.zeros(len(self.corpus))
        for word, count in sorted(Counter(words_of(text)).items()):
            if word in self._postings:
                places, weights = self._postings[word]
                total[places] += count * weights
        return total

    def find(self, texts: Sequence[str], k: int) -> list[list[int]]:
        """Places of the best passages; see ``Retriever.search``."""
        return [_best(self.scores(text), k) for text in texts]


def _postings(corpus: Corpus, k1: float, b: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each word the places ``(df,)`` that have it, rising, and what it adds to their scores."""
    counts: dict[str, tuple[list[int], list[int]]] = {}
    lengths = np.zeros(len(corpus))
    for place, passage in enumerate(corpus):
        words = words_of(passage.encoded_text)
        lengths[place] = len(words)
        for word, count in Counter(words).items():
            places, found = counts.setdefault(word, ([], []))
            places.append(place)
            found.append(count)
    mean = lengths.mean() or 1.0  # texts of punctuation only have no words
    damping = k1 * (1 - b + b * lengths / mean)
    postings = {}
    for word, (places, found) in counts.items():
        rows, times = np.array(places, dtype=np.int64), np.array(found, dtype=np.float64)
        rarity = np.log1p((len(corpus) - len(rows) + 0.5) / (len(rows) + 0.5))
        postings[word] = (rows, rarity * times * (k1 + 1) / (times + damping[rows]))
    return postings


def _best(scores: np.ndarray, k: int) -> list[int]:
    """Places of the k largest, the lower place first among equal ones."""
    k = min(k, len(scores))
    bound = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > bound)
    level = np.flatnonzero(scores == bound)[: k - len(above)]
    places = np.sort(np.concatenate([above, level]))
    found: list[int] = places[np.argsort(-scores[places], kind="stable")].tolist()
    return found
