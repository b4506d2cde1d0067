"""Rollouts as a data stream: drawing prompts and cutting rollouts into windows."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.engines.scripted import ScriptedEngine
from datamodules.experience import Completion, Experience, FinishReason, Prompt, Rollouts
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.base import Task


class Lines(Task):
    """Prompts by number; every third one is of domain ``refl``."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def records(self, split: str) -> list[int]:
        return list(range(self.count))

    def prompt(self, record: int) -> Prompt:
        domain = "refl" if record % 3 == 2 else "pref"
        return Prompt(str(record), (1, 2, record), self, domain)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        return {"reward": 0.0}


def stream(count: int = 12, rank: int = 0, world: int = 1, **options: Any) -> RolloutDataModule:
    data = RolloutDataModule(task=Lines(count), engine=ScriptedEngine(records=[]), **options)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return data


def uids(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.uid for prompt in prompts]


# --- drawing prompts ------------------------------------------------------------------------------


def test_draw_is_a_function_of_seed_index_and_rank():
    data = stream(prompts_per_rollout=4, seed=3)
    first = [uids(data.draw(index)) for index in range(9)]
    fresh = stream(prompts_per_rollout=4, seed=3)
    assert [uids(fresh.draw(index)) for index in reversed(range(9))] == first[::-1]
    other = stream(prompts_per_rollout=4, seed=4)
    assert [uids(other.draw(index)) for index in range(9)] != first


def test_no_prompt_comes_twice_in_a_cycle_and_cycles_differ():
    data = stream(13, prompts_per_rollout=4)
    assert data.rollouts_per_epoch() == 3
    cycles = [sum((uids(data.draw(3 * c + i)) for i in range(3)), []) for c in range(3)]
    assert all(len(cycle) == len(set(cycle)) == 12 for cycle in cycles)
    assert cycles[0] != cycles[1] != cycles[2]


@pytest.mark.parametrize("world", [2, 4])
def test_rank_slices_are_disjoint_and_make_the_whole_draw(world):
    counts = {"pref": 4, "refl": 4}
    whole = stream(prompts_per_rollout=counts)
    ranks = [stream(rank=r, world=world, prompts_per_rollout=counts) for r in range(world)]
    for index in range(4):
        slices = [uids(data.draw(index)) for data in ranks]
        assert sorted(sum(slices, [])) == sorted(uids(whole.draw(index)))
        domains = [[prompt.domain for prompt in data.draw(index)] for data in ranks]
        assert domains == [["pref"] * (4 // world) + ["refl"] * (4 // world)] * world


def test_draw_that_ranks_cannot_divide_is_rounded_up():
    counts = {"pref": 4, "refl": 3}
    ranks = [stream(rank=r, world=2, prompts_per_rollout=counts) for r in (0, 1)]
    with pytest.warns(UserWarning, match=r"prompts_per_rollout\.refl=3 is taken as 4: 2 proc"):
        drawn = [data.draw(0) for data in ranks]
    assert [len(part) for part in drawn] == [4, 4]
    whole = stream(prompts_per_rollout={"pref": 4, "refl": 4})
    assert sorted(uids(drawn[0] + drawn[1])) == sorted(uids(whole.draw(0)))
    assert [data.rollouts_per_epoch() for data in (*ranks, whole)] == [1, 1, 1]


def test_fewer_prompts_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"refl=1: 4 training prompts cannot be shared among 5"):
        stream(world=5, prompts_per_rollout={"refl": 1}).draw(0)


def test_pools_hold_their_domain_only():
    data = stream(prompts_per_rollout={"pref": 3, "refl": 2})
    assert {name: uids(pool) for name, pool in data.pools().items()} == {
        "pref": ["0", "1", "3", "4", "6", "7", "9", "10"],
        "refl": ["2", "5", "8", "11"],
    }
    assert [prompt.domain for prompt in data.draw(1)] == ["pref"] * 3 + ["refl"] * 2
    assert data.rollouts_per_epoch() == 2  # 8 // 3 and 4 // 2


def test_domain_asked_for_with_zero_is_left_out():
    data = stream(prompts_per_rollout={"pref": 3, "refl": 0})
    assert list(data.pools()) == ["pref"]
    assert all(prompt.domain == "pref" for index in range(6) for prompt in data.draw(index))


def test_more_prompts_than_there_are_give_each_once():
    data = stream(prompts_per_rollout={"refl": 100})
    assert sorted(uids(data.draw(0))) == ["11", "2", "5", "8"]
    assert data.rollouts_per_epoch() == 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"pref": 2, "rfl": 1}, r"rfl=1, but there are no such .* with prompts: pref, refl"),
        ({"pref": 0, "refl": 0}, "asks for no prompts at all"),
    ],
)
def test_pools_without_prompts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        stream(prompts_per_rollout=counts).pools()


@pytest.mark.parametrize(
    "options", [{"mini_batches": 0}, {"passes": 0}, {"micro_batches": -1}, {"shares": {"refl": 0}}]
)
def test_counts_below_one_are_refused(options):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(options))}.* must be at least 1"):
        stream(**options)


# --- cutting a rollout into windows of micro-batches ----------------------------------------------


def scored(domains: Sequence[str], index: int = 0) -> Rollouts:
    """Rollouts of unequal lengths; the reward of row i is i, so that pieces can be told apart."""
    task = Lines()
    prompts = [Prompt(str(i), (3,) * (2 + i % 3), task, d) for i, d in enumerate(domains)]
    completions = [
        [Completion((10 + i,) * (1 + i % 4), (-0.5,) * (1 + i % 4), FinishReason.STOP)]
        for i in range(len(domains))
    ]
    rollouts = Rollouts.from_groups(prompts, completions)
    rollouts.index = index
    rollouts.reward = torch.arange(float(len(domains)))
    rollouts.advantages = rollouts.reward / 10
    return rollouts


