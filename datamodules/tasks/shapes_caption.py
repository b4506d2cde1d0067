"""ShapesCap: images of coloured shapes and their captions, a world for image-text embeddings.

The procedural data of our CoCoA card, section 4 [our choice there: no downloads, unlimited, ground
truth known]. A scene has two or three objects, each in a quadrant of its own, on dark noise:

    image     32 x 32 RGB
    caption   ``a red square at tl a blue ring at br``, objects in any order, five words each

Where we add to the card [our choice]: some two objects of a scene differ in colour *and* shape, so
that both hard negatives (two colours swapped, two positions swapped) exist and differ; and splits
share no *family*, which is the set of quadrants with the colours and the shapes, whoever has which.
Swaps stay in the family, so no hard negative of a test scene was trained on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from random import Random
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from datamodules.sources import stable_hash
from datamodules.tasks.base import Split
from datamodules.tasks.mini_writing_world import option_problems

SIZE = 32  # pixels of a side
RADIUS = 4  # half the width of an object
QUADRANTS = {"tl": (8, 8), "tr": (8, 24), "bl": (24, 8), "br": (24, 24)}  # centres: row, column
SHAPES = ("square", "circle", "cross", "bar", "ring")
COLOURS = {
    "red": (255, 25, 25),
    "green": (25, 255, 25),
    "blue": (25, 25, 255),
    "yellow": (255, 255, 25),
    "magenta": (255, 25, 255),
    "cyan": (25, 255, 255),
}
SPLIT_TENTHS = {"train": range(2, 10), "val": range(1, 2), "test": range(0, 1)}  # of the families
MAX_TRIES = 20_000  # draws for one new scene; about 10 in a fresh split of a tenth

Swap = Literal["colours", "positions"]


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Args:
        quadrant: A name of ``QUADRANTS``.
        colour: A name of ``COLOURS``.
        shape: One of ``SHAPES``.
        offset: Rows down and columns right of the quadrant's centre, in pixels.
    """

    quadrant: str
    colour: str
    shape: str
    offset: tuple[int, int] = (0, 0)

    @property
    def words(self) -> str:
        """What a caption says of it.

        Example:
            >>> SceneObject("tl", "red", "ring").words
            'a red ring at tl'
        """
        return f"a {self.colour} {self.shape} at {self.quadrant}"


@dataclass(frozen=True)
class Scene:
    """Objects in the order of their quadrants, and the seed of the background.

    Args:
        uid: Stable identity of the record.
        objects: What is there.
        noise_seed: Of the background.
    """

    uid: str
    objects: tuple[SceneObject, ...]
    noise_seed: int

    @property
    def scene_id(self) -> int:
        """What a caption can tell: equal if and only if the same objects are in the same quadrants.

        Rows of a batch with equal ids are no negatives of each other. Less than 10^6.
        """
        at, number = {item.quadrant: item for item in self.objects}, 0
        for quadrant in QUADRANTS:
            number *= 1 + len(SHAPES) * len(COLOURS)
            if quadrant in at:
                colour, shape = list(COLOURS).index(at[quadrant].colour), at[quadrant].shape
                number += 1 + colour * len(SHAPES) + SHAPES.index(shape)
        return number

    @property
    def family(self) -> str:
        """Quadrants, colours and shapes without who has which: what swaps cannot change."""
        fields = zip(*((o.quadrant, o.colour, o.shape) for o in self.objects), strict=True)
        return " ".join(",".join(sorted(values)) for values in fields)


