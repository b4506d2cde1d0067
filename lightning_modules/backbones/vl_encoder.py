"""A Qwen-VL read as an encoder: any attention mask, vectors, and masked tokens through its head.

Everything goes through one ``forward``, so that the hooks of ``fully_shard`` gather parameters,
the head's included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.images import EncodedImages
from lightning_modules.backbones.export import stream_weights
from lightning_modules.backbones.loading import add_lora
from lightning_modules.backbones.sharding import gathered
from lightning_modules.backbones.vision_language import VisionLanguage, load_vl, vl_inputs
from lightning_modules.functional.attention_masks import MaskedTokens, additive
from lightning_modules.ops import fuse_lm_head
from lightning_modules.options import BackboneOptions, KernelOptions, LoraOptions


class Rebuilt(NamedTuple):
    """What a sequence with masked parts was rebuilt to.

    Args:
        logprobs: ``(K,)`` of the masked tokens.
        pixels: ``(J, C)`` of the masked image tokens' patches; None where there are none.
    """

    logprobs: Tensor
    pixels: Tensor | None


class VisionLanguageEncoder(nn.Module):
    """Wraps a Qwen2-VL or Qwen2.5-VL, or a PEFT model of one.

    Args:
        vl: The loaded folder.
        lora: Of the adapters; None trains all parameters.
        kernel: Options of the fused head; None for its defaults.
        image_decoder: Add a decoder of masked patches: a copy of the middle layer and a linear map
            to the pixels of an image token (MoCa [code], which CoCoA follows).
    """

    def __init__(
        self,
        vl: VisionLanguage,
        *,
        lora: LoraOptions | None = None,
        kernel: KernelOptions | None = None,
        image_decoder: bool = False,
    ) -> None:
        super().__init__()
        model: Any = vl.model
        decoder = ImageDecoder(model) if image_decoder else None
        if decoder is not None and lora is not None:
            decoder.float()  # trained whole: as wide as the adapters, which PEFT keeps in float32
        self.model = model if lora is None else add_lora(model, lora, "FEATURE_EXTRACTION")
        self.image_decoder = decoder
        options = kernel or KernelOptions()
        fuse_lm_head(self.base, backend=options.backend, workspace_mb=options.workspace_mb)
        self.mask_id, self.special_ids = vl.mask_id, vl.special_ids
        self.image_processor = vl.image_processor  # exported with the model

    @property
    def base(self) -> Any:
        """The Hugging Face model itself, adapters or not."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def blocks(self) -> Any:
        """Layers of the language model, which alone are sharded one by one.

        A batch without images does not run the vision tower, and ranks may differ in that.
        """
        return self.base.model.language_model.layers

    @property
    def has_adapter(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.model, "peft_config")

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """Generation defaults of the Hugging Face model."""
        return getattr(self.base, "generation_config", None)

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return int(self.config.get_text_config().hidden_size)

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        """Inside the block a sharded encoder is whole on every rank, where that fits."""
        with gathered(self) as is_whole:
            yield is_whole

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under their Hugging Face names, one at a time; see ``stream_weights``."""
        return stream_weights(self)

    def forward(
        self,
        input_ids: Tensor,
        valid: Tensor,
        attention: Tensor,
        images: EncodedImages | None = None,
        *,
        pool: Tensor | None = None,
        masked: MaskedTokens | None = None,
        image_rows: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Vectors, or masked tokens and patches rebuilt.

        Args:
            input_ids: ``(B, L)``, padded on the right.
            valid: ``(B, L)`` bool, True on tokens.
            attention: ``(B, 1, L, L)`` bool, see ``functional.attention_masks``.
            images: Of all rows, in order.
            pool: ``(B, L)`` bool: the vectors are means of these hidden states.
            masked: Tokens to rebuild, each read one place to its left.
            image_rows: Rows and places ``(J,)`` of masked image tokens, for the image decoder.

        Returns:
            ``(B, d)`` with ``pool``, else ``Rebuilt``.
        """
        base = self.base
        known = VisionLanguage(base, None, None, None)
        keywords = vl_inputs(known, input_ids, valid, images)
        additive_mask = additive(attention, base.dtype)
        hidden = base.model(
            input_ids=input_ids, attention_mask=additive_mask, use_cache=False, **keywords
        ).last_hidden_state
        rebuilds = image_rows is not None and self.image_decoder is not None
        head = base.get_output_embeddings()
        nothing = self._unused(
            base.model.visual if images is None else None,
            None if rebuilds else self.image_decoder,
            head if masked is None else None,
        )
        if pool is not None:
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            weights = pool.to(wide.dtype)
            return (wide * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True) + nothing
        assert masked is not None
        read = hidden[masked.rows, masked.read_positions]
        found = head(read, masked.targets, with_entropy=False)
        pixels = None
        if rebuilds:
            assert self.image_decoder is not None
            rotary = base.model.language_model.rotary_emb(hidden, keywords["position_ids"])
            pixels = self.image_decoder(hidden, additive_mask, rotary)[image_rows]
        return Rebuilt(found.logprob + nothing, pixels)

    def _unused(self, *parts: nn.Module | None) -> Tensor | float:
        """0 with the parameters of these parts in its graph.

        DDP waits for all parameters, and FSDP for the same ones on all ranks.
        """
        if not torch.is_grad_enabled():
            return 0.0
        touched = [
            parameter.flatten()[:1].sum().float()
            for part in parts
            if part is not None
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        return 0.0 * torch.stack(touched).sum() if touched else 0.0


class ImageDecoder(nn.Module):
    """One more layer over all hidden states, and the pixels of an image token from each.

    Args:
        model: A Qwen-VL; its middle layer is copied.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        layers = model.model.language_model.layers
        self.layer = copy.deepcopy(layers[len(layers) // 2])
        vision = model.config.vision_config
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        self.head = nn.Linear(
            model.config.get_text_config().hidden_size,
            vision.spatial_merge_size**2 * channels,
            dtype=model.dtype,
        )
        nn.init.normal_(self.head.weight, std=0.02)  # MoCa [code]
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, attention: Tensor, rotary: Any) -> Tensor:
        """Pixels ``(B, L, merge^2 C)`` of every position; only those of masked ones are used."""
        dtype = self.head.weight.dtype
        turns = tuple(part.to(dtype) for part in rotary)
        made = self.layer(
            hidden.to(dtype), attention_mask=attention.to(dtype), position_embeddings=turns
        )
        made = made[0] if isinstance(made, tuple) else made
        pixels: Tensor = self.head(made)
        return pixels


def load_vl_encoder(
    options: BackboneOptions,
    lora: LoraOptions | None = None,
    *,
    kernel: KernelOptions | None = None,
    mask_token: str | None = None,
    image_decoder: bool = False,
) -> VisionLanguageEncoder:
    """Load a Qwen2-VL or Qwen2.5-VL folder as an encoder.

    Args:
        options: Of the backbone.
        lora: Of the adapters; None trains all parameters.
        kernel: Options of the fused head.
        mask_token: See ``load_vl``.
        image_decoder: See ``VisionLanguageEncoder``.

    Raises:
        ValueError: It cannot be loaded, or reads no images.
    """
    vl = load_vl(
        options.path,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        mask_token=mask_token,
        revision=options.revision,
        random_init=options.random_init,
    )
    if options.gradient_checkpointing:
        vl.model.gradient_checkpointing_enable({"use_reentrant": False})
    return VisionLanguageEncoder(vl, lora=lora, kernel=kernel, image_decoder=image_decoder)
