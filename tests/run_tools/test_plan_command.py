"""``python train.py ... mode=plan`` over every model and recipe; what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data_files import write_judge
from tests.models import EMBEDDING_MODELS, POLICY_MODELS, composed, has_rollouts
from tests.runs import REPO, SMALL, main

RECIPES = sorted(
    path.stem
    for path in (REPO / "conf" / "experiment").glob("*_paper.yaml")
    if has_rollouts(composed(f"experiment={path.stem}"))
)


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def _run(tmp_path: Path, *overrides: str) -> tuple[int, str, str]:
    own = [f"output_dir={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}", "mode=plan"]
    return main(*own, *overrides)


@pytest.mark.parametrize("model", POLICY_MODELS)
def test_every_model_is_planned_and_nothing_started(model: str, tmp_path: Path) -> None:
    before, target = _states(), tmp_path / "deep" / "plan.json"
    found = _run(tmp_path, f"model={model}", *SMALL, "plan.gpus=[8]", f"plan.output={target}")
    status, output, errors = found
    assert status == 0, errors
    assert "nothing was started" in output
    assert _states() == before
    assert [path.name for path in tmp_path.iterdir()] == ["deep"], "a folder was written"
    machines = json.loads(target.read_text())["machines"]
    assert len(machines) == 2
    assert all(one["phases"]["peak"] > 0 and one["fits"] for one in machines.values())


@pytest.mark.parametrize("model", EMBEDDING_MODELS)
def test_models_without_rollouts_are_refused(model: str, tmp_path: Path) -> None:
    status, _, errors = _run(tmp_path, f"model={model}")
    assert status == 1
    assert f"model={model} writes none" in errors
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported judge."""
    return write_judge(tmp_path_factory.mktemp("judge"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("trainer", ["auto", "fsdp"])
def test_every_recipe_is_planned_on_a_tiny_backbone(
    name: str, trainer: str, tmp_path: Path, judge: Path
) -> None:
    small = ["backbone=tiny", "backbone.path=null", f"trainer={trainer}", "plan.gpus=[8]"]
    if "reward: judge" in (REPO / "conf" / "experiment" / f"{name}.yaml").read_text():
        small.append(f"reward.path={judge}")
    status, output, errors = _run(tmp_path, f"experiment={name}", *small, *SMALL)
    assert status == 0, errors
    assert "8 x H100: fits" in output
    assert not list(tmp_path.iterdir())


def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    name = "nobody/has-this-model"
    status, _, errors = _run(tmp_path, "model=grpo", "backbone=hf", f"backbone.path={name}")
    assert status == 1
    assert "Traceback" not in errors
    assert f"backbone.path='{name}' cannot be loaded" in errors
    assert "give a folder that holds that file" in errors


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("plan.gpu=[8]", "unknown key 'plan.gpu'; did you mean 'plan.gpus'"),
        ("plan.mfus=1", "did you mean 'plan.mfu'"),
        ("+plan.bandwith_tbs=1", "unknown key 'plan.bandwith_tbs'; did you mean 'bandwidth_tbs'"),
        ("plan.mfu=2", "plan.mfu=2 must be in (0, 1]"),
        ("plan.gpus=[0]", "plan.gpus=[0]: give numbers of GPUs"),
        ("mode=plann", "mode='plann' must be one of"),
    ],
)
def test_wrong_keys_and_values_are_refused(override: str, wanted: str, tmp_path: Path) -> None:
    status, _, errors = _run(tmp_path, "model=grpo", *SMALL, override)
    assert status == 1
    assert wanted in errors, errors
    assert not list(tmp_path.iterdir())
