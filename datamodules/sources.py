"""Rows of files and data sets; every bad row is named.

Preference pairs are made of them in ``preference_rows``. Nothing here is executed or evaluated:
rows are data. All errors are ``ValueError``.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BadRowPolicy = Literal["error", "skip"]
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
FORMATS = ("auto", *dict.fromkeys(SUFFIXES.values()), "hf")
MAX_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One record and where it stands.

    Args:
        values: Field name to value.
        where: ``file:line`` in text formats, ``file row N`` elsewhere.
    """

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Problem:
    """Why one row cannot be used.

    Args:
        reason: Short name under which such rows are counted, e.g. ``bad_json``.
        message: File, line, field, what was found and what would work.
    """

    reason: str
    message: str


def stable_hash(*parts: object) -> int:
    """A 64-bit number that depends on the texts of ``parts`` only, not on process or platform.

    Args:
        parts: Values with a stable ``str``.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8])


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no name comes close.

    Args:
        name: What was written.
        known: What exists.
    """
    options = {option.lower(): option for option in known}
    close = difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.5)
    return f"; did you mean {options[close[0]]!r}?" if close else ""


def raise_problems(path: str | Path, problems: Sequence[Problem], hint: str = "") -> None:
    """Raise one error that shows the first problems of a file; nothing happens without any.

    Args:
        path: The file.
        problems: What is wrong with it, in file order.
        hint: What else would work.

    Raises:
        ValueError: There is a problem.
    """
    if not problems:
        return
    lines = [f"{path}: {len(problems)} bad row{'s' if len(problems) > 1 else ''}"]
    lines += [f"  {problem.message}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"  and {len(problems) - MAX_SHOWN} more")
    raise ValueError("\n".join([*lines, hint] if hint else lines))


def find_column(
    present: Sequence[str],
    names: Sequence[str],
    *,
    key: str,
    path: str | Path,
    chosen: str | None = None,
    taken: Iterable[str] = (),
) -> str:
    """The column that plays a role: the configured one, else the first known name.

    Args:
        present: Columns of the file.
        names: Usual names of this role, best first.
        key: Config key that sets the column.
        path: The file, for the message.
        chosen: Configured column, None where unset.
        taken: Columns of other roles, not to be suggested.

    Raises:
        ValueError: No such column.
    """
    for name in [chosen] if chosen is not None else names:
        if name in present:
            return name
    has = "it has " + (", ".join(present) or "no columns")
    if chosen is not None:
        raise ValueError(
            f"{path}: {key}={chosen!r} is no column of this file{nearest(chosen, present)} {has}"
        )
    spare = [name for name in present if name not in set(taken)]
    hits = [(name, hit) for name in names for hit in difflib.get_close_matches(name, spare, n=1)]
    hits.sort(key=lambda pair: -difflib.SequenceMatcher(None, *pair).ratio())
    close = f"; did you mean {hits[0][1]!r}?" if hits else ";"
    raise ValueError(f"{path}: no column {' / '.join(names)}{close} {has}; set {key}=<column>")


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise ValueError(f"{path}: the file is empty; data.path needs at least one row")
    return data


def _scan_jsonl(path: Path) -> tuple[list[Row], list[Problem]]:
    rows, problems = [], []
    # Only "\n" ends a line: str.splitlines would also cut at separators inside JSON strings.
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        try:
            rows.append(Row(json.loads(raw.decode("utf-8")), where))
        except UnicodeDecodeError as error:
            message = f"invalid UTF-8 (byte {error.start + 1} of the line); save it as UTF-8"
            problems.append(Problem("bad_utf8", f"{where}: {message}"))
        except (ValueError, RecursionError) as error:
            message = f"does not parse as JSON ({error}); one JSON object a line is needed"
            problems.append(Problem("bad_json", f"{where}: {message}"))
    return rows, problems


def _json_positions(text: str) -> tuple[list[Any], list[int]]:
    """Items of a list, or of the list under ``data``, of valid JSON; and where each begins."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(index: int) -> int:
        return space.match(text, index).end()  # type: ignore[union-attr]

    index = skip(0)
    if text[index] == "{":
        index, key = skip(index + 1), None
        while text[index] != "}":
            key, index = decoder.raw_decode(text, index)
            index = skip(index)
            if key == "data":
                break
            index = skip(decoder.raw_decode(text, index)[1])
    if text[index] != "[":
        raise ValueError('a list of objects or {"data": [...]} is needed')
    items, starts, index = [], [], skip(index + 1)
    while text[index] != "]":
        starts.append(index)
        item, index = decoder.raw_decode(text, index)
        items.append(item)
        index = skip(index)
    return items, starts


def _scan_json(path: Path) -> tuple[list[Row], list[Problem]]:
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8")
        json.loads(text)
        items, starts = _json_positions(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: invalid UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "; for one object a line set data.format=jsonl" if "Extra" in error.msg else ""
        raise ValueError(
            f"{path}:{error.lineno}: does not parse as JSON ({error}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    rows, line, last = [], 1, 0
    for item, start in zip(items, starts, strict=True):
        line, last = line + text.count("\n", last, start), start
        rows.append(Row(item, f"{path}:{line}"))
    return rows, []


def _scan_csv(
    path: Path, delimiter: str, header: Sequence[str] | None
) -> tuple[list[Row], list[Problem]]:
    # Undecodable bytes become lone surrogates, so that only their own rows are bad.
    text = _read_bytes(path).decode("utf-8", "surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    # A file without a header line is taken as raw cells: such files do not quote either.
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if header is None else csv.QUOTE_NONE,
        strict=header is None,
    )
    rows, problems, names, line = [], [], list(header or []), 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if any(clean(cell) != cell for cell in cells):
                problems.append(Problem("bad_utf8", f"{where}: invalid UTF-8; save it as UTF-8"))
            elif not names:
                names = cells
                if twice := [name for name in names if names.count(name) > 1]:
                    raise ValueError(f"{where}: the header names column {twice[0]!r} twice")
            elif len(cells) != len(names):
                message = f"{len(cells)} cells where the header has {len(names)} ({names})"
                problems.append(Problem("bad_cells", f"{where}: {message}; quote the separators"))
            else:
                rows.append(Row(dict(zip(names, cells, strict=True)), where))
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: does not parse ({error}); check the quotes") from error
    return rows, problems


def _scan_parquet(path: Path) -> tuple[list[Row], list[Problem]]:
    import pyarrow.parquet

    _read_bytes(path)
    try:
        items = pyarrow.parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no readable parquet file ({error})") from error
    return [Row(item, f"{path} row {index}") for index, item in enumerate(items, start=1)], []


def _scan_hf(path: str, split: str | None) -> tuple[list[Row], list[Problem]]:
    import datasets

    name, _, config = path.partition(":")
    try:
        if Path(path).is_dir():
            data = datasets.load_from_disk(path)
        else:
            data = datasets.load_dataset(name, config or None)
    except Exception as error:  # hubs fail in many ways, each with its own exception
        raise ValueError(
            f"data.path={path}: could not be loaded as a Hugging Face data set "
            f"({type(error).__name__}: {error}); without a network use a file or a folder of "
            "datasets.save_to_disk"
        ) from error
    if isinstance(data, dict):
        split = next(iter(data)) if split is None and len(data) == 1 else split
        if split not in data:
            close = nearest(split or "", data)
            raise ValueError(f"{path}: data.split={split} but there are {', '.join(data)}{close}")
        data, path = data[split], f"{path}[{split}]"
    return [Row(dict(item), f"{path} row {index}") for index, item in enumerate(data, start=1)], []


def _detect_format(path: str, format: str) -> str:
    if format not in FORMATS:
        raise ValueError(
            f"data.format={format!r}: allowed are {', '.join(FORMATS)}{nearest(format, FORMATS)}"
        )
    file, suffix = Path(path), Path(path).suffix.lower()
    if file.is_dir():
        if format in ("auto", "hf") and any(
            (file / name).exists() for name in ("state.json", "dataset_dict.json")
        ):
            return "hf"
        inside = ", ".join(sorted(child.name for child in file.iterdir())[:MAX_SHOWN])
        raise ValueError(
            f"data.path={path!r} is a folder that datasets.save_to_disk did not write; "
            f"name one file (it holds: {inside or 'nothing'})"
        )
    # "owner/name" is a hub name only where no such folder could have been meant.
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", path)
    if format == "hf" or (
        format == "auto" and is_hub_name and suffix not in SUFFIXES and not file.parent.exists()
    ):
        return "hf"
    if not file.is_file():
        folder = file.parent
        if not folder.is_dir():
            raise ValueError(f"data.path={path!r}: there is no folder {str(folder)!r}")
        close = nearest(file.name, [child.name for child in folder.iterdir()])
        raise ValueError(f"data.path={path!r}: there is no such file{close}")
    if format == "auto" and suffix not in SUFFIXES:
        raise ValueError(
            f"data.path={path!r}: unknown ending {suffix!r}; use {', '.join(SUFFIXES)} or set "
            f"data.format to one of {', '.join(FORMATS[1:])}"
        )
    return SUFFIXES[suffix] if format == "auto" else format


def scan_rows(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    header: Sequence[str] | None = None,
) -> tuple[list[Row], list[Problem]]:
    """All readable rows and all problems of a file, without raising for single rows.

    Args:
        path: File, folder of ``datasets.save_to_disk`` or hub name (``owner/name[:config]``).
        format: One of ``FORMATS``; ``auto`` goes by the file's ending.
        split: Split of a Hugging Face data set that has several.
        header: Column names of a csv or tsv file without a header line; its cells are then
            taken as they are, quotes included.

    Raises:
        ValueError: The file as a whole cannot be read, or holds no row.
    """
    name = str(path)
    scanners: dict[str, Callable[[], tuple[list[Row], list[Problem]]]] = {
        "jsonl": lambda: _scan_jsonl(Path(path)),
        "json": lambda: _scan_json(Path(path)),
        "csv": lambda: _scan_csv(Path(path), ",", header),
        "tsv": lambda: _scan_csv(Path(path), "\t", header),
        "parquet": lambda: _scan_parquet(Path(path)),
        "hf": lambda: _scan_hf(name, split),
    }
    kind = _detect_format(name, format)
    if split is not None and kind != "hf":
        raise ValueError(f"data.split={split}: {name} is one {kind} file without splits; drop it")
    found, problems = scanners[kind]()
    rows = [row for row in found if isinstance(row.values, dict)]
    for row in found:
        if not isinstance(row.values, dict):
            message = f"{row.where}: a JSON object is needed, not a {type(row.values).__name__}"
            problems.append(Problem("not_an_object", message))
    if not rows and not problems:
        raise ValueError(f"{name}: the file is empty: it holds no row of data")
    return rows, problems


def read_rows(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    header: Sequence[str] | None = None,
) -> list[Row]:
    """All rows of a file, folder or hub data set, in order.

    Args:
        path: As in ``scan_rows``.
        format: As in ``scan_rows``.
        split: As in ``scan_rows``.
        header: As in ``scan_rows``.

    Raises:
        ValueError: The file cannot be read, or some row; up to five are shown.
    """
    rows, problems = scan_rows(path, format=format, split=split, header=header)
    raise_problems(path, problems)
    return rows


def clean(text: str) -> str:
    """Text without lone surrogates, which no tokenizer and no file takes.

    Args:
        text: Any text; what can be encoded comes back as it is.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
