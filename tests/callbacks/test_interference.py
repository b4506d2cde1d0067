"""Forgetting and rigidity from made-up validation scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.interference import Interference


class Points:
    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))


def validate(callback: Interference, step: int, **scores: float) -> dict[str, float]:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(global_step=step))
    logger = Points()
    trainer: Any = SimpleNamespace(
        sanity_checking=False, fit_loop=loop, loggers=[logger], global_step=step
    )
    module: Any = SimpleNamespace(results={f"val/score/{d}": v for d, v in scores.items()})
    module.results["val/score"] = 0.5
    callback.on_validation_end(trainer, module)
    (at, values), *_ = logger.points
    assert at == step and values.items() <= module.results.items()
    return values


def test_forgetting_is_the_fall_from_the_best() -> None:
    callback = Interference(tag="val/score/<d>")
    assert validate(callback, 1, math=0.2, chat=0.5) == {
        "val/forgetting/math": 0.0, "val/forgetting/chat": 0.0,
    }  # fmt: skip
    assert validate(callback, 2, math=0.9, chat=0.4)["val/forgetting/chat"] == (pytest.approx(0.1))
    resumed = Interference(tag="val/score/<d>")
    resumed.load_state_dict(callback.state_dict())
    got = validate(resumed, 3, math=0.6, chat=0.45)
    assert got["val/forgetting/math"] == pytest.approx(0.3)
    assert got["val/forgetting/chat"] == pytest.approx(0.05)


def test_rigidity_is_what_the_expert_reached_and_this_run_never_did(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"val/score/math": 0.95, "seed": 0}))
    experts = {"math": str(path), "chat": str(path), "if": str(tmp_path / "none.json")}
    callback = Interference(tag="val/score/<d>", experts=experts)
    with pytest.warns(UserWarning) as warned:
        callback.on_fit_start(None, None)  # type: ignore[arg-type]
    told = " ".join(str(one.message) for one in warned)
    assert "it holds no val/score/chat" in told and "none.json: there is no such file" in told
    validate(callback, 1, math=0.7)
    got = validate(callback, 2, math=0.6)
    assert got["val/rigidity/math"] == pytest.approx(0.25)
    assert got["val/forgetting/math"] == pytest.approx(0.1)
    assert set(got) == {"val/rigidity/math", "val/forgetting/math"}


def test_a_tag_without_a_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold <d> once"):
        Interference(tag="val/score")
