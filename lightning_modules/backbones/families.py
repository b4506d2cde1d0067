"""Kinds of tiny backbones: what their config keys are and who makes them (``backbone.family``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.backbones.prepare import WarmStartOptions, prepare_tiny
from lightning_modules.backbones.tiny import TinyOptions
from lightning_modules.backbones.tiny_encoder import (
    PairWarmStartOptions,
    TinyEncoderOptions,
    prepare_tiny_encoder,
)
from lightning_modules.backbones.tiny_pair import (
    PairWarmStart,
    TinyPairOptions,
    prepare_tiny_pair,
)
from lightning_modules.backbones.tiny_vl import NoWarmStart, TinyVLOptions, prepare_tiny_vl


@dataclass(frozen=True)
class Family:
    """A kind of tiny backbone.

    Args:
        shape: Dataclass of ``backbone.tiny``.
        warm_start: Dataclass of ``backbone.warm_start``.
        prepare: Makes the folder, see ``prepare_tiny``.
    """

    shape: type
    warm_start: type
    prepare: Callable[..., Path]


FAMILIES: dict[str, Family] = {
    "causal_lm": Family(TinyOptions, WarmStartOptions, prepare_tiny),
    "encoder": Family(TinyEncoderOptions, PairWarmStartOptions, prepare_tiny_encoder),
    "pair": Family(TinyPairOptions, PairWarmStart, prepare_tiny_pair),
    "vision_language": Family(TinyVLOptions, NoWarmStart, prepare_tiny_vl),
}


def family_of(backbone: dict[str, Any]) -> Family:
    """The family that a config's ``backbone`` names.

    Args:
        backbone: Its values; without ``family`` it is ``causal_lm``.

    Raises:
        ValueError: There is no such family.
    """
    name = backbone.get("family") or "causal_lm"
    if name not in FAMILIES:
        raise ValueError(f"backbone.family={name!r} must be one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
