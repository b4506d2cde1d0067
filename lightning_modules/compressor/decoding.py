"""Free-running decoding from a memory: batched, cached, rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.engines.base import Sampling
from datamodules.engines.decode import choose_tokens, uniforms
from lightning_modules.compressor.memory import Memory
from lightning_modules.compressor.pair import Pair, Question
from lightning_modules.compressor.projector import Prompt


class DecodedTexts(NamedTuple):
    """Decoded tokens, padded on the right; on the CPU.

    Args:
        token_ids: ``(B, T)`` with EOS where it came, 0 behind the end.
        logprobs: ``(B, T)`` of the tokens under the decoder (temperature 1 where greedy).
        lengths: ``(B,)`` tokens, EOS included.
        is_finished: ``(B,)`` whether EOS came.
    """

    token_ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    is_finished: Tensor

    def texts(self) -> list[list[int]]:
        """Token ids of every row without EOS, for the tokenizer."""
        rows = zip(self.token_ids, self.lengths, self.is_finished, strict=True)
        return [ids[: int(length) - int(end)].tolist() for ids, length, end in rows]


@torch.no_grad()
def greedy_decode(
    pair: Pair,
    memory: Memory,
    max_new_tokens: int | Sequence[int],
    *,
    eos_ids: Sequence[int],
    forbidden: Sequence[int] = (),
    prompt: Prompt = "ae",
    question: Question | None = None,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    any_rank: Callable[[bool], bool] = bool,
    fixed_steps: int | None = None,
) -> DecodedTexts:
    """Decode every text of a memory.

    Args:
        pair: Whose decoder reads.
        memory: Of B texts.
        max_new_tokens: Most tokens, EOS included, for all or for each text
            (card, section 3: n + 8).
        eos_ids: Tokens that end a text.
        forbidden: Tokens that are never written, such as padding or memory-token ids.
        prompt: As in ``Pair.score``.
        question: As in ``Pair.score``.
        temperature: 0 is greedy.
        seeds: One a text, where the temperature is above 0; the tokens do not depend on batch
            mates.
        any_rank: Whether any rank still writes; under sharding all ranks make equally many steps.
        fixed_steps: Make exactly so many steps, whatever has ended (sharding without talk).

    Raises:
        ValueError: A temperature without seeds, or no room for a token.
    """
    rows = len(memory)
    limits = torch.as_tensor(max_new_tokens).expand(rows)
    most = int(limits.max())
    _check(rows, limits, temperature, seeds, fixed_steps)
    device = memory.mask.device
    noise = uniforms(seeds, most) if temperature > 0 and seeds is not None else None
    sampling, ends = Sampling(temperature=temperature), torch.tensor(list(eos_ids))
    banned = torch.tensor(list(forbidden), dtype=torch.long, device=device)
    written = DecodedTexts(
        torch.zeros(rows, most, dtype=torch.long),
        torch.zeros(rows, most),
        torch.zeros(rows, dtype=torch.long),
        torch.zeros(rows, dtype=torch.bool),
    )
    logits, context = pair.begin(memory, prompt, question)
    numbers, alive = torch.arange(rows), torch.ones(rows, dtype=torch.bool)  # of the rows in cache
    step = 0
    while True:
        logits = logits.float().index_fill(1, banned, -torch.inf)
        uniform = None if noise is None else noise[numbers, min(step, most - 1)].to(device)
        tokens, logprobs = (value.cpu() for value in choose_tokens(logits, sampling, uniform))
        live = numbers[alive]
        written.token_ids[live, step : step + 1] = tokens[alive, None]
        written.logprobs[live, step : step + 1] = logprobs[alive, None]
        written.lengths[live] = step + 1
        written.is_finished[live] = torch.isin(tokens[alive], ends)
        alive = alive & ~torch.isin(tokens, ends) & (limits[numbers] > step + 1)
        step += 1
        if _is_over(bool(alive.any()), step, fixed_steps, any_rank):
            return written
        if 0 < int(alive.sum()) < 0.9 * len(alive):
            kept = alive.nonzero()[:, 0]
            context.keep(kept.to(device))
            numbers, tokens, alive = numbers[kept], tokens[kept], alive[kept]
        logits = pair.advance(context, tokens.to(device))


def _is_over(
    is_writing: bool, step: int, fixed_steps: int | None, any_rank: Callable[[bool], bool]
) -> bool:
    return not any_rank(is_writing) if fixed_steps is None else step >= fixed_steps


def _check(
    rows: int,
    limits: Tensor,
    temperature: float,
    seeds: Sequence[int] | None,
    fixed_steps: int | None,
) -> None:
    problems = []
    if int(limits.min()) < 1:
        problems.append(f"max_new_tokens={int(limits.min())} must be at least 1")
    if temperature > 0 and (seeds is None or len(seeds) != rows):
        problems.append(f"temperature={temperature} needs one seed for each of the {rows} texts")
    if fixed_steps is not None and fixed_steps < int(limits.max()):
        problems.append(
            f"fixed_steps={fixed_steps} is less than max_new_tokens={int(limits.max())}"
        )
    if problems:
        raise ValueError("; ".join(problems))
