"""Vision-language backbones: loading Qwen2-VL and Qwen2.5-VL folders, and what they read.

Model, tokenizer and image processor are loaded apart: ``AutoProcessor`` wants torchvision for a
video processor that nothing here needs.

The models derive their positions (M-RoPE) from a mask ``(B, L)`` and cannot do so from the
``(B, 1, L, L)`` masks of CoCoA (card, section 8) [tried]. So ``vl_inputs`` makes the positions,
and the forward pass is

    ``model(input_ids=ids, attention_mask=additive(mask), **vl_inputs(vl, ids, valid, images))``

in which ``model`` may be ``vl.model`` or its body ``vl.model.model``, which has no head. A batch
without images leaves the vision tower without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil

from datamodules.images import EncodedImages, ImageSource
from datamodules.images import encode_images as cut_images
from datamodules.images import read_image as read_image

MODELS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
IMAGE = 1  # token type; 0 is text


@dataclass
class VisionLanguage:
    """A loaded folder.

    Args:
        model: ``Qwen2VLForConditionalGeneration`` or the one of Qwen2.5-VL.
        tokenizer: Its tokenizer.
        image_processor: Its image processor.
        mask_id: Token that replaces masked ones; None where nothing says which.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    mask_id: int | None

    @property
    def merge_size(self) -> int:
        """Patches of an image token's side."""
        return int(self.model.config.vision_config.spatial_merge_size)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that stand for no text, in order: what must never be masked."""
        config = self.model.config
        own = {config.image_token_id, config.video_token_id}
        own |= {config.vision_start_token_id, config.vision_end_token_id}
        masks = set() if self.mask_id is None else {self.mask_id}
        return sorted(own | masks | set(self.tokenizer.all_special_ids))

    def image_tokens(self, num_tokens: int) -> list[int]:
        """Vision start, the image's tokens, vision end.

        Args:
            num_tokens: Of the image, see ``EncodedImages.num_tokens``.
        """
        config = self.model.config
        body = [config.image_token_id] * num_tokens
        return [config.vision_start_token_id, *body, config.vision_end_token_id]


def load_vl(
    path: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    mask_token: str | None = None,
    revision: str | None = None,
    random_init: bool = False,
) -> VisionLanguage:
    """Load a folder or hub name of a Qwen2-VL or Qwen2.5-VL, in training mode.

    Args:
        path: Where from.
        dtype: Of the parameters; ``auto`` keeps the folder's.
        attn_implementation: As in transformers; FlashAttention takes no mask of four dimensions.
        mask_token: A token that the tokenizer knows; None takes its own mask token, if any. A
            released Qwen has none: name a token that your texts do not use.
        revision: Of the hub repository.
        random_init: Take the configuration only: a checkpoint brings the weights.

    Raises:
        ValueError: Something is missing or cannot be loaded, it is another architecture, the image
            processor does not fit the model, or the mask token is unknown.
    """
    where = f"backbone.path={str(path)!r}"
    shared: dict[str, Any] = {"revision": revision or "main"}
    try:
        config = AutoConfig.from_pretrained(path, **shared)
        if config.model_type not in MODELS:
            kind = config.model_type
            raise ValueError(f"its type is {kind!r}, not one of {', '.join(MODELS)}")
        cls: Any = getattr(transformers, MODELS[config.model_type])
        known = dtype if dtype == "auto" else getattr(torch, dtype)
        if random_init:
            kept = config.dtype if known == "auto" else known
            model = cls._from_config(config, dtype=kept, attn_implementation=attn_implementation)
        else:
            model = cls.from_pretrained(
                path, dtype=known, attn_implementation=attn_implementation, **shared
            )
        tokenizer = AutoTokenizer.from_pretrained(path, **shared)
        processor: Any = Qwen2VLImageProcessorPil.from_pretrained(path, **shared)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{where} cannot be loaded as a Qwen-VL model: {first}") from error
    vision = model.config.vision_config
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    found = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if wanted != found:
        raise ValueError(
            f"{where}: patch, merge and temporal patch size are {wanted} in config.json and "
            f"{found} in preprocessor_config.json"
        )
    mask_id = tokenizer.mask_token_id
    if mask_token is not None:
        mask_id = tokenizer.get_vocab().get(mask_token)
        if mask_id is None:
            raise ValueError(f"mask_token={mask_token!r} is no token of {where}")
    return VisionLanguage(model.train(), tokenizer, processor, mask_id)  # loaded in eval mode


def encode_images(vl: VisionLanguage, images: Sequence[ImageSource]) -> EncodedImages:
    """Resize, normalise and cut images into patches; see ``datamodules.images.encode_images``.

    Args:
        vl: What will read them.
        images: At least one, in the order in which their tokens will stand in the batch.
    """
    return cut_images(vl.image_processor, images)


def vl_inputs(
    vl: VisionLanguage,
    input_ids: Tensor,
    valid: Tensor,
    images: EncodedImages | Sequence[ImageSource] | None,
) -> dict[str, Tensor]:
    """Keywords of the forward pass besides ids and attention mask, on the device of the ids.

    Args:
        vl: The model's parts.
        input_ids: ``(B, L)`` with the tokens of every image in place, see ``image_tokens``.
        valid: ``(B, L)``, true on tokens, false on padding.
        images: Of all rows, in order; None or none for text only.

    Returns:
        ``mm_token_type_ids`` ``(B, L)``, ``position_ids`` ``(3, B, L)`` and, where there are
        images, ``pixel_values`` ``(P, C)`` in the model's dtype and ``image_grid_thw`` ``(N, 3)``.

    Raises:
        ValueError: As in ``encode_images`` and ``mrope_positions``.
    """
    if not isinstance(images, EncodedImages):
        images = encode_images(vl, images) if images else None
    is_image = (input_ids == vl.model.config.image_token_id) & valid.bool()
    types = is_image.int() * IMAGE
    grids = None if images is None else images.image_grid_thw
    made = {"mm_token_type_ids": types}
    made["position_ids"] = mrope_positions(types, valid, grids, vl.merge_size)
    if images is not None:
        device = input_ids.device
        made["pixel_values"] = images.pixel_values.to(device, vl.model.dtype)
        made["image_grid_thw"] = images.image_grid_thw.to(device)
    return made


def mrope_positions(
    token_types: Tensor, valid: Tensor, image_grid_thw: Tensor | None, merge_size: int
) -> Tensor:
    """Positions of Qwen's M-RoPE, as the models' own ``get_rope_index`` makes them for images.

    A text token has the same position in time, height and width, one more than what precedes it. An
    image's tokens count from there in each direction, and the text behind goes on from the largest
    side. Padding has 0.

    Args:
        token_types: ``(B, L)``, 1 on image tokens, 0 on text.
        valid: ``(B, L)``, true on tokens.
        image_grid_thw: ``(N, 3)`` patches of each image, in order; None without images.
        merge_size: Patches of an image token's side.

    Returns:
        ``(3, B, L)`` int64: time, height, width.

    Raises:
        ValueError: The image tokens are not those of the images, each in one piece.
    """
    valid, is_image = valid.bool(), token_types == IMAGE
    steps = valid.long()
    offsets = torch.zeros(3, *valid.shape, dtype=torch.long, device=valid.device)
    rows, columns = is_image.nonzero(as_tuple=True)
    grids = torch.zeros(0, 3, dtype=torch.long) if image_grid_thw is None else image_grid_thw
    grids = grids.to(valid.device) // torch.tensor([1, merge_size, merge_size]).to(valid.device)
    counts = grids.prod(dim=1)
    if int(counts.sum()) != len(rows):
        raise ValueError(
            f"the ids have {len(rows)} image tokens, the {len(grids)} images {int(counts.sum())}"
        )
    if len(rows):
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        nth = torch.arange(len(rows), device=valid.device) - first
        bad = ((rows != rows[first]) | (columns != columns[first] + nth)).nonzero()
        if len(bad):
            row = int(rows[bad[0, 0]])
            raise ValueError(f"row {row}: the tokens of an image must stand in one piece")
        _, height, width = (side.repeat_interleave(counts) for side in grids.unbind(1))
        inside = torch.stack([nth // (height * width), nth // width % height, nth % width])
        offsets[:, rows, columns] = inside
        last = counts.cumsum(0) - 1
        steps[rows, columns] = 0  # the last token of an image takes the step for all
        steps[rows[last], columns[last]] = grids[:, 1:].amax(dim=1)
    starts = (steps.cumsum(dim=1) - steps) * valid
    return starts + offsets
