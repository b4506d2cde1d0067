"""The flat config with the final metrics, for TensorBoard's HParams tab."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from run_tools.folder import flatten


@rank_zero_only
def log_hyperparameters(
    config: Mapping[str, Any],
    trainer: Trainer,
    metrics: Mapping[str, Any],
    logged: Mapping[str, float],
) -> None:
    """Log config and metrics once, at the end.

    The tab takes the last value of a tag, so only what was not ``logged`` yet becomes a scalar.
    """
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
    new = {k: v for k, v in numbers.items() if k not in logged}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            values = flatten(config)
            logger.log_hyperparams(values)  # the file hparams.yaml
            logger.log_metrics(new, step=trainer.global_step)
            writer = logger.experiment._get_file_writer()
            for summary in hparams(logger._sanitize_params(values), numbers):
                writer.add_summary(summary)
            logger.finalize("success")
