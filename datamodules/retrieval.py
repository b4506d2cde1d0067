"""What a retriever is: texts in, places of passages out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from datamodules.passages import Corpus


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
