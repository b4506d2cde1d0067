"""Images and texts from files: row formats, paths of images, splits, bad rows."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.tasks.base import Split
from datamodules.tasks.embedding import BridgeSet, ImageText, RetrievalSet
from datamodules.tasks.image_text_file import ImageTextFile
from run_tools.checks import check_node

WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pictures in a folder beside the files, and one that is cut off."""
    folder = tmp_path / "img"
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


CAPTION = {"image_path": "img/0.png", "caption": "a red ring"}
BRIDGE = {
    "qry": "<|image_1|>\nWhat is it?",
    "qry_image_path": "img/1.png",
    "pos_text": "A red ring.",
}
TEXT = {"qry": "Say it again: a bar", "qry_image_path": "", "pos_text": "there is a bar"}
PAIR = {"qry": "a blue bar", "pos_text": "<|image_1|>\nShow it.", "pos_image_path": "img/2.png"}


@pytest.mark.usefixtures("images")
def test_all_kinds_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, [CAPTION, BRIDGE, TEXT, PAIR])
    task = ImageTextFile(path=path, **WHOLE)
    [caption] = task.captions("train")
    assert (caption.text, caption.image, caption.where) == (
        "a red ring", str(tmp_path / "img/0.png"), f"{path}:1",
    )  # fmt: skip
    seen, said = task.bridges("train")
    image = str(tmp_path / "img" / "1.png")
    assert seen.source == ImageText(image, image, "What is it?")
    assert (seen.target, seen.where) == ("A red ring.", f"{path}:2")
    assert (said.source, said.target) == (TEXT["qry"], TEXT["pos_text"])
    [pairs] = task.pairs("train")
    assert [row.where for row in pairs.rows] == [f"{path}:{line}" for line in (2, 3, 4)]
    shown = pairs.rows[2]
    assert shown.query == "a blue bar" and isinstance(shown.positive, ImageText)
    assert (shown.positive.key, shown.positive.text) == (str(tmp_path / "img/2.png"), "Show it.")
    assert task.pairs("predict")[0].rows == pairs.rows
    counts = task.counts
    assert counts["captions/main/rows"] == 4 and counts["bridges/main/skipped"] == 0


@pytest.mark.usefixtures("images")
def test_a_file_for_each_kind_and_a_root_for_images(tmp_path: Path) -> None:
    other = tmp_path / "lists"
    other.mkdir()
    captions = write(other, [{"image": "0.png", "text": "a ring"}], "captions.jsonl")
    bridges = write(other, [{"qry": "a", "pos_text": "b c d"}], "bridges.jsonl")
    pairs = write(tmp_path, [{"qry": "e", "pos_text": "f", "shown": "3.png"}], "pairs.jsonl")
    task = ImageTextFile(
        path=pairs, captions_path=captions, bridges_path=bridges, image_root=str(tmp_path / "img"),
        columns={"caption": "text", "pos_image": "shown"}, **WHOLE,
    )  # fmt: skip
    assert [item.text for item in task.captions("train")] == ["a ring"]
    assert [row.target for row in task.bridges("train")] == ["b c d"]
    [one] = task.pairs("train")
    assert [row.query for row in one.rows] == ["e"]
    assert one.rows[0].positive == ImageText(str(tmp_path / "img/3.png"), None, "f")


