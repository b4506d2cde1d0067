"""Small runs of the compressor for tests."""

from __future__ import annotations

from pathlib import Path

#: Few nouns and relations; 24 texts in micro-batches of 4, two a step; odd sets in the test.
WORLD = [
    "data.task.num_first=4",
    "data.task.num_second=4",
    "data.task.num_held_out=3",
    "data.task.relations=1",
    "data.task.num_names=6",
    "data.task.num_verbs=16",
    "data.task.num_train=24",
    "data.task.num_val=4",
    "data.task.num_test=5",
    "data.batch_size=4",
    "data.micro_batches=2",
    "data.eval_batch_size=4",
]
#: Two models of two layers, hardly fitted.
PAIR = [
    "backbone.tiny.hidden_size=32",
    "backbone.tiny.decoder_width=32",
    "backbone.warm_start.steps=20",
    "backbone.warm_start.decoder_steps=20",
    "backbone.warm_start.batch_size=16",
]
ALL_SETS = ["trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0"]
TINY = ["model=compressor", *WORLD, *PAIR, *ALL_SETS, "test_base=false", "compare=[]"]
LORA = ["lora=default", "lora.r=4", "lora.dropout=0.1"]
#: The first step answers questions, the next three continue texts; evaluations ask.
CONTINUED = ["model.qa_ratio=0.3", "model.lm_ratio=0.7", "model.loss.skip=0"]


def write_texts(folder: Path, count: int = 60) -> list[str]:
    """Overrides for a file of texts of very different lengths, without facts, in segments."""
    path = folder / "texts.txt"
    lines = [" ".join(f"word {i} {j}" for j in range(1 + 3 * (i % 3))) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    shares = ["data.task.val_fraction=0.1", "data.task.test_fraction=0.15"]
    return ["data=text_file", f"data.path={path}", *shares, "model.memory.segment_tokens=16",
            "backbone.warm_start.decoder_steps=0"]  # fmt: skip
