"""Plots over runs and their correlations, from made-up metrics checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from run_tools.claim_scatter import draw_scatters, number_of
from run_tools.claim_scatter_options import Scatter, scatter_problems
from run_tools.report import report

ARMS = ["w16", "w32", "w64"]
# arm -> seed -> x (rank), y (overwriting), control (cross-entropy)
VALUES = {
    "w16": {0: (1.0, 0.1, 0.5), 1: (2.0, 0.2, 0.7)},
    "w32": {0: (3.0, 0.3, 0.6), 1: (4.0, 0.4, 0.4)},
    "w64": {0: (5.0, 0.6, 0.3), 1: (6.0, 0.5, 0.2)},
}
RANK, KO, CE = "test/pc/rank", "test/cf/ko", "test/pc/ce"
PLOT = {"name": "rank", "x": RANK, "y": [KO]}


def runs() -> dict[str, dict[int, dict[str, Any]]]:
    return {
        arm: {
            seed: {"seed": seed, RANK: rank, KO: ko, CE: ce, "mem/params": 2.0 ** len(arm)}
            for seed, (rank, ko, ce) in seeds.items()
        }
        for arm, seeds in VALUES.items()
    }


def body(folder: Path, arms: Any, *plots: dict[str, Any]) -> list[list[str]]:
    return draw_scatters(plots, arms, "toy", folder).table.body


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ({"name": "a", "x": "t"}, r"scatter\[0\] needs 'y'"),
        (PLOT | {"ys": []}, r"scatter\[0\]: unknown key 'ys'; did you mean 'y'\?"),
        (PLOT | {"name": "a/b"}, "name='a/b' must be letters, digits"),
        (PLOT | {"name": "curves"}, "name='curves' must be .* not curves"),
        (PLOT | {"name": ""}, "name='' must be a text"),
        (PLOT | {"x": 3}, "x=3 must be a text"),
        (PLOT | {"y": "t"}, "y='t' must be a list of different tags"),
        (PLOT | {"y": ["t", "t"]}, "must be a list of different tags"),
        (PLOT | {"twin": True}, "must be two tags where twin is true"),
        (PLOT | {"log_x": 1}, "log_x=1 must be true or false"),
        (PLOT | {"label_by": "seed"}, "label_by='seed' must be 'arm' or 'group'"),
        (PLOT | {"group": []}, r"group=\[\] must be an object of lists"),
        (PLOT | {"group": {"a": ["w61"]}}, r"group: unknown arm 'w61'.* \(arms: w16, w32, w64\)"),
        ("rank", "scatter.0.='rank' must be an object"),
    ],
)
def test_wrong_plots_are_refused(plot: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert not scatter_problems([plot], ARMS), "; ".join(scatter_problems([plot], ARMS))


def test_problems_of_the_list() -> None:
    assert scatter_problems({}, ARMS) == ["scatter={} must be a list of objects"]
    assert scatter_problems([PLOT, PLOT], ARMS) == ["scatter: two plots are named 'rank'"]
    assert scatter_problems([PLOT, PLOT | {"name": "b", "group": {"x": ["w16"]}}], ARMS) == []


def test_numbers_in_names_of_arms() -> None:
    assert number_of("rate8") == 8
    assert number_of("w16_s700", "s") == 700
    assert number_of("masks3_s2.5", "s") == 2.5  # not the s of masks
    with pytest.raises(ValueError, match="the arm 'base' has no number in its name"):
        number_of("base")
    with pytest.raises(ValueError, match="'w16' has no number behind 's'"):
        number_of("w16", "s")


def test_correlations_by_hand(tmp_path: Path) -> None:
    # ranks of y: 1 2 3 4 6 5, so 1 - 6 * 2 / (6 * 35) = 0.943
    (row,) = body(tmp_path, runs(), PLOT)
    assert row[:5] == ["rank", RANK, KO, "all", "+0.943"]
    assert row[7:] == [CE, "6"]
    # r_xz: ranks of z 4 6 5 3 2 1, sum d2 = 9+16+4+1+9+25 = 64, 1 - 384 / 210 = -0.829;
    # r_yz: d2 = 9+16+4+1+16+16 = 62, 1 - 372 / 210 = -0.771
    x_z, y_z, x_y = 1 - 384 / 210, 1 - 372 / 210, 1 - 12 / 210
    partial = (x_y - x_z * y_z) / ((1 - x_z**2) * (1 - y_z**2)) ** 0.5
    assert row[6] == f"{partial:+.3f}"
    assert 0 < float(row[5]) < 0.05


def test_groups_have_rows_of_their_own_and_one_together(tmp_path: Path) -> None:
    groups = {"narrow": ["w16", "w32"], "wide": ["w64"]}
    rows = body(tmp_path, runs(), PLOT | {"group": groups})
    assert [(row[3], row[4], row[-1]) for row in rows] == [
        ("narrow", "+1.000", "4"),
        ("wide", "-", "2"),
        ("all groups", "+0.943", "6"),
    ]
    overlapping = body(tmp_path, runs(), PLOT | {"group": {"a": ["w16"], "b": ["w16", "w32"]}})
    assert overlapping[-1][-1] == "4"  # a run counts once


def test_what_has_no_correlation_has_none(tmp_path: Path) -> None:
    flat = runs()
    for seeds in flat.values():
        for run in seeds.values():
            run[KO] = 0.0
            del run[CE]
    (row,) = body(tmp_path, flat, PLOT)
    assert row[4:] == ["-", "-", "-", CE, "6"]
    (own,) = body(tmp_path, runs(), PLOT | {"x": CE})
    assert own[4] == "-0.771" and own[6] == "-"  # nothing is left of a control held fixed


def test_runs_without_values_are_told(tmp_path: Path) -> None:
    some = runs()
    del some["w16"][0][KO]
    some["w32"][0][KO] = float("nan")
    found = draw_scatters([PLOT], some, "toy", tmp_path)
    assert found.notes == [f"rank: {KO} against {RANK} is in 4 of 6 runs"]
    assert found.table.body[0][-1] == "4"
    none = draw_scatters([PLOT | {"y": ["test/never"]}], some, "toy", tmp_path / "none")
    assert none.notes == [f"rank: test/never against {RANK} is in 0 of 6 runs"]
    assert not none.images and none.markdown() == ""


def test_a_logarithm_of_nothing_is_refused(tmp_path: Path) -> None:
    some = runs()
    some["w32"][1][RANK] = 0.0
    with pytest.raises(ValueError, match=f"log_x=true needs x above 0, but {RANK} is 0 in arm w32"):
        draw_scatters([PLOT | {"log_x": True}], some, "toy", tmp_path)


def draw(monkeypatch: pytest.MonkeyPatch, folder: Path, plot: dict[str, Any]) -> Any:
    """The figure itself, caught as it is written."""
    from matplotlib.figure import Figure

    caught: list[Any] = []
    save = Figure.savefig

    def saved(figure: Figure, *args: Any, **kwargs: Any) -> None:
        caught.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saved)
    assert draw_scatters([plot], runs(), "toy", folder).images[0].is_file()
    return caught[0]


def test_twin_axes_hold_means_and_standard_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"first": ["w64", "w16"], "second": ["w32"]}
    plot = {"name": "paradox", "x": "arm:w", "y": [CE, KO], "twin": True, "log_x": True}
    figure = draw(monkeypatch, tmp_path, plot | {"group": groups})
    left, right = figure.axes
    assert left.get_xscale() == right.get_xscale() == "log"
    line, _, (bars,) = left.containers[0]
    assert line.get_xdata().tolist() == [16.0, 64.0]  # by size, whatever the order in the file
    assert line.get_ydata().tolist() == pytest.approx([0.6, 0.25])
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.6 - 0.1, 0.6 + 0.1))  # stdev 0.1414 over sqrt 2
    dashed = right.containers[0][0]
    assert dashed.get_ydata().tolist() == pytest.approx([0.15, 0.55])
    assert dashed.get_linestyle() == "--" and dashed.get_color() == line.get_color()
    assert right.containers[1][0].get_xdata().tolist() == [32.0]
    assert Scatter(**plot).control == CE  # type: ignore[arg-type]


def test_points_have_the_colour_of_their_arm_or_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_arm = draw(monkeypatch, tmp_path, PLOT | {"y": [KO, CE]})
    assert [len(panel.collections) for panel in by_arm.axes] == [3, 3]
    assert by_arm.axes[0].collections[2].get_offsets().tolist() == [[5.0, 0.6], [6.0, 0.5]]
    monkeypatch.undo()
    groups = {"group": {"a": ["w16", "w32"], "b": ["w64"]}}
    by_group = draw(monkeypatch, tmp_path, PLOT | groups)
    assert [c.get_label() for c in by_group.axes[0].collections] == ["a", "b"]
    monkeypatch.undo()
    both = draw(monkeypatch, tmp_path, PLOT | groups | {"label_by": "arm"})
    assert [c.get_label() for c in both.axes[0].collections] == ARMS


# --- the page -------------------------------------------------------------------------------------


def page(house: Path, scatter: list[Any] | None) -> str:
    claim = house / "conf" / "claim" / "toy"
    claim.mkdir(parents=True, exist_ok=True)
    for arm, seeds in runs().items():
        (claim / f"{arm}.yaml").write_text("# @package _global_\n")
        for seed, run in seeds.items():
            folder = house / "outputs" / "toy" / arm / f"s{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.json").write_text(json.dumps(run))
    options: dict[str, Any] = {"metrics": ["ko"], "baseline_arm": "w16"}
    if scatter is not None:
        options["scatter"] = scatter
    (claim / "report.json").write_text(json.dumps(options))
    report("toy", house / "outputs", house / "docs", house / "conf")
    return (house / "docs" / "toy.md").read_text(encoding="utf-8")


def test_the_page_has_plots_and_correlations_and_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = {"name": "paradox", "x": "arm", "y": [CE, KO], "twin": True}
    plots = [twin, PLOT, PLOT | {"name": "gone", "y": ["test/never"]}]
    text = page(tmp_path, plots)
    section = text.split("## Metrics against each other")[1].split("\n## ")[0]
    assert "(toy_paradox.png)" in section and "(toy_rank.png)" in section
    assert section.count("| rank |") == 1 and "| paradox |" not in section
    assert f"- **Note:** gone: test/never against {RANK} is in 0 of 6 runs" in text
    assert str(tmp_path / "docs" / "toy_rank.png") in capsys.readouterr().out
    images = {path.name: path.read_bytes() for path in (tmp_path / "docs").glob("*.png")}
    assert set(images) == {"toy.png", "toy_paradox.png", "toy_rank.png"}
    assert page(tmp_path, plots) == text
    again = {path.name: path.read_bytes() for path in (tmp_path / "docs").glob("*.png")}
    assert again == images


def test_without_plots_the_page_has_no_section(tmp_path: Path) -> None:
    text = page(tmp_path, None)
    assert "each other" not in text and "Correlations" not in text
    assert page(tmp_path, []) == text


def test_a_wrong_plot_is_named_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report.json: scatter\[0\].group: unknown arm 'x'"):
        page(tmp_path, [PLOT | {"group": {"a": ["x"]}}])
