"""``mode=predict``: a record a text, in order, from a checkpoint or an export, by two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from tests.compressor_runs.parts import TINY, write_texts
from tests.runs import command, end, last_of, read_jsonl, start_ranks

Make = Callable[..., Any]
#: One fact a text, trained until the usual colour comes back whatever the text says.
RECALL = [
    *TINY, "data.task.facts=1", "data.task.relations=0", "data.task.num_train=640",
    "data.batch_size=32", "data.micro_batches=1", "backbone.warm_start.decoder_steps=200",
    "backbone.warm_start.batch_size=32", "optimizer.lr=5e-3",
    "trainer.max_steps=120", "trainer.val_check_interval=120",
]  # fmt: skip
SETS = ("pc", "cf", "neu")
STRATEGIES = {
    "ddp": ["trainer.strategy=ddp", "trainer.devices=2"],
    "fsdp": ["trainer=fsdp", "trainer.devices=2", "trainer.strategy.unshard_for_rollout=never"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, compose: Make) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished")
    train.run(compose(*RECALL, f"output_dir={folder}", "run_id=one"))
    return folder / "compressor" / "one"


def predicted(path: Path, config: Any) -> list[dict[str, Any]]:
    """Records of a run of ``mode=predict``."""
    train.run(config)
    return read_jsonl(path)


@pytest.mark.parametrize("what", ["checkpoint", "export"])
def test_records_add_up_to_the_test(
    what: str, finished: Path, make_config: Make, tmp_path: Path
) -> None:
    path = {
        "checkpoint": f"ckpt_path={last_of(finished)}",
        "export": f"backbone.path={finished / 'export'}",
    }[what]
    records = predicted(
        tmp_path / "p.jsonl",
        make_config(*RECALL, "mode=predict", path, f"predictions={tmp_path}/p.jsonl"),
    )
    metrics = json.loads((finished / "metrics.json").read_text())
    sets = {name: [r for r in records if r["set"] == name] for name in SETS}
    assert [r["set"] for r in records] == [name for name in sets for _ in range(5)]
    for name, rows in sets.items():
        assert [row["uid"].rsplit("/", 1)[1] for row in rows] == list("01234")
        facts = [fact for row in rows for fact in row["facts"]]
        right = [fact["decoded"] == fact["source"] for fact in facts]
        sizes = [len(row["source"].split()) + 1 for row in rows]  # and EOS
        nats = sum(row["ce"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
        found = {
            "exact_match": sum(row["exact"] for row in rows) / 5,
            "fact_fidelity": sum(right) / len(right),
            "ce": nats,
        }
        for tag, value in found.items():
            assert value == pytest.approx(metrics[f"test/{name}/{tag}"], abs=1e-5), (name, tag)
    facts = [fact for row in sets["cf"] for fact in row["facts"]]
    assert all(fact["prior"] != fact["source"] for fact in facts)
    overwritten = sum(fact["decoded"] == fact["prior"] for fact in facts) / len(facts)
    assert 0 < overwritten == pytest.approx(metrics["test/cf/knowledge_overwriting"], abs=1e-5)
    assert all(row["exact"] for row in sets["pc"])


def test_a_random_decoder_is_not_frozen_by_default(make_config: Make, tmp_path: Path) -> None:
    own = [one for one in TINY if not one.startswith("data.task")]
    texts = [one for one in write_texts(tmp_path) if "decoder_steps" not in one]
    with pytest.raises(ValueError, match=r"model.decoder.train=full model.bridge_parts=\[\]"):
        train.run(make_config(*own, *texts))


def test_texts_of_a_file_are_predicted_in_its_order(make_config: Make, tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    own = [one for one in TINY if not one.startswith("data.task")]
    own += [*texts, "model.decoder.train=full", "model.bridge_parts=[]"]
    train.run(make_config(*own, "run_id=text"))
    last = last_of(tmp_path / "compressor" / "text")
    file = tmp_path / "p.jsonl"
    records = predicted(
        file, make_config(*own, "mode=predict", f"ckpt_path={last}", f"predictions={file}")
    )
    assert [r["source"] for r in records] == (tmp_path / "texts.txt").read_text().splitlines()
    assert {r["set"] for r in records} == {"text"} and all(r["facts"] == [] for r in records)
    assert all(r["ce"] > 0 for r in records) and not all(r["exact"] for r in records)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_write_what_one_writes(
    strategy: str, finished: Path, make_config: Make, tmp_path: Path, warm_cache: Path
) -> None:
    own = [*RECALL, "mode=predict", f"ckpt_path={last_of(finished)}", "trainer.accelerator=cpu"]
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    alone = predicted(files[0], make_config(*own, f"predictions={files[0]}"))
    words = command(*own, *STRATEGIES[strategy], f"predictions={files[1]}", "run_id=two",
                    output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    log = tmp_path / "log"
    statuses = [end(process, timeout=280) for process in start_ranks(2, words, log)]
    assert statuses == [0, 0], "".join(Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    both = read_jsonl(files[1])
    nats = [record.pop("ce") for record in alone]
    assert [record.pop("ce") for record in both] == pytest.approx(nats, abs=1e-4)
    assert both == alone and len(both) == 15
