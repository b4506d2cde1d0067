"""A tiny Qwen2.5-VL built in code: an ordinary folder, so plain tools load what we export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from datamodules.prepared import prepare
from datamodules.word_tokenizer import EOS, PAD, UNK, byte_tokenizer, word_tokenizer
from lightning_modules.options import read_options

MASK = "<mask>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # as Qwen's


@dataclass
class TinyVLOptions:
    """Shape of a small Qwen2.5-VL: 16 tokens for an image of 32 x 32 pixels.

    Args:
        hidden_size: Width of the language model.
        intermediate_size: Width of its MLP.
        num_layers: Decoder layers.
        num_heads: Query heads; they share ``hidden_size``, at least 6 and an even number each.
        num_kv_heads: Key and value heads.
        max_positions: Longest sequence (tokens).
        tie_embeddings: One matrix for input embeddings and head, as in the 2B and 3B models.
        vision_hidden_size: Width of the vision tower.
        vision_intermediate_size: Width of its MLP.
        vision_layers: Its blocks; the last attends to the whole image, the others to windows of
            2 x 2 image tokens.
        vision_heads: Its heads; a multiple of 4 each.
        patch_size: Pixels of a patch's side.
        merge_size: Patches of an image token's side.
        image_size: Larger images are shrunk to this many pixels squared.
        init_std: Standard deviation of the random weights; 0.02 is for wide models.
    """

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    max_positions: int = 2048
    tie_embeddings: bool = True
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    vision_layers: int = 2
    vision_heads: int = 2
    patch_size: int = 4
    merge_size: int = 2
    image_size: int = 32
    init_std: float = 0.02


def build_tiny_vl(
    folder: str | Path, vocabulary: Sequence[str] | None, options: TinyVLOptions, seed: int
) -> None:
    """Write a random Qwen2.5-VL, its tokenizer and its image processor as a Hugging Face folder.

    Args:
        folder: Where to.
        vocabulary: Words of a word-level tokenizer, which also has ``<pad> <unk> <eos> <mask>``
            and Qwen's vision tokens; None makes a byte-level one.
        options: Shape.
        seed: Of the weights.

    Raises:
        ValueError: A word is there twice, or the heads do not fit the widths.
    """
    words = [MASK, *VISION, *(vocabulary or [])]
    taken = {PAD, UNK, EOS}
    for word in words:
        if word in taken:
            raise ValueError(f"the vocabulary has {word!r} twice, or it is a special token")
        taken.add(word)
    tokenizer = byte_tokenizer() if vocabulary is None else word_tokenizer(words)
    tokenizer.add_special_tokens({"mask_token": MASK, "additional_special_tokens": list(VISION)})
    start, end, image, video = (tokenizer.get_vocab()[word] for word in VISION)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    config: Any = Qwen2_5_VLConfig(
        text_config=_text_config(options) | ends | {"vocab_size": len(tokenizer)},
        vision_config=_vision_config(options),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=options.tie_embeddings,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    token_side = options.patch_size * options.merge_size
    processor = Qwen2VLImageProcessorPil(
        patch_size=options.patch_size,
        merge_size=options.merge_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        size={"shortest_edge": token_side**2, "longest_edge": options.image_size**2},
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)  # type: ignore[attr-defined]


@dataclass
class NoWarmStart:
    """A tiny vision-language model starts from random weights.

    Args:
        steps: Of no effect; ``experiment=smoke`` shortens every warm start by it.
    """

    steps: int = 0


def prepare_tiny_vl(
    task: Any,
    *,
    tiny: Mapping[str, Any] | TinyVLOptions | None,
    warm_start: Any,
    task_settings: Any,
    seed: int,
    cache_dir: str | Path,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Folder of a random tiny Qwen2.5-VL for ``task``, made at most once.

    Args:
        task: Gives the vocabulary.
        tiny: Shape of the model.
        warm_start: Not used.
        task_settings: Not used: the weights do not depend on the data.
        seed: Of the weights.
        cache_dir: Where prepared folders live.
        callbacks: Not used.
    """
    shape = read_options(TinyVLOptions, tiny, "backbone.tiny")
    words = task.vocabulary()
    material = {"format": 1, "vocabulary": words, "tiny_vl": asdict(shape), "seed": seed}
    return prepare(cache_dir, "vl", material, lambda at: build_tiny_vl(at, words, shape, seed))


def _text_config(options: TinyVLOptions) -> dict[str, Any]:
    head_dim, rest = divmod(options.hidden_size, options.num_heads)
    if rest or head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"hidden_size={options.hidden_size} and num_heads={options.num_heads} must give heads "
            f"of an even width of at least 6"
        )
    half = head_dim // 2
    time = half // 4  # a quarter for time, the rest for height and width, as in Qwen's models
    return {
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_kv_heads,
        "max_position_embeddings": options.max_positions,
        "initializer_range": options.init_std,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [time, (half - time) // 2, (half - time + 1) // 2],
        },
    }


def _vision_config(options: TinyVLOptions) -> dict[str, Any]:
    if options.vision_hidden_size % (4 * options.vision_heads):
        raise ValueError(
            f"vision_hidden_size={options.vision_hidden_size} and "
            f"vision_heads={options.vision_heads} must give heads of a width that 4 divides"
        )
    return {
        "depth": options.vision_layers,
        "initializer_range": options.init_std,
        "hidden_size": options.vision_hidden_size,
        "intermediate_size": options.vision_intermediate_size,
        "num_heads": options.vision_heads,
        "patch_size": options.patch_size,
        "spatial_merge_size": options.merge_size,
        "temporal_patch_size": 2,
        "window_size": 2 * options.patch_size * options.merge_size,
        "fullatt_block_indexes": [options.vision_layers - 1],
        "out_hidden_size": options.hidden_size,
    }
