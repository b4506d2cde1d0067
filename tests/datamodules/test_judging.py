"""Training items of ReflectRM: the filter, reflection items, proportions, the cache, the pools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.judging import JudgeDataModule, build_items
from datamodules.tasks.base import Pair, Task
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.tiny import word_tokenizer

TOKENIZER = word_tokenizer(PrefixAudit().vocabulary())
#: For a pair (numbered from 0) and one of its samples: winner and number of the analysis.
Rule = Callable[[int, Pair, int], tuple[int | None, int]]


def bound_task(num_train: int = 40, **options: Any) -> PrefixAudit:
    task = PrefixAudit(num_train=num_train, num_val=2, num_test=2, **options)
    task.bind(TOKENIZER)
    return task


@cache
def analyses(task: PrefixAudit, pair: Pair) -> list[str]:
    """Twenty-five analyses: the gold one, then those with other counts."""
    gold = task.analysis_values(task.gold_analysis(pair))
    assert gold is not None
    others = [counts for counts in product(range(5), repeat=2) if counts != gold[-2:]]
    return [task.analysis_words(gold[:-2] + counts) for counts in (gold[-2:], *others)]


class WrittenEngine(Engine):
    """Writes what a rule says; a winner of None does not parse, one of 0 is cut off."""

    def __init__(self, task: PrefixAudit, rule: Rule) -> None:
        self.task, self.rule = task, rule
        self.calls: list[Sampling] = []

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.calls.append(sampling)
        return [
            [self._write(place, prompt, sample) for sample in range(sampling.samples)]
            for place, prompt in enumerate(prompts)
        ]

    def _write(self, place: int, prompt: Prompt, sample: int) -> Completion:
        winner, number = self.rule(place, prompt.record, sample)
        text = f"{analyses(self.task, prompt.record)[number]} response{winner or 1}_wins <eos>"
        words = text.split() if winner is not None else text.split()[1:]
        ids = tuple(self.task.tokenizer.convert_tokens_to_ids(words))
        reason = FinishReason.LENGTH if winner == 0 else FinishReason.STOP
        return Completion(ids, (-1.0,) * len(ids), reason)


def right_in(*counts: int) -> Rule:
    """Pair ``i`` has ``counts[i % len]`` right outputs of 8; sample ``s`` writes analysis ``s``."""

    def rule(place: int, pair: Pair, sample: int) -> tuple[int, int]:
        assert pair.label is not None
        is_right = sample < counts[place % len(counts)]
        return (pair.label if is_right else 3 - pair.label), sample

    return rule


def build(task: PrefixAudit, rule: Rule, **options: Any) -> tuple[list[Pair], list[Any], Any]:
    """Pairs of the preference rows, reflection rows, counts."""
    defaults: dict[str, Any] = {
        "samples": 8, "ratio": None, "label": "outcome", "rebalance_slots": False,
        "drop_all_right": True, "seed": 0,
    }  # fmt: skip
    engine, pairs = WrittenEngine(task, rule), task.records("train")
    pref, refl, stats = build_items(task, engine, pairs, **defaults | options)
    assert [call.temperature for call in engine.calls] == [1.0]
    assert [call.samples for call in engine.calls] == [options.get("samples", 8)]
    return [Pair(**row["pair"]) for row in pref], refl, stats


def uids(rows: Sequence[Any]) -> list[str]:
    return [row.uid if isinstance(row, Pair) else row["pair"]["uid"] for row in rows]


# --- the filter and the reflection items --------------------------------------------------------


def test_easy_pairs_go_and_hopeless_ones_never_reflect() -> None:
    task = bound_task()
    pref, refl, stats = build(task, right_in(8, 0, 4, 7, 1))
    pairs = task.records("train")
    assert pref == [pair for i, pair in enumerate(pairs) if i % 5]
    assert uids(refl) == [pair.uid for i, pair in enumerate(pairs) if i % 5 > 1]  # one for each
    assert (stats["pairs"], stats["dropped_all_right"], stats["mixed"]) == (40, 8, 24)
    assert (stats["preferences"], stats["reflections"], stats["unparsed"]) == (32, 24, 0.0)
    assert stats["sample_accuracy"] == pytest.approx(20 / 40)


def test_without_the_filter_every_pair_stays() -> None:
    task = bound_task()
    pref, refl, stats = build(task, right_in(8, 0, 4), drop_all_right=False)
    assert pref == task.records("train")
    assert len(refl) == 13 and stats["dropped_all_right"] == 0


@pytest.mark.parametrize("broken", [None, 0], ids=["does not parse", "cut off"])
def test_unparsed_outputs_are_neither_right_nor_wrong(broken: int | None) -> None:
    """Pair i is: all right but one unparsed, all unparsed, half and half and one unparsed."""

    def rule(place: int, pair: Pair, sample: int) -> tuple[int | None, int]:
        if sample == 5 or place % 3 == 1:
            return broken, sample
        return right_in(8, 0, 4)(place, pair, sample)

    task = bound_task(num_train=30)
    pref, refl, stats = build(task, rule)
    assert pref == task.records("train")
    assert uids(refl) == [pair.uid for i, pair in enumerate(pref) if i % 3 == 2]
    assert stats["unparsed"] == pytest.approx((1 + 8 + 1) / 24)
    assert stats["sample_accuracy"] == pytest.approx((7 + 0 + 4) / 24)
    for row in refl:
        pair = next(pair for pair in pref if pair.uid == row["pair"]["uid"])
        numbers = [analyses(task, pair).index(text) for text in row["analyses"]]
        assert 5 not in numbers


def test_label_is_the_place_of_the_analysis_with_the_right_verdict() -> None:
    task = bound_task(num_train=400)
    _, refl, _ = build(task, right_in(4))
    chosen: Counter[int] = Counter()
    slots: dict[int, list[int]] = {1: [], 2: []}
    assert len(refl) == 400
    for row in refl:
        pair = Pair(**row["pair"])
        good, bad = (
            analyses(task, pair).index(row["analyses"][place - 1])
            for place in (row["label"], 3 - row["label"])
        )
        assert good < 4 <= bad
        chosen.update([good, bad])
        slots[pair.label or 0].append(row["label"])
    assert set(chosen) == set(range(8))  # any of the outputs may stand for its verdict
    # the order is a coin of its own, whatever the pair's label (four standard deviations)
    for labels in slots.values():
        assert abs(labels.count(1) - len(labels) / 2) < 2 * len(labels) ** 0.5
        assert len(labels) > 100


def test_step_truth_labels_are_the_tasks_own() -> None:
    """Right verdicts come with a wrong analysis in every other pair; some pairs have no truth."""

    def rule(place: int, pair: Pair, sample: int) -> tuple[int, int]:
        assert pair.label is not None
        is_right = sample % 2 == 0
        number = [(0, 3), (3, 0), (1, 1)][place % 3][not is_right]
        return (pair.label if is_right else 3 - pair.label), number

    task = bound_task(num_train=60)
    pref, truth, stats = build(task, rule, label="step_truth")
    assert len(pref) == 60 and stats["mixed"] == len(truth) == 40  # equal analyses have no truth
    assert uids(truth) == [pair.uid for i, pair in enumerate(pref) if i % 3 < 2]
    for row in truth:
        pair = Pair(**row["pair"])
        assert row["analyses"][row["label"] - 1] == task.gold_analysis(pair)
    _, outcome, _ = build(task, rule)
    kept = [row for i, row in enumerate(outcome) if i % 3 < 2]
    assert [row["analyses"] for row in kept] == [row["analyses"] for row in truth]
    differs = [a["label"] != b["label"] for a, b in zip(kept, truth, strict=True)]
    assert differs == [False, True] * 20


# --- proportions --------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [1, 2, 5, 9, 10, 11, 23, 40])
@pytest.mark.parametrize("ratio", [4.0, 1.0, 2.5])
def test_proportion_is_exact_to_one_item(mixed: int, ratio: float) -> None:
    task = bound_task()
    order = [4] * mixed + [0] * (40 - mixed)
    pref, refl, stats = build(task, right_in(*order), ratio=ratio)
    assert (len(pref), len(refl)) == (stats["preferences"], stats["reflections"])
    assert abs(len(refl) - len(pref) / ratio) < 1
    # as many as there can be: one of the two pools is used up
    assert len(pref) == 40 or len(refl) == mixed
    assert abs(len(pref) - ratio * len(refl)) < max(1.0, ratio)
    # subsets without repetition, preferences from the whole pool
    assert len(set(uids(pref))) == len(pref) and len(set(uids(refl))) == len(refl)
    assert set(uids(refl)) <= {pair.uid for pair in task.records("train")[:mixed]}
    if len(pref) < 30:
        assert not set(uids(pref)) <= {pair.uid for pair in task.records("train")[: len(pref)]}


def test_no_ratio_keeps_everything() -> None:
    pref, refl, _ = build(bound_task(), right_in(4, 0), ratio=None)
    assert (len(pref), len(refl)) == (40, 20)


def test_a_seed_fixes_everything() -> None:
    task, rule = bound_task(), right_in(4, 0, 0)
    first, again, other = (build(task, rule, ratio=1.5, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert uids(first[0]) != uids(other[0])
    assert [row["label"] for row in first[1]] != [row["label"] for row in other[1]]


@pytest.mark.parametrize("size", [30, 31])
def test_rebalancing_swaps_until_both_slots_win_equally_often(size: int) -> None:
    """A judge that likes slot 1 leaves the pairs in which slot 2 is better."""

    def rule(place: int, pair: Pair, sample: int) -> tuple[int, int]:
        return (1 if sample or place % 7 else 2), sample

    task = bound_task(num_train=size)
    plain, _, stats = build(task, rule)
    assert stats["gold_first_slot"] == stats["gold_first_slot_used"] < 0.4
    pref, refl, stats = build(task, rule, rebalance_slots=True)
    labels = Counter(pair.label for pair in pref)
    assert abs(labels[1] - labels[2]) <= 1
    assert stats["gold_first_slot"] < 0.4
    assert stats["gold_first_slot_used"] == pytest.approx(labels[1] / len(pref))
    assert all(new in (old, old.swap()) for new, old in zip(pref, plain, strict=True))
    assert all(pair["pair"]["swapped"] is False for pair in refl)


# --- the datamodule -----------------------------------------------------------------------------


@pytest.fixture
def make_data() -> Callable[..., JudgeDataModule]:
    def make(rule: Rule, num_train: int = 10, **options: Any) -> JudgeDataModule:
        task = bound_task(num_train)
        return JudgeDataModule(task=task, engine=WrittenEngine(task, rule), **options)

    return make


def calls(data: JudgeDataModule) -> int:
    assert isinstance(data.engine, WrittenEngine)
    return len(data.engine.calls)


def test_items_are_built_once(make_data: Any, tiny_folder: Path, tmp_path: Path) -> None:
    rule, settings = right_in(4, 0), {"num_train": 10}
    first = make_data(rule)
    first.prepare(str(tiny_folder), tmp_path, settings)
    assert calls(first) == 1
    second = make_data(right_in(0))  # would build something else
    second.prepare(str(tiny_folder), tmp_path, settings)
    assert calls(second) == 0
    assert second.train_prompts() == first.train_prompts()
    assert second.build_stats == first.build_stats
    assert first.build_stats["reflections"] == 2
    for change in ({"seed": 1}, {"build_samples": 4}, {"reflection_label": "step_truth"},
                   {"pref_refl_ratio": None}, {"rebalance_slots": True},
                   {"drop_all_right": False}):  # fmt: skip
        other = make_data(rule, **change)
        other.prepare(str(tiny_folder), tmp_path, settings)
        assert calls(other) == 1, change
    third = make_data(rule)
    third.prepare(str(tiny_folder), tmp_path, {"num_train": 11})
    assert calls(third) == 1


def test_nothing_is_built_where_nothing_is_trained(
    make_data: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    data = make_data(right_in(4))
    data.prepare(str(tiny_folder), tmp_path, {}, for_training=False)
    assert calls(data) == 0 and not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="prepare"):
        data.train_prompts()


def test_prompts_carry_labels_and_texts(make_data: Any, tiny_folder: Path, tmp_path: Path) -> None:
    data = make_data(right_in(4, 0), pref_refl_ratio=None)
    data.prepare(str(tiny_folder), tmp_path)
    prompts = data.train_prompts()
    assert Counter(p.domain for p in prompts) == {"pref": 10, "refl": 5}
    assert len({prompt.uid for prompt in prompts}) == 15
    for prompt in prompts:
        if prompt.domain == "pref":
            assert prompt == data.task.prompt(prompt.record)
            continue
        pair, texts = prompt.record
        assert analyses(data.task, pair).index(texts[(prompt.label or 0) - 1]) < 4
        assert isinstance(pair.responses, tuple)


def test_both_orders_of_every_preference_pair(
    make_data: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    data = make_data(right_in(4, 0), pair_order="both", pref_refl_ratio=None)
    data.prepare(str(tiny_folder), tmp_path)
    prompts = [prompt for prompt in data.train_prompts() if prompt.domain == "pref"]
    assert len(prompts) == len({prompt.uid for prompt in prompts}) == 20
    for one, two in zip(prompts[::2], prompts[1::2], strict=True):
        assert one.record.swap() == two.record and one.label == 3 - two.label
    assert sum(prompt.domain == "refl" for prompt in data.train_prompts()) == 5


def test_pools_follow_the_counts(make_data: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for counts, domains in [
        ({"pref": 4, "refl": 1}, {"pref", "refl"}),
        ({"pref": 4, "refl": 0}, {"pref"}),
        ({"pref": 0, "refl": 1}, {"refl"}),
    ]:
        data = make_data(right_in(4, 0), prompts_per_rollout=counts)
        data.prepare(str(tiny_folder), tmp_path)
        assert set(data.pools()) == domains
        drawn = Counter(prompt.domain for prompt in data.draw(0))
        assert drawn == {domain: counts[domain] for domain in domains}


def test_real_backbone_without_reflections_trains_on_preferences(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Random weights write nothing that parses, so every pair stays and none is mixed."""
    counts = {"pref": 2, "refl": 1}

    def make(**options: Any) -> JudgeDataModule:
        data = JudgeDataModule(
            task=bound_task(4), engine=HFEngine(), build_samples=2, prompts_per_rollout=counts,
            **options,
        )  # fmt: skip
        data.prepare(str(tiny_folder), tmp_path)
        return data

    data = make()
    assert data.build_stats["unparsed"] == 1.0
    assert (data.build_stats["preferences"], data.build_stats["reflections"]) == (4, 0)
    with pytest.warns(UserWarning, match="preferences only"):
        pools = data.pools()
    assert {domain: len(pool) for domain, pool in pools.items()} == {"pref": 4}
    assert [prompt.domain for prompt in data.draw(0)] == ["pref", "pref"]
    assert counts == {"pref": 2, "refl": 1}  # the caller's own mapping is left alone
    with pytest.raises(ValueError, match="data.shares"), pytest.warns(UserWarning):
        make(shares={"pref": 1, "refl": 1}).pools()


