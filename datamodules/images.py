"""Images: reading them, and as patches the way Qwen-VL models read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_ASPECT = 200  # of the image processor

ImageSource = str | Path | Image.Image | NDArray[np.uint8]


class EncodedImages(NamedTuple):
    """Images as the model reads them.

    Args:
        pixel_values: ``(P, C)`` all patches, image by image; C = 3 x time x patch side squared.
            The patches of one image token (merge side squared) are next to each other.
        image_grid_thw: ``(N, 3)`` patches of each image in time, height and width.
    """

    pixel_values: Tensor
    image_grid_thw: Tensor

    def num_tokens(self, merge_size: int) -> list[int]:
        """Image tokens of each image.

        Args:
            merge_size: Patches of an image token's side.
        """
        return [int(size) // merge_size**2 for size in self.image_grid_thw.prod(dim=1)]

    def pick(self, places: Sequence[int]) -> EncodedImages:
        """Some of the images, in this order.

        Args:
            places: Their numbers; at least one.
        """
        patches = self.pixel_values.split(self.image_grid_thw.prod(dim=1).tolist())
        chosen = torch.cat([patches[place] for place in places])
        return EncodedImages(chosen, self.image_grid_thw[list(places)])


def read_image(source: ImageSource, label: str = "image") -> NDArray[np.uint8]:
    """An image as an array, turned as its EXIF data say; transparency is dropped.

    Args:
        source: File, PIL image or array ``(H, W, 3)`` uint8.
        label: Name for messages; a file is named by its path.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError: The file is missing or does not decode, or the array has another shape or type
            (names it).
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(
                f"{label} must be (H, W, 3) uint8, got {source.shape} {source.dtype.name}"
            )
        return source
    try:
        if isinstance(source, Image.Image):
            return np.asarray(_upright(source))
        label = str(source)
        with Image.open(source) as image:
            return np.asarray(_upright(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{label} does not decode: no image format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{label} does not decode: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


def encode_images(
    processor: Any, images: Sequence[ImageSource], *, square: int | None = None
) -> EncodedImages:
    """Resize, normalise and cut images into patches.

    Args:
        processor: The image processor of the model that will read them.
        images: At least one, in the order in which their tokens will stand in the batch.
        square: Side in pixels of the square that each is resized to first, whatever its shape; None
            leaves the size to the processor, which keeps the shape.

    Returns:
        On the CPU.

    Raises:
        ValueError: There is none, one does not decode, has a side shorter than an image token, or
            is too long and narrow (names it).
    """
    if not images:
        raise ValueError("no images to encode")
    least = processor.patch_size * processor.merge_size
    arrays = []
    for number, source in enumerate(images):
        label = str(source) if isinstance(source, str | Path) else f"image {number}"
        array = read_image(source, label)
        if square is not None:
            whole = Image.fromarray(array).resize((square, square), Image.Resampling.BICUBIC)
            array = np.asarray(whole)
        height, width = array.shape[:2]
        size = f"{label} is {width} x {height} pixels"
        if min(height, width) < least:
            raise ValueError(f"{size}; each side needs at least {least}, one image token")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"{size}; one side may be at most {MAX_ASPECT} times the other")
        arrays.append(array)
    made = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
    return EncodedImages(made["pixel_values"], made["image_grid_thw"])


def join_images(images: Sequence[EncodedImages]) -> EncodedImages | None:
    """Images one after the other; None for none.

    Args:
        images: In the order in which their tokens stand in the batch.
    """
    if not images:
        return None
    pixels = torch.cat([each.pixel_values for each in images])
    return EncodedImages(pixels, torch.cat([each.image_grid_thw for each in images]))
