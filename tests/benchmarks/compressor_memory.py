"""The compressor's step and its decoding: ``python -m tests.benchmarks.compressor_memory``.

*Step*: forward and backward of ``Pair.forward`` and ``reconstruction_loss`` on 32 texts of 64
tokens (the last one EOS), 16 memory vectors, vocabulary 32,768, two random Qwen3 of two layers and
width 256, float32, a trained compressor, and a decoder that is frozen or trained too. Arms, on the
same weights and rows:

- ``fused``: as a run does it; losses, entropies and hits of every label from the fused head;
- ``eager loss``: the same hidden states, full logits, ``cross_entropy``, and nothing else: what a
  plain script does, and the strictest comparison;
- ``eager all``: the plain back end (``kernel=reference``): full logits, and the same statistics as
  ``fused``.

``peak_mib`` is the most that a step holds at once above what rests between steps (weights),
gradients of the parameters included, read from PyTorch's profiler. ``seconds`` are processor
seconds, medians of steps in turn after one to warm up. ``gradient_gap`` is the largest difference
of any gradient to ``eager loss``, as a share of the largest entry of the whole gradient.

*Decoding*: the test set ``cf`` of TwinNouns with 10 facts a text, 512 texts of 30 words: compress,
write exactly 32 tokens a text (EOS does not end it), turn them into text and read the facts. Width
64, two layers on either side, 2 memory vectors through 16 numbers, random weights, batches of 64.

Goals: memory of ``fused`` at most half of ``eager loss``, equal gradients to 1e-5, decoding in less
than 20 seconds. Missing one is said, and the status is 1. ``KINETO_LOG_LEVEL=99`` before the
command quiets PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from datamodules.context_encoding import CompressionBatch, ContextEncoding
from datamodules.tasks.compression import ContextSet
from datamodules.tasks.twin_nouns import TwinNouns
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.interventions import reconstruction_loss, token_weights
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions, Training
from lightning_modules.compressor.pair import Pair
from lightning_modules.functional.fidelity import slot_outcomes
from lightning_modules.functional.sums import means
from lightning_modules.ops import load_kernels
from lightning_modules.options import BackboneOptions, KernelOptions
from tests.benchmarks.embedding_parts import hush, write_csv

measure_of = load_kernels("bench_measure")

VOCABULARY, WIDTH, TEXTS, LENGTH, MEMORY = 32768, 256, 32, 64, 16
ITEMS, NEW_TOKENS, BATCH, EOS = 512, 32, 64, 2
MIB = 2**20
DEFAULT_CSV = Path("docs/results/compressor_cpu.csv")


Kernel = Literal["auto", "reference"]


class Arm(NamedTuple):
    """One way to the loss.

    Args:
        kernel: Back end of the decoder's head.
        loss: Of a pair and a batch, a scalar.
    """

    kernel: Kernel
    loss: Callable[[Pair, CompressionBatch], Tensor]


def by_scores(pair: Pair, batch: CompressionBatch) -> Tensor:
    """The loss of a training step."""
    _, scores = pair(batch.source_ids, batch.source_mask, batch.target_ids, batch.target_mask)
    return reconstruction_loss(scores.loss, token_weights(batch.target_mask))


def by_logits(pair: Pair, batch: CompressionBatch) -> Tensor:
    """The same loss from full logits, and no statistics."""
    memory = pair.compress(batch.source_ids, batch.source_mask)
    live = batch.target_mask
    logits = pair.logits(memory, batch.target_ids, live, live)
    return functional.cross_entropy(logits, batch.target_ids[live])


FUSED, EAGER = "fused", "eager loss"
ARMS = {
    EAGER: Arm("reference", by_logits),
    FUSED: Arm("auto", by_scores),
    "eager all": Arm("reference", by_scores),
}


# ------------------------------------------------------------------------------------ a step


def step_batch() -> CompressionBatch:
    """Random texts of one length; what is read is what is written, up to EOS."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(EOS + 1, VOCABULARY, (TEXTS, LENGTH), generator=generator)
    targets, live = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    targets[:, -1] = EOS
    none = torch.zeros_like(live)
    return CompressionBatch(ids, live, targets, live, none, [str(i) for i in range(TEXTS)], none)


def load(folder: Path, kernel: Kernel, train: Training) -> Pair:
    """The pair of the folder's two models, the same whatever the back end."""
    compressor = load_causal_lm(BackboneOptions(str(folder / "compressor")))
    options = BackboneOptions(str(folder / "decoder"))
    decoder = load_causal_lm(options, kernel=KernelOptions(backend=kernel))
    return Pair(compressor, decoder, MemoryOptions(tokens=MEMORY), ProjectorOptions(), train)


def run_step(arm: Arm, pair: Pair, batch: CompressionBatch) -> None:
    """Forward and backward; gradients stay."""
    pair.zero_grad(set_to_none=True)
    arm.loss(pair, batch).backward()


def peak_of(arm: Arm, pair: Pair, batch: CompressionBatch) -> float:
    """MiB of a step above what rests between steps."""
    pair.zero_grad(set_to_none=True)
    return measure_of.peak_bytes(lambda: run_step(arm, pair, batch), "cpu") / MIB


