"""Images and texts as a data stream of CoCoA's three stages (arXiv 2603.01471), one after another.

    warmup       image and caption in one sequence; tokens and patches are masked
    bridge       ``[A] [EOS] [B]``; tokens of B are masked
    contrastive  images and texts apart, each with EOS at its end

A batch says its stage; which tokens are masked is drawn by the module from the rows' seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from datamodules.image_encoding import ImageTextEncoding, StageName
from datamodules.loader import Loader, Rows, RowSource, Source, check_window
from datamodules.pairs import PairBatch, PairDataModule, PairSource
from datamodules.sources import nearest, stable_hash
from datamodules.tasks.embedding import Bridge, ImageTextTask
from datamodules.texts import Encoded


@dataclass
class ReconstructionBatch:
    """Sequences in which tokens are to be masked and rebuilt.

    Args:
        stage: ``warmup`` or ``bridge``.
        items: N sequences.
        spans: Of each, the first and last-plus-one token that may be masked.
        bridges: Of each, the place of its EOS token; -1 in the warm-up, which has none.
        seeds: Of each, what decides which of its tokens are masked.
        uids: Identities of the rows.
        domain: For metrics; the stage.
    """

    stage: StageName
    items: list[Encoded]
    spans: list[tuple[int, int]]
    bridges: list[int]
    seeds: list[int]
    uids: list[str]
    domain: str = ""

    def to(self, *_: Any, **__: Any) -> ReconstructionBatch:
        """Nothing here is a tensor yet."""
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(len(item.ids) for item in self.items)

    def state(self) -> dict[str, Any]:
        """Plain containers: what a bad batch is saved as."""
        return {"stage": self.stage, "uids": self.uids, "ids": [list(i.ids) for i in self.items]}


@dataclass(frozen=True)
class Stage:
    """A stretch of the run.

    Args:
        name: What is trained.
        steps: Optimizer steps.
        batch_size: Rows a micro-batch over all ranks.
    """

    name: StageName
    steps: int
    batch_size: int


class ImageTextDataModule(PairDataModule):
    """Stages of reconstruction and contrast, one after another.

    Args:
        stages: ``[{name: warmup, steps: 150}, ...]``: optimizer steps of each, in order; steps of 0
            leave a stage out. A stage may have a ``batch_size`` of its own. One that comes twice
            goes on with the batches where it stopped.
        bridge_batch_size: Rows of a micro-batch of ``warmup`` and ``bridge`` over all ranks, where
            the stage has none of its own; None for ``batch_size``.
        **options: Of ``PairDataModule``; the schedule is not used.

    Raises:
        ValueError: An unknown stage, or none, a count out of range, or bags beside stages.
    """

    task: ImageTextTask
    encoding: ImageTextEncoding

    def __init__(
        self,
        *,
        stages: Sequence[Mapping[str, Any]],
        bridge_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if bridge_batch_size is not None and bridge_batch_size < 1:
            raise ValueError(f"data.bridge_batch_size={bridge_batch_size} must be at least 1")
        problems = [
            problem for number, stage in enumerate(stages) for problem in _problems(number, stage)
        ]
        if self.schedule.bags is not None:
            problems.append("data.schedule.bags cannot be cut from data with stages: use null")
        if problems:
            raise ValueError("; ".join(problems))
        own = bridge_batch_size or self.batch_size
        sizes = {"warmup": own, "bridge": own, "contrastive": self.batch_size}
        self.stages = [
            Stage(each["name"], each["steps"], each.get("batch_size") or sizes[each["name"]])
            for each in stages
            if each["steps"]
        ]
        if not self.stages:
            raise ValueError("data.stages holds no stage with steps")

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind tokenizer and image processor of a backbone."""
        super().prepare(backbone, cache_dir, task_settings, for_training)
        self.encoding.bind_images(backbone)

    @property
    def stage_steps(self) -> list[int]:
        """Optimizer steps of each stage."""
        return [stage.steps for stage in self.stages]

    @property
    def bag_steps(self) -> list[int]:
        """Its stages train one model."""
        return [sum(self.stage_steps)]

    def stage_at(self, step: int) -> StageName | None:
        """The stage that an optimizer step belongs to; None before the first.

        Args:
            step: As Lightning counts them when it is done: 1 is the first.
        """
        if step < 1:
            return None
        for stage in self.stages:
            if step <= stage.steps:
                return stage.name
            step -= stage.steps
        return self.stages[-1].name

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(StagedSource(self))
        check_window(self.trainer, loader)
        return loader


