"""Resolvers of the config: functions that its files may call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from omegaconf import OmegaConf


def register() -> None:
    """Make ``${package_folder:...}`` known."""
    OmegaConf.register_new_resolver("package_folder", package_folder, replace=True)


def package_folder(package: str, folder: str) -> str:
    """Folder inside an installed package, for ``${package_folder:...}``.

    Raises:
        ValueError: It is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise ValueError(f"the package {name} is not installed: pip install {name}")
    return str(Path(spec.origin).parent / folder)
