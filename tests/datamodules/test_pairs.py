"""Batches of pairs: one data set each, ranks, fillers, false negatives, what is refused."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.pair_schedule import Schedule
from datamodules.pairs import PairBatch, PairDataModule, PairSource, text_id
from datamodules.tasks.embedding import EmbeddingTask, EvalSet, ImageText, PairRow, PairSet
from datamodules.texts import TextEncoding
from lightning_modules.backbones.tiny import word_tokenizer
from lightning_modules.functional.contrastive import PairInfo, info_nce

WORDS = [f"{kind}{number}" for kind in "qpn" for number in range(40)]


class Given(EmbeddingTask):
    """Data sets as they are given."""

    name = "given"

    def __init__(self, *sets: PairSet) -> None:
        self.sets = list(sets)

    def pairs(self, split: Any) -> list[PairSet]:
        return self.sets if split == "train" else []

    def evaluations(self, split: Any) -> list[EvalSet]:
        return []


def rows(count: int, name: str = "", negatives: int = 0) -> list[PairRow]:
    """Rows of different texts, each with as many negatives as it is told."""
    return [
        PairRow(
            f"{name}{i}",
            f"q{i}",
            f"p{i}",
            tuple(f"n{(i + k) % 40}" for k in range(negatives)),
            f"{name}.jsonl:{i + 1}",
        )
        for i in range(count)
    ]


def module(*sets: PairSet, ranks: tuple[int, int] = (0, 1), **options: Any) -> PairDataModule:
    """A bound datamodule; ``ranks`` is what a trainer would say of itself."""
    options = {"batch_size": 4, "encoding": TextEncoding()} | options
    data = PairDataModule(task=Given(*sets), **options)
    data.bind(word_tokenizer([*WORDS, "find:", "say:"]))
    if ranks != (0, 1):
        data.trainer = SimpleNamespace(global_rank=ranks[0], world_size=ranks[1])  # type: ignore
    return data


def batches(data: PairDataModule) -> list[PairBatch]:
    source = PairSource(data)
    return [source.batch(0, index) for index in range(len(source))]


def info_of(batch: PairBatch) -> PairInfo:
    names = ("in_batch", "counted", "passage_mask", "text_ids", "query_ids", "known_positives")
    return PairInfo(**{name: getattr(batch, name) for name in names})


def negatives_of(batch: PairBatch) -> float:
    """Mean number of negatives of the rows that count."""
    size, group = batch.text_ids.shape
    found = info_nce(torch.randn(size, 8), torch.randn(size, group, 8), info=info_of(batch))
    total, count = found.metrics["negatives"]
    return float(total) / float(count)


TWO = (PairSet("web", rows(20, "web")), PairSet("sts", rows(13, "sts")))


def test_every_batch_is_of_one_data_set_and_every_row_comes_once() -> None:
    data = module(*TWO, schedule=Schedule(drop_last=False))
    found = batches(data)
    seen: Counter[str] = Counter()
    for batch in found:
        assert {uid.rstrip("0123456789") for uid in batch.uids} == {batch.domain}
        assert len(batch.queries) == len(batch.passages) == 4
        seen.update(batch.uids[: int(batch.counted.sum())])
    assert set(seen) == {row.uid for each in TWO for row in each.rows}
    assert set(seen.values()) == {1}
    domains = [batch.domain for batch in found]
    assert domains not in (sorted(domains), sorted(domains, reverse=True)), "not in one stretch"
    chosen = batches(module(*TWO, datasets=["sts"]))
    assert {batch.domain for batch in chosen} == {"sts"}
    mixed = batches(module(*TWO, schedule=Schedule(name="example_shuffle")))
    assert "mixed" in {batch.domain for batch in mixed}


def test_a_batch_is_a_pure_function_of_seed_and_number() -> None:
    first, again = PairSource(module(*TWO)), PairSource(module(*TWO))
    straight = [first.batch(0, index).uids for index in range(len(first))]
    assert [again.batch(0, i).uids for i in reversed(range(len(again)))] == straight[::-1]
    assert [batch.uids for batch in batches(module(*TWO, seed=1))] != straight
    tensors = [first.batch(0, 3), again.batch(0, 3)]
    assert torch.equal(tensors[0].text_ids, tensors[1].text_ids)
    assert tensors[0].queries == tensors[1].queries


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "example_shuffle"},
        {"name": "sequential", "replay": 0.2},
        {"name": "two_stage", "groups": [["web"], ["sts"]]},
        {"name": "temperature", "temperature": 2.0},
    ],
)
def test_passes_of_the_trainer_have_orders_of_their_own(options: dict[str, Any]) -> None:
    data = module(*TWO, schedule=Schedule(**options))
    source = PairSource(data)
    passes = [[source.batch(e, i).uids for i in range(len(source))] for e in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [source.batch(1, i).uids for i in range(len(source))] == passes[1]
    other = PairSource(module(*TWO, schedule=Schedule(**options), seed=1))
    assert [other.batch(1, i).uids for i in range(len(other))] != passes[1]
    shares = [PairSource(module(*TWO, ranks=(r, 2), schedule=Schedule(**options))) for r in (0, 1)]
    joined = [sorted(u for s in shares for u in s.batch(1, i).uids) for i in range(len(source))]
    assert joined == [sorted(uids) for uids in passes[1]]


def test_shares_of_two_ranks_join_to_the_whole() -> None:
    options: dict[str, Any] = {"schedule": Schedule(drop_last=False), "num_negatives": 2}
    sets = (PairSet("web", rows(18, "web", 3)), PairSet("sts", rows(7, "sts", 1)))
    whole = batches(module(*sets, **options))
    ranks = [batches(module(*sets, ranks=(rank, 2), **options)) for rank in (0, 1)]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for one, *parts in zip(whole, *ranks, strict=True):
        assert {part.domain for part in parts} == {one.domain}, "the same data set on both ranks"
        assert [x for pair in zip(parts[0].uids, parts[1].uids, strict=True) for x in pair] == (
            one.uids
        )
        for name in ("counted", "in_batch", "query_ids"):
            joined = torch.stack([getattr(part, name) for part in parts], 1).flatten()
            assert torch.equal(joined, getattr(one, name)), name
        assert parts[0].text_ids.shape == parts[1].text_ids.shape == (2, 3), "equal on all ranks"
    assert not all(batch.counted.all() for batch in whole)
    with pytest.raises(ValueError, match="data.batch_size=4 cannot be shared evenly by 3"):
        batches(module(*TWO, ranks=(0, 3)))


def test_filled_up_rows_do_not_count() -> None:
    (batch,) = batches(module(PairSet("tiny", rows(5, "tiny")), batch_size=8))
    assert batch.counted.tolist() == [True] * 5 + [False] * 3
    (alone,) = batches(module(PairSet("tiny", rows(5, "tiny")), batch_size=5))
    assert set(alone.uids) == set(batch.uids[:5])
    vectors = {uid: torch.randn(2, 6) for uid in alone.uids}
    losses = []
    for one in (batch, alone):
        made = torch.stack([vectors[uid] for uid in one.uids])
        found = info_nce(made[:, 0], made[:, 1:], temperature=0.5, info=info_of(one))
        assert found.num_rows == 5
        losses.append(float(found.loss_sum))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_known_positives_and_equal_texts_are_no_negatives() -> None:
    plain = PairSet("plain", rows(4))
    (batch,) = batches(module(plain))
    assert negatives_of(batch) == 3
    # rows 0 and 1 ask the same, 2 and 3 have the same answer
    same = [
        PairRow("0", "q0", "p0"),
        PairRow("1", "q0", "p1"),
        PairRow("2", "q2", "p2"),
        PairRow("3", "q3", "p2"),
    ]
    (batch,) = batches(module(PairSet("same", same)))
    assert negatives_of(batch) == 2
    # an answer of q0 that stands in no row of this batch is the negative of another row
    far = [*rows(4), PairRow("far", "q0", "n0")]
    hard = [PairRow("h", "q9", "p9", ("n0", "n1"))]
    sets = PairSet("far", [*far, *hard])
    data = module(sets, batch_size=6, num_negatives=2)
    (batch,) = batches(data)
    place = batch.uids.index("0")
    known = set(batch.known_positives[place].tolist()) - {-1}
    assert known == {text_id("p0"), text_id("n0")}
    # each of six rows has five positives of others and the two negatives of h; those of q0 lose
    # each other's positive, and n0 where it is a negative of h
    assert negatives_of(batch) * 6 == 6 * 7 - 2 * 2


def test_hard_negatives_are_taken_up_to_a_number_and_filled_up() -> None:
    uneven = [PairRow("0", "q0", "p0", ("n0", "n1", "n2")), *rows(3)[1:], *rows(5, "", 1)[4:]]
    (batch,) = batches(module(PairSet("web", uneven), num_negatives=2))
    assert batch.text_ids.shape == (4, 3) and len(batch.passages) == 12
    by_uid = dict(zip(batch.uids, batch.passage_mask.tolist(), strict=True))
    assert by_uid == {
        "0": [True, True, True],
        "1": [True, False, False],
        "2": [True, False, False],
        "4": [True, True, False],
    }
    assert bool((batch.text_ids[~batch.passage_mask] == -1).all())
    assert int(batch.text_ids[batch.uids.index("0"), 2]) == text_id("n1"), "in their order"
    (none,) = batches(module(PairSet("web", uneven)))
    assert none.text_ids.shape == (4, 1)


def test_labelled_rows_use_their_own_negatives_alone() -> None:
    labelled = PairSet("labels", rows(4, "labels", 2), in_batch=False)
    (batch,) = batches(module(labelled, num_negatives=2))
    assert not batch.in_batch.any()
    assert negatives_of(batch) == 2
    bare = [*rows(2, "labels", 1), PairRow("bare", "q5", "p5", (), "labels.jsonl:7")]
    message = r"^labels.jsonl:7: data set 'labels' has no in-batch negatives \(in_batch=false\)"
    with pytest.raises(ValueError, match=message):
        module(PairSet("labels", bare, in_batch=False), num_negatives=2).training_sets()
    with pytest.raises(ValueError, match="labels.jsonl:1: .*data.num_negatives at least 1"):
        module(labelled).training_sets()


def test_instructions_stand_before_queries() -> None:
    sets = (PairSet("web", rows(4, "web"), instruction="find:"), PairSet("sts", rows(4, "sts")))
    options = {"query_template": "{instruction} {text}"}
    tokenizer = word_tokenizer([*WORDS, "find:", "say:"])
    for told, first in (({}, "find:"), ({"web": "say:"}, "say:")):
        data = module(*sets, encoding=TextEncoding(**options, instructions=told))
        by_name = {batch.domain: batch for batch in batches(data)}
        words = [tokenizer.convert_ids_to_tokens(list(q.ids)) for q in by_name["web"].queries]
        assert {one[0] for one in words} == {first} and {len(one) for one in words} == {2}
        assert {len(query.ids) for query in by_name["sts"].queries} == {1}
        assert {len(passage.ids) for passage in by_name["web"].passages} == {1}


def test_ids_tell_texts_and_images_apart() -> None:
    assert text_id("a") == text_id("a") >= 0
    assert (
        len({text_id(x) for x in ("a", "b", ImageText("a", None), ImageText("a", None, "b"))}) == 4
    )
    assert text_id(ImageText("a", 1)) == text_id(ImageText("a", 2)), "the key says what is equal"


def test_a_batch_moves_counts_and_tells_what_it_is() -> None:
    batch = batches(module(*TWO))[0]
    moved = batch.to("cpu")
    assert torch.equal(moved.text_ids, batch.text_ids) and moved.queries == batch.queries
    assert batch.num_tokens == 8
    state = batch.state()
    assert state["uids"] == batch.uids and len(state["passages"]) == 4
    assert isinstance(state["queries"][0], list)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "data.batch_size=1 must be at least 2: a lone row has no in-batch"),
        ({"num_negatives": -1}, "data.num_negatives=-1 must be at least 0"),
        ({"micro_batches": 0}, "data.micro_batches=0 must be at least 1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size=0 must be at least 1"),
        ({"datasets": ["wbe"]}, "names the unknown data set 'wbe'.*did you mean 'web'.*web, sts"),
        ({"datasets": []}, "there is no data set to train on"),
        ({"micro_batches": 9}, "8 batches do not fill one window of 9"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(module(*TWO, **options))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="the data set 'none' has no training rows"):
        batches(module(*TWO, PairSet("none", [])))


def test_a_text_without_a_token_names_its_row() -> None:
    bad = [*rows(3, "web"), PairRow("bad", "q5", "", (), "web.jsonl:9")]
    with pytest.raises(ValueError, match=r"^web.jsonl:9: the text '' has no token"):
        batches(module(PairSet("web", bad)))


def test_windows_and_stages_count_optimizer_steps() -> None:
    data = module(
        *TWO, micro_batches=2, schedule=Schedule(bags=[{"percent": 60}, {"percent": 100}])
    )
    assert data.stage_steps == [len_ // 2 for len_ in data.plan.stages] == [2, 4]
    assert PairSource(data).window == 2 and len(PairSource(data)) == 12