class ShapesCaption:
    """Scenes as pure functions of ``(seed, split, index)``, with images and captions on demand.

    Scenes of a split are all different, and a longer split begins with the scenes of a shorter one.
    No scene and no hard negative is in two splits, whatever their seeds.

    Args:
        num_train: Scenes of the split ``train``.
        num_val: Scenes of the split ``val``.
        num_test: Scenes of the split ``test``; ``predict`` is the same.
        seed: Of the scenes.
        min_objects: Fewest objects.
        max_objects: Most objects; at most 4, one a quadrant.
        jitter: Most pixels that an object is off its quadrant's centre, each way; at most 4.
        noise: Brightest background, 0 to 1.

    Raises:
        ValueError: A value is out of range; all such values are named at once.

    Example:
        >>> task = ShapesCaption(num_train=1, max_objects=2)
        >>> scene = task.records("train")[0]
        >>> task.caption(scene, order=(0, 1))
        'a green square at tl a magenta cross at bl'
        >>> task.caption(task.swap(scene, "colours"), order=(0, 1))
        'a magenta square at tl a green cross at bl'
        >>> task.render(scene).shape
        (32, 32, 3)
    """

    name = "shapes_caption"

    def __init__(
        self,
        *,
        num_train: int = 2000,
        num_val: int = 128,
        num_test: int = 256,
        seed: int = 0,
        min_objects: int = 2,
        max_objects: int = 3,
        jitter: int = 4,
        noise: float = 0.15,
    ) -> None:
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        self.seed, self.jitter, self.noise = seed, jitter, noise
        self.min_objects, self.max_objects = min_objects, max_objects
        whole = {f"num_{split}": (size, 0) for split, size in self.sizes.items()}
        whole |= {"seed": (seed, 0), "jitter": (jitter, 0)}
        whole |= {"min_objects": (min_objects, 2), "max_objects": (max_objects, 2)}
        problems = option_problems(whole, {"noise": noise})
        if not problems:
            if not min_objects <= max_objects <= len(QUADRANTS):
                problems.append(
                    f"data.task.min_objects={min_objects} and max_objects={max_objects} must be in "
                    f"this order and at most {len(QUADRANTS)}"
                )
            if jitter > RADIUS:
                problems.append(f"data.task.jitter={jitter} must be at most {RADIUS}")
        if problems:
            raise ValueError("; ".join(problems))

    def vocabulary(self) -> list[str]:
        """All words of captions, 17.

        Example:
            >>> len(ShapesCaption().vocabulary())
            17
        """
        return ["a", "at", *COLOURS, *SHAPES, *QUADRANTS]

    def records(self, split: Split) -> list[Scene]:
        """All scenes of a split, in a fixed order; ``predict`` is the split ``test``.

        Args:
            split: Which one.

        Raises:
            ValueError: The split is unknown, or has fewer different scenes than asked for.
        """
        source = "test" if split == "predict" else split
        if source not in self.sizes:
            raise ValueError(f"split {split!r} is none of {', '.join(self.sizes)}, predict")
        found: dict[int, Scene] = {}
        for index in range(self.sizes[source]):
            uid = f"{self.name}/{self.seed}/{source}/{index}"
            rng = Random(uid)
            for _ in range(MAX_TRIES):
                scene = self._draw(rng, uid)
                if scene.scene_id not in found and _is_in(scene, source):
                    break
            else:
                raise ValueError(
                    f"data.task.num_{source}={self.sizes[source]}: no scene of {self.min_objects} "
                    f"to {self.max_objects} objects is left after {index}; ask for fewer"
                )
            found[scene.scene_id] = scene
        return list(found.values())

    def _draw(self, rng: Random, uid: str) -> Scene:
        """A scene in which some two objects differ in colour and shape."""
        off = range(-self.jitter, self.jitter + 1)
        while True:
            number = rng.randint(self.min_objects, self.max_objects)
            places = sorted(rng.sample(range(len(QUADRANTS)), number))
            objects = tuple(
                SceneObject(
                    list(QUADRANTS)[place],
                    rng.choice(list(COLOURS)),
                    rng.choice(SHAPES),
                    (rng.choice(off), rng.choice(off)),
                )
                for place in places
            )
            scene = Scene(uid, objects, rng.getrandbits(63))
            if _contrasts(scene):
                return scene

    def render(self, scene: Scene) -> NDArray[np.uint8]:
        """The image.

        Args:
            scene: A scene of this world.

        Returns:
            ``(32, 32, 3)``, RGB.
        """
        # raw bits: numpy promises never to change these streams, unlike those of a Generator
        bits = np.random.PCG64(scene.noise_seed).random_raw(SIZE * SIZE * 3)
        uniform = (bits >> np.uint64(40)).astype(np.float64) / 2**24
        image = np.rint(255 * self.noise * uniform).astype(np.uint8).reshape(SIZE, SIZE, 3)
        for item in scene.objects:
            row, column = np.add(QUADRANTS[item.quadrant], item.offset) - RADIUS
            patch = image[row : row + 2 * RADIUS, column : column + 2 * RADIUS]
            patch[_OUTLINES[item.shape]] = COLOURS[item.colour]
        return image

    def order(self, scene: Scene, draw: int = 0) -> tuple[int, ...]:
        """A random order of the objects.

        Args:
            scene: A scene of this world.
            draw: Another number, another order; a pure function of both.
        """
        places = list(range(len(scene.objects)))
        Random(f"{scene.uid}/order/{draw}").shuffle(places)
        return tuple(places)

    def caption(self, scene: Scene, order: Sequence[int] | None = None) -> str:
        """The caption with its objects in an order.

        Args:
            scene: A scene of this world.
            order: Of the objects; None takes ``order(scene)``.

        Raises:
            ValueError: ``order`` does not name every object once.
        """
        places = self.order(scene) if order is None else tuple(order)
        if sorted(places) != list(range(len(scene.objects))):
            raise ValueError(f"order={places} must name each of 0 to {len(scene.objects) - 1} once")
        return " ".join(scene.objects[place].words for place in places)

    def text_pair(self, scene: Scene, draw: int = 0) -> tuple[str, str]:
        """Captions in two different orders: the blocks A and B of a text-only row of stage 2.

        Args:
            scene: A scene of this world.
            draw: Another number, other orders; a pure function of both.
        """
        first = self.order(scene, draw)
        others = [order for order in permutations(sorted(first)) if order != first]
        second = Random(f"{scene.uid}/second_order/{draw}").choice(others)
        return self.caption(scene, first), self.caption(scene, second)

    def swap(self, scene: Scene, kind: Swap) -> Scene:
        """A hard negative: two objects that differ in colour and shape exchange something.

        Everything else stays, the background too. Which two is a pure function of the scene.

        Args:
            scene: A scene of this world.
            kind: ``colours`` (who has which colour) or ``positions`` (who is where).

        Raises:
            ValueError: The kind is unknown, or no two objects differ in colour and shape.
        """
        if kind not in get_args(Swap):
            raise ValueError(f"kind={kind!r} is none of {', '.join(get_args(Swap))}")
        pairs = _contrasts(scene)
        if not pairs:
            raise ValueError(f"scene {scene.uid}: no two objects differ in colour and shape")
        uid = f"{scene.uid}/swap_{kind}"
        i, j = Random(uid).choice(pairs)
        objects = list(scene.objects)
        one, other = objects[i], objects[j]
        # quadrants are in order, so a swap of positions leaves place and offset where they are
        taken = ("colour",) if kind == "colours" else ("colour", "shape")
        objects[i] = replace(one, **{name: getattr(other, name) for name in taken})
        objects[j] = replace(other, **{name: getattr(one, name) for name in taken})
        return replace(scene, uid=uid, objects=tuple(objects))


def _contrasts(scene: Scene) -> list[tuple[int, int]]:
    """Pairs of objects that differ in colour and shape."""
    objects = scene.objects
    return [
        (i, j)
        for i, j in combinations(range(len(objects)), 2)
        if objects[i].colour != objects[j].colour and objects[i].shape != objects[j].shape
    ]


def _is_in(scene: Scene, split: str) -> bool:
    """Whether the scene's family belongs to the split; the same for every seed."""
    return stable_hash("shapes_caption", scene.family) % 10 in SPLIT_TENTHS[split]


def _outlines() -> dict[str, NDArray[np.bool_]]:
    """Pixels of every shape in a box of 2 RADIUS pixels."""
    row, column = np.mgrid[: 2 * RADIUS, : 2 * RADIUS] - (RADIUS - 0.5)
    distance = row**2 + column**2
    return {
        "square": np.ones_like(row, dtype=bool),
        "circle": distance < RADIUS**2,
        "cross": (abs(row) < 1) | (abs(column) < 1),
        "bar": abs(row) < 2,
        "ring": (distance < RADIUS**2) & (distance > 4),
    }


_OUTLINES = _outlines()
