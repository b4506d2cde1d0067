"""Negatives mined in training: never answers, within the margins, the same after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from callbacks.hard_negatives import HardNegatives
from datamodules.pairs import text_id
from tests.runs import assert_same_weights, last_of, weights

Make = Callable[..., Any]
TINY = [
    "model=contrastive",
    "callbacks=[default,hard_negatives]",
    "callbacks.hard_negatives.count=2",
    "data.num_negatives=2",
    "data.batch_size=8",
    "data.datasets=[domain_0,domain_1]",
    "data.task.num_train=24",
    "data.task.num_pretrain=16",
    "data.task.num_val=8",
    "data.task.num_test=8",
    "backbone.tiny.hidden_size=32",
    "backbone.tiny.num_layers=1",
    "backbone.warm_start.epochs=1",
    "trainer.max_steps=6",
]


def built(make_config: Make, *overrides: str) -> tuple[Any, Any, Any]:
    """Callback, module and data of a run that has ended."""
    seen: dict[str, Any] = {}
    real = train.build_trainer

    def keep(config: Any, data: Any, folder: Any) -> Any:
        trainer = real(config, data, folder)
        seen["trainer"], seen["data"] = trainer, data
        return trainer

    train.build_trainer = keep  # type: ignore[assignment]
    try:
        train.run(make_config(*TINY, *overrides))
    finally:
        train.build_trainer = real
    (callback,) = [c for c in seen["trainer"].callbacks if isinstance(c, HardNegatives)]
    return callback, seen["trainer"].lightning_module, seen["data"]


def test_mined_negatives_are_no_answers_and_are_trained_on(make_config: Make) -> None:
    callback, module, data = built(make_config)
    assert callback.mined_at == 0
    assert set(callback.mined) == {"domain_0", "domain_1"}
    loader = data.train_dataloader()
    for pairs in data.training_sets():
        items, known = data.passages_of(pairs)
        negatives = callback.mined[pairs.name]
        assert len(negatives) == len(pairs.rows) == 24
        assert any(negatives), "nothing was found at all"
        for row, places, answers in zip(pairs.rows, negatives, known, strict=True):
            assert not set(places) & set(answers)
            assert items[answers[0]] == row.positive
    batch = loader.source.batch(0, 0)
    assert batch.text_ids.shape[1] > 1, "batches must hold what was mined"
    mined = {text_id(item) for p in data.training_sets() for item in data.passages_of(p)[0]}
    assert set(batch.text_ids[batch.passage_mask].tolist()) <= mined


def test_margins_drop_near_candidates(make_config: Make) -> None:
    tight, *_ = built(make_config, "callbacks.hard_negatives.relative_margin=0.9", "run_id=tight")
    loose, *_ = built(make_config, "callbacks.hard_negatives.relative_margin=null", "run_id=loose")
    count = [sum(len(row) for rows in c.mined.values() for row in rows) for c in (tight, loose)]
    assert count[0] < count[1] == 2 * 48


def test_mined_again_when_due(make_config: Make) -> None:
    once, *_ = built(make_config, "run_id=once")
    again, *_ = built(make_config, "callbacks.hard_negatives.every_n_steps=4", "run_id=again")
    assert (once.mined_at, again.mined_at) == (0, 4)
    assert once.mined != again.mined, "the model has changed, and so have its hardest negatives"


def test_a_resumed_run_has_the_same_negatives(make_config: Make, tmp_path: Path) -> None:
    often = ["callbacks.hard_negatives.every_n_steps=3", "callbacks.checkpoint.every_n_steps=1"]
    train.run(make_config(*TINY, *often, "run_id=whole"))
    cut = [*TINY, *often, "run_id=cut", "resume=auto"]
    with pytest.raises(KeyError, match="crashed"):
        train.run(make_config(*cut, "+callbacks.crash={_target_: tests.runs.CrashAt, batch: 4}"))
    train.run(make_config(*cut))
    folder = tmp_path / "contrastive"
    assert_same_weights(weights(last_of(folder / "whole")), weights(last_of(folder / "cut")))


def test_refusals(make_config: Make) -> None:
    with pytest.raises(ValueError, match=r"count=2 needs data\.num_negatives=2"):
        train.run(make_config(*TINY, "data.num_negatives=1"))
    with pytest.raises(ValueError, match="range_max=3 must be at least"):
        HardNegatives(count=4, range_max=3)
    with pytest.raises(ValueError, match="count=0"):
        HardNegatives(count=0)


def test_vectors_as_predictions(make_config: Make, tmp_path: Path) -> None:
    train.run(make_config(*TINY, "run_id=made"))
    export = tmp_path / "contrastive" / "made" / "export"
    named = ["mode=predict", "backbone=hf", f"backbone.path={export}", "backbone.dtype=float32"]
    small = [word for word in TINY if not word.startswith(("backbone.", "callbacks"))]
    train.run(make_config(*small, *named, f"predictions={tmp_path}/vectors.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
    first = [r for r in records if (r["set"], r["part"]) == ("domain_0", "query")]
    assert [r["place"] for r in first] == list(range(8))
    vectors = torch.tensor([r["vector"] for r in first])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(8), atol=1e-5)
    module = train.load(tmp_path / "contrastive" / "made")
    assert module.embed(["d0c1a d0c2b", "d0c3a"], "query").shape == (2, 32)
