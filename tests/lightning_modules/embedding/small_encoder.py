"""A small encoder with dropout, chunks of rows for it, and the gradient of all at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_modules.functional.contrastive import info_nce

GROUP = 2
ROWS = [3, 3, 2]


class Encoder(nn.Module):
    """Two layers with dropout before each.

    Args:
        dropout: Probability.
        dtype: Of the weights.
    """

    def __init__(self, dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16, dtype=dtype)
        self.second = nn.Linear(16, 4, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.second(self.dropout(torch.tanh(self.first(self.dropout(x)))))


def data(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Chunks ``(n, 1 + GROUP, 6)``: a query with its passages."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(ROWS), 1 + GROUP, 6, generator=generator, dtype=dtype)
    return list(x.split(ROWS))


def loss_of(vectors: list[Tensor]) -> Tensor:
    joined = torch.cat(vectors)
    found = info_nce(joined[:, 0], joined[:, 1:], temperature=0.1, symmetric=True)
    return found.loss_sum / found.num_rows


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]


def one_batch(encoder: Encoder, chunks: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All graphs at once, with the dropout masks that chunks draw one after the other."""
    encoder.zero_grad()
    torch.manual_seed(7)
    loss = loss_of([encoder(chunk) for chunk in chunks])
    loss.backward()
    return loss.detach(), gradients(encoder)
