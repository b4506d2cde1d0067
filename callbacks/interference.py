"""Interference between domains: what a run learnt and lost again, and what it never reached.

For each domain, at every validation:

    forgetting  best validation score of this run so far, minus the present one
    rigidity    score of an expert (a run on this domain alone), minus the best of this run

Together they are the gap to the expert. The MGS paper reads both off that gap (arXiv 2602.02301,
section on sequential RL: a domain trained early forgets, one trained late is rigid) [page]; the
split at the run's own best is our choice, so that a run on all domains at once has both numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class Interference(Callback):
    """Logs ``val/forgetting/<d>`` and, with experts, ``val/rigidity/<d>``.

    Args:
        tag: Logged tag of a domain's score, ``<d>`` in place of its name.
        experts: Domain -> ``metrics.json`` of its expert; a file that is not there is left out with
            a warning. The expert's own final value of the tag counts.

    Raises:
        ValueError: The tag has no ``<d>``.
    """

    def __init__(self, *, tag: str, experts: Mapping[str, str] | None = None) -> None:
        if tag.count("<d>") != 1:
            raise ValueError(
                f"callbacks.interference.tag={tag!r} must hold <d> once, such as val/reward/<d>"
            )
        self.tag = tag
        self.experts = dict(experts or {})
        self._pattern = re.compile(re.escape(tag).replace("<d>", r"(\w+)"))
        self._best: dict[str, float] = {}
        self._reached: dict[str, float] | None = None  # by the experts

    def state_dict(self) -> dict[str, Any]:
        """Best score of each domain."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best of the resumed run."""
        self._best = dict(state_dict["best"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the experts before anything is trained."""
        self._reached = {d: v for d, v in map(self._expert, self.experts) if v is not None}

    def _expert(self, domain: str) -> tuple[str, float | None]:
        path = Path(self.experts[domain])
        key = f"callbacks.interference.experts.{domain}={path}"
        if not path.is_file():
            rank_zero_warn(f"{key}: there is no such file, so its rigidity is not logged")
            return domain, None
        tag = self.tag.replace("<d>", domain)
        value = json.loads(path.read_text(encoding="utf-8")).get(tag)
        if not isinstance(value, (int, float)):
            rank_zero_warn(f"{key}: it holds no {tag}, so its rigidity is not logged")
            return domain, None
        return domain, float(value)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the scores that were just logged."""
        results: dict[str, float] = getattr(pl_module, "results", {})
        if trainer.sanity_checking:
            return
        found: dict[str, float] = {}
        for tag, value in list(results.items()):
            match = self._pattern.fullmatch(tag)
            if match is None:
                continue
            domain = match.group(1)
            best = self._best[domain] = max(value, self._best.get(domain, value))
            found[f"val/forgetting/{domain}"] = best - value
            if self._reached and domain in self._reached:
                found[f"val/rigidity/{domain}"] = self._reached[domain] - best
        results |= found
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
