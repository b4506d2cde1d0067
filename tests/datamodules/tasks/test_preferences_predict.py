"""Pairs to predict: all of the main file, in its order, whether they have labels or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.tasks.preferences import PreferencePairs

SPLITS = ("train", "val", "test")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def judge_row(number: int, label: str | None = "A>B", size: int = 1) -> dict[str, Any]:
    row = {"pair_id": f"p{number}", "question": f"Why {number}?"}
    row |= {"response_A": f"good {number}" * size, "response_B": f"bad {number}" * size}
    return row if label is None else {**row, "label": label}


def make_task(path: str, **options: Any) -> PreferencePairs:
    task = PreferencePairs(path=path, **{"max_prompt_tokens": 300, **options})
    task.bind(byte_tokenizer())
    return task


def uids(task: PreferencePairs, split: Any = "predict") -> list[str]:
    return [pair.uid for pair in task.records(split)]


@pytest.mark.parametrize("labels", ["required", "optional"])
@pytest.mark.parametrize("on_too_long", ["cut", "skip", "error"])
def test_a_file_without_labels_can_be_predicted(
    tmp_path: Path, labels: Any, on_too_long: Any
) -> None:
    path = write(tmp_path, [judge_row(number, None) for number in range(20)])
    task = make_task(path, labels=labels, on_too_long=on_too_long)
    assert uids(task) == [f"p{number}" for number in range(20)]
    assert all(pair.label is None for pair in task.records("predict"))
    prompts = [task.prompt(pair) for pair in task.records("predict")]
    assert all(prompt.label is None for prompt in prompts)
    assert task.counts["predict"] == task.counts["predict/rows"] == 20
    if labels == "required":
        with pytest.raises(ValueError, match="no column label"):
            task.records("test")
    else:  # nothing to be scored on: they are for training without labels
        assert (uids(task, "train"), uids(task, "test")) == (uids(task), [])


def test_predict_is_the_whole_main_file_in_its_order(tmp_path: Path) -> None:
    path = write(tmp_path, [judge_row(number) for number in range(60)])
    other = write(tmp_path, [judge_row(number) for number in range(100, 104)], "test.jsonl")
    task = make_task(path, test_path=other)
    assert uids(task) == [f"p{number}" for number in range(60)]
    assert task.records("predict") is task.records("predict")
    assert {pair.label for pair in task.records("predict")} == {1}
    assert sorted(uids(task, "train") + uids(task, "val")) == sorted(uids(task))
    assert task.counts["main/rows"] == task.counts["predict/rows"] == 60
    assert task.counts["test/rows"] == len(task.records("test")) == 4


def test_splits_and_prediction_are_read_apart_and_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    task = make_task(str(path))  # nothing is there as yet
    write(tmp_path, [judge_row(0, None), judge_row(1)])
    assert uids(task) == ["p0", "p1"] and "main/rows" not in task.counts
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: field 'label' is missing"):
        task.records("train")
    write(tmp_path, [judge_row(2)])
    assert sum((uids(task, split) for split in SPLITS), []) == ["p2"]
    assert uids(task) == ["p0", "p1"]


def test_bad_and_doubled_rows_are_treated_as_in_training(tmp_path: Path) -> None:
    rows = [judge_row(0), judge_row(0), {**judge_row(1), "response_B": ""}, judge_row(2, None)]
    rows.append(judge_row(3, "C"))
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=r"2 bad rows\n.*jsonl:3: .*\n.*jsonl:5: "):
        make_task(path).records("predict")
    task = make_task(path, on_bad_row="skip")
    assert uids(task) == ["p0", "p0#2", "p2"]
    assert task.counts["predict/skipped"] == 2
    assert task.counts["predict/skipped/empty_text"] == 1
    assert task.counts["predict/skipped/bad_label"] == 1
    with pytest.warns(UserWarning, match="2 of 5 rows left out"):
        assert len(make_task(path, max_bad_share=0.4).records("predict")) == 3


@pytest.mark.parametrize("label", [None, "A>B"])
@pytest.mark.parametrize("first", ["predict", "test"])
def test_long_pairs(tmp_path: Path, label: str | None, first: str) -> None:
    rows = [judge_row(0), judge_row(1, label, size=200), judge_row(2), judge_row(3, label)]
    path = write(tmp_path, rows)
    task = make_task(path, labels="required", on_bad_row="skip", on_too_long="skip")
    task.records("predict" if first == "predict" else "test")
    assert uids(task) == ["p0", "p2", "p3"] and task.counts["predict/too_long"] == 1
    known = ["p0", "p2"] if label is None else ["p0", "p2", "p3"]
    assert sorted(sum((uids(task, split) for split in SPLITS), [])) == known
    assert task.counts["too_long"] == (label is not None)
    assert task.counts["main/skipped"] == (2 if label is None else 0)
    task.bind(byte_tokenizer())
    assert task.counts["too_long"] == (label is not None) and len(uids(task)) == 3
    with pytest.raises(ValueError, match="the prompt of pair 'p1' is longer"):
        make_task(path, on_too_long="error")
    assert len(make_task(path).records("predict")) == 4


def test_lists_of_responses_need_no_label_column(tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "q", "chosen": ["a", "b"], "rejected": ["x", "y"]}
    task = make_task(write(tmp_path, [row]))
    assert uids(task) == ["7/c0r0", "7/c0r1", "7/c1r0", "7/c1r1"]
    assert {pair.label for pair in task.records("predict")} <= {1, 2}
