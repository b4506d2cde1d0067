"""Hidden states of completions whose prompts are read once a group, gradients included.

The samples of a group share their prompt. Its keys and values are computed once and serve every
member; completions go through the model in batches of like length. The result is that of reading
every sequence whole (to rounding) for a fraction of the tokens [our choice: the decode loop shares
prompts too, and judges' prompts are several times longer than their completions].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.experience import span


def length_buckets(lengths: Tensor, most: int = 4, least_rows: int = 8) -> list[Tensor]:
    """Rows of like length together, where that saves a tenth of the padded tokens.

    Args:
        lengths: ``(N,)`` tokens of each row.
        most: Number of buckets at most.
        least_rows: Rows a bucket at least.

    Returns:
        Row numbers of each bucket; together every row once.

    Example:
        >>> [len(rows) for rows in length_buckets(torch.tensor([1] * 8 + [9] * 8), most=2)]
        [8, 8]
    """
    count = max(1, min(most, len(lengths) // least_rows))
    ordered, order = lengths.sort(stable=True)
    parts, sizes = order.tensor_split(count), ordered.tensor_split(count)
    padded = sum(int(size[-1]) * len(size) for size in sizes if len(size))
    return list(parts) if padded < 0.9 * int(lengths.max()) * len(lengths) else [order]


def shared_hidden(
    body: Any, config: Any, input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor, groups: Tensor
) -> Tensor:
    """Hidden states that predict the completion tokens.

    Args:
        body: The decoder without its head.
        config: Its configuration; all layers full attention.
        input_ids: ``(N, L)`` prompt then completion, right-padded.
        prompt_lengths: ``(N,)``.
        mask: ``(N, T)`` True on completion tokens whose predictions are wanted. What lies in a gap
            (observed tokens) is read as context like any other token.
        groups: ``(N,)`` equal for rows of one prompt.

    Returns:
        ``(K, H)`` for the K tokens of the mask, row by row.
    """
    device = mask.device
    _, member = torch.unique(groups, return_inverse=True)
    number = torch.arange(len(member), device=device)
    first = torch.full((int(member.max()) + 1,), len(member), device=device)
    first = first.scatter_reduce(0, member, number, "amin")  # a row of each group
    width = int(prompt_lengths.max())
    source = torch.arange(width, device=device) - (width - prompt_lengths[first])[:, None]
    is_prompt = source >= 0  # padded on the left, so that every prompt ends in the last column
    padded = None if bool(is_prompt.all()) else is_prompt.long()
    cache = DynamicCache(config=config)
    read = body(
        input_ids=input_ids[first].gather(1, source.clamp(min=0)),
        attention_mask=padded,
        position_ids=source.clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    lengths = span(mask)  # up to the last wanted token, gaps included
    pieces, keys = [], []
    for rows in length_buckets(lengths):
        steps = int(lengths[rows].max())
        own = member[rows]
        hidden = read.index_select(0, own)[:, None]  # predicts the first token
        if steps > 1:
            written = _continue(
                body, config, cache, own, padded, prompt_lengths[rows], input_ids[rows], steps - 1
            )
            hidden = torch.cat([hidden, written], dim=1)
        inside, places = mask[rows, :steps].nonzero(as_tuple=True)
        pieces.append(hidden[inside, places])
        keys.append(rows[inside] * mask.shape[1] + places)
    return torch.cat(pieces)[torch.cat(keys).argsort()]


def _continue(
    body: Any,
    config: Any,
    cache: DynamicCache,
    own: Tensor,
    padded: Tensor | None,
    prompt_lengths: Tensor,
    input_ids: Tensor,
    steps: int,
) -> Tensor:
    """Hidden states ``(R, steps, H)`` of the first ``steps`` completion tokens of some rows."""
    mine = DynamicCache(config=config)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        mine.update(layer.keys.index_select(0, own), layer.values.index_select(0, own), index)
    positions = prompt_lengths[:, None] + torch.arange(steps, device=own.device)
    tokens = input_ids.gather(1, positions.clamp(max=input_ids.shape[1] - 1))
    if padded is not None:
        padded = torch.cat([padded.index_select(0, own), torch.ones_like(tokens)], dim=1)
    return body(
        input_ids=tokens,
        attention_mask=padded,
        position_ids=positions,
        past_key_values=mine,
        use_cache=True,
    ).last_hidden_state
