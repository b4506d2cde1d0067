"""Images and texts from files: captions, blocks to be rebuilt and contrastive pairs.

One row format a stage of CoCoA [code: data format; card, section 4], all of them in one file or
each in its own:

    captions  ``image`` or ``image_path``, ``caption``              warm-up
    bridges   ``qry``, ``qry_image_path`` or none, ``pos_text``     bridge
    pairs     the same, and ``pos_image_path`` or none              contrast, evaluation

``<|image_1|>`` in a text says where its image stands; images stand first here, so it goes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.images import read_image
from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.row_options import RowOptions
from datamodules.sources import nearest
from datamodules.tasks.base import Split
from datamodules.tasks.embedding import (
    Bridge,
    BridgeSet,
    EvalSet,
    ImageText,
    ImageTextTask,
    Item,
    PairRow,
    PairSet,
    RetrievalSet,
)
from datamodules.tasks.pair_file import set_name

Kind = Literal["captions", "bridges", "pairs"]
IMAGE_NAMES, CAPTION_NAMES = ("image_path", "image"), ("caption",)
ROLES: dict[Kind, dict[str, Role]] = {
    "captions": {
        "image": Role(IMAGE_NAMES, is_required=False),
        "caption": Role(CAPTION_NAMES, is_required=False),
    },
    "bridges": {
        "qry": Role(("qry",), is_required=False),
        "qry_image": Role(("qry_image_path",), is_required=False),
        "pos_text": Role(("pos_text",), is_required=False),
        "pos_image": Role(("pos_image_path",), is_required=False),
    },
}
ROLES["pairs"] = ROLES["bridges"]
NEEDED: dict[Kind, str] = {
    "captions": "image (or image_path) and caption",
    "bridges": "qry and pos_text",
    "pairs": "qry and pos_text",
}
PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>\s*")


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Args:
        uid: Stable identity.
        query: The image with its caption, or what asks.
        positive: What answers; "" for a caption.
        key: What decides the split: the image where there is one.
        where: ``file:line``.
    """

    uid: str
    query: Item
    positive: Item
    key: str
    where: str