def test_a_backbone_that_is_always_right_leaves_nothing(
    make_data: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    data = make_data(right_in(8), prompts_per_rollout={"pref": 2, "refl": 0})
    data.prepare(str(tiny_folder), tmp_path)
    with pytest.raises(ValueError, match="prompts_per_rollout.pref=2"):
        data.pools()


def test_bad_options_are_named() -> None:
    class Other(Task):
        def records(self, split: Any) -> list[Any]:
            return []

        def prompt(self, record: Any) -> Any: ...

        def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
            return {}

    for options, name in [
        ({"build_samples": 0}, "build_samples"), ({"pref_refl_ratio": 0.0}, "pref_refl_ratio"),
        ({"reflection_label": "gold"}, "reflection_label"), ({"pair_order": "ab"}, "pair_order"),
        ({"task": Other()}, "JudgeTask"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            JudgeDataModule(**{"task": bound_task(), "engine": HFEngine()} | options)


def test_leftovers_of_a_killed_build_of_items(
    make_data: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    data = make_data(right_in(4))
    data.prepare(str(tiny_folder), tmp_path / "first")
    unfinished = (tmp_path / "second" / data.folder.name).with_suffix(".unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "pref.jsonl").write_text('{"pair": ')
    again = make_data(right_in(4))
    again.prepare(str(tiny_folder), tmp_path / "second")
    assert calls(again) == 1
    assert again.train_prompts() == data.train_prompts()
    assert not unfinished.exists()
