"""Critics: a value for every state in which the policy wrote a token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_modules.backbones.causal_lm import Completions, completion_hidden, load_causal_lm
from lightning_modules.options import BackboneOptions


class ValueHead(nn.Module):
    """One number a hidden state.

    It starts at zero [our choice: the first advantages are then plain returns, not noise].

    Args:
        hidden_size: Width ``H`` of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values ``(K,)`` of states ``(K, H)``."""
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


class Critic(nn.Module):
    """A decoder of its own with a value head: as large as the policy, started from its weights.

    Args:
        options: Of the backbone.

    Raises:
        ValueError: The backbone cannot be loaded.
    """

    def __init__(self, options: BackboneOptions) -> None:
        super().__init__()
        model = load_causal_lm(options).base
        self.config: Any = model.config
        self.body: Any = model.base_model  # without its language-model head
        self.value_head = ValueHead(self.config.get_text_config().hidden_size)

    def forward(self, input_ids: Tensor, completions: Completions) -> Tensor:
        """Values ``(K,)`` of the states in which the K completion tokens were written."""
        hidden = completion_hidden(self.body, self.config, input_ids, completions)
        return self.value_head(hidden)
