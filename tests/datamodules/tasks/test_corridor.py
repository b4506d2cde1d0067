"""The valid corridor: what is valid, what is rewarded, what is demonstrated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.corridor import Corridor
from lightning_modules.backbones.tiny import TinyOptions, build_tiny

SHAPE = TinyOptions(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
                    head_dim=8)  # fmt: skip


def bound(folder: Path, **options: Any) -> Corridor:
    task = Corridor(**{"vocabulary_size": 64, "length": 6} | options)
    build_tiny(folder, task.vocabulary(), SHAPE, seed=0)
    task.bind(AutoTokenizer.from_pretrained(folder))
    return task


def check(
    task: Corridor, words: str, reason: str = "length", ends: bool = False
) -> dict[str, float]:
    ids = task.tokenizer.convert_tokens_to_ids(words.split())
    ids += [task.tokenizer.eos_token_id] * ends
    prompt = task.prompt(task.records("train")[0])
    return task.verify(prompt, Completion(tuple(ids), (0.0,) * len(ids), FinishReason(reason)))


def walk(*classes: int) -> str:
    return " ".join(f"w{t}.{c}" for t, c in enumerate(classes))


def test_rewards(tmp_path: Path) -> None:
    task = bound(tmp_path)
    assert task.keys == (1, 3, 5)
    assert check(task, walk(0, 1, 3, 1, 2, 1)) == {"reward": 1.0, "valid": 1.0, "keys": 1.0}
    assert check(task, walk(0, 1, 3, 1, 2, 0)) == {"reward": 0.0, "valid": 1.0, "keys": 2 / 3}
    assert check(task, walk(0, 0, 0, 0, 0, 0)) == {"reward": 0.0, "valid": 1.0, "keys": 0.0}
    wrong = walk(0, 1, 3, 1, 2, 1).replace("w2.3", "w3.3")  # valid elsewhere only
    assert check(task, wrong) == {"reward": 0.0, "valid": 0.0, "keys": 1.0}
    assert check(task, wrong.replace("w3.3", "x0"))["valid"] == 0.0
    assert check(task, walk(0, 1, 3, 1, 2))["valid"] == 0.0
    assert check(task, walk(0, 1, 3, 1, 2), reason="stop", ends=True)["valid"] == 0.0
    assert check(task, walk(0, 1, 3, 1, 2, 1) + " w0.0")["valid"] == 0.0
    assert check(task, "", reason="stop") == {"reward": 0.0, "valid": 0.0, "keys": 0.0}


def test_the_wrong_way_pays_a_little_where_it_is_deceptive(tmp_path: Path) -> None:
    task = bound(tmp_path, reward="deceptive")
    assert check(task, walk(0, 1, 3, 1, 2, 1))["reward"] == 1.0
    assert check(task, walk(0, 1, 3, 1, 2, 0))["reward"] == 0.0
    assert check(task, walk(0, 0, 0, 2, 0, 3))["reward"] == 0.3
    assert check(task, walk(0, 0, 0, 2, 0, 3).replace("w0.0", "x1"))["reward"] == 0.0


def test_with_an_end_token_a_walk_must_end(tmp_path: Path) -> None:
    task = bound(tmp_path, end_token=True)
    right = walk(0, 1, 3, 1, 2, 1)
    assert check(task, right, reason="stop", ends=True)["reward"] == 1.0
    assert check(task, right, reason="length")["reward"] == 0.0
    assert task.prompt(task.records("val")[0]).max_new_tokens == 7
    one = task.demonstrations(0, 0, 1)[0]
    assert one.completion_ids[-1] == task.tokenizer.eos_token_id and len(one.completion_ids) == 7


def test_demonstrations_are_valid_walks_of_the_prior(tmp_path: Path) -> None:
    task = bound(tmp_path, prior=(0.5, 0.5, 0.0, 0.0))
    shown = task.demonstrations(3, 7, 200)
    assert shown == task.demonstrations(3, 7, 200) != task.demonstrations(3, 8, 200)
    prompt = task.prompt(task.records("train")[0])
    for one in shown:
        completion = Completion(one.completion_ids, (0.0,) * 6, FinishReason.LENGTH)
        assert task.verify(prompt, completion)["valid"] == 1.0
        assert one.prompt_ids == prompt.token_ids
    words = Counter(w for one in shown for w in task.tokenizer.convert_ids_to_tokens(
        list(one.completion_ids)))  # fmt: skip
    classes = [sum(n for w, n in words.items() if w.endswith(f".{c}")) for c in range(4)]
    assert classes[2] == classes[3] == 0 and abs(classes[0] - classes[1]) < 150


def test_the_vocabulary_is_as_large_as_asked_and_uids_differ(tmp_path: Path) -> None:
    task = bound(tmp_path, vocabulary_size=50)
    assert len(task.vocabulary()) == len(set(task.vocabulary())) == 50
    uids = [uid for split in ("train", "val", "test") for uid in task.records(split)]
    assert len(uids) == len(set(uids))
    assert task.records("predict") == task.records("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 64, "length": 16}, "vocabulary_size=64 must be at least 65"),
        ({"num_keys": 17}, "num_keys=17 must be 1 to length=16"),
        ({"prior": [1.0]}, "give 4 weights"),
        ({"reward": "dense"}, "give 'sparse' or 'deceptive'"),
        ({"num_classes": 1, "prior": [1.0]}, "num_classes=1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corridor(**options)
