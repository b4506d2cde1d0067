"""The only importer of ``kernels/``.

``kernels`` is also the import name of a Hugging Face package that transformers looks for, so our
folder has no ``__init__.py`` and is loaded by path, once, under the name ``litpost_kernels``. In a
wheel the folder itself is called ``litpost_kernels``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_NAME = "litpost_kernels"


def load_kernels(name: str) -> ModuleType:
    """Load ``kernels/<name>.py`` as ``litpost_kernels.<name>``.

    Raises:
        ImportError: The folder is not beside this package.
    """
    if _NAME not in sys.modules:
        root = Path(__file__).resolve().parent.parent
        folder = next(
            (root / f for f in ("kernels", _NAME) if (root / f / "reference.py").is_file()), None
        )
        if folder is None:
            raise ImportError(f"LitPost's kernels folder is not in {root}: reinstall litpost")
        package = ModuleType(_NAME, "Fused LM-head operations of LitPost.")
        package.__path__ = [str(folder)]
        package.__spec__ = importlib.machinery.ModuleSpec(_NAME, None, is_package=True)
        sys.modules[_NAME] = package
    return importlib.import_module(f"{_NAME}.{name}")


_api, _regions = load_kernels("api"), load_kernels("regions")
linear_logprob_entropy = _api.linear_logprob_entropy
linear_cross_entropy = _api.linear_cross_entropy
logprob_entropy_from_logits = _api.logprob_entropy_from_logits
available_backend = load_kernels("dispatch").available_backend
LogprobEntropy, CEStats = _regions.LogprobEntropy, _regions.CEStats
TopK, TopP = _regions.TopK, _regions.TopP
_head = load_kernels("head")
FusedLMHead, fuse_lm_head = _head.FusedLMHead, _head.fuse_lm_head

__all__ = [
    "CEStats",
    "FusedLMHead",
    "LogprobEntropy",
    "TopK",
    "TopP",
    "available_backend",
    "fuse_lm_head",
    "linear_cross_entropy",
    "linear_logprob_entropy",
    "load_kernels",
    "logprob_entropy_from_logits",
]