def rows(pieces: Sequence[Experience]) -> list[int]:
    return [int(value) for piece in pieces for value in piece.reward]


@pytest.mark.parametrize(
    ("passes", "mini_batches", "micro_batches"),
    [(1, 1, 1), (1, 1, 4), (1, 3, 1), (3, 1, 1), (2, 2, 2), (2, 3, 3), (1, 2, 5)],
)
def test_cut_gives_every_rollout_once_a_pass(passes, mini_batches, micro_batches):
    data = stream(passes=passes, mini_batches=mini_batches, micro_batches=micro_batches)
    pieces = data.cut(scored(["pref"] * 11))
    a_pass = mini_batches * micro_batches
    assert len(pieces) == passes * a_pass
    orders = [rows(pieces[i * a_pass : (i + 1) * a_pass]) for i in range(passes)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len(set(map(tuple, orders))) == passes  # each pass in an order of its own
    sizes = [len(piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    for piece in pieces:
        assert piece.window_size == micro_batches


def test_pieces_hold_the_rows_of_the_rollout_trimmed():
    rollouts = scored(["pref"] * 9)
    for piece in stream(micro_batches=4).cut(rollouts):
        assert piece.input_ids.shape[1] == piece.attention_mask.sum(1).max()
        assert piece.mask.shape[1] == piece.mask.sum(1).max()
        for place, row in enumerate(rows([piece])):
            tokens = rollouts.prompts[row].token_ids + rollouts.completions[row].token_ids
            kept = piece.input_ids[place][piece.attention_mask[place].bool()]
            assert tuple(kept.tolist()) == tokens
            assert piece.prompt_lengths[place] == len(rollouts.prompts[row].token_ids)
            live = piece.mask[place]
            assert int(live.sum()) == len(rollouts.completions[row].token_ids)
            torch.testing.assert_close(piece.advantages[place], live * row / 10)
            torch.testing.assert_close(piece.sampler_logprobs[place], live * -0.5)


def test_cut_is_a_function_of_seed_and_rollout():
    options = {"mini_batches": 2, "micro_batches": 2}
    order = rows(stream(**options).cut(scored(["pref"] * 12, index=4)))
    assert order == rows(stream(**options).cut(scored(["pref"] * 12, index=4)))
    assert order != rows(stream(**options).cut(scored(["pref"] * 12, index=5)))
    assert order != rows(stream(seed=1, **options).cut(scored(["pref"] * 12, index=4)))


@pytest.mark.parametrize(("passes", "mini_batches"), [(1, 1), (2, 3)])
def test_unequal_shares_give_one_domain_a_micro_batch(passes, mini_batches):
    data = stream(passes=passes, mini_batches=mini_batches, shares={"pref": 2, "refl": 1})
    assert data.window == 3
    domains = ["pref"] * 13 + ["refl"] * 5
    pieces = data.cut(scored(domains))
    assert len(pieces) == passes * mini_batches * 3
    of_piece = []
    for piece in pieces:
        kinds = {piece.domain_names[i] for i in piece.domains.tolist()}
        assert kinds == {domains[row] for row in rows([piece])} and len(kinds) == 1
        of_piece += kinds
    assert of_piece == ["pref", "pref", "refl"] * (passes * mini_batches)
    for start in range(0, len(pieces), 3 * mini_batches):
        assert sorted(rows(pieces[start : start + 3 * mini_batches])) == list(range(18))
    assert {piece.window_size for piece in pieces} == {3}


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 1},
        {"micro_batches": 3, "mini_batches": 2, "passes": 2},
        {"shares": {"refl": 1, "pref": 2}, "mini_batches": 2},
    ],
)
def test_window_tokens_are_those_of_the_whole_window(options):
    data = stream(**options)
    pieces = data.cut(scored(["pref"] * 9 + ["refl"] * 4))
    for start in range(0, len(pieces), data.window):
        window = pieces[start : start + data.window]
        tokens = sum(int(piece.mask.sum()) for piece in window)
        sequences = sum(len(piece) for piece in window)
        assert all(piece.window_tokens == tokens for piece in window)
        assert all(piece.window_sequences == sequences for piece in window)
    a_pass = sum(piece.window_tokens for piece in pieces) / data.window / data.passes
    assert a_pass == sum(1 + i % 4 for i in range(13))


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        (["pref"] * 3, {"micro_batches": 4}, r"data\.shares: 3 rollouts cannot fill 4 micro-"),
        (["pref"] * 5, {"micro_batches": 2, "mini_batches": 3}, "5 rollouts cannot fill 6 micro-"),
        (
            ["pref"] * 9 + ["refl"],
            {"shares": {"pref": 2, "refl": 1}, "mini_batches": 2},
            r"data\.shares\.refl: 1 rollouts cannot fill 2 micro-batches; draw more",
        ),
        (["pref"] * 9, {"shares": {"pref": 2, "refl": 1}}, r"data\.shares\.refl: 0 rollouts"),
        (
            ["pref", "refl"],
            {"shares": {"pref": 1}},
            r"no micro-batches for refl.*shares\.refl",
        ),
    ],
)
def test_rollouts_that_fill_no_window_are_refused(domains, options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options).cut(scored(domains))
