"""Handwritten digits as images, paired with texts: real images that need no download.

The images are the 1797 of ``sklearn.datasets.load_digits`` (8 x 8, 17 shades of grey; test part of
the UCI set "Optical Recognition of Handwritten Digits"), made larger by repeating pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.sources import stable_hash
from datamodules.tasks.base import Split
from datamodules.tasks.embedding import (
    EmbeddingTask,
    EvalSet,
    ImageText,
    PairRow,
    PairSet,
    RetrievalSet,
)

if TYPE_CHECKING:
    import numpy as np

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTS = tuple(f"a handwritten {name}" for name in NAMES)
REPEAT = 4  # 8 pixels become 32
MAX_SHADE = 16


def load_images() -> tuple[np.ndarray, list[int]]:
    """All images and their labels.

    Returns:
        Images ``(1797, 32, 32, 3)`` uint8, bright strokes on black; labels 0 to 9.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    import numpy as np

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"the data 'digits' comes with scikit-learn ({error}): pip install 'litpost[embed]'"
        ) from error
    data = load_digits()
    grey = np.rint(data.images * (255 / MAX_SHADE)).astype(np.uint8)
    large = grey.repeat(REPEAT, axis=1).repeat(REPEAT, axis=2)
    return np.stack([large] * 3, axis=-1), [int(label) for label in data.target]


class Digits(EmbeddingTask):
    """Images of digits that ask for the text of their class.

    A batch has several images of one class: their texts are equal, so whoever takes the rest of a
    batch as negatives must leave out equal texts. Splits are fixed: within each class, images go by
    a hash of their number [our choice]; one writer's digits may be in several splits.
    ``predict`` is the split ``test``.

    Args:
        val_fraction: Share of each class that validates; one image at least if it is above 0.
        test_fraction: Share of each class that tests, likewise.

    Raises:
        ValueError: A share is out of range.

    Example:
        >>> [pairs.name for pairs in Digits().pairs("train")]
        ['digits']
    """

    name = "digits"

    def __init__(self, *, val_fraction: float = 0.1, test_fraction: float = 0.2) -> None:
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 0.98:
            raise ValueError(
                f"data.task.val_fraction={val_fraction}, data.task.test_fraction={test_fraction}: "
                "both are shares of each class, 0 or more, together below 0.98"
            )
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._images: list[ImageText] = []
        self._labels: list[int] = []
        self._places: dict[Split, list[int]] = {}

    def vocabulary(self) -> list[str]:
        """The words of the ten texts."""
        return list(dict.fromkeys(word for text in TEXTS for word in text.split()))

    def pairs(self, split: Split) -> list[PairSet]:
        """One set: an image asks, the text of its class answers.

        Args:
            split: Which.

        Returns:
            The set ``digits``; none where the split has no images.

        Raises:
            ValueError: scikit-learn is not installed.
        """
        places = self._split(split)
        rows = [
            PairRow(self._images[place].key, self._images[place], TEXTS[self._labels[place]])
            for place in places
        ]
        return [PairSet(self.name, rows)] if rows else []

    def evaluations(self, split: Split) -> list[EvalSet]:
        """Retrieval of texts by images and of images by texts.

        Args:
            split: Which.

        Returns:
            ``digits_i2t``, all images of the split against the ten texts; ``digits_t2i``, the ten
            texts against all images of the split. None where the split has no images.

        Raises:
            ValueError: scikit-learn is not installed.
        """
        places = self._split(split)
        if not places:
            return []
        images = [self._images[place] for place in places]
        labels = [self._labels[place] for place in places]
        of_class = [[i for i, one in enumerate(labels) if one == label] for label in range(10)]
        return [
            RetrievalSet("digits_i2t", images, TEXTS, [[label] for label in labels]),
            RetrievalSet("digits_t2i", TEXTS, images, of_class),
        ]

    def _split(self, split: Split) -> list[int]:
        """Numbers of a split's images, ascending."""
        if not self._images:
            images, self._labels = load_images()
            self._images = [ImageText(f"digits/{i}", image) for i, image in enumerate(images)]
            self._places = self._divide()
        return self._places["test" if split == "predict" else split]

    def _divide(self) -> dict[Split, list[int]]:
        found: dict[Split, list[int]] = {"test": [], "val": [], "train": []}
        for label in range(len(TEXTS)):
            own = [i for i, one in enumerate(self._labels) if one == label]
            own.sort(key=lambda i: stable_hash(self.name, i))
            num_test = _count(self.test_fraction, len(own))
            num_val = _count(self.val_fraction, len(own))
            found["test"] += own[:num_test]
            found["val"] += own[num_test : num_test + num_val]
            found["train"] += own[num_test + num_val :]
        return {split: sorted(places) for split, places in found.items()}


def _count(share: float, size: int) -> int:
    return max(1, round(share * size)) if share else 0
