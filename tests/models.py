"""Which models there are, and of which family: policies, embeddings, compressors of contexts."""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra

from tests.runs import REPO


def composed(*overrides: str) -> Any:
    """The config as it is, without the fixtures that shrink it."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def has_rollouts(config: Any) -> bool:
    """Whether the data of a config come from an engine."""
    return "engine" in config.data


def has_contexts(config: Any) -> bool:
    """Whether the data of a config are contexts to compress."""
    return "source_mask" in config.data


def has_pairs(config: Any) -> bool:
    """Whether the data of a config are pairs of texts (or images) that belong together."""
    return not has_rollouts(config) and not has_contexts(config)


MODELS = sorted(path.stem for path in (REPO / "conf" / "model").glob("[!_]*.yaml"))
_CONFIGS = {name: composed(f"model={name}") for name in MODELS}
POLICY_MODELS = [name for name in MODELS if has_rollouts(_CONFIGS[name])]
CONTEXT_MODELS = [name for name in MODELS if has_contexts(_CONFIGS[name])]
EMBEDDING_MODELS = [name for name in MODELS if has_pairs(_CONFIGS[name])]
