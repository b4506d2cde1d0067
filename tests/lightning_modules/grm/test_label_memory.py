"""The memory of pseudo-labels, and the pairs without labels that it is about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.engines.hf import HFEngine
from datamodules.self_training import SelfTrainingDataModule
from datamodules.tasks.prefix_audit import PrefixAudit
from datamodules.tasks.skills import RepeatTask
from lightning_modules.backbones.tiny import word_tokenizer
from lightning_modules.grm.consistrm import ConsistRM
from lightning_modules.grm.label_memory import LabelMemory


def test_visits_add_and_survive_a_checkpoint():
    memory = LabelMemory(size=3)
    memory.begin([("a", [1, 1])])
    for index, label in enumerate((-1, 0, 1)):
        memory.visit({"a": label, "b": -label}, index)
    assert memory.tally("a")[1] == 3
    assert memory.tally("b") == (0, 3)
    assert (memory.last("a"), memory.last("c")) == (1, None)
    other = LabelMemory(size=3)
    other.load(memory.state())
    assert [other.tally(key) for key in "abc"] == [memory.tally(key) for key in "abc"]
    assert len(other) == 2


def test_a_label_of_zero_weakens_the_memory():
    memory = LabelMemory()
    memory.begin([("a", [-1, 0, 0, 0])])
    assert memory.tally("a") == (-1, 4)


def test_decay_and_frozen():
    memory = LabelMemory(decay=0.5)
    memory.begin([("a", [1, 1])])
    memory.visit({"a": -1}, 0)
    assert memory.tally("a") == (-1 + 0.5 + 0.25, 1.75)
    frozen = LabelMemory(is_frozen=True)
    frozen.begin([("a", [1])])
    frozen.visit({"a": -1}, 0)
    assert (frozen.tally("a"), frozen.last("a")) == ((1, 1), -1)


def pairs_of(tiny_folder: Path, **options: Any) -> SelfTrainingDataModule:
    task = PrefixAudit(num_train=8, num_val=2, num_test=2)
    data = SelfTrainingDataModule(
        task=task, engine=HFEngine(), **{"prompts_per_rollout": 4, "prior_votes": 0} | options
    )
    data.bind(word_tokenizer(task.vocabulary()))
    return data


def test_both_orders_stand_side_by_side_and_hide_their_labels(tiny_folder):
    drawn = pairs_of(tiny_folder).draw(0)
    assert len(drawn) == 8
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        assert one.record.uid == other.record.uid
        assert (one.record.swapped, other.record.swapped) == (False, True)
        assert one.record.responses == other.record.responses[::-1]
    assert all(prompt.label is None and prompt.record.label is None for prompt in drawn)


def test_random_orders_are_a_coin_a_pair_and_draw(tiny_folder):
    data = pairs_of(tiny_folder, pair_order="random", labels="given")
    orders = [[prompt.record.swapped for prompt in data.draw(index)] for index in range(40)]
    share = sum(map(sum, orders)) / 160
    assert 0.35 < share < 0.65
    again = [[prompt.record.swapped for prompt in data.draw(index)] for index in range(40)]
    assert orders == again
    truth = {pair.uid: pair.label for pair in data.judge_task.records("train")}
    for prompt in data.draw(3):
        label = truth[prompt.record.uid]
        assert prompt.label == (3 - label if prompt.record.swapped else label)


def test_given_labels_leave_out_pairs_without_one(tiny_folder):
    class Half(PrefixAudit):
        def records(self, split: Any) -> Any:
            pairs = super().records(split)
            return [replace(p, label=None) if i % 2 else p for i, p in enumerate(pairs)]

    task = Half(num_train=8, num_val=2, num_test=2)
    task.bind(word_tokenizer(task.vocabulary()))
    for labels, count in (("given", 4), ("hidden", 8)):
        data = SelfTrainingDataModule(task=task, engine=HFEngine(), labels=labels)
        assert len(data.train_prompts()) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "shown"}, "data.labels='shown' is unknown; allowed: hidden, given"),
        ({"pair_order": "none"}, "allowed: single, both, random"),
        ({"prior_votes": -1}, "data.prior_votes=-1"),
    ],
)
def test_bad_options_are_named(tiny_folder, options, message):
    with pytest.raises(ValueError, match=message):
        pairs_of(tiny_folder, **options)


def test_tasks_without_pairs_are_refused():
    with pytest.raises(ValueError, match="has no pairs to judge"):
        SelfTrainingDataModule(task=RepeatTask(), engine=HFEngine())  # type: ignore[arg-type]


@pytest.mark.parametrize(("symmetrise", "keys"), [("pooled", 1), ("off", 2)])
def test_prior_votes_of_the_other_order_are_turned(tiny_folder, symmetrise, keys):
    """Both orders for slot 1: they cancel where one memory holds both."""
    module = ConsistRM(backbone=str(tiny_folder), symmetrise=symmetrise)
    for swapped in (False, True):
        key, flip = module._key("p", swapped)
        module.memory.begin([(key, [flip * -1] * 3)])
    tallies = [module.memory.tally(key) for key in ("p", "p/12", "p/21")]
    assert len(module.memory) == keys
    assert tallies == ([(0, 6), (0, 0), (0, 0)] if keys == 1 else [(0, 0), (-3, 3), (-3, 3)])
