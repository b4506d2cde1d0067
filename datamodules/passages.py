"""Passages: what a search agent can find. A corpus is a fixed list of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Passage:
    """One passage.

    Args:
        uid: Unique in its corpus.
        title: May be empty.
        text: Its body.
        where: ``file:line``, for messages; "" where nothing was read.
    """

    uid: str
    title: str
    text: str
    where: str = ""

    @property
    def encoded_text(self) -> str:
        """What an encoder reads: title, then body."""
        return f"{self.title} {self.text}" if self.title else self.text


class Corpus(Sequence[Passage]):
    """Passages in a fixed order; a *place* is an index into it.

    Args:
        passages: At least one.
        name: For messages.

    Raises:
        ValueError: No passages, duplicate ids or passages without a text; names the first ones.
    """

    def __init__(self, passages: Sequence[Passage], name: str = "corpus") -> None:
        self.passages, self.name = list(passages), name
        self.places = {passage.uid: place for place, passage in enumerate(self.passages)}
        self._digest: str | None = None
        self._check()

    def _check(self) -> None:
        if not self.passages:
            raise ValueError(f"{self.name}: there are no passages")
        empty = [p for p in self.passages if not p.text.strip()]
        if empty:
            raise ValueError(
                f"{empty[0].where or self.name}: {len(empty)} passages have no text, the first is "
                f"{empty[0].uid!r}"
            )
        seen: dict[str, Passage] = {}
        twice = [p for p in self.passages if seen.setdefault(p.uid, p) is not p]
        if twice:
            first = seen[twice[0].uid]
            raise ValueError(
                f"{twice[0].where or self.name}: {len(twice)} passages have an id that another "
                f"has, the first is {twice[0].uid!r} (also {first.where or first.title})"
            )

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, place: int) -> Passage:  # type: ignore[override]
        return self.passages[place]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.passages)

    @property
    def digest(self) -> str:
        """Hash of all ids, titles and texts in order."""
        if self._digest is None:
            found = blake2b(digest_size=16)
            for one in self.passages:
                found.update(repr((one.uid, one.title, one.text)).encode())
            self._digest = found.hexdigest()
        return self._digest