@pytest.mark.usefixtures("images")
def test_tables(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [BRIDGE | {"pos_image_path": ""}, {"qry_image_path": None} | PAIR]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = [ImageTextFile(path=str(tmp_path / name), **WHOLE) for name in ("a.csv", "a.parquet")]
    one, other = (task.pairs("train")[0].rows for task in made)
    assert [(row.query, row.positive) for row in one] == [(r.query, r.positive) for r in other]
    assert len(one) == 2 and other[1].where == f"{tmp_path / 'a.parquet'} row 2"
    assert [len(task.bridges("train")) for task in made] == [1, 1]


@pytest.mark.usefixtures("images")
def test_absolute_paths_and_rows_without_a_query_text(tmp_path: Path) -> None:
    image = str(tmp_path / "img" / "1.png")
    other = tmp_path / "elsewhere"
    other.mkdir()
    path = write(other, [{"qry": "<|image_1|>", "qry_image_path": image, "pos_text": "a b c"}])
    [row] = ImageTextFile(path=path, **WHOLE).pairs("train")[0].rows
    assert row.query == ImageText(image, image, "")


@pytest.mark.usefixtures("images")
def test_short_targets_are_left_out_counted_and_said_once(tmp_path: Path) -> None:
    rows = [BRIDGE, BRIDGE | {"pos_text": "a cat"}, BRIDGE | {"pos_text": "cat"}]
    path = write(tmp_path, rows)
    task = ImageTextFile(path=path, **WHOLE)
    with pytest.warns(UserWarning, match=r"2 rows left out of the bridge: .* fewer than 3 words"):
        assert [row.target for row in task.bridges("train")] == ["A red ring."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.bridges("train"), task.bridges("val")
    assert task.counts["bridges/short"] == 2 and task.counts["bridges/main/skipped"] == 0
    assert len(task.pairs("train")[0].rows) == 3
    assert len(ImageTextFile(path=path, min_target_words=0, **WHOLE).bridges("train")) == 3
    only = ImageTextFile(path=write(tmp_path, rows[1:], "short.jsonl"), **WHOLE)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="2 have too few words"):
        only.bridges("train")


@pytest.mark.usefixtures("images")
def test_a_stage_without_rows_is_named(tmp_path: Path) -> None:
    pairs = ImageTextFile(path=write(tmp_path, [PAIR]), **WHOLE)
    wanted = r"no row has image \(or image_path\) and caption: .* give data.task.captions_path, or"
    with pytest.raises(ValueError, match=wanted):
        pairs.captions("train")
    with pytest.raises(ValueError, match="no row has qry and pos_text: .*data.task.bridges_path"):
        pairs.bridges("train")
    captions = ImageTextFile(path=write(tmp_path, [CAPTION], "c.jsonl"), **WHOLE)
    with pytest.raises(ValueError, match="no row has qry and pos_text: .*data.task.pairs_path"):
        captions.pairs("train")
    assert captions.evaluations("train") == [] and captions.captions("val") == []


@pytest.mark.usefixtures("images")
def test_retrieval_and_reconstruction_are_measured(tmp_path: Path) -> None:
    rows = [BRIDGE, BRIDGE | {"pos_text": "One more ring."}, TEXT, PAIR, PAIR | {"qry": "b"}]
    path = write(tmp_path, rows)
    retrieval, bridge = ImageTextFile(path=path, dataset="my set", **WHOLE).evaluations("train")
    assert isinstance(retrieval, RetrievalSet) and isinstance(bridge, BridgeSet)
    assert retrieval.name == "my_set" and len(retrieval.queries) == 4
    assert len(retrieval.corpus) == 4, "the picture of two queries is there once"
    assert [list(places) for places in retrieval.relevant] == [[0, 1], [2], [3], [3]]
    assert [row.target for row in bridge.rows] == [
        "A red ring.",
        "One more ring.",
        TEXT["pos_text"],
    ]
    few = ImageTextFile(path=path, eval_bridges=2, **WHOLE).evaluations("train")[1]
    assert isinstance(few, BridgeSet) and len(few.rows) == 2
    none = ImageTextFile(path=path, eval_bridges=0, **WHOLE)
    assert len(none.evaluations("train")) == 1 == len(none.evaluations("predict"))


def test_rows_of_an_image_stay_in_one_split(tmp_path: Path, images: Path) -> None:
    for number in range(4, 90):
        (images / f"{number}.png").write_bytes((images / "0.png").read_bytes())
    rows: list[dict[str, Any]] = []
    for number in range(90):
        name = f"img/{number}.png"
        rows.append({"image": name, "caption": f"caption {number}"})
        rows.append({"qry": "<|image_1|> What?", "qry_image_path": name, "pos_text": "one two six"})
        rows.append({"qry": f"Find {number}.", "pos_text": "", "pos_image_path": name})
    task = ImageTextFile(path=write(tmp_path, rows), val_fraction=0.25, test_fraction=0.25)
    of_split = {}
    for split in SPLITS:
        shown = {item.key for item in task.captions(split)}
        assert shown == {b.source.key for b in task.bridges(split)}  # type: ignore[union-attr]
        sides = [side for row in task.pairs(split)[0].rows for side in (row.query, row.positive)]
        assert shown == {side.key for side in sides if isinstance(side, ImageText)}
        of_split[split] = shown
    assert sum(map(len, of_split.values())) == len(set().union(*of_split.values())) == 90
    assert all(len(found) > 9 for found in of_split.values())
    other = ImageTextFile(path=task.path, val_fraction=0.25, test_fraction=0.25, seed=1)
    assert {item.key for item in other.captions("val")} != of_split["val"]
    split_off = ImageTextFile(path=task.path, val_path=task.path, test_fraction=0.25)
    with pytest.warns(UserWarning, match="of its rows are also trained on"):
        assert len(split_off.pairs("val")[0].rows) == 180
    assert split_off.captions("val") == []


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("row", "reason", "wanted"),
    [
        (CAPTION | {"image_path": "img/9.png"}, "no_file", "img/9.png': there is no such file"),
        (CAPTION | {"image_path": ""}, "no_image", "field 'image_path' is empty; the path of an"),
        (CAPTION | {"image_path": 3}, "not_text", "field 'image_path' is a int"),
        (CAPTION | {"caption": " "}, "empty_text", "field 'caption' is empty"),
        ({"image_path": "img/0.png"}, "missing_field", "field 'caption' is missing"),
    ],
)
def test_bad_captions(tmp_path: Path, row: dict[str, Any], reason: str, wanted: str) -> None:
    path = write(tmp_path, [CAPTION, row, PAIR])
    with pytest.raises(ValueError) as error:
        ImageTextFile(path=path, **WHOLE).captions("train")
    assert f"{path}:2: field" in str(error.value) and wanted in str(error.value)
    task = ImageTextFile(path=path, on_bad_row="skip", **WHOLE)
    assert len(task.captions("train")) == 1
    assert task.counts["captions/main/skipped"] == 1
    assert task.counts[f"captions/main/skipped/{reason}"] == 1
    with pytest.warns(UserWarning, match="1 of 3 rows left out"):
        ImageTextFile(path=path, max_bad_share=0.4, **WHOLE).captions("train")


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("row", "reason", "wanted"),
    [
        (BRIDGE | {"qry_image_path": "img/9.png"}, "no_file", "img/9.png': there is no such file"),
        (BRIDGE | {"qry_image_path": ""}, "no_image", "names <|image_1|>, and there is no such"),
        (BRIDGE | {"qry": "<|image_1|> or <|image_2|>"}, "no_image", "names <|image_2|>, and"),
        (TEXT | {"pos_text": ""}, "empty_text", "field 'pos_text' is empty"),
        (TEXT | {"qry": None}, "empty_text", "field 'qry' is empty"),
        (PAIR | {"pos_image_path": "no"}, "no_file", "no': there is no such file"),
    ],
)
def test_bad_pairs(tmp_path: Path, row: dict[str, Any], reason: str, wanted: str) -> None:
    path = write(tmp_path, [BRIDGE, row, CAPTION])
    with pytest.raises(ValueError) as error:
        ImageTextFile(path=path, **WHOLE).pairs("train")
    assert f"{path}:2: field" in str(error.value) and wanted in str(error.value)
    task = ImageTextFile(path=path, on_bad_row="skip", **WHOLE)
    assert len(task.pairs("train")[0].rows) == 1
    assert task.counts[f"pairs/main/skipped/{reason}"] == 1


