"""Images and texts as a data stream of CoCoA's three stages (arXiv 2603.01471), one after another.

    warmup       image and caption in one sequence; tokens and patches are masked
    bridge       ``[A] [EOS] [B]``; tokens of B are masked
    contrastive  images and texts apart, each with EOS at its end

A batch says its stage; which tokens are masked is drawn by the module from the batch's seed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoConfig, Qwen2VLImageProcessorPil

from datamodules.images import EncodedImages, encode_images
from datamodules.loader import Loader, Rows, RowSource, Source, check_window
from datamodules.pairs import PairBatch, PairDataModule, PairSource
from datamodules.sources import nearest, stable_hash
from datamodules.tasks.embedding import Bridge, ImageText, ImageTextTask, Item
from datamodules.texts import Encoded, Role, TextEncoding

StageName = Literal["warmup", "bridge", "contrastive"]
LEAST_TARGET = 4  # tokens of block B that are kept, however long A is


@dataclass
class ReconstructionBatch:
    """Sequences in which tokens are to be masked and rebuilt.

    Args:
        stage: ``warmup`` or ``bridge``.
        items: N sequences.
        spans: Of each, the first and last-plus-one token that may be masked.
        bridges: Of each, the place of its EOS token; -1 in the warm-up, which has none.
        seed: Of what is masked.
        uids: Identities of the rows.
        domain: For metrics; the stage.
    """

    stage: StageName
    items: list[Encoded]
    spans: list[tuple[int, int]]
    bridges: list[int]
    seed: int
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


class ImageTextEncoding(TextEncoding):
    """Images and texts in one sequence: vision tokens, the text, EOS.

    Args:
        max_sequence_tokens: Longest sequence of the first two stages.
        cache_images: Encoded images that are kept.
        **options: Of ``TextEncoding``; CoCoA pools the EOS token.
    """

    def __init__(
        self, *, max_sequence_tokens: int = 4096, cache_images: int = 4096, **options: Any
    ) -> None:
        super().__init__(**options)
        self.max_sequence_tokens, self.cache_images = max_sequence_tokens, cache_images
        self.processor: Any = None
        self._vision: tuple[int, int, int] = (0, 0, 0)
        self._cache: OrderedDict[str, EncodedImages] = OrderedDict()

    def bind_images(self, backbone: str) -> None:
        """Take the image processor and the vision tokens of a Qwen-VL folder.

        Raises:
            ValueError: It has none.
        """
        try:
            config: Any = AutoConfig.from_pretrained(backbone)
            self._vision = (
                config.vision_start_token_id,
                config.image_token_id,
                config.vision_end_token_id,
            )
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(backbone)
        except (OSError, AttributeError, ValueError) as error:
            raise ValueError(
                f"backbone.path={backbone!r} reads no images: give a Qwen2-VL or Qwen2.5-VL folder"
            ) from error

    def image(self, item: ImageText, where: str = "") -> EncodedImages:
        """Its patches, from the cache where they are."""
        if item.key not in self._cache:
            try:
                self._cache[item.key] = encode_images(self.processor, [item.image])
            except ValueError as error:
                raise ValueError(f"{where or item.key}: {error}") from error
            while len(self._cache) > self.cache_images:
                self._cache.popitem(last=False)
        self._cache.move_to_end(item.key)
        return self._cache[item.key]

    def image_ids(self, image: EncodedImages) -> list[int]:
        """Vision start, the image's tokens, vision end."""
        start, token, end = self._vision
        return [start, *[token] * image.num_tokens(self.processor.merge_size)[0], end]

    def encode(
        self, items: Sequence[Item], role: Role, instruction: str = "", where: Sequence[str] = ()
    ) -> list[Encoded]:
        """Token ids of images and texts, each with EOS where that is pooled.

        Raises:
            ValueError: An image does not decode, or a text has no token (names where it is from).
        """
        texts = [item for item in items if isinstance(item, str)]
        places = [place for place, item in enumerate(items) if isinstance(item, str)]
        told = [where[place] for place in places] if where else []
        rendered = [self.render(text, role, instruction) for text in texts]
        made = iter(self.encode_texts(rendered, role, instruction, told))
        found = []
        for place, item in enumerate(items):
            if isinstance(item, str):
                found.append(next(made))
                continue
            image = self.image(item, where[place] if where else "")
            head = self.image_ids(image)
            # the text behind it, or EOS alone, is what the tokenizer makes of it
            tail = self.tokenizer(self.render(item.text, role, instruction))["input_ids"]
            room = max(self.max_tokens[role] - len(head), 1)
            tail = tail if len(tail) <= room else [*tail[: room - 1], tail[-1]]
            ids = (*head, *tail)
            found.append(Encoded(ids, self._pool(len(ids), 0), image))
        return found

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def warmup(self, items: Sequence[ImageText]) -> tuple[list[Encoded], list[tuple[int, int]]]:
        """Image then caption, and where the caption is.

        Raises:
            ValueError: A caption has no token, or no room beside its image.
        """
        found, spans = [], []
        for item in items:
            image = self.image(item)
            head, text = self.image_ids(image), self.plain_ids(item.text)
            ids = (head + text)[: self.max_sequence_tokens]
            if len(ids) == len(head):
                raise ValueError(
                    f"{item.key}: the caption has no token, or no room beside its image"
                )
            found.append(Encoded(tuple(ids), (len(ids) - 1, len(ids)), image))
            spans.append((len(head), len(ids)))
        return found, spans

    def bridge(
        self, rows: Sequence[tuple[Item, str, str]]
    ) -> tuple[list[Encoded], list[tuple[int, int]], list[int]]:
        """``[A] [EOS] [B]``: sequences, where B is, and where EOS is.

        Text of A is cut before B loses its first tokens; image tokens never are.

        Args:
            rows: Block A, block B, and where they are from.

        Raises:
            ValueError: A block has no token, or an image leaves no room.
        """
        found, spans, bridges = [], [], []
        most = self.max_sequence_tokens
        for source, target, where in rows:
            image = None if isinstance(source, str) else self.image(source, where)
            head = [] if image is None else self.image_ids(image)
            text = self.plain_ids(source if isinstance(source, str) else source.text)
            own = self.plain_ids(target)
            room = most - len(head) - 1 - min(len(own), LEAST_TARGET)
            if room < 0 or not own or not (head or text):
                raise ValueError(
                    f"{where}: block A and B need tokens, and room for them (max {most})"
                )
            first = head + text[:room]
            own = own[: most - len(first) - 1]
            ids = (*first, self.tokenizer.eos_token_id, *own)
            found.append(Encoded(ids, (len(first), len(first) + 1), image))
            bridges.append(len(first))
            spans.append((len(first) + 1, len(ids)))
        return found, spans, bridges


