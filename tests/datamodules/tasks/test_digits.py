"""Handwritten digits: images, texts, splits, both directions of retrieval."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from datamodules.tasks.base import Split
from datamodules.tasks.digits import NAMES, TEXTS, Digits
from datamodules.tasks.embedding import ImageText, PairRow, RetrievalSet
from lightning_modules.backbones.tiny import word_tokenizer
from run_tools.checks import check_node

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@pytest.fixture(scope="module")
def task() -> Digits:
    pytest.importorskip("sklearn")
    return Digits()


def rows(task: Digits, split: Split) -> list[PairRow]:
    [one] = task.pairs(split)
    assert (one.name, one.in_batch) == ("digits", True)
    return list(one.rows)


def image(item: Any) -> np.ndarray:
    assert isinstance(item, ImageText)
    return item.image


def test_images_are_those_of_scikit_learn(task: Digits) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    found = [row for split in SPLITS for row in rows(task, split)]
    for row in found[::50]:
        pixels, index = image(row.query), int(row.uid.removeprefix("digits/"))
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        assert np.ptp(pixels, axis=-1).max() == 0, "grey"
        blocks = pixels[..., 0].reshape(8, 4, 8, 4)
        assert np.ptp(blocks, axis=(1, 3)).max() == 0, "a pixel became a square"
        assert np.abs(blocks[:, 0, :, 0] - data.images[index] * 255 / 16).max() <= 0.5
        assert row.positive == f"a handwritten {NAMES[data.target[index]]}"
        assert (row.query.key, row.query.text) == (row.uid, "")  # type: ignore[union-attr]
    assert max(image(row.query).max() for row in found) == 255


def test_splits_are_stratified_and_fixed(task: Digits) -> None:
    found = {split: rows(task, split) for split in SPLITS}
    keys = [row.uid for split in SPLITS for row in found[split]]
    assert len(set(keys)) == len(keys) == 1797
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        counts = Counter(row.positive for row in found[split])  # type: ignore[index]
        assert set(counts) == set(TEXTS)
        assert all(abs(count - share * 179) < 5 for count in counts.values())
    again = Digits()
    assert [row.uid for row in rows(again, "val")] == [row.uid for row in found["val"]]
    assert [row.uid for row in found["val"]][:3] == ["digits/1", "digits/4", "digits/6"]
    assert task.pairs("predict") == task.pairs("test")
    tiny = Digits(val_fraction=0.001, test_fraction=0)
    assert len(rows(tiny, "val")) == 10 and len(rows(tiny, "train")) == 1787
    assert tiny.pairs("test") == tiny.evaluations("test") == []


def test_both_directions_of_retrieval(task: Digits) -> None:
    pairs = rows(task, "val")
    to_text, to_image = task.evaluations("val")
    assert isinstance(to_text, RetrievalSet) and isinstance(to_image, RetrievalSet)
    assert (to_text.name, to_image.name) == ("digits_i2t", "digits_t2i")
    assert list(to_text.queries) == list(to_image.corpus) == [row.query for row in pairs]
    assert list(to_text.corpus) == list(to_image.queries) == list(TEXTS)
    for row, places in zip(pairs, to_text.relevant, strict=True):
        assert [to_text.corpus[place] for place in places] == [row.positive]
    for text, places in zip(to_image.queries, to_image.relevant, strict=True):
        assert list(places) == [i for i, row in enumerate(pairs) if row.positive == text] != []


def test_all_words_are_known() -> None:
    task = Digits()
    words = task.vocabulary()
    assert len(words) == len(set(words)) == 12
    assert {word for text in TEXTS for word in text.split()} == set(words)
    task.bind(word_tokenizer(words))
    with pytest.raises(ValueError, match="'nine'"):
        task.bind(word_tokenizer(words[:-1]))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'litpost\[embed\]'"):
        Digits().pairs("train")


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (0.5, 0.5), (0.1, 1.0)])
def test_wrong_shares_are_named(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="data.task.val_fraction=.*data.task.test_fraction="):
        Digits(val_fraction=shares[0], test_fraction=shares[1])
    node = {"_target_": "datamodules.tasks.digits.Digits", "val_fraction": 0.1}
    assert check_node("data.task", node) == []
    [wrong] = check_node("data.task", node | {"test_fractoin": 0.1})
    assert "'test_fraction'" in wrong