def _problems(number: int, stage: Any) -> list[str]:
    """What is wrong with an item of ``data.stages``."""
    key, known = f"data.stages[{number}]", get_args(StageName)
    if not isinstance(stage, Mapping) or set(stage) - {"batch_size"} != {"name", "steps"}:
        shown = dict(stage) if isinstance(stage, Mapping) else stage
        return [f"{key}={shown!r} must be {{name: bridge, steps: 500}}, with batch_size at most"]
    name, steps, size = stage["name"], stage["steps"], stage.get("batch_size")
    problems = []
    if name not in known:
        hint = nearest(str(name), known)
        problems.append(f"{key}.name={name!r} must be one of {', '.join(known)}{hint}")
    if type(steps) is not int or steps < 0:
        problems.append(f"{key}.steps={steps!r} must be 0 or more")
    least = 2 if name == "contrastive" else 1
    if size is not None and (type(size) is not int or size < least):
        problems.append(f"{key}.batch_size={size!r} must be at least {least}")
    return problems


class StagedSource(Source):
    """Batches of the stages, a pure function of (seed, index).

    Args:
        data: Its datamodule.
    """

    def __init__(self, data: ImageTextDataModule) -> None:
        self.data, self.window = data, data.window
        self._sources: dict[tuple[str, int], RowSource] = {}
        self._pairs: PairSource | None = None

    def __len__(self) -> int:
        return sum(self.data.stage_steps) * self.window

    def batch(self, epoch: int, index: int) -> PairBatch | ReconstructionBatch:
        """The next batch of the stage that is due."""
        stage, place = self._stage(index)
        rows, numbers = self._rows(stage, place)
        if stage.name == "contrastive":
            return self._contrastive(rows)
        # a row's seed does not depend on which rank has it
        seeds = [
            stable_hash(self.data.seed, stage.name, epoch, place, number) % 2**62
            for number in numbers
        ]
        encoding = self.data.encoding
        if stage.name == "warmup":
            items, spans = encoding.warmup(rows.items)
            bridges, uids = [-1] * len(items), [item.key for item in rows.items]
        else:
            chosen: list[Bridge] = rows.items
            told = [(row.source, row.target, row.where or row.uid) for row in chosen]
            items, spans, bridges = encoding.bridge(told)
            uids = [row.uid for row in chosen]
        return ReconstructionBatch(stage.name, items, spans, bridges, seeds, uids, stage.name)

    def _stage(self, index: int) -> tuple[Stage, int]:
        """Stage of a micro-batch, and its number among those of that name."""
        seen: Counter[str] = Counter()
        for stage in self.data.stages[:-1]:
            size = stage.steps * self.window
            if index < size:
                return stage, seen[stage.name] + index
            index -= size
            seen[stage.name] += size
        last = self.data.stages[-1]
        return last, seen[last.name] + index

    def _rows(self, stage: Stage, place: int) -> tuple[Rows, list[int]]:
        """Rows of a micro-batch, and their numbers in that of all ranks."""
        name, (rank, world) = stage.name, self.data.ranks
        key = name, stage.batch_size
        if key not in self._sources:
            if stage.batch_size % world:
                raise ValueError(
                    f"batches of {stage.batch_size} rows ({name}) cannot be shared evenly by "
                    f"{world} processes: use multiples in data.batch_size, data.bridge_batch_size "
                    f"and data.stages"
                )
            self._sources[key] = RowSource(
                self._all_rows(name),
                batch_size=stage.batch_size // world,
                seed=stable_hash(self.data.seed, name) % 2**31,
                window=self.window,
                rank=rank,
                world_size=world,
                drop_last=True,
            )
        source = self._sources[key]
        numbers = list(range(rank, stage.batch_size, world))
        return source.batch(place // len(source), place % len(source)), numbers

    def _all_rows(self, name: StageName) -> Sequence[Any]:
        task = self.data.task
        if name == "contrastive":
            sets = self.data.training_sets()
            return [(s, row) for s in range(len(sets)) for row in range(len(sets[s].rows))]
        rows = task.captions("train") if name == "warmup" else task.bridges("train")
        if not rows:
            raise ValueError(
                f"data.stages has the stage {name!r}, and the task has no rows for it to train on: "
                f"give it some, or leave the stage out"
            )
        return rows

    def _contrastive(self, rows: Rows) -> PairBatch:
        if self._pairs is None:
            self._pairs = PairSource(self.data, batches=[])
        sets = [self._pairs.sets[number] for number, _ in rows.items]
        chosen = [
            (pairs, pairs.rows[row], None) for pairs, (_, row) in zip(sets, rows.items, strict=True)
        ]
        return self._pairs.collate(chosen, len(chosen))
