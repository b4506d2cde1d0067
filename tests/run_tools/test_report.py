"""Pages of claims from made-up metrics: every number checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from run_tools.report import Cell, cell, difference, read_arms, report, sweep_command

PM = "\u00b1"
# greedy and maj8 accuracy by seed; differences maj8 - greedy of unified: 0.1, 0.3, -0.1
UNIFIED = {0: (0.6, 0.7), 1: (0.5, 0.8), 2: (0.7, 0.6)}
BASE = {0: (0.4, 0.5), 1: (0.4, 0.6), 2: (0.4, 0.7)}


class House:
    """A conf folder, an output folder and a place for pages."""

    def __init__(self, path: Path) -> None:
        self.conf, self.outputs, self.pages = path / "conf", path / "outputs", path / "docs"

    def claim(self, arms=("base", "unified"), options=None, text=None, name="toy") -> None:
        folder = self.conf / "claim" / name
        folder.mkdir(parents=True, exist_ok=True)
        for arm in arms:
            (folder / f"{arm}.yaml").write_text("# @package _global_\n")
        if options is not None:
            (folder / "report.json").write_text(json.dumps(options))
        if text is not None:
            (folder / "README.md").write_text(text)

    def run(self, arm: str, seed: int, values=None, **tags) -> Path:
        folder = self.outputs / "toy" / arm / f"s{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {"seed": seed, "model": "reflectrm", "steps": 0 if arm == "base" else 10}
        metrics |= {"time/wall_s": 30.0, "train/loss": 1.0, "val/greedy/accuracy": 0.9}
        if values is not None:
            metrics |= {"test/greedy/accuracy": values[0], "test/maj8/accuracy": values[1]}
        (folder / "metrics.json").write_text(json.dumps(metrics | tags))
        return folder

    def fill(self) -> None:
        for arm, table in (("base", BASE), ("unified", UNIFIED)):
            for seed, values in table.items():
                self.run(arm, seed, values)

    def report(self, claim="toy") -> dict[str, float]:
        return report(claim, self.outputs, self.pages, self.conf)

    @property
    def page(self) -> str:
        return (self.pages / "toy.md").read_text(encoding="utf-8")


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def row(page: str, *start: str) -> list[str]:
    """Cells of the only table row that begins with ``start``."""
    rows = [line for line in page.splitlines() if line.startswith(f"| {' | '.join(start)} |")]
    assert len(rows) == 1, (start, rows)
    return [text.strip() for text in rows[0].strip("|").split("|")][len(start) :]


# --- numbers --------------------------------------------------------------------------------------


def test_cell_by_hand():
    found = cell([1.0, 2.0, 3.0, 4.0])
    # squares of -1.5, -0.5, 0.5, 1.5 add to 5; 5/3 is the variance, over 4 values
    assert (found.mean, found.count) == (2.5, 4)
    assert found.error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert cell([0.25]) == Cell(0.25, 0.0, 1)
    assert str(cell([0.25])) == "0.250"
    assert str(cell([0.0, 0.5])) == f"0.250 {PM} 0.250"
    assert str(cell([431.0, 433.0])) == f"432.0 {PM} 1.0"


def test_difference_by_hand():
    first = {seed: maj for seed, (_, maj) in UNIFIED.items()}
    second = {seed: greedy for seed, (greedy, _) in UNIFIED.items()}
    found = difference(first, second)
    # 0.1, 0.3, -0.1: mean 0.1, variance (0 + 0.04 + 0.04) / 2, two have the sign
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(math.sqrt(0.04 / 3))
    assert str(found) == f"+0.100 {PM} 0.115 (2/3)"
    assert str(difference(second, first)) == f"-0.100 {PM} 0.115 (2/3)"


def test_difference_takes_common_seeds_only():
    assert str(difference({0: 0.5, 1: 0.5, 7: 9.0}, {1: 0.75, 2: 9.0})) == "-0.250 (1/1)"
    assert difference({0: 1.0}, {1: 1.0}) is None
    same = difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert str(same) == f"+0.000 {PM} 0.000 (2/2)"
    assert str(difference({0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0})).endswith("(0/2)")


def test_sweep_command_names_the_seeds():
    end = "hydra/launcher=joblib"
    start = "python train.py -m '+claim/toy=glob(*)'"
    assert sweep_command("toy", [1, 0, 2], "outputs") == f"{start} 'seed=range(0,3)' {end}"
    assert sweep_command("toy", [4, 0], "outputs") == f"{start} seed=0,4 {end}"
    assert sweep_command("toy", [3], "runs") == f"{start} seed=3 {end} output_dir=runs"
    assert sweep_command("toy", [3], "/home/me/runs") == f"{start} seed=3 {end}"


# --- pages ----------------------------------------------------------------------------------------


def test_defaults_show_everything_and_compare_with_the_first_arm(house, capsys):
    house.claim()
    house.fill()
    values = house.report()
    page = house.page
    assert page.startswith("# Claim: toy\n")
    assert row(page, "unified", "greedy") == [f"0.600 {PM} 0.058", "3"]
    assert row(page, "unified", "maj8") == [f"0.700 {PM} 0.058", "3"]
    assert row(page, "base", "greedy") == [f"0.400 {PM} 0.000", "3"]
    # by seed 0.2, 0.1, 0.3
    assert row(page, "unified greedy - base greedy") == [f"+0.200 {PM} 0.058 (3/3)"]
    # by seed 0.2, 0.2, -0.1
    assert row(page, "unified maj8 - base maj8") == [f"+0.100 {PM} 0.100 (2/3)"]
    assert "val/" not in page and "train/loss" not in page and "Note:" not in page
    assert values == pytest.approx(
        {
            "base/greedy/accuracy": 0.4,
            "base/maj8/accuracy": 0.6,
            "unified/greedy/accuracy": 0.6,
            "unified/maj8/accuracy": 0.7,
            "base/seeds": 3.0,
            "unified/seeds": 3.0,
        }
    )
    printed = capsys.readouterr().out
    assert f"0.600 {PM} 0.058" in printed
    assert str(house.pages / "toy.md") in printed and str(house.pages / "toy.png") in printed


def test_description_file_chooses_what_is_shown(house):
    house.claim(
        options={
            "metrics": ["consistency", "accuracy"],
            "rows": ["maj8", "greedy"],
            "pairs": [["vote minus greedy", "unified/maj8", "unified/greedy"]],
            "extra": ["test/conf_auc", "time/train_s"],
        },
        text="What we claim.\n\n*Nothing* here shows it: a|b.\n",
    )
    for seed, values in UNIFIED.items():
        tags = {"test/conf_auc": 0.5 + seed / 10, "time/train_s": 200.0}
        tags |= {"test/greedy/consistency": 0.25, "test/oracle/accuracy": 1.0}
        house.run("unified", seed, values, **tags)
    house.run("base", 0, BASE[0])
    values = house.report()
    page = house.page
    start = "# Claim: toy\n\nWhat we claim.\n\n*Nothing* here shows it: a|b.\n\n"
    assert page.startswith(start)
    assert "| arm | inference | consistency | accuracy | seeds |" in page
    assert page.index("| unified | maj8 |") < page.index("| unified | greedy |")
    assert row(page, "unified", "greedy") == [f"0.250 {PM} 0.000", f"0.600 {PM} 0.058", "3"]
    assert row(page, "unified", "maj8") == ["-", f"0.700 {PM} 0.058", "3"]
    assert row(page, "vote minus greedy") == ["-", f"+0.100 {PM} 0.115 (2/3)"]
    assert row(page, "base", "-") == ["-", "1"]  # no extra of this arm
    assert "| unified | 0.600 " + PM + " 0.058 | 200.0 " + PM + " 0.0 | 3 |" in page
    assert "oracle" not in page and "unified/oracle/accuracy" not in values
    assert " - base" not in page  # pairs replace the comparison with a baseline


def test_state_rows_and_a_baseline_beside_pairs(house):
    house.claim(options={"baseline_arm": "unified", "rows": [""],
                         "pairs": [["state", "unified", "base"]]})  # fmt: skip
    house.run("base", 0, **{"test/accuracy": 0.25})
    house.run("unified", 0, **{"test/accuracy": 0.75})
    assert house.report()["unified/accuracy"] == 0.75
    assert row(house.page, "unified", "-") == ["0.750", "1"]
    assert row(house.page, "state") == ["+0.500 (1/1)"]
    assert row(house.page, "base - unified") == ["-0.500 (1/1)"]


def test_text_with_a_heading_gets_no_second_title(house):
    house.claim(text="# Judges that reflect\n\nText.\n")
    house.fill()
    house.report()
    assert house.page.startswith("# Judges that reflect\n\nText.\n\n## Results\n")
    assert "# Claim" not in house.page


def test_seeds_command_and_time_are_on_the_page(house):
    house.claim()
    house.fill()
    house.run("unified", 5, UNIFIED[0], **{"time/wall_s": "lost"})
    house.report()
    page = house.page
    assert "- Seeds of base: 0, 1, 2\n- Seeds of unified: 0, 1, 2, 5\n" in page
    # six runs of 30 s
    assert "3.0 minutes (time/wall_s over 6 runs; the other 1 recorded no time)" in page
    assert "seed=0,1,2,5 hydra/launcher=joblib\npython train.py mode=report report.cla" in page
    assert str(house.outputs) not in page
    assert "- Seeds of" in page and "torch where this page was made: " in page


# --- what is missing or odd -----------------------------------------------------------------------


def test_missing_arms_seeds_and_unfinished_runs_are_named(house):
    house.claim(arms=("base", "rft", "unified", "volume"))
    house.fill()
    (house.outputs / "toy" / "base" / "s2" / "metrics.json").unlink()
    (house.outputs / "toy" / "rft" / "s0" / "checkpoints").mkdir(parents=True)
    house.report()
    expected = "not run: base with seed 2 (unfinished: s2); rft (unfinished: s0); volume\n"
    assert expected in house.page
    assert row(house.page, "base", "maj8") == [f"0.550 {PM} 0.050", "2"]
    # seeds 0 and 1 only: 0.2, 0.1
    assert row(house.page, "unified greedy - base greedy") == [f"+0.150 {PM} 0.050 (2/2)"]


def test_metric_missing_in_one_seed_is_counted(house):
    house.claim()
    house.fill()
    for seed in (0, 1):
        house.run("unified", seed, UNIFIED[seed], **{"test/greedy/flip_rate": 0.5})
    house.run("unified", 2, UNIFIED[2], **{"test/greedy/flip_rate": float("nan")})
    house.report()
    assert row(house.page, "unified", "greedy")[1] == f"0.500 {PM} 0.000 (n=2)"
    assert "left out, not finite: unified seed 2 test/greedy/flip_rate" in house.page


def test_single_seed_has_no_error(house):
    house.claim()
    house.run("base", 4, BASE[0])
    house.run("unified", 4, UNIFIED[0])
    house.report()
    assert row(house.page, "unified", "greedy") == ["0.600", "1"]
    assert row(house.page, "unified greedy - base greedy") == ["+0.200 (1/1)"]


def test_unequal_steps_warn_but_arms_without_training_are_exempt(house, capsys):
    house.claim(arms=("base", "rft", "unified"))
    house.fill()
    house.run("rft", 0, BASE[0])
    house.report()
    assert "differ in steps" not in house.page
    house.run("rft", 0, BASE[0], steps=12)
    house.report()
    line = "arms differ in steps: rft 12; unified 10. A fair comparison needs equal steps"
    assert line in house.page
    assert line in capsys.readouterr().out


def test_unplanned_arms_and_unmeasured_names_are_named(house):
    house.claim(
        options={"metrics": ["accuracy", "flips"], "rows": ["maj8", "gredy"],
                 "pairs": [["x", "unified/majj8", "base/maj8"]], "extra": ["test/auc"]}
    )  # fmt: skip
    house.fill()
    house.run("other", 0, BASE[0])
    house.report()
    page = house.page
    assert "runs of arms that conf/claim/toy does not hold: other" in page
    assert (
        "in no run: row of a pair majj8 (did you mean 'maj8'?), metric flips, row gredy "
        "(did you mean 'greedy'?), extra test/auc" in page
    )
    assert "| arm | inference | accuracy | seeds |" in page
    assert row(page, "x") == ["-"]


def test_folders_of_ordinary_runs_are_no_arms(house):
    """``model=reflectrm`` writes outputs/reflectrm/s0, beside the arms of the claim reflectrm."""
    house.claim()
    house.fill()
    for name in ("checkpoints", "test"):
        (house.outputs / "toy" / "s0" / name).mkdir(parents=True)
    (house.outputs / "toy" / "s0" / "metrics.json").write_text('{"seed": 0}')
    house.report()
    assert "Note:" not in house.page and "s0" not in house.page


# --- errors ---------------------------------------------------------------------------------------


def test_claim_must_be_one_that_exists(house):
    with pytest.raises(ValueError, match=r"report.claim=<name>; conf/claim has: no claims"):
        house.report(None)
    house.claim()
    house.claim(name="mgs")
    with pytest.raises(ValueError, match=r"report.claim=<name>; conf/claim has: mgs, toy"):
        house.report(None)
    with pytest.raises(ValueError, match=r"report.claim=tooy is unknown; did you mean 'toy'\?"):
        house.report("tooy")
    with pytest.raises(ValueError, match="unknown"):
        house.report("../claim/toy")


def test_no_finished_run_names_the_command(house):
    house.claim()
    (house.outputs / "toy" / "base" / "s0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no finished runs below .*toy; run python train.py -m"):
        house.report()
    assert not house.pages.exists()


def test_runs_without_test_metrics_are_refused(house):
    house.claim()
    house.run("base", 0)
    with pytest.raises(ValueError, match="hold no test/... metrics"):
        house.report()


@pytest.mark.parametrize("text", ["{", "[]", '{"test/accuracy": 1.0}', '{"seed": null}'])
def test_broken_metrics_name_the_file(house, text):
    house.claim()
    (house.run("base", 0) / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"base/s0/metrics.json holds no metrics with a seed"):
        house.report()


def test_two_runs_of_one_seed_are_refused(house):
    house.claim()
    house.run("base", 0, BASE[0])
    (house.outputs / "toy" / "base" / "again").mkdir()
    again = house.outputs / "toy" / "base" / "again" / "metrics.json"
    again.write_text('{"seed": 0, "test/greedy/accuracy": 1.0}')
    with pytest.raises(ValueError, match=r"two runs of arm base have seed 0: .*again and .*s0"):
        read_arms("toy", house.outputs)


# --- files ----------------------------------------------------------------------------------------


def test_same_runs_give_the_same_bytes(house, tmp_path):
    house.claim(text="Text.")
    house.fill()
    house.report()
    first = {path.name: path.read_bytes() for path in house.pages.iterdir()}
    assert sorted(first) == ["toy.md", "toy.png"]  # nothing unfinished is left
    other = House(tmp_path / "elsewhere")
    other.claim(text="Text.")
    for arm, table in (("unified", UNIFIED), ("base", BASE)):  # another order of writing
        for seed in reversed(table):
            other.run(arm, seed, table[seed])
    other.report()
    assert {path.name: path.read_bytes() for path in other.pages.iterdir()} == first


def test_figure_is_a_png_of_150_dpi(house):
    from PIL import Image

    house.claim()
    house.fill()
    house.run("unified", 0, UNIFIED[0], **{"test/greedy/consistency": 0.5})
    house.report()
    image = house.pages / "toy.png"
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(image) as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert min(picture.size) > 600
    assert "](toy.png)" in house.page


def test_command_line_says_what_is_wrong(monkeypatch, tmp_path):
    from omegaconf import OmegaConf

    import train

    config = OmegaConf.create({"mode": "report", "output_dir": str(tmp_path),
                               "report": {"claim": None, "folder": str(tmp_path)}})  # fmt: skip
    with pytest.raises(ValueError, match=r"report.claim=<name>; conf/claim has: .*reflectrm"):
        train.run(config)
