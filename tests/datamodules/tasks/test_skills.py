"""The three miniature skills: scores against hand-made answers, records, noisy demonstrations."""

from __future__ import annotations

from typing import Any

import pytest

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.skills import SKILLS, ChatTopics, Draw, ModularSum, RepeatTask, Skill
from tests.datamodules.tasks.prefix_audit_helpers import EOS, make_tokenizer


def make(cls: type[Skill], **options: Any) -> Skill:
    task = cls(**options)
    words = dict.fromkeys(w for other in SKILLS for w in other(**options).vocabulary())
    task.bind(make_tokenizer(list(words)))
    return task


def write(task: Skill, numbers: list[int], finish: FinishReason = FinishReason.STOP) -> Completion:
    words = [f"w{number}" for number in numbers]
    ids = tuple(task.tokenizer.convert_tokens_to_ids(words))
    return Completion((*ids, EOS), (0.0,) * (len(ids) + 1), finish)


def asked(task: Skill, first: int, second: int) -> Prompt:
    return task.prompt(Draw("hand", (first, second)))


@pytest.mark.parametrize(
    ("cls", "numbers", "answer", "score"),
    [
        (ModularSum, (20, 5), [2], 1.0),
        (ModularSum, (20, 5), [2, 2], 0.0),
        (ModularSum, (20, 5), [], 0.0),
        (ModularSum, (3, 4), [8], 0.0),
        (ChatTopics, (20, 0), [20, 21, 22, 0, 1, 2, 3, 4], 1.0),
        (ChatTopics, (20, 9), [4, 20], 0.25),
        (ChatTopics, (20, 0), [20, 20, 20, 19], (1 - 1.5) / 8),
        (ChatTopics, (20, 0), [], 0.0),
        (RepeatTask, (6, 1), [6, 6, 6, 2, 3], 1.0),
        (RepeatTask, (6, 1), [6, 2, 6, 6, 3], 1.0),
        (RepeatTask, (6, 1), [2, 3, 6, 6, 6], 2 / 3),
        (RepeatTask, (6, 1), [6, 6, 2, 3], 1 / 3),
        (RepeatTask, (6, 1), [6], 0.0),
        (RepeatTask, (6, 1), [], 0.0),
        (RepeatTask, (6, 3), [6, 6, 6, 6, 6, 0, 0], 1.0),
    ],
)
def test_scores(
    cls: type[Skill], numbers: tuple[int, int], answer: list[int], score: float
) -> None:
    task = make(cls, scale=10.0)
    got = task.verify(asked(task, *numbers), write(task, answer))
    assert got == {"reward": pytest.approx(10 * score), "score": pytest.approx(score)}


def test_a_completion_without_its_end_and_other_words() -> None:
    task = make(ModularSum)
    prompt = asked(task, 1, 1)
    for reason in (FinishReason.LENGTH, FinishReason.ERROR):
        assert task.verify(prompt, write(task, [2], reason))["score"] == 0.0
    engine_kept_the_end = Completion(write(task, [2]).token_ids[:-1], (0.0,), FinishReason.STOP)
    assert task.verify(prompt, engine_kept_the_end)["score"] == 1.0
    chat = make(ChatTopics)
    odd = (*write(chat, [5, 6]).token_ids[:-1], chat.tokenizer.get_vocab()["="], 99_999, EOS)
    completion = Completion(odd, (0.0,) * len(odd), FinishReason.STOP)
    assert chat.verify(asked(chat, 5, 0), completion)["score"] == pytest.approx((2 - 1.0) / 8)


def test_records_and_prompts() -> None:
    task = make(RepeatTask, num_train=30, num_val=5, num_test=7)
    sizes = {split: len(task.records(split)) for split in ("train", "val", "test", "predict")}
    assert sizes == {"train": 30, "val": 5, "test": 7, "predict": 7}
    assert task.records("train") == make(RepeatTask, num_train=30).records("train")
    assert task.records("train")[:7] != task.records("test")
    assert make(RepeatTask, num_train=30, seed=1).records("train") != task.records("train")
    record = task.records("train")[0]
    prompt = task.prompt(record)
    first, second = record.numbers
    assert task.render(prompt.token_ids) == f"repeat w{first} w{second} ="
    assert (prompt.uid, prompt.domain) == (record.uid, "if")
    assert len({r.uid for s in sizes if s != "predict" for r in task.records(s)}) == 42


@pytest.mark.parametrize("cls", SKILLS)
def test_demonstrations_without_slips_earn_everything_that_they_claim(cls: type[Skill]) -> None:
    task = make(cls, noise=0.0, confusion=0.0)
    scores = []
    for shown in task.demonstrations(0, 0, 50):
        words = task.render(shown.prompt_ids).split()
        prompt = asked(task, int(words[1][1:]), int(words[2][1:]))
        assert prompt.token_ids == shown.prompt_ids
        assert len(shown.completion_ids) <= prompt.max_new_tokens
        completion = Completion(
            shown.completion_ids, (0.0,) * len(shown.completion_ids), FinishReason.STOP
        )
        scores.append(task.verify(prompt, completion)["score"])
    if cls is ChatTopics:  # three to six words of eight
        assert {3 / 8, 6 / 8} <= set(scores) <= {3 / 8, 4 / 8, 5 / 8, 6 / 8}
    else:
        assert set(scores) == {1.0}


def test_demonstrations_are_pure_noisy_and_confused() -> None:
    task = make(ModularSum, noise=0.0, confusion=1.0)
    assert task.demonstrations(3, 1, 9) == task.demonstrations(3, 1, 9)
    assert task.demonstrations(3, 1, 9) != task.demonstrations(3, 2, 9)
    sizes = [len(shown.completion_ids) - 1 for shown in task.demonstrations(0, 0, 600)]
    # a third of the manners is the sum itself, and no other manner writes one word
    assert 0.26 < sum(size == 1 for size in sizes) / 600 < 0.41
    slips = make(ModularSum, noise=0.5, confusion=0.0).demonstrations(0, 0, 400)
    right = 0
    for shown in slips:
        words = task.render(shown.prompt_ids).split()
        total = (int(words[1][1:]) + int(words[2][1:])) % 23
        right += task.render(shown.completion_ids).split()[0] == f"w{total}"
    assert 0.42 < right / 400 < 0.63  # a slip may hit the sum


def test_bad_options_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_val=-1.*num_words=3.*noise=2.*scale=0"):
        ModularSum(num_val=-1, num_words=3, noise=2, scale=0)
