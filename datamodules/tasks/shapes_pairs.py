"""ShapesCap as a task: images against captions, and captions to be rebuilt from images or texts.

The world itself is ``shapes_caption``; the protocol is that of our CoCoA card, section 9 [our
choice]: half of the reconstruction rows have an image as block A, half the same scene's caption in
another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

from datamodules.tasks.base import Split
from datamodules.tasks.embedding import (
    Bridge,
    BridgeSet,
    EvalSet,
    ImageText,
    ImageTextTask,
    PairRow,
    PairSet,
    RetrievalSet,
)
from datamodules.tasks.shapes_caption import Scene, ShapesCaption

T = TypeVar("T")


class Drawn(Sequence[T], Generic[T]):
    """Rows that are made when they are asked for.

    Args:
        count: Rows.
        make: Number -> row, a pure function.
    """

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.make(i) for i in range(self.size)[place]]
        if not -self.size <= place < self.size:
            raise IndexError(place)
        return self.make(place % self.size)


class ShapesPairs(ShapesCaption, ImageTextTask):
    """Scenes and captions for contrast and reconstruction.

    Args:
        draws: Orders in which each caption is told in reconstruction.
        text_share: Share of the reconstruction rows whose block A is a text.
        **options: Of ``ShapesCaption``.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> task = ShapesPairs(num_train=4, num_val=2, num_test=2)
        >>> row = task.pairs("train")[0].rows[0]
        >>> row.query.key == row.uid, row.positive.split()[0]
        (True, 'a')
    """

    def __init__(self, *, draws: int = 4, text_share: float = 0.5, **options: Any) -> None:
        if draws < 1:
            raise ValueError(f"data.task.draws={draws} must be at least 1")
        if not 0 <= text_share <= 1:
            raise ValueError(f"data.task.text_share={text_share} must be from 0 to 1")
        super().__init__(**options)
        self.draws, self.text_share = draws, text_share
        self._scenes: dict[str, list[Scene]] = {}

    def _all(self, split: Split) -> list[Scene]:
        if split not in self._scenes:
            self._scenes[split] = self.records(split)
        return self._scenes[split]

    def item(self, scene: Scene, text: str = "") -> ImageText:
        """The image of a scene, with a text or alone."""
        return ImageText(scene.uid, self.render(scene), text)

    def pairs(self, split: Split) -> list[PairSet]:
        """Image -> caption; train with ``model.symmetric`` for both directions."""
        scenes = self._all(split)

        def make(place: int) -> PairRow:
            scene = scenes[place]
            return PairRow(scene.uid, self.item(scene), self.caption(scene))

        return [PairSet("shapes", Drawn(len(scenes), make))]

    def captions(self, split: Split) -> Sequence[ImageText]:
        """Images with their captions, in ``draws`` orders."""
        scenes = self._all(split)

        def make(place: int) -> ImageText:
            scene = scenes[place % len(scenes)]
            order = self.order(scene, place // len(scenes))
            return self.item(scene, self.caption(scene, order))

        return Drawn(len(scenes) * self.draws, make)

    def bridges(self, split: Split) -> Sequence[Bridge]:
        """Image or caption -> caption (in another order)."""
        scenes = self._all(split)

        def make(place: int) -> Bridge:
            scene, draw = scenes[place % len(scenes)], place // len(scenes)
            first, second = self.text_pair(scene, draw)
            # one in every 1 / text_share, of a draw's scenes and of a scene's draws
            number = place % len(scenes) + draw
            is_text = int((number + 1) * self.text_share) > int(number * self.text_share)
            source = first if is_text else self.item(scene)
            return Bridge(f"{scene.uid}/{draw}", source, second)

        return Drawn(len(scenes) * self.draws, make)

    def evaluations(self, split: Split) -> list[EvalSet]:
        """Both directions, the hard negatives, and reconstruction from images and from texts."""
        scenes = self._all(split)
        if not scenes:
            return []
        images = [self.item(scene) for scene in scenes]
        texts = [self.caption(scene) for scene in scenes]
        own = [[place] for place in range(len(scenes))]
        swapped = [
            self.caption(self.swap(scene, kind), self.order(scene))
            for scene in scenes
            for kind in ("colours", "positions")
        ]
        hard = texts + [text for text in dict.fromkeys(swapped) if text not in set(texts)]
        sets: list[EvalSet] = [
            RetrievalSet("i2t", images, texts, own, group="retrieval"),
            RetrievalSet("t2i", texts, images, own, group="retrieval"),
            RetrievalSet("i2t_hard", images, hard, own, group="hard"),
        ]
        if len(scenes) < 2:
            return sets
        pairs = [self.text_pair(scene) for scene in scenes]
        for name in ("from_image", "from_text"):
            rows = [
                Bridge(
                    scene.uid,
                    self.item(scene) if name == "from_image" else first,
                    second,
                )
                for scene, (first, second) in zip(scenes, pairs, strict=True)
            ]
            sets.append(BridgeSet(name, rows, group="bridge"))
        return sets
