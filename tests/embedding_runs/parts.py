"""Small runs of embedding models for tests, and kills that hit the final merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import AutoModel, AutoTokenizer

from callbacks import model_merging
from tests.runs import SignalAt

#: Two data sets of 24 rows, batches of 8, a BERT of one layer with dropout.
TINY = [
    "data.task.num_domains=3",
    "data.task.train_domains=[0,1]",
    "data.task.new_domains=[]",
    "data.task.num_train=24",
    "data.task.num_pretrain=16",
    "data.task.num_val=8",
    "data.task.num_test=8",
    "data.batch_size=8",
    "backbone.tiny.hidden_size=32",
    "backbone.tiny.intermediate_size=32",
    "backbone.tiny.num_layers=1",
    "backbone.tiny.num_heads=2",
    "backbone.tiny.dropout=0.1",
    "backbone.warm_start.epochs=1",
    "compare=[]",
]
CONTRASTIVE = ["model=contrastive", *TINY]
#: Bags of 2, 4 and 6 batches.
BAGS = "data.schedule.bags=[{percent: 40}, {percent: 70}, {percent: 100}]"
BOOM = ["model=boom", *TINY, "data.datasets=[domain_0,domain_1]", BAGS]
#: A pair of texts of different lengths, of words that the vocabulary has.
TEXTS = ["d0c1a d0c2b n01 d0c3a d0c17b", "n01 d1c5a", "d1c7b"]


class MergeSignal(SignalAt):
    """Kills the run in its final merge: when the merged weights are written, but not their folder
    (``merging``), or before the module takes them (``merged``).

    Args:
        moment: One of these.
    """

    def __init__(self, *, moment: str, count: int = 0) -> None:
        super().__init__(moment=moment, count=count)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand between the callback and what it calls."""
        if self.moment == "merged":
            self._before(model_merging, "load_dense", trainer)
        else:
            from run_tools import merged

            self._before(merged, "asdict", trainer)  # the figures come after the weights

    def _before(self, module: Any, name: str, trainer: Any) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any) -> Any:
            self._strike(trainer)
            return function(*arguments)

        setattr(module, name, call)


def plain_vectors(folder: Path, texts: list[str], pooling: str) -> torch.Tensor:
    """Vectors of texts by nothing but ``transformers``, one text at a time."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows = {"mean": hidden, "cls": hidden[:1]}.get(pooling, hidden[-1:])
        found.append(torch.nn.functional.normalize(rows.mean(0), dim=0))
    return torch.stack(found)


class Watch(Callback):
    """Keeps what every optimizer step of a run in this process starts from.

    Its entries are of the class: a config builds the callback.
    """

    seen: list[dict[str, Any]] = []  # noqa: RUF012
    factors: list[dict[str, torch.Tensor]] = []  # noqa: RUF012

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the run before."""
        Watch.seen, Watch.factors = [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        """Weights, learning rate and whether the optimizer knows anything."""
        if number % trainer.accumulate_grad_batches == 0:
            named = pl_module.named_parameters()
            optimizer = trainer.optimizers[0]
            Watch.seen.append(
                {
                    "weights": {n: p.detach().clone() for n, p in named if p.requires_grad},
                    "states": len(optimizer.state),
                    "lr": optimizer.param_groups[0]["lr"],
                    "uids": batch.uids,
                }
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Weights after the step."""
        named = pl_module.named_parameters()
        Watch.factors.append({n: p.detach().clone() for n, p in named if p.requires_grad})


#: Adds ``Watch``.
WATCHED = ["+callbacks.watch._target_=tests.embedding_runs.parts.Watch"]
