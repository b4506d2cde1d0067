"""What validation and test of ReflectRM report: metrics, arms, warnings, repeatability."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from datamodules.engines.hf import HFEngine
from datamodules.loader import Rows
from datamodules.tasks.base import Pair
from lightning_modules.grm.base import GenerativeRewardModule

STATS = ("accuracy", "consistency", "flip_rate", "first_slot_rate", "invalid_rate")


def stats(results: dict[str, float], arm: str) -> list[float]:
    return [results[f"test/{arm}/{name}" if arm else f"test/{name}"] for name in STATS]


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda pair, i: (1, i or 0), [0.5, 0.0, 1.0, 1.0, 0.0]),
        (lambda pair, i: (2, i or 0), [0.5, 0.0, 1.0, 0.0, 0.0]),
        (lambda pair, i: (pair.label, i or 0), [1.0, 1.0, 0.0, 0.5, 0.0]),
        (lambda pair, i: (3 - pair.label, i or 0), [0.0, 0.0, 0.0, 0.5, 0.0]),
    ],
    ids=["always 1", "always 2", "perfect", "always wrong"],
)
def test_metrics_of_stub_judges(make_module, make_engine, run_test, judge, expected):
    engine = make_engine(judge)
    results = run_test(make_module(num_votes=3), engine, eval_batch_size=2)
    arms = ["", "greedy", "maj3", "maj5", "best_confidence", "oracle", "two_stage",
            "two_stage_no_copies", "random_winners", "random_anchor"]  # fmt: skip
    for arm in arms:
        assert stats(results, arm) == expected, arm


def test_unparsable_verdicts_are_wrong(make_module, make_engine, run_test):
    blank = make_engine(lambda pair, i: (None,))
    results = run_test(make_module(), blank)
    for arm in ("", "greedy", "maj8", "maj15", "best_confidence", "oracle", "two_stage"):
        tag = f"test/{arm}/" if arm else "test/"
        values = [results[f"{tag}{name}"] for name in ("accuracy", "consistency", "invalid_rate")]
        assert values == [0.0, 0.0, 1.0], arm
        assert f"{tag}flip_rate" not in results  # nothing to flip
    assert results["test/infer/generations"] == 8
    half = make_engine(lambda pair, i: (None if pair.swapped else pair.label,))
    results = run_test(make_module(), half)
    values = [results[f"test/maj8/{name}"] for name in ("accuracy", "consistency", "invalid_rate")]
    assert values == [0.5, 0.0, 0.5]


def test_long_vote_extends_the_same_samples(make_module, make_engine, run_test):
    """Five of the first eight are right, none of the other seven."""

    def judge(pair, i):
        return (pair.label if i is not None and i < 5 else 3 - pair.label, i or 0)

    results = run_test(make_module(), make_engine(judge))
    accuracy = {arm: results[f"test/{arm}/accuracy"] for arm in ("greedy", "maj8", "maj15")}
    assert accuracy == {"greedy": 0.0, "maj8": 1.0, "maj15": 0.0}


def test_more_samples_of_the_real_engine_extend_fewer(task, make_module):
    module, engine = make_module(), HFEngine()
    module.configure_model()
    engine.sync(module.policy, 0)
    drawn = {}
    for samples in (8, 15):
        with engine.keyed("test/0"):
            drawn[samples] = module.sample(
                task.records("test"), engine, greedy=False, samples=samples
            )
    for few, many in zip(drawn[8], drawn[15], strict=True):
        texts = [[one.completion.token_ids for one in c.samples] for c in (few, many)]
        assert texts[0] == texts[1][:8]
        assert len(set(texts[1])) > 8


@pytest.mark.parametrize("unparsed", [0, 3, 7])
def test_generations_of_a_judgement(task, make_module, make_engine, run_test, unparsed):
    engine = make_engine(lambda pair, i: (None if (i or 0) < unparsed else pair.label, i or 0))
    module = make_module()
    module.judge(task.records("test"), engine=engine, task=task)
    judgements = 2 * 5
    assert engine.written == Counter(pref=8 * judgements, refl=(7 - unparsed) * judgements)
    results = run_test(module, engine)
    assert results["test/infer/generations"] == 15 - unparsed


def two_right_two_wrong(pair: Pair, i: int | None) -> tuple[int, int]:
    """The right verdict comes with the gold analysis, every other time."""
    return (pair.label, 0) if (i or 0) % 2 == 0 else (3 - pair.label, i or 0)


@pytest.mark.parametrize("is_good", [True, False])
def test_reflection_accuracy_and_its_warning(task, make_module, make_engine, run_test, is_good):
    def reflect(pair, texts):
        better = task.better_analysis(pair, texts) or 1
        return better if is_good else 3 - better

    engine = make_engine(two_right_two_wrong, reflect)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = run_test(make_module(controls=False), engine)
    messages = [str(w.message) for w in caught]
    assert results["test/reflection_accuracy"] == float(is_good)
    assert results["test/reflection_accuracy_outcome"] == float(is_good)
    assert any("reflection accuracy is 0.00, below 0.8" in m for m in messages) != is_good
    assert "test/random_anchor/accuracy" not in results


@pytest.mark.parametrize("is_good", [True, False])
def test_two_stage_below_the_vote_warns(number_of, make_module, make_engine, run_test, is_good):
    """Five of eight are right, the anchor among them; W is the other three, or empty."""

    def judge(pair, i):
        i = i or 0
        return (pair.label if i < 5 else 3 - pair.label, i, -1.0 - i)

    def reflect(pair, texts):
        numbers = [number_of(pair, text) for text in texts]
        best = max(numbers) if max(numbers) >= 5 and not is_good else 0  # 0 is the anchor
        return numbers.index(best) + 1

    module = make_module(controls=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = run_test(module, make_engine(judge, reflect))
    assert results["test/maj8/accuracy"] == 1.0
    messages = [str(w.message) for w in caught]
    assert any("is below the plain vote's 1.000" in m for m in messages) != is_good
    assert results["test/two_stage/accuracy"] == float(is_good)


def test_evaluating_twice_gives_the_same_numbers(make_module, noisy, run_test):
    module = make_module()
    first, second = run_test(module, noisy), run_test(module, noisy)
    assert 0 < first["test/two_stage/accuracy"] < 1
    assert 0 < first["test/infer/winner_set_size"] < 7
    assert first == second
    assert run_test(module, noisy, seed=1) != first  # another stream of samples


def test_real_engine_evaluates_and_repeats(make_task, make_module, run_test):
    options = {"task": make_task(num_test=2), "eval_batch_size": 2}
    module = make_module(num_votes=2)
    first, second = (run_test(module, HFEngine(), **options) for _ in range(2))
    assert first == second
    assert first["test/accuracy"] == 0.0 and first["test/invalid_rate"] == 1.0  # random weights


def test_filled_up_rows_do_not_count(task, make_module, noisy, run_test):
    module = make_module()
    whole, filled = (run_test(module, noisy, eval_batch_size=size) for size in (5, 4))
    for tag in whole.keys() - {"test/conf_auc"}:  # whose pairs are those within a batch
        assert filled[tag] == pytest.approx(whole[tag]), tag
    first, second, *_ = task.records("test")
    alone = module.evaluate(Rows([first], [True]), "test")
    beside = module.evaluate(Rows([first, second], [True, False]), "test")
    for arm, metrics in alone.items():
        plain, other = ({k: (float(s), float(n)) for k, (s, n) in m.items() if float(n)}
                        for m in (metrics, beside[arm]))  # fmt: skip
        assert plain == other, arm


@pytest.mark.parametrize("inference", ["greedy", "all"])
def test_validation_runs_what_is_asked_for(make_module, make_engine, run_test, inference):
    engine = make_engine(lambda pair, i: (pair.label, i or 0))
    module = make_module(val_inference=inference)
    results = run_test(module, engine, split="validate", eval_batch_size=3)
    assert results["val/accuracy"] == results["val/greedy/accuracy"] == 1.0
    assert ("val/two_stage/accuracy" in results) == (inference == "all")
    assert engine.written["greedy"] == 6
    assert engine.written["pref"] == (6 * 15 if inference == "all" else 0)


def test_bad_options_are_named(make_module):
    for options, name in [
        ({"anchor": "best"}, "model.anchor"), ({"winners": "some"}, "model.winners"),
        ({"num_votes": 0}, "model.num_votes"), ({"conf_fraction": 0.0}, "model.conf_fraction"),
        ({"inference": "vote"}, "model.inference"), ({"verdict_reward": {"bad": 1}}, "bad"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make_module(**options)
    with pytest.raises(ValueError, match="two_stage"):
        make_module(GenerativeRewardModule, inference="two_stage")
