"""Description files of claims: what is refused, and the ones that ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from run_tools.claim_options import ClaimOptions, found_cells, tag_of

ROOT = Path(__file__).resolve().parents[2]
ARMS = ["base", "unified"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ["accuracy"]}, r"unknown key 'metric'; did you mean 'metrics'\?"),
        ({"metrics": "accuracy"}, "metrics='accuracy' must be a list of texts"),
        ({"rows": [1]}, r"rows=\[1\] must be a list of texts"),
        ({"baseline_arm": "bse"}, r"baseline_arm: unknown arm 'bse'; did you mean 'base'\?"),
        ({"pairs": [["x", "base/maj8"]]}, r"pairs\[0\]=.* must be \[label"),
        ({"pairs": [["x", "base/maj8", "unifid/maj8"]]}, r"pairs\[0\]: unknown arm 'unifid'"),
        ({"pairs": 3}, "pairs=3 must be a list"),
        ([], "must be an object"),
    ],
)
def test_wrong_files_are_refused(tmp_path, options, message):
    (tmp_path / "report.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message) as error:
        ClaimOptions.read(tmp_path, ARMS)
    assert str(tmp_path / "report.json") in str(error.value)


def test_all_problems_are_named_at_once(tmp_path):
    (tmp_path / "report.json").write_text('{"row": [], "baseline_arm": 3}')
    with pytest.raises(ValueError, match="unknown key 'row'.*; baseline_arm: unknown arm 3"):
        ClaimOptions.read(tmp_path, ARMS)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "report.json").write_text("metrics: [accuracy]")
    with pytest.raises(ValueError, match="report.json is not JSON"):
        ClaimOptions.read(tmp_path, ARMS)


def test_no_file_gives_the_defaults(tmp_path):
    assert ClaimOptions.read(tmp_path, ARMS) == ClaimOptions()


def test_cells_are_the_numbers_below_test():
    run = {"test/maj8/accuracy": 1, "test/accuracy": 0.5, "test/name": "x", "val/accuracy": 1.0}
    cells = found_cells({"base": {0: run}, "unified": {1: {"test/base/maj8/accuracy": 0.0}}})
    assert cells == {("maj8", "accuracy"), ("", "accuracy"), ("base/maj8", "accuracy")}
    assert {tag_of(*one) for one in cells} == {
        "test/maj8/accuracy",
        "test/accuracy",
        "test/base/maj8/accuracy",
    }


def test_defaults_follow_the_rows_that_are_asked_for():
    run = {"test/maj8/accuracy": 1.0, "test/conf_auc": 0.5, "test/greedy/flip_rate": 0.0}
    shown = ClaimOptions(rows=["maj8"]).filled({"base": {0: run}})
    assert (shown.metrics, shown.rows, shown.pairs) == (["accuracy"], ["maj8"], [])
    shown = ClaimOptions(metrics=["flip_rate"]).filled({"base": {0: run}})
    assert shown.rows == ["greedy"]


def test_the_reflectrm_claim_compares_rows_that_it_shows():
    values = json.loads((ROOT / "conf" / "claim" / "reflectrm" / "report.json").read_text())
    assert set(values) == {"metrics", "rows", "pairs", "extra"}
    sides = [side.split("/") for _, *pair in values["pairs"] for side in pair]
    assert {arm for arm, _ in sides} == {"base", "rft", "rft_equal_volume", "unified"}
    assert {name for _, name in sides} <= set(values["rows"])