@pytest.mark.usefixtures("images")
def test_images_that_do_not_decode_can_be_found_before_training(tmp_path: Path) -> None:
    path = write(tmp_path, [CAPTION, CAPTION | {"image_path": "img/cut.png"}])
    late = ImageTextFile(path=path, **WHOLE)
    assert len(late.captions("train")) == 2, "only looked for until its turn comes"
    with pytest.raises(
        ValueError, match=rf"{path}:2: field 'image_path' names an image: .*cut.png"
    ):
        ImageTextFile(path=path, decode_all=True, **WHOLE).captions("train")
    task = ImageTextFile(path=path, decode_all=True, on_bad_row="skip", **WHOLE)
    assert len(task.captions("train")) == 1
    assert task.counts["captions/main/skipped/bad_image"] == 1


def test_wrong_options_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        ImageTextFile(
            path="", columns={"captoin": "c"}, min_target_words=-1, eval_bridges=-1, dataset=" ",
            image_root=str(tmp_path / "none"), val_fraction=2,
        )  # fmt: skip
    for wanted in (
        "data.task.columns.captoin: no such role; did you mean 'caption'?",
        "data.task.min_target_words=-1",
        "data.task.eval_bridges=-1",
        "data.task.dataset=' '",
        "none': there is no such folder",
        "data.task.val_fraction=2",
        "data.path is not set",
    ):
        assert str(error.value).count(wanted) == 1, wanted
    node = {"_target_": "datamodules.tasks.image_text_file.ImageTextFile", "path": "a"}
    assert check_node("data.task", node | {"captions_path": None, "seed": 1}) == []
    assert check_node("data.task", node | {"bridge_path": "b"})