def gradients(arm: Arm, pair: Pair, batch: CompressionBatch) -> dict[str, Tensor]:
    """Gradients of a step by parameter, and the loss."""
    pair.zero_grad(set_to_none=True)
    loss = arm.loss(pair, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    return {**found, "": loss.detach()}


def gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference as a share of the largest entry; the same parameters have a gradient."""
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients only on one side: {sorted(found.keys() ^ wanted.keys())}")
    names = [name for name in wanted if name]
    largest = max(float(wanted[name].abs().max()) for name in names)
    return max(float((found[name] - wanted[name]).abs().max()) for name in names) / largest


def seconds_of(pairs: dict[str, Pair], batch: CompressionBatch, repeats: int) -> dict[str, float]:
    """Median processor seconds of a step of each arm, in turn."""
    kept: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(repeats + 1):
        for name, pair in pairs.items():
            gc.collect()
            start = time.process_time()
            run_step(ARMS[name], pair, batch)
            kept[name].append(time.process_time() - start)
            pair.zero_grad(set_to_none=True)
    return {name: statistics.median(values[1:]) for name, values in kept.items()}


def measure_step(folder: Path, train: Training, repeats: int) -> list[dict[str, Any]]:
    """A row for each arm."""
    batch = step_batch()
    pairs = {name: load(folder, arm.kernel, train).train() for name, arm in ARMS.items()}
    wanted = gradients(ARMS[EAGER], pairs[EAGER], batch)
    gaps = {n: gap(gradients(ARMS[n], pair, batch), wanted) for n, pair in pairs.items()}
    peaks = {name: peak_of(ARMS[name], pair, batch) for name, pair in pairs.items()}
    seconds = seconds_of(pairs, batch, repeats)
    return [
        {
            "part": "step",
            "decoder": train,
            "arm": name,
            "peak_mib": round(peaks[name], 1),
            "memory_ratio": round(peaks[name] / peaks[EAGER], 3),
            "seconds": round(seconds[name], 3),
            "time_ratio": round(seconds[name] / seconds[EAGER], 3),
            "gradient_gap": f"{gaps[name]:.1e}",
            "repeats": repeats,
            "threads": torch.get_num_threads(),
        }
        for name in ARMS
    ]


# ------------------------------------------------------------------------------------ decoding


def decode_all(pair: Pair, encoding: ContextEncoding, task: TwinNouns, items: ContextSet) -> float:
    """Compress, decode and read a set.

    Returns:
        Share of the facts that came back.
    """
    said, prior, out = [], [], []
    for start in range(0, len(items.contexts), BATCH):
        contexts = items.contexts[start : start + BATCH]
        batch = encoding.batch(contexts)
        with torch.no_grad():
            memory = pair.compress(batch.source_ids, batch.source_mask)
        decoded = greedy_decode(pair, memory, NEW_TOKENS, eos_ids=[], fixed_steps=NEW_TOKENS)
        texts = encoding.target_tokenizer.batch_decode(decoded.texts(), skip_special_tokens=True)
        for context, text in zip(contexts, texts, strict=True):
            values = task.read(context, text)
            said += [slot.value for slot in context.slots]
            prior += [slot.prior for slot in context.slots]
            out += [values.get(slot.key) for slot in context.slots]
    return means(slot_outcomes(said, prior, out).metrics())["fact_fidelity"]


def measure_decoding(folder: Path, repeats: int) -> dict[str, Any]:
    """A row of the time that a free-running evaluation takes."""
    task = TwinNouns(facts=10, num_test=ITEMS)
    for name, seed in (("small_compressor", 0), ("small_decoder", 1)):
        shape = TinyOptions(intermediate_size=256, num_layers=2)
        build_tiny(folder / name, task.vocabulary(), shape, seed=seed)
    models = [load_causal_lm(BackboneOptions(str(folder / f"small_{n}"))) for n in
              ("compressor", "decoder")]  # fmt: skip
    projector = ProjectorOptions(kind="low_rank", rank=16)
    pair = Pair(models[0], models[1], MemoryOptions(tokens=2), projector).eval()
    tokenizer, encoding = AutoTokenizer.from_pretrained(folder / "small_decoder"), ContextEncoding()
    encoding.bind(tokenizer, tokenizer, [])
    items = next(one for one in task.evaluations("test") if one.name == "cf")
    kept = []
    for _ in range(repeats):
        start = time.process_time()
        decode_all(pair, encoding, task, items)
        kept.append(time.process_time() - start)
    return {
        "part": "decode",
        "decoder": "frozen",
        "arm": f"{len(items.contexts)}x{NEW_TOKENS}",
        **dict.fromkeys(("peak_mib", "memory_ratio"), ""),
        "seconds": round(statistics.median(kept), 3),
        **dict.fromkeys(("time_ratio", "gradient_gap"), ""),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------------------------ the whole


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Goals that were not reached."""
    found = []
    for row in rows:
        if row["part"] == "decode" and row["seconds"] >= 20:
            found.append(f"decoding takes {row['seconds']} s, the goal is less than 20")
        if row["arm"] == FUSED and row["memory_ratio"] > 0.5:
            found.append(f"decoder {row['decoder']}: memory is {row['memory_ratio']}, goal 0.5")
        if row["gradient_gap"] and float(row["gradient_gap"]) > 1e-5:
            found.append(f"decoder {row['decoder']}, {row['arm']}: gradients are not equal to 1e-5")
    return found


def main() -> int:
    """Measure, print and write a table; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=DEFAULT_CSV)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    measure_of.check_meter("cpu")
    shape = TinyOptions(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_layers=2, num_heads=4, num_kv_heads=4,
        head_dim=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, part in enumerate(("compressor", "decoder")):
            build_tiny(folder / part, [f"w{i}" for i in range(VOCABULARY - 3)], shape, seed=number)
        trainings: tuple[Training, ...] = ("frozen", "full")
        rows = [row for one in trainings for row in measure_step(folder, one, args.repeats)]
        rows.append(measure_decoding(folder, args.repeats))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    write_csv(args.output, rows)
    problems = missed(rows)
    print("\n".join(problems) or "all goals are reached")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
