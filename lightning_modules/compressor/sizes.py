"""How large the parts of a pair are, so that tied and untied models compare (card, section 8)."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_modules.compressor.memory import head_is_tied
from lightning_modules.compressor.pair import Pair


def pair_sizes(pair: Pair) -> dict[str, float]:
    """Parameters of a pair, adapters left out but where they are what is trained.

    The compressor's own head is not counted, for nothing uses it: a tied and an untied compressor
    of one shape have one size. The decoder's head counts once, tied or not.

    Args:
        pair: Sharded or not.

    Returns:
        ``size/compressor_params``, ``size/decoder_params``, ``size/trained_params`` (all parts and
        the bridge) and ``size/tied``, 1 where the compressor's head is its input embeddings.

    Example:
        >>> pair_sizes(pair)["size/tied"]  # doctest: +SKIP
        0.0
    """
    is_tied = head_is_tied(pair.config)
    head: Any = pair.compressor.base.get_output_embeddings()
    unused = 0 if is_tied else _params(head)
    trained = (value.numel() for value in pair.parameters() if value.requires_grad)
    return {
        "size/compressor_params": float(_params(pair.compressor) - unused),
        "size/decoder_params": float(_params(pair.decoder)),
        "size/trained_params": float(sum(trained)),
        "size/tied": float(is_tied),
    }


def _params(model: nn.Module) -> int:
    named = model.named_parameters()
    return sum(value.numel() for name, value in named if "lora_" not in name)
