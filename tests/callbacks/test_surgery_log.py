"""What surgery logs, against cosines and norms of whole gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.gradient_surgery import GradientSurgery
from tests.callbacks.surgery_parts import Batches, Net, domain_gradients, fit


def test_tags_heat_map_and_histogram(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="board", version="")
    module = fit(
        GradientSurgery(full_log=True, image_every_n_steps=2), steps=3, logger=logger,
    )  # fmt: skip
    logger.finalize("success")
    board = EventAccumulator(
        str(tmp_path / "board"), size_guidance={"images": 0, "histograms": 0}
    ).Reload()
    tags = board.Tags()
    assert {image for image in tags["images"]} == {
        f"surgery/cosines/{pair}" for pair in ("chat_if", "chat_math", "if_math")
    }
    steps = [event.step for event in board.Images("surgery/cosines/chat_if")]
    assert steps == [1, 3] == [event.step for event in board.Histograms("surgery/unit_cos")]
    names = ["conflict_frac", "cos_final_naive", "ms", "buffers_mib", "cos/mlp/chat_math",
             "cos_global/if_math", "grad_norm/if", "grad_norm_ratio/chat_if", "weight/math",
             "unit_weight/layers.0.weight/if", "unit_cos/layers.0.bias/chat_math"]  # fmt: skip
    assert {f"surgery/{name}" for name in names} <= set(tags["scalars"])
    assert not any(
        tag.startswith(("surgery/cos/attn", "surgery/cos/norm")) for tag in tags["scalars"]
    )

    found = domain_gradients(Net(), Batches())
    flat = {d: torch.cat([v.flatten() for v in g.values()]) for d, g in found.items()}
    first = {tag: board.Scalars(f"surgery/{tag}")[0].value for tag in names}
    cosine = torch.cosine_similarity(flat["if"], flat["math"], dim=0)
    assert first["cos_global/if_math"] == pytest.approx(float(cosine), abs=1e-5)
    assert first["grad_norm/if"] == pytest.approx(float(flat["if"].norm()), rel=1e-5)
    ratio = float(flat["chat"].norm() / flat["if"].norm())
    assert first["grad_norm_ratio/chat_if"] == pytest.approx(ratio, rel=1e-5)
    final = torch.cat([module.grads[0][n].flatten() for n in found["if"]])
    naive = sum(flat.values())
    cosine = torch.cosine_similarity(final, naive, dim=0)
    assert first["cos_final_naive"] == pytest.approx(float(cosine), abs=1e-5)
    assert 0 < first["conflict_frac"] < 1
    assert first["buffers_mib"] == pytest.approx(3 * 4 * flat["if"].numel() / 2**20)
