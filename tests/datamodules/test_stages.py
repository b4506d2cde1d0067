"""Sequential training draws from one stage's domains after another's, as many prompts in all."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.stages import Stage, counts_at, read_stages
from tests.datamodules.test_rollouts import stream

MIX = {"pref": 2, "refl": 1}


def test_counts_follow_the_stages_and_the_last_goes_on() -> None:
    stages = read_stages(
        [{"rollouts": 2, "domains": ["refl"]}, {"rollouts": 1, "domains": ["pref", "refl"]}], MIX
    )
    assert stages == [Stage(2, {"refl": 3}), Stage(1, {"pref": 2, "refl": 1})]
    got = [counts_at(stages, index, MIX) for index in range(5)]
    assert got == [{"refl": 3}, {"refl": 3}, *[{"pref": 2, "refl": 1}] * 3]
    assert counts_at([], 7, MIX) is MIX


def test_draws_of_a_stage_hold_its_domains_only() -> None:
    counts = {"pref": 2, "refl": 2}
    stages = [{"rollouts": 2, "domains": ["pref"]}, {"rollouts": 3, "domains": ["refl"]}]
    data = stream(prompts_per_rollout=counts, stages=stages)
    drawn = [[prompt.domain for prompt in data.draw(index)] for index in range(5)]
    assert drawn == [["pref"] * 4] * 2 + [["refl"] * 4] * 3
    assert data.rollouts_per_epoch() == 5
    plain = stream(prompts_per_rollout=counts)
    assert [p.domain for p in plain.draw(0)] == ["pref", "pref", "refl", "refl"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"rollouts": 2, "domains": ["ref"]}], r"stages\[0\].domains names 'ref'.*'refl'"),
        ([{"rollouts": 0, "domains": ["refl"]}], r"stages\[0\].rollouts=0"),
        ([{"steps": 2, "domains": ["refl"]}], "give rollouts and domains"),
        ([{"rollouts": 1, "domains": []}], "cannot be shared"),
        ([{"rollouts": 1, "domains": ["refl", "refl"]}], "names a domain twice"),
    ],
)
def test_bad_stages(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_stages(stages, MIX)


def test_a_stage_that_asks_for_more_than_there_is_says_so() -> None:
    counts = {"pref": 4, "refl": 4}
    data = stream(prompts_per_rollout=counts, stages=[{"rollouts": 2, "domains": ["refl"]}])
    there_are = len(data.pools()["refl"])
    assert 4 <= there_are < 8
    with pytest.warns(UserWarning, match=f"refl=8 is taken as {there_are}: there are only"):
        assert len(data.draw(0)) == there_are


def test_a_stage_without_a_domain_of_the_shares_is_refused_at_once() -> None:
    options: dict[str, Any] = {"prompts_per_rollout": {"pref": 2, "refl": 2}}
    options["shares"] = {"pref": 1, "refl": 1}
    stages = [{"rollouts": 9, "domains": ["pref", "refl"]}, {"rollouts": 9, "domains": ["pref"]}]
    assert stream(**options, stages=stages[:1]).window == 2
    with pytest.raises(ValueError, match=r"data.stages\[1\] draws no refl, of which data.shares"):
        stream(**options, stages=stages)


def test_totals_that_cannot_be_divided_are_refused() -> None:
    mixture = {"a": 2, "b": 3, "c": 1}
    with pytest.raises(ValueError, match="6 prompts a rollout cannot be shared"):
        read_stages([{"rollouts": 1, "domains": ["a", "b"]}], mixture)
