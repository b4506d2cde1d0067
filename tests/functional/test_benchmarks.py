"""Breakdowns of RewardBench, RM-Bench and JudgeBench against hand-made tables and slow loops."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.tasks.base import Pair
from datamodules.tasks.preferences import PreferencePairs
from lightning_modules.functional.benchmarks import (
    BENCHMARKS,
    JUDGE_BENCH_SOURCES,
    REWARD_BENCH_WEIGHTS,
    RM_BENCH_STYLES,
    benchmark_metrics,
    composites,
    find_benchmark,
    overall,
    pair_metrics,
    parts_of,
    unknown_values,
)
from lightning_modules.functional.sums import Metrics, means, merge

torch.set_num_threads(1)

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "judgebench_claude.jsonl"
Table = list[tuple[dict[str, Any], tuple[int, int]]]
# Verdicts of both orders on a pair whose label is 1.
TWICE, TORN, HALF, SILENT, NEVER = (1, 2), (1, 1), (1, 0), (0, 0), (2, 1)


def judged(benchmark: str, table: Table) -> Metrics:
    forward, backward = torch.tensor([verdicts for _, verdicts in table]).T
    extras = [extra for extra, _ in table]
    return benchmark_metrics(benchmark, extras, forward, backward, torch.ones_like(forward))


def numbers(benchmark: str, table: Table) -> dict[str, float]:
    start = len(benchmark) + 1
    found = composites(judged(benchmark, table))
    return {tag[start:]: value for tag, value in found.items()}


# ---- RewardBench ---------------------------------------------------------------------------------


def subset(name: str, *verdicts: tuple[int, int]) -> Table:
    return [({"subset": name}, one) for one in verdicts]


def test_reward_bench_weights_are_its_row_counts_but_for_math() -> None:
    sums = {section: sum(own.values()) for section, own in REWARD_BENCH_WEIGHTS.items()}
    assert sums == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 2 * 984}
    assert sum(sums.values()) - 984 + 447 == 2985, "rows of the split 'filtered'"
    assert sum(map(len, REWARD_BENCH_WEIGHTS.values())) == 23


def test_reward_bench_by_hand() -> None:
    table = subset("alpacaeval-easy", TWICE)
    table += subset("mt-bench-easy", TWICE, NEVER)
    table += subset("llmbar-adver-GPTInst", TORN, HALF)
    table += subset("xstest-should-refuse", TWICE) + subset("xstest-should-respond", NEVER)
    table += subset("math-prm", NEVER) + subset("hep-go", TWICE) + subset("hep-cpp", TORN)
    accuracy = {
        "chat": (100 * 1 + 28 * 0.5) / 128,
        "chat_hard": 0.5,
        "safety": 250 / 404,
        "reasoning": (984 * 0 + 164 * 1 + 164 * 0.5) / (984 + 2 * 164),
    }
    consistency = {"chat": 114 / 128, "chat_hard": 0.0, "safety": 250 / 404, "reasoning": 1 / 8}
    found = numbers("reward_bench", table)
    for metric, expected in (("accuracy", accuracy), ("consistency", consistency)):
        for section, value in expected.items():
            assert found[f"{section}/{metric}"] == pytest.approx(value, abs=1e-12)
        assert found[f"overall/{metric}"] == pytest.approx(sum(expected.values()) / 4, abs=1e-12)
    # two of four verdicts right, one unparsable: (0 + 1 + 1 + 0.5) / 4
    assert found["chat_hard/rewardbench_accuracy"] == 0.625
    assert found["chat/rewardbench_accuracy"] == found["chat/accuracy"]
    assert "other_rate" not in found and len(found) == 5 * 3


def test_math_weighs_as_much_as_all_code() -> None:
    table = subset("math-prm", *[TWICE] * 3)
    for language in ("cpp", "go", "java", "js", "python", "rust"):
        table += subset(f"hep-{language}", NEVER, NEVER)
    assert numbers("reward_bench", table)["reasoning/accuracy"] == 0.5


def test_no_overall_without_all_sections() -> None:
    found = numbers("reward_bench", subset("donotanswer", TWICE) + subset("hep-js", NEVER))
    assert {name.split("/")[0] for name in found} == {"safety", "reasoning"}


# ---- RM-Bench ------------------------------------------------------------------------------------


def cell(domain: str, i: int, j: int) -> dict[str, Any]:
    return {"domain": domain, "chosen_index": i, "rejected_index": j}


def test_rm_bench_cells() -> None:
    cells = itertools.product(range(3), repeat=2)
    levels = [parts_of("rm_bench", cell("chat", i, j))[0].removeprefix("chat/") for i, j in cells]
    easy, normal, hard = "easy", "normal", "hard"
    assert levels == [normal, hard, hard, easy, normal, hard, easy, easy, normal]
    parts = parts_of("rm_bench", cell("safety-refuse", 2, 1))
    assert parts == ("safety/easy", "matrix/markdown_over_plain")


def test_rm_bench_by_hand() -> None:
    table = [(cell("math", i, j), TWICE if i >= j else NEVER) for i in range(3) for j in range(3)]
    # chat has two rows: right only where the styles are equal, and in one row only
    for verdicts in (TORN, NEVER):
        for i, j in itertools.product(range(3), repeat=2):
            table.append((cell("chat", i, j), verdicts if i == j else NEVER))
    found = numbers("rm_bench", table)
    expected = {
        "math": (2 / 3, 2 / 3),
        "chat": ((0 + 0.25 + 0) / 3, 0.0),
        "easy": ((1 + 0) / 2, 0.5),
        "normal": ((1 + 0.25) / 2, 0.5),
        "hard": (0.0, 0.0),
        "overall": ((0.5 + 0.625 + 0) / 3, 1 / 3),
    }
    assert {name.split("/")[0] for name in found} == set(expected)
    for name, (accuracy, consistency) in expected.items():
        assert found[f"{name}/accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert found[f"{name}/consistency"] == pytest.approx(consistency, abs=1e-12)
    matrix = means(judged("rm_bench", table))
    assert matrix["rm_bench/matrix/markdown_over_concise/accuracy"] == pytest.approx(1 / 3)
    assert matrix["rm_bench/matrix/plain_over_plain/accuracy"] == pytest.approx(0.5)


def test_rm_bench_equals_matrices_of_triangles() -> None:
    domains = ["chat", "math", "math", "code", "safety-refuse", "safety-response", "safety-refuse"]
    draw = np.random.default_rng(0)
    rows = [(domain, draw.random((3, 3)) < 0.6) for domain in domains]
    table = [
        (cell(domain, i, j), TWICE if right[i, j] else NEVER)
        for domain, right in rows
        for i, j in itertools.product(range(3), repeat=2)
    ]
    found = numbers("rm_bench", table)
    levels = []
    for start in ("chat", "math", "code", "safety"):
        matrix = np.mean([right for domain, right in rows if domain.startswith(start)], axis=0)
        sums = np.tril(matrix, -1).sum(), np.trace(matrix), np.triu(matrix, 1).sum()
        levels.append([float(value) / 3 for value in sums])
        assert found[f"{start}/accuracy"] == pytest.approx(np.mean(levels[-1]))
    for name, value in zip(("easy", "normal", "hard"), np.mean(levels, axis=0), strict=True):
        assert found[f"{name}/accuracy"] == pytest.approx(value)
    assert found["overall/accuracy"] == pytest.approx(np.mean(levels))
    pooled = np.mean([verdicts == TWICE for _, verdicts in table])
    assert found["overall/accuracy"] != pytest.approx(pooled), "domains weigh alike, not pairs"


def test_rm_bench_lacks_levels() -> None:
    found = numbers("rm_bench", [(cell("code", 0, 0), TWICE), (cell("chat", 0, 1), NEVER)])
    assert {name.split("/")[0] for name in found} == {"normal", "hard"}


# ---- JudgeBench ----------------------------------------------------------------------------------


def test_judge_bench_rule_on_all_verdicts() -> None:
    """Both orders as decisions for the gold side (+1), against it (-1) or none."""
    for forward, backward, label in itertools.product((0, 1, 2), (0, 1, 2), (1, 2)):
        sides = (forward, label), (backward, 3 - label)
        for_gold = [0 if not verdict else 1 if verdict == good else -1 for verdict, good in sides]
        values = pair_metrics("judge_bench", *torch.tensor([[forward], [backward], [label]]))
        assert means(values)["judgebench_accuracy"] == float(sum(for_gold) > 0)
        halves = pair_metrics("reward_bench", *torch.tensor([[forward], [backward], [label]]))
        assert means(halves)["rewardbench_accuracy"] == sum(0.5 + v / 2 for v in for_gold) / 2


def test_judge_bench_by_hand() -> None:
    table: Table = [
        ({"source": "mmlu-pro-math"}, TWICE),
        ({"source": "mmlu-pro-computer science"}, HALF),
        ({"source": "mmlu-pro-law"}, TORN),
        ({"source": "livebench-reasoning"}, (2, 0)),
        ({"source": "livebench-math"}, SILENT),
        ({"source": "livecodebench"}, TWICE),
    ]
    expected = {
        "knowledge": (4 / 6, 1 / 3, 2 / 3),
        "reasoning": (0.0, 0.0, 0.0),
        "math": (0.0, 0.0, 0.0),
        "coding": (1.0, 1.0, 1.0),
    }
    names = ("accuracy", "consistency", "judgebench_accuracy")
    assert means(judged("judge_bench", table)) == pytest.approx(
        {
            f"judge_bench/{part}/{name}": value
            for part, values in expected.items()
            for name, value in zip(names, values, strict=True)
        }
    )
    found = numbers("judge_bench", table)
    assert found == pytest.approx(
        {f"overall/{name}": value for name, value in zip(names, (1 / 2, 1 / 3, 1 / 2), strict=True)}
    )


# ---- Merging, names, unknown values --------------------------------------------------------------


def every_extra(benchmark: str) -> list[dict[str, Any]]:
    if benchmark == "reward_bench":
        return [{"subset": name} for own in REWARD_BENCH_WEIGHTS.values() for name in own]
    if benchmark == "judge_bench":
        return [{"source": start} for start in JUDGE_BENCH_SOURCES]
    cells = itertools.product(("chat", "code", "math", "safety-response"), range(3), range(3))
    return [cell(*one) for one in cells]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_halves_merge_into_the_whole(benchmark: str) -> None:
    rng = random.Random(1)
    extras = every_extra(benchmark)
    table = [
        (extra, (rng.randrange(3), rng.randrange(3)))
        for extra in [*extras, *rng.choices(extras, k=70), {}]
    ]
    rng.shuffle(table)
    first, second = judged(benchmark, table[:31]), judged(benchmark, table[31:])
    whole = composites(judged(benchmark, table))
    assert composites(merge(first, second)) == pytest.approx(whole, abs=1e-12)
    halves = composites(first), composites(second)
    apart = {tag: (halves[0].get(tag, 0.0) + halves[1].get(tag, 0.0)) / 2 for tag in whole}
    assert apart != pytest.approx(whole, abs=1e-6), "means of means are something else"


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_parts_are_safe_tags_and_no_composite_has_the_name_of_a_part(benchmark: str) -> None:
    extras = every_extra(benchmark)
    metrics = judged(benchmark, [(extra, TORN) for extra in [*extras, {}]])
    for tag in metrics:
        assert tag == tag.lower() and " " not in tag and "@" not in tag
    parts = {part for extra in extras for part in parts_of(benchmark, extra)}
    assert len(parts) == {"reward_bench": 23, "rm_bench": 12 + 9, "judge_bench": 4}[benchmark]
    assert not set(composites(metrics)) & set(metrics)


def test_prefixes_are_kept_apart() -> None:
    right = judged("judge_bench", [({"source": "livecodebench"}, TWICE)])
    wrong = judged("judge_bench", [({"source": "livecodebench"}, NEVER)])
    tags: Metrics = {f"test/{tag}": value for tag, value in right.items()}
    tags |= {f"test/maj8/{tag}": value for tag, value in wrong.items()}
    tags |= {"test/accuracy": (1.0, 2), "judge_bench/odd": (1.0, 1)}
    found = composites(tags)
    assert found["test/judge_bench/overall/accuracy"] == 1.0
    assert found["test/maj8/judge_bench/overall/accuracy"] == 0.0
    assert len(found) == 6


UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    ("reward_bench", {"subset": "hep-cobol"}, "subset='hep-cobol' (2)"),
    ("reward_bench", {}, "no column subset (2)"),
    ("rm_bench", cell("poetry", 0, 1), "domain='poetry', chosen_index=0, rejected_index=1 (2)"),
    ("rm_bench", cell("math", 0, 3), "domain='math', chosen_index=0, rejected_index=3 (2)"),
    ("rm_bench", {"domain": "math"}, "no column chosen_index, no column rejected_index (2)"),
    ("judge_bench", {"source": "livebench-poetry"}, "source='livebench-poetry' (2)"),
]


@pytest.mark.parametrize(("benchmark", "extra", "text"), UNKNOWN)
def test_unknown_values_count_as_other(benchmark: str, extra: dict[str, Any], text: str) -> None:
    known = every_extra(benchmark)[0]
    assert parts_of(benchmark, extra) == ("other",)
    warning = unknown_values(benchmark, [extra, known, extra, known])
    assert warning.startswith(f"2 of 4 pairs have no part in {benchmark}") and text in warning
    assert unknown_values(benchmark, [known]) == ""
    table = [(extra, NEVER), (known, TWICE), (known, TWICE), (known, TWICE)]
    found = numbers(benchmark, table)
    assert found["other_rate"] == 0.25
    assert means(judged(benchmark, table))[f"{benchmark}/other/accuracy"] == 0.0
    without = numbers(benchmark, table[1:])
    if benchmark == "judge_bench":
        assert found["overall/accuracy"] == 0.75 and without["overall/accuracy"] == 1.0
    else:
        assert {name: found[name] for name in without} == without


def test_many_unknown_values_make_a_short_warning() -> None:
    warning = unknown_values("reward_bench", [{"subset": f"s{i}"} for i in range(8)])
    assert warning.count("subset=") == 5 and warning.endswith("; and 3 more")


def test_find_benchmark() -> None:
    for benchmark in BENCHMARKS:
        extras = every_extra(benchmark)
        assert find_benchmark([{}, {"source": "web"}, *extras]) == benchmark
        assert find_benchmark(extras, "none") is None
        assert find_benchmark([], benchmark) == benchmark
    assert find_benchmark([]) is None
    assert find_benchmark([{"subset": "Factuality"}, {"domain": "math"}]) is None
    mixed = [{"source": "livecodebench"}, *every_extra("reward_bench")]
    assert find_benchmark(mixed) == "reward_bench"
    with pytest.raises(ValueError, match="did you mean 'rm_bench'"):
        find_benchmark([], "rmbench")


def test_refused() -> None:
    one = torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="extras must be as many as labels, got 1 and 2"):
        benchmark_metrics("rm_bench", [{}], one, one, one)
    for function, arguments in ((parts_of, [{}]), (overall, [{}]), (pair_metrics, [one] * 3)):
        with pytest.raises(ValueError, match="did you mean 'reward_bench'"):
            function("rewardbench", *arguments)


# ---- Files ---------------------------------------------------------------------------------------


def read(folder: Path, rows: list[dict[str, Any]]) -> list[Pair]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = PreferencePairs(path=str(path), val_fraction=0.0, test_fraction=1.0)
    return task.records("test")


def test_reward_bench_file(tmp_path: Path) -> None:
    names = ["alpacaeval-easy", "llmbar-adver-GPTOut", "donotanswer", "math-prm", "new-subset"]
    texts = {"chosen_model": "m", "rejected_model": "n"}
    rows = [
        {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "subset": name, "id": 7} | texts
        for i, name in enumerate(names)
    ]
    pairs = read(tmp_path, rows)
    assert find_benchmark(pair.extra for pair in pairs) == "reward_bench"
    assert [parts_of("reward_bench", pair.extra) for pair in pairs] == [
        ("chat/alpacaeval-easy",),
        ("chat_hard/llmbar-adver-gptout",),
        ("safety/donotanswer",),
        ("reasoning/math-prm",),
        ("other",),
    ]
    assert len({pair.uid for pair in pairs}) == 5


def test_rm_bench_file(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{domain}-{row}",
            "prompt": f"q{row}",
            "chosen": [f"good {style}" for style in RM_BENCH_STYLES],
            "rejected": [f"bad {style}" for style in RM_BENCH_STYLES],
            "domain": domain,
        }
        for row, domain in enumerate(("chat", "safety-response"))
    ]
    pairs = read(tmp_path, rows)
    assert find_benchmark(pair.extra for pair in pairs) == "rm_bench"
    assert len(pairs) == 18 and {pair.label for pair in pairs} == {1, 2}
    for pair in pairs:
        for order in (pair, pair.swap()):
            assert order.label is not None
            good, bad = order.responses[order.label - 1], order.responses[2 - order.label]
            part, styles = parts_of("rm_bench", order.extra)
            assert styles == f"matrix/{good.split()[1]}_over_{bad.split()[1]}"
            assert part.split("/")[0] == ("chat" if pair.question == "q0" else "safety")
    counts = Counter(part for pair in pairs for part in parts_of("rm_bench", pair.extra))
    levels = {f"{d}/{level}": 3 for d in ("chat", "safety") for level in ("easy", "normal", "hard")}
    assert levels.items() <= counts.items() and counts.total() == 36


def test_judge_bench_file(tmp_path: Path) -> None:
    sources = ["mmlu-pro-math", "livebench-reasoning", "livebench-math", "livecodebench"]
    row = {"original_id": "4", "question": "q", "response_model": "m", "label": "B>A"}
    rows = [
        {"pair_id": f"p{i}", "source": source, "response_A": "a", "response_B": f"b{i}"} | row
        for i, source in enumerate(sources)
    ]
    pairs = read(tmp_path, rows)
    assert find_benchmark(pair.extra for pair in pairs) == "judge_bench"
    parts = [parts_of("judge_bench", pair.extra) for pair in pairs]
    assert parts == [("knowledge",), ("reasoning",), ("math",), ("coding",)]


@pytest.mark.filterwarnings("ignore:1 of 270 rows")
def test_real_file() -> None:
    if not REAL.exists():
        pytest.skip("the file is not beside this checkout")
    task = PreferencePairs(path=str(REAL), val_fraction=0.0, test_fraction=1.0, max_bad_share=0.01)
    extras = [pair.extra for pair in task.records("test")]
    assert find_benchmark(extras) == "judge_bench" and unknown_values("judge_bench", extras) == ""
    counts = Counter(part for extra in extras for part in parts_of("judge_bench", extra))
    whole = Counter(knowledge=154, reasoning=51, math=34, coding=31)
    assert counts <= whole and (whole - counts).total() == 1, "one row has two equal responses"
