"""docs/tags.md lists every tag that a run logs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.models import MODELS
from tests.runs import REPO, call, command, small

TABLES = re.split(
    "Policy RL, below|Judges, below|Embeddings, below", (REPO / "docs" / "tags.md").read_text()
)
SUMMARY = "(mean|std|min|max)"
#: Every model, and options of embeddings that log more.
CASES = {
    **{name: [f"model={name}"] for name in MODELS},
    "contrastive-options": [
        "model=contrastive", "model.chunk_size=4", "model.keep_chunks=1", "model.symmetric=true",
        "model.matryoshka_dims=[32,8]", "callbacks=[default,hard_negatives]",
        "callbacks.hard_negatives.count=2", "data.num_negatives=2",
    ],
    "boom-merged": ["model=boom", "callbacks.model_merging.use_base=true", "trainer.max_steps=-1"],
}  # fmt: skip


def patterns(text: str) -> list[str]:
    """Regular expressions of the tags in the first column of a table."""
    found = []
    for line in text.splitlines():
        for tag in re.findall(r"`([^`]+)`", line.split("|")[1] if line.startswith("|") else ""):
            choices = [part.split(",") for part in re.findall(r"\{([^}]*)\}", tag)]
            shape = re.sub(r"\{[^}]*\}", "{}", tag)
            for values in itertools.product(*choices):
                filled = shape.format(*values)
                filled = re.escape(filled).replace("<d>", r"\w+?").replace(r"\.\.\.", r"\w+")
                filled = filled.replace("<n>", r"\d+")
                found.append(filled)
    return found


GENERAL = [p for p in patterns(TABLES[0]) if not p.startswith(("val/", "test/"))]
EVALUATED = [f"{p}(/\\w+)?" for p in patterns(TABLES[1])]
EVALUATED += [p for table in TABLES[2:] for p in patterns(table)]


def is_listed(tag: str) -> bool:
    if tag.startswith(("val/", "test/")):
        return any(re.fullmatch(rf"(val|test)(/\w+)*?/{pattern}", tag) for pattern in EVALUATED)
    return any(re.fullmatch(pattern, tag) for pattern in GENERAL)


def test_an_unknown_tag_is_not_listed() -> None:
    assert is_listed("train/loss")
    assert is_listed("test/rft/two_stage/accuracy")
    assert not is_listed("train/no_such_tag")
    assert not is_listed("test/greedy/no_such_metric")
    assert is_listed("val/merged/domain_0/recall_at_1_dim_8")
    assert is_listed("test/sts/pearson")
    assert not is_listed("val/domain_0/recall_at_1_dim_")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_tag_of_a_run_is_listed(
    case: str, tmp_path: Path, warm_cache: Path, compose: Any
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = CASES[case][0].removeprefix("model=")
    arms = list(compose(f"model={model}", smoke=False).compare)
    words = command(*small(model, compose), *CASES[case][1:], f"compare=[{','.join(arms)}]",
                    "test_base=true", output_dir=tmp_path, cache_dir=warm_cache)  # fmt: skip
    done = call(*words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / model / "s0"
    own = ("seed", "model", "steps", "bad_steps", "time/wall_s", "time/train_s", "hp_metric")
    tags = set(json.loads((run / "metrics.json").read_text()))
    for events in run.glob("tensorboard/events*"):
        board = EventAccumulator(str(events)).Reload()
        for kind in ("scalars", "histograms", "tensors", "images"):
            tags |= {tag.removesuffix("/text_summary") for tag in board.Tags()[kind]}
    unlisted = sorted(tag for tag in tags if tag not in own and not is_listed(tag))
    assert not unlisted, f"docs/tags.md lacks {unlisted}"
    assert len(tags) > (100 if model == "reflectrm" else 30)