class ImageTextFile(RowOptions, ImageTextTask):
    """Captions, bridges and pairs from one file or three.

    A file may hold rows of several kinds: a row that has none of the fields of one kind is not
    counted there. Rows of an image stay in one split, whichever file they are in (so paths must be
    written alike), others go by the hash of the query. A stage trains on the split ``train``;
    ``predict`` is the whole file of the pairs in its order.

    ``counts`` are those of ``PromptFile`` under ``<kind>/``, and ``bridges/short``.

    Args:
        captions_path: File of the captions; None for ``path``.
        bridges_path: File of the bridges; None for ``path``.
        pairs_path: File of the pairs; None for ``path``.
        image_root: Folder that relative image paths start from; None for that of their file.
        min_target_words: Bridges to shorter texts are left out, such as class names: there is
            nothing to rebuild. 0 keeps all (texts without spaces are one word).
        decode_all: Also decode every image when its file is read, so that ``on_bad_row`` speaks of
            those that do not; otherwise only missing files are seen then, and what does not decode
            ends the run when its turn comes.
        eval_bridges: Rows on which reconstruction is measured; 0 for none.
        dataset: Name of the retrieval set.
        instruction: Said before the queries where the template has ``{instruction}``.
        **options: Of ``RowOptions``. Files of their own for validation and test are of pairs.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.
    """

    name = "image_text_file"

    def __init__(
        self,
        *,
        captions_path: str | None = None,
        bridges_path: str | None = None,
        pairs_path: str | None = None,
        image_root: str | None = None,
        min_target_words: int = 3,
        decode_all: bool = False,
        eval_bridges: int = 256,
        dataset: str = "pairs",
        instruction: str = "",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        own = {"captions": captions_path, "bridges": bridges_path, "pairs": pairs_path}
        self.paths: dict[Kind, str] = {kind: own[kind] or self.path for kind in ROLES}
        self.image_root, self.min_target_words = image_root, min_target_words
        self.decode_all, self.eval_bridges = decode_all, eval_bridges
        self.dataset, self.instruction = set_name(dataset), instruction
        known = sorted({role for roles in ROLES.values() for role in roles})
        problems = [
            f"data.task.columns.{role}: no such role{nearest(role, known)}; allowed are "
            f"{', '.join(known)}"
            for role in self.columns
            if role not in known
        ]
        problems += [
            f"data.task.{name}={value} must be 0 or more"
            for name, value in (
                ("min_target_words", min_target_words),
                ("eval_bridges", eval_bridges),
            )
            if value < 0
        ]
        if not dataset.strip():
            problems.append(f"data.task.dataset={dataset!r}: a name is needed")
        if image_root is not None and not Path(image_root).is_dir():
            problems.append(f"data.task.image_root={image_root!r}: there is no such folder")
        self.files: dict[Kind, PromptFile[Record | None]] = {}
        for kind in ROLES:
            try:
                self.files[kind] = self._file(kind, options)
            except ValueError as error:
                problems += [line for line in str(error).split("\n") if line not in problems]
        if problems:
            raise ValueError("\n".join(problems))
        self._records: dict[tuple[Kind, Split], list[Record]] = {}
        self._is_told = False

    def _file(self, kind: Kind, options: dict[str, Any]) -> PromptFile[Record | None]:
        mine = {role: c for role, c in self.columns.items() if role in ROLES[kind]}
        if kind == "bridges" and self.paths["bridges"] != self.paths["pairs"]:
            mine.pop("pos_image", None)
        more = options | {"path": self.paths[kind], "columns": mine}
        if kind != "pairs":  # files of their own for evaluation are of pairs
            places = ("val_path", "val_split", "test_path", "test_split")
            more = {k: v for k, v in more.items() if k not in places}
            more |= {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        make: dict[Kind, Callable[[Fields], Record | None]] = {
            "captions": self._caption,
            "bridges": self._bridge,
            "pairs": self._pair,
        }
        return PromptFile(
            roles=ROLES[kind],
            make_record=make[kind],
            key_of=lambda record: "" if record is None else record.key,
            **more,
        )

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows."""
        found = Counter[str]()
        for kind, file in self.files.items():
            found.update({f"{kind}/{name}": value for name, value in file.counts.items()})
        return found

    # ------------------------------------------------------------------ rows

    def _caption(self, fields: Fields) -> Record | None:
        has = [bool(_text(fields, role)) for role in ("image", "caption")]
        if not any(has):
            return None
        path = self._image(fields, "image")
        if path is None:
            raise fields.bad("image", "no_image", "is empty; the path of an image is needed")
        text = fields.text("caption").strip()
        item = ImageText(path, path, text, fields.where)
        return Record(fields.uid, item, "", path, fields.where)

    def _bridge(self, fields: Fields) -> Record | None:
        if _text(fields, "pos_image"):
            return None  # its text says what to do with the image
        record = self._pair(fields)
        if record is None:
            return None
        assert isinstance(record.positive, str)
        if len(record.positive.split()) < self.min_target_words:
            self.files["bridges"].counts["short"] += 1
            return None
        return record

    def _pair(self, fields: Fields) -> Record | None:
        if not any(_text(fields, role) for role in ("qry", "qry_image", "pos_text", "pos_image")):
            return None
        query = self._item(fields, "qry", "qry_image")
        positive = self._item(fields, "pos_text", "pos_image")
        images = [item.key for item in (query, positive) if isinstance(item, ImageText)]
        key = images[0] if images else str(query)
        return Record(fields.uid, query, positive, key, fields.where)

    def _item(self, fields: Fields, role: str, image_role: str) -> Item:
        """A text, or an image with what is said about it."""
        text, path = _text(fields, role), self._image(fields, image_role)
        numbers = set(PLACEHOLDER.findall(text))
        if numbers - {"1"} or (numbers and path is None):
            missing = f"<|image_{max(numbers, key=int)}|>"
            raise fields.bad(role, "no_image", f"names {missing}, and there is no such image")
        text = PLACEHOLDER.sub("", text).strip()
        if path is not None:
            return ImageText(path, path, text, fields.where)
        if not text:
            raise fields.bad(role, "empty_text", "is empty; a text or an image is needed")
        return text

    def _image(self, fields: Fields, role: str) -> str | None:
        """The path of an image that is there; None where the row names none."""
        name = _text(fields, role)
        if not name:
            return None
        path = str(Path(self.image_root or _folder(fields.where), name))
        if not Path(path).is_file():
            raise fields.bad(role, "no_file", f"names {path!r}: there is no such file")
        if self.decode_all:
            try:
                read_image(path)
            except ValueError as error:
                raise fields.bad(role, "bad_image", f"names an image: {error}") from error
        return path

    def _rows(self, kind: Kind, split: Split) -> list[Record]:
        """Rows of a kind; [] where the file has none."""
        if (kind, split) not in self._records:
            file = self.files[kind]
            self._records[kind, split] = [r for r in file.records(split) if r is not None]
            if kind == "bridges" and file.counts["short"] and not self._is_told:
                self._is_told = True
                warnings.warn(
                    f"{self.paths[kind]}: {file.counts['short']} rows left out of the bridge: "
                    f"pos_text has fewer than {self.min_target_words} words "
                    f"(data.task.min_target_words)",
                    stacklevel=4,
                )
        return self._records[kind, split]

    def _asked(self, kind: Kind, split: Split) -> list[Record]:
        """Rows of a kind that a stage needs.

        Raises:
            ValueError: The file has none, in no split.
        """
        rows = self._rows(kind, split)
        parts: tuple[Split, ...] = ("train", "val", "test")
        if not rows and not any(self._rows(kind, part) for part in parts):
            short = self.files[kind].counts["short"]
            raise ValueError(
                f"{self.paths[kind]}: no row has {NEEDED[kind]}"
                + (f" ({short} have too few words)" if short else "")
                + f": name the columns in data.task.columns, give data.task.{kind}_path, or leave "
                f"the stage out of data.stages"
            )
        return rows

    # ------------------------------------------------------------------ the task

    def captions(self, split: Split) -> list[ImageText]:
        """Images with their captions.

        Args:
            split: As in ``PromptFile.records``.

        Raises:
            ValueError: The file cannot be read, or no row is one.
        """
        rows = self._asked("captions", split)
        return [row.query for row in rows if isinstance(row.query, ImageText)]

    def bridges(self, split: Split) -> list[Bridge]:
        """Rows whose positive is a text that is long enough.

        Args:
            split: As in ``PromptFile.records``.

        Raises:
            ValueError: The file cannot be read, or no row is one.
        """
        return [_bridge(row) for row in self._asked("bridges", split)]

    def pairs(self, split: Split) -> list[PairSet]:
        """One set of all pairs; other rows of a batch are negatives.

        Args:
            split: As in ``PromptFile.records``.

        Raises:
            ValueError: The file cannot be read, or no row is one.
        """
        rows = [
            PairRow(row.uid, row.query, row.positive, where=row.where)
            for row in self._asked("pairs", split)
        ]
        return [PairSet(self.dataset, rows, instruction=self.instruction)] if rows else []

    def evaluations(self, split: Split) -> list[EvalSet]:
        """Queries against all positives of the split, and how well blocks are rebuilt.

        Args:
            split: As in ``PromptFile.records``.

        Raises:
            ValueError: A file cannot be read.
        """
        sets: list[EvalSet] = []
        if rows := self._rows("pairs", split):
            answers: dict[Item, dict[Item, None]] = {}
            for row in rows:
                answers.setdefault(row.query, {})[row.positive] = None
            corpus = list(dict.fromkeys(row.positive for row in rows))
            places = {item: place for place, item in enumerate(corpus)}
            relevant = [sorted(places[item] for item in found) for found in answers.values()]
            sets.append(
                RetrievalSet(
                    self.dataset, list(answers), corpus, relevant, instruction=self.instruction
                )
            )
        if self.eval_bridges > 1 and split != "predict":
            bridges = self._rows("bridges", split)[: self.eval_bridges]
            if len(bridges) > 1:
                sets.append(BridgeSet("bridge", [_bridge(row) for row in bridges]))
        return sets


def _bridge(row: Record) -> Bridge:
    assert isinstance(row.positive, str)
    return Bridge(row.uid, row.query, row.positive, row.where)


def _text(fields: Fields, role: str) -> str:
    """A text; "" for a blank or empty field, or none."""
    if not fields.has(role):
        return ""
    value = fields.value(role)
    return "" if isinstance(value, str) and not value.strip() else fields.text(role)


def _folder(where: str) -> Path:
    """Folder of the file that ``Row.where`` names, or the data set's own."""
    found = re.fullmatch(r"(.+?)(?:\[[^\]]*\])?(?::\d+| row \d+)", where)
    file = Path(found.group(1) if found else where)
    return file if file.is_dir() else file.parent