class ImageTextDataModule(PairDataModule):
    """Stages of reconstruction and contrast, one after another.

    Args:
        stages: ``[{name: warmup, steps: 150}, ...]``: optimizer steps of each, in order; steps of 0
            leave a stage out.
        bridge_batch_size: Rows of a micro-batch of ``warmup`` and ``bridge`` over all ranks; None
            for ``batch_size``.
        **options: Of ``PairDataModule``; the schedule is not used.

    Raises:
        ValueError: An unknown stage, or none.
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
        problems = []
        for number, stage in enumerate(stages):
            if set(stage) != {"name", "steps"}:
                problems.append(
                    f"data.stages[{number}]={dict(stage)} must be {{name: bridge, steps: 500}}"
                )
            elif stage["name"] not in get_args(StageName):
                known = get_args(StageName)
                problems.append(
                    f"data.stages[{number}].name={stage['name']!r} must be one of "
                    f"{', '.join(known)}{nearest(str(stage['name']), known)}"
                )
            elif not isinstance(stage["steps"], int) or stage["steps"] < 0:
                problems.append(f"data.stages[{number}].steps={stage['steps']!r} must be 0 or more")
        if problems:
            raise ValueError("; ".join(problems))
        self.stages: list[tuple[StageName, int]] = [
            (stage["name"], stage["steps"]) for stage in stages if stage["steps"]
        ]
        if not self.stages:
            raise ValueError("data.stages holds no stage with steps")
        self.bridge_batch_size = bridge_batch_size or self.batch_size

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
        return [steps for _, steps in self.stages]

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(StagedSource(self))
        check_window(self.trainer, loader)
        return loader


class StagedSource(Source):
    """Batches of the stages, a pure function of (seed, index).

    Args:
        data: Its datamodule.
    """

    def __init__(self, data: ImageTextDataModule) -> None:
        self.data, self.window = data, data.window
        self._sources: dict[str, RowSource] = {}
        self._pairs: PairSource | None = None

    def __len__(self) -> int:
        return sum(self.data.stage_steps) * self.window

    def batch(self, epoch: int, index: int) -> PairBatch | ReconstructionBatch:
        """The next batch of the stage that is due."""
        name, place = self._stage(index)
        rows = self._rows(name, place)
        if name == "contrastive":
            return self._contrastive(rows)
        rank, _ = self.data.ranks
        seed = stable_hash(self.data.seed, name, epoch, place, rank) % 2**62
        encoding = self.data.encoding
        if name == "warmup":
            items, spans = encoding.warmup(rows.items)
            bridges, uids = [-1] * len(items), [item.key for item in rows.items]
        else:
            chosen: list[Bridge] = rows.items
            told = [(row.source, row.target, row.where or row.uid) for row in chosen]
            items, spans, bridges = encoding.bridge(told)
            uids = [row.uid for row in chosen]
        return ReconstructionBatch(name, items, spans, bridges, seed, uids, name)

    def _stage(self, index: int) -> tuple[StageName, int]:
        """Stage of a micro-batch, and its number there."""
        for name, steps in self.data.stages[:-1]:
            if index < steps * self.window:
                return name, index
            index -= steps * self.window
        return self.data.stages[-1][0], index

    def _rows(self, name: str, place: int) -> Rows:
        if name not in self._sources:
            task, (rank, world) = self.data.task, self.data.ranks
            size = self.data.bridge_batch_size
            if name == "contrastive":
                sets = self.data.training_sets()
                rows: Sequence[Any] = [
                    (s, row) for s in range(len(sets)) for row in range(len(sets[s].rows))
                ]
                size = self.data.batch_size
            else:
                rows = task.captions("train") if name == "warmup" else task.bridges("train")
            if size % world:
                raise ValueError(
                    f"batches of {size} rows cannot be shared evenly by {world} processes: use "
                    f"multiples in data.batch_size and data.bridge_batch_size"
                )
            self._sources[name] = RowSource(
                rows,
                batch_size=size // world,
                seed=stable_hash(self.data.seed, name) % 2**31,
                window=self.window,
                rank=rank,
                world_size=world,
                drop_last=True,
            )
        source = self._sources[name]
        return source.batch(place // len(source), place % len(source))

    def _contrastive(self, rows: Rows) -> PairBatch:
        if self._pairs is None:
            self._pairs = PairSource(self.data, batches=[])
        sets = [self._pairs.sets[number] for number, _ in rows.items]
        chosen = [
            (pairs, pairs.rows[row], None) for pairs, (_, row) in zip(sets, rows.items, strict=True)
        ]
        return self._pairs.collate(chosen, len(chosen))
