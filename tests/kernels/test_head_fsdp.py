"""The fused head under ``fully_shard`` on two gloo processes equals an unsharded, plain head."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.head_worker import LAYOUTS, RESHARD
from tests.runs import REPO, call, environment

pytestmark = pytest.mark.slow
UNITS = ("head unit", "root", "layers and root")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote: gaps or a text, by case."""
    folder = tmp_path_factory.mktemp("head")
    worker = str(REPO / "tests" / "kernels" / "head_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options = {"env": environment(PYTHONPATH=str(REPO))}
    result = call(*launcher, *rendezvous, worker, str(folder), **options)
    assert result.returncode == 0, result.stderr
    assert "returned a view tensor" not in result.stderr, "in-place use would drop FSDP2's hook"
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_close(found: list[dict[str, Any]], case: str, atol: float) -> None:
    for rank, cases in enumerate(found):
        gaps = cases[case]
        assert isinstance(gaps, dict), f"rank {rank}, {case}: {gaps}"
        assert len(gaps) > 3
        wrong = {name: value for name, value in gaps.items() if not value <= atol}
        assert not wrong, f"rank {rank}, {case}"


@pytest.mark.parametrize("word", RESHARD)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(found: list[dict[str, Any]], layout: str, word: str) -> None:
    assert_close(found, f"{layout}, {word}", 1e-5)


@pytest.mark.parametrize("layout", UNITS)
@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_adapters(found: list[dict[str, Any]], kind: str, layout: str) -> None:
    assert_close(found, f"{kind}, {layout}", 1e-5)
    wanted = ["lora_A", "lora_B"] if kind == "lora" else ["modules_to_save"]
    names = " ".join(found[0][f"{kind}, {layout}"])
    assert all(word in names for word in wanted)


@pytest.mark.parametrize("layout", UNITS)
def test_bfloat16_parameters(found: list[dict[str, Any]], layout: str) -> None:
    """Within the rounding of a bfloat16 body; a wrong gradient would be off by its own size."""
    assert_close(found, f"bfloat16, {layout}", 0.1)


@pytest.mark.parametrize("layout", ["head unit", "tied unit", "root"])
def test_reading_the_weight_later_is_refused(found: list[dict[str, Any]], layout: str) -> None:
    for cases in found:
        text = cases[f"read, {layout}"]
        assert "weight is a DTensor" in text
        assert "fuse_lm_head(model)" in text, "the message says what to do"


def test_a_head_outside_the_wrapped_forward_is_refused(found: list[dict[str, Any]]) -> None:
    for cases in found:
        assert "weight is a DTensor" in cases["forward, not gathered"]


def test_an_adapter_sharded_by_itself_is_refused(found: list[dict[str, Any]]) -> None:
    for cases in found:
        assert "lora_B.weight of the head is a DTensor" in cases["lora_B unit"]


def test_fuse_comes_before_sharding(found: list[dict[str, Any]]) -> None:
    for cases in found:
        assert "call fuse_lm_head before fully_shard" in cases["late"]
        assert cases["settings"] == "3"
