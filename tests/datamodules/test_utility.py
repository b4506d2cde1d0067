"""Measured utility as data: labels once, rows from them, and what an evaluation searches with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datamodules.agents import ScriptedAgent
from datamodules.tasks.search_world import SearchWorld
from datamodules.tasks.utility_pairs import UtilityPairs
from datamodules.texts import TextEncoding
from datamodules.utility import UtilityDataModule
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder

WORLD = {"num_names": 40, "num_cities": 12, "num_train": 12, "num_val": 3, "num_test": 6}


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    folder = tmp_path / "encoder"
    shape = TinyEncoderOptions(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
    build_tiny_encoder(folder, SearchWorld(**WORLD).vocabulary(), shape, seed=0)
    return str(folder)


def make(tmp_path: Path, **options: Any) -> UtilityDataModule:
    values: dict[str, Any] = {
        "task": UtilityPairs(search=SearchWorld(**WORLD)),
        "agent": ScriptedAgent(),
        "judge": {"path": None},
        "retriever": {"path": None, "input": "query"},
        "index": {"kind": "flat"},
        "search": {"max_searches": 5},
        "labels": {"label": "gold_ids"},
        "labels_folder": str(tmp_path / "labels"),
        "encoding": TextEncoding(max_query_tokens=24, max_passage_tokens=64),
        "batch_size": 4,
        "num_negatives": 15,
    }
    return UtilityDataModule(**(values | options))


def test_labels_become_rows(tmp_path: Path, encoder: str) -> None:
    data = make(tmp_path)
    data.prepare(encoder, tmp_path / "cache")
    (pairs,) = data.task.pairs("train")
    assert data.labelled is not None
    assert len(pairs.rows) == len(data.labelled.rows) > 0
    corpus = data.utility.search.corpus
    for row, pair in zip(data.labelled.rows, pairs.rows, strict=True):
        assert pair.query == f"{row.question} [SEP] {row.query}"
        assert pair.positive == corpus[corpus.places[row.positive]].encoded_text
        assert len(pair.negatives) == 15 and pair.positive not in pair.negatives
    batch = data.train_source().collate([(pairs, pairs.rows[0], None)] * 2, 2)
    assert batch.scores.shape == batch.text_ids.shape


def test_finished_labels_are_read(tmp_path: Path, encoder: str) -> None:
    first = make(tmp_path)
    first.prepare(encoder, tmp_path / "cache")
    files = {p: p.read_bytes() for p in (tmp_path / "labels").rglob("*") if p.is_file()}
    again = make(tmp_path)
    again.agent.open = lambda task: _Silent().open(task)  # type: ignore[method-assign]
    again.prepare(encoder, tmp_path / "cache")
    assert again.labelled.rows == first.labelled.rows
    assert {p: p.read_bytes() for p in files} == files


class _Silent(ScriptedAgent):
    """Binds the task, and must not be asked for anything."""

    def open(self, task: Any) -> Any:
        engine = super().open(task)
        engine.generate = lambda *_: pytest.fail("it was labelled again")  # type: ignore
        return engine


def test_labels_of_another_retriever_are_refused(tmp_path: Path, encoder: str) -> None:
    make(tmp_path).prepare(encoder, tmp_path / "cache")
    other = tmp_path / "other"
    shape = TinyEncoderOptions(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
    build_tiny_encoder(other, SearchWorld(**WORLD).vocabulary(), shape, seed=1)
    with pytest.raises(ValueError, match="retriever"):
        make(tmp_path).prepare(str(other), tmp_path / "cache")


def test_no_rows_are_an_error(tmp_path: Path, encoder: str) -> None:
    data = make(tmp_path, labels={"label": "local", "pos_threshold": 100})
    with pytest.raises(ValueError, match="no turn gave a training row"):
        data.prepare(encoder, tmp_path / "cache")


def test_measuring_alone_makes_no_labels(tmp_path: Path, encoder: str) -> None:
    data = make(tmp_path)
    data.prepare(encoder, tmp_path / "cache", for_training=False)
    assert not (tmp_path / "labels").exists()
    names = {one.name: one.input for batch in data.test_dataloader() for one in batch.items}
    assert names.keys() <= {"single", "multi"}
    assert set(names.values()) == {"question_query"}


def test_an_input_that_is_too_long_keeps_its_query(tmp_path: Path, encoder: str) -> None:
    data = make(tmp_path)
    data.prepare(encoder, tmp_path / "cache", for_training=False)
    text = data.input_text("question_query", "was " * 60, ["where was born"])
    assert text.endswith("[SEP] where was born")
    assert len(text.split()) == 24
    assert len(data.encoding.encode([text], "query")[0].ids) <= 24


@pytest.mark.parametrize("key", ["input", "base_input"])
def test_an_unknown_input_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.{key}='question' must be one of query, .*did you"
    ):
        make(tmp_path, **{key: "question"})
