"""Passages: what a search agent can find. A corpus is a fixed list of them, maybe of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from datamodules.sources import Problem, Row, clean, raise_problems, scan_rows


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


def read_passages(path: str | Path) -> Corpus:
    """The passages of a file, in its order.

    A row is ``{"id": ..., "title": ..., "text": ...}``; the title may be missing. Rows of BEIR
    (``_id``) and of the wiki18 dump (``contents``: the title in quotes, a line end, the body [code:
    FlashRAG]) are read too. Ids may be whole numbers.

    Args:
        path: JSON-lines; what else ``scan_rows`` reads works as well.

    Raises:
        ValueError: The file cannot be read, or some row: no text, an id that is missing or taken,
            a field that is no text. Names ``file:line`` and field, up to five of them.
    """
    rows, problems = scan_rows(path)
    passages: list[Passage] = []
    taken: dict[str, str] = {}
    for row in rows:
        made = _passage(row)
        if isinstance(made, Passage) and made.uid in taken:
            known = f"{row.where}: id {made.uid!r} is that of {taken[made.uid]} already"
            made = Problem("duplicate_id", f"{known}; every passage needs its own")
        if isinstance(made, Problem):
            problems.append(made)
            continue
        taken[made.uid] = made.where
        passages.append(made)
    raise_problems(path, problems)
    return Corpus(passages, name=Path(path).name)


def _passage(row: Row) -> Passage | Problem:
    """The passage of a row, or what is wrong with it."""
    values = row.values
    key = "_id" if "id" not in values and "_id" in values else "id"
    uid = values.get(key)
    if isinstance(uid, bool) or not isinstance(uid, str | int) or not str(uid).strip():
        return _bad(row, "bad_id", key, uid, "a text or a whole number")
    body = "contents" if "text" not in values and "contents" in values else "text"
    text, title = values.get(body), values.get("title")
    if not isinstance(text, str) or not text.strip():
        return _bad(row, "bad_text", body, text, "a text that is not empty")
    if title is not None and not isinstance(title, str):
        return _bad(row, "bad_title", "title", title, "a text, or missing")
    if body == "contents" and title is None and "\n" in text.strip():
        title, _, text = text.strip().partition("\n")
        title = title.strip().strip('"')
    return Passage(clean(str(uid)), clean((title or "").strip()), clean(text.strip()), row.where)


def _bad(row: Row, reason: str, field: str, value: Any, wanted: str) -> Problem:
    found = f"is {value!r:.60}" if field in row.values else "is missing"
    return Problem(reason, f"{row.where}: field {field!r} {found}; it must be {wanted}")
