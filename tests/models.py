"""Which models there are, and of which family: policies that roll out, and embeddings."""

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


MODELS = sorted(path.stem for path in (REPO / "conf" / "model").glob("[!_]*.yaml"))
POLICY_MODELS = [name for name in MODELS if has_rollouts(composed(f"model={name}"))]
EMBEDDING_MODELS = [name for name in MODELS if name not in POLICY_MODELS]
