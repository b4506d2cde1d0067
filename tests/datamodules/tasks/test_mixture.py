"""Mixtures: domains, delegation to the parts, vocabulary, demonstrations, refused parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.chat_prompts import ChatPrompts
from datamodules.tasks.mixture import Mixture
from datamodules.tasks.prefix_audit import PrefixAudit
from datamodules.tasks.skills import ChatTopics, ModularSum, RepeatTask
from tests.datamodules.tasks.prefix_audit_helpers import EOS, make_tokenizer


def make(**tasks: object) -> Mixture:
    mixture = Mixture(tasks=tasks)
    mixture.bind(make_tokenizer(mixture.vocabulary() or []))
    return mixture


@pytest.fixture
def mixture() -> Mixture:
    small = {"num_train": 6, "num_val": 2, "num_test": 3}
    return make(sums=ModularSum(**small), chat=ChatTopics(scale=10.0, **small))


def test_prompts_keep_their_task_under_the_name_of_their_part(mixture: Mixture) -> None:
    records = mixture.records("train")
    prompts = [mixture.prompt(record) for record in records]
    assert [prompt.domain for prompt in prompts] == ["sums"] * 6 + ["chat"] * 6
    assert all(prompt.task is mixture.tasks[prompt.domain] for prompt in prompts)
    assert len({prompt.uid for prompt in prompts}) == 12
    own = mixture.tasks["sums"]
    first = own.prompt(own.records("train")[0])
    assert prompts[0].token_ids == first.token_ids
    assert prompts[0].uid == f"sums/{first.uid}"
    assert [len(mixture.records(split)) for split in ("val", "test", "predict")] == [4, 6, 6]


def test_verify_reaches_the_part(mixture: Mixture) -> None:
    prompts = [mixture.prompt(record) for record in mixture.records("test")]
    for prompt in prompts:
        number = sum(prompt.record.numbers) % 23 if prompt.domain == "sums" else 99
        number = prompt.record.numbers[0] if prompt.domain == "chat" else number
        ids = (mixture.tokenizer.get_vocab()[f"w{number}"], EOS)
        completion = Completion(ids, (0.0, 0.0), FinishReason.STOP)
        expected = 1.0 if prompt.domain == "sums" else 10 / 8
        assert mixture.verify(prompt, completion)["reward"] == pytest.approx(expected)
        assert prompt.task.verify(prompt, completion) == mixture.verify(prompt, completion)


def test_two_parts_of_one_class_have_different_prompts() -> None:
    mixture = make(a=ModularSum(num_train=3), b=ModularSum(num_train=3))
    assert len({mixture.prompt(record).uid for record in mixture.records("train")}) == 6


def test_vocabulary_is_the_union_in_order(mixture: Mixture) -> None:
    words = mixture.vocabulary()
    assert words == [*(f"w{n}" for n in range(23)), "=", "add", "chat"]


def test_parts_of_text_and_of_words_have_no_common_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hello?"}) + "\n")
    chat = ChatPrompts(path=str(path))
    assert Mixture(tasks={"a": chat}).vocabulary() is None
    with pytest.raises(ValueError, match="chat need a tokenizer of text and math one of words"):
        Mixture(tasks={"math": ModularSum(), "chat": chat}).vocabulary()


def test_demonstrations_are_shared_among_the_parts_that_have_some(tmp_path: Path) -> None:
    mixture = make(a=ModularSum(), b=ChatTopics(), c=RepeatTask())
    for count in (2, 3, 7, 12):
        domains = [shown.domain for shown in mixture.demonstrations(0, 5, count)]
        assert len(domains) == count
        numbers = [domains.count(name) for name in "abc"]
        assert max(numbers) - min(numbers) <= 1
    assert mixture.demonstrations(0, 5, 9) == mixture.demonstrations(0, 5, 9)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Hello?"}) + "\n")
    with_none = Mixture(tasks={"text": ChatPrompts(path=str(path)), "sums": mixture.tasks["a"]})
    assert [one.domain for one in with_none.demonstrations(0, 0, 4)] == ["sums"] * 4
    assert Mixture(tasks={"text": ChatPrompts(path=str(path))}).demonstrations(0, 0, 4) == []


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "names no task"),
        ({"math": None}, "names no task"),
        ({"no/slash": ModularSum()}, r"data\.task\.tasks\.no/slash: a name is a letter"),
        ({"math": "ModularSum"}, r"data\.task\.tasks\.math is a str"),
        ({"judge": PrefixAudit()}, r"data\.task\.tasks\.judge judges pairs.*name it pref"),
    ],
)
def test_refused_parts(tasks: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(tasks=tasks)


def test_a_judge_task_is_a_part_under_its_own_domain() -> None:
    audit = PrefixAudit(num_test=1)
    mixture = make(pref=audit, math=ModularSum(num_test=1))
    prompt = mixture.prompt(mixture.records("test")[0])
    text = f"{audit.gold_analysis(prompt.record)} response{prompt.label}_wins"
    ids = (*mixture.tokenizer.convert_tokens_to_ids(text.split()), EOS)
    completion = Completion(ids, (0.0,) * len(ids), FinishReason.STOP)
    assert mixture.verify(prompt, completion) == {"reward": 1.0, "valid": 1.0}


def test_rollouts_draw_by_domain(mixture: Mixture) -> None:
    counts = {"sums": 3, "chat": 2}
    data = RolloutDataModule(task=mixture, engine=HFEngine(), prompts_per_rollout=counts)
    for index in range(4):
        domains = [prompt.domain for prompt in data.draw(index)]
        assert sorted(domains) == ["chat"] * 2 + ["sums"] * 3
