"""Who may attend to whom, and which tokens are masked: CoCoA's stages as functions of spans.

CoCoA (arXiv 2603.01471) reads everything with bidirectional attention. Its second stage lays out
``[A] [EOS] [B]`` and cuts the attention between A and B, so that the EOS token is the only bridge
(card, section 2.2) [paper: figure; code: create_block_attention_mask]:

=========== === === ===
query / key  A  EOS  B
=========== === === ===
A            1   1   0
EOS          1   1   1
B            0   1   1
=========== === === ===

Masks are bool ``(B, 1, L, L)``, True where a query (dimension 2) may attend to a key (dimension 3).
A padding query sees itself and nothing else, so that no row is empty: softmax over an empty row is
NaN in some kernels (card, section 8) [our choice]. Models take the ``additive`` form: with
``attn_implementation="eager"`` transformers *adds* whatever it is given, and a bool mask would
then hide nothing.

Tokens are masked for masked next-token prediction (MNTP): token ``i`` is read from position
``i - 1``, which keeps the shift of the language model (card, section 2.1) [paper: figure; code].
Which token replaces it is not published: always the mask token [our choice].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Values of ``blocks``.
PADDING, BLOCK_A, BRIDGE, BLOCK_B = -1, 0, 1, 2


class MaskedTokens(NamedTuple):
    """Masked ids, and the K tokens to be reconstructed, row by row.

    Args:
        input_ids: ``(B, L)`` with the mask token in the chosen places.
        rows: ``(K,)``.
        positions: ``(K,)`` places of the masked tokens; 1 or more.
        targets: ``(K,)`` the tokens that stood there.
    """

    input_ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor

    @property
    def read_positions(self) -> Tensor:
        """``(K,)`` where MNTP reads them: one place to the left."""
        return self.positions - 1


def eos_positions(input_ids: Tensor, valid: Tensor, eos_id: int) -> Tensor:
    """Place of the one EOS token of every row; padding may have the same id.

    The official code takes the first occurrence, padding and chat templates included, and index 0
    where there is none (card, section 8) [code]; we refuse instead [our choice].

    Args:
        input_ids: ``(B, L)``.
        valid: ``(B, L)``, true on tokens, false on padding.
        eos_id: Of the EOS token.

    Returns:
        ``(B,)`` int64.

    Raises:
        ValueError: Shapes differ, or a row has no EOS token or several (names the row).

    Example:
        >>> ids = torch.tensor([[2, 2, 7, 2, 8]])
        >>> eos_positions(ids, torch.tensor([[False, False, True, True, True]]), 2)
        tensor([3])
    """
    _check_valid(valid, input_ids)
    found = (input_ids == eos_id) & valid.bool()
    counts = found.sum(dim=1)
    bad = (counts != 1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"row {bad[0]} has {int(counts[bad[0]])} EOS tokens (id {eos_id}) among its tokens; "
            f"exactly one must stand between the blocks"
        )
    return found.int().argmax(dim=1)


def blocks(valid: Tensor, eos_pos: Tensor) -> Tensor:
    """Block of every position: ``BLOCK_A``, ``BRIDGE``, ``BLOCK_B`` or ``PADDING``.

    Args:
        valid: ``(B, L)``, true on tokens.
        eos_pos: ``(B,)`` place of the bridge in the padded row.

    Returns:
        ``(B, L)`` int64.

    Raises:
        ValueError: Shapes do not fit, or a bridge is outside its row or on padding (names it).

    Example:
        >>> blocks(torch.tensor([[False, True, True, True]]), torch.tensor([2]))
        tensor([[-1,  0,  1,  2]])
    """
    _check_valid(valid)
    num_rows, length = valid.shape
    if eos_pos.shape != (num_rows,):
        raise ValueError(f"eos_pos must have shape ({num_rows},), got {tuple(eos_pos.shape)}")
    valid, eos_pos = valid.bool(), eos_pos.long()
    is_inside = (eos_pos >= 0) & (eos_pos < length)
    is_good = is_inside & valid.gather(1, eos_pos.clamp(0, length - 1)[:, None])[:, 0]
    bad = (~is_good).nonzero().flatten().tolist()
    if bad:
        place = int(eos_pos[bad[0]])
        where = "on padding" if bool(is_inside[bad[0]]) else f"outside 0 to {length - 1}"
        raise ValueError(f"eos_pos[{bad[0]}] is {place}, {where}")
    # -1, 0, 1 before, at, behind the bridge
    side = torch.sign(torch.arange(length, device=valid.device) - eos_pos[:, None])
    return torch.where(valid, side + BRIDGE, PADDING)


def causal_mask(valid: Tensor) -> Tensor:
    """Every token sees itself and the tokens before it (baseline ``causal_cl``).

    Args:
        valid: ``(B, L)``, true on tokens.

    Returns:
        ``(B, 1, L, L)`` bool.

    Raises:
        ValueError: ``valid`` is no matrix.
    """
    _check_valid(valid)
    length = valid.shape[1]
    lower = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    return _with_padding(lower, valid.bool())


def bidirectional_mask(valid: Tensor) -> Tensor:
    """Every token sees every token (stages 1 and 3).

    Args:
        valid: ``(B, L)``, true on tokens.

    Returns:
        ``(B, 1, L, L)`` bool.

    Raises:
        ValueError: ``valid`` is no matrix.

    Example:
        >>> bidirectional_mask(torch.tensor([[True, True, False]]))[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    _check_valid(valid)
    return _with_padding(torch.ones_like(valid[0], dtype=torch.bool), valid.bool())


def bridge_mask(
    valid: Tensor, eos_pos: Tensor, *, eos_sees_b: bool = True, a_sees_eos: bool = True
) -> Tensor:
    """The table above (stage 2).

    Note that B reads the keys and values of the bridge in *every* layer, not only its last hidden
    state (card, section 2.2) [inference].

    Args:
        valid: ``(B, L)``, true on tokens.
        eos_pos: ``(B,)`` place of the bridge in the padded row.
        eos_sees_b: Whether the bridge attends to B [paper, code]; without it nothing of B reaches
            A or the bridge, as in stage 3, where there is no B [our choice of an ablation].
        a_sees_eos: Whether A attends to the bridge [paper, code; off: our choice of an ablation].

    Returns:
        ``(B, 1, L, L)`` bool.

    Raises:
        ValueError: As in ``blocks``.

    Example:
        >>> valid = torch.tensor([[True, True, True, True]])
        >>> bridge_mask(valid, torch.tensor([1]), eos_sees_b=False)[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    block = blocks(valid, eos_pos)
    query, key = block[:, :, None], block[:, None, :]
    allowed = (query == key) | (query == BRIDGE) | (key == BRIDGE)
    if not eos_sees_b:
        allowed &= ~((query == BRIDGE) & (key == BLOCK_B))
    if not a_sees_eos:
        allowed &= ~((query == BLOCK_A) & (key == BRIDGE))
    return _with_padding(allowed, valid.bool())


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is added to attention scores: 0 where a mask allows, the least finite number elsewhere.

    Right for ``eager`` and ``sdpa``; FlashAttention-2 takes no such mask. Give explicit positions
    with it: models cannot derive them from a mask of four dimensions. Under autocast the least
    number of float32 becomes -inf, which does no harm since no row is empty.

    Args:
        mask: Bool, any shape.
        dtype: Of the scores, that is of the model.

    Returns:
        The shape of ``mask``.

    Raises:
        TypeError: The mask is not bool, or ``dtype`` is no floating-point one.

    Example:
        >>> additive(torch.tensor([True, False]), torch.float16)
        tensor([     0., -65504.], dtype=torch.float16)
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, not {mask.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point one, not {dtype}")
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def mask_tokens(
    input_ids: Tensor,
    span: Tensor,
    valid: Tensor,
    *,
    probability: float,
    mask_id: int,
    special_ids: Sequence[int],
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> MaskedTokens:
    """Mask each token of a span with a probability, at least one a row.

    A token can be masked if it is in the span, is not special and has a token on its left to be
    read from. A row in which chance takes none gets one of them, each equally likely.

    Args:
        input_ids: ``(B, L)``.
        span: ``(B, L)``, true where masking is allowed: B in stage 2, the caption in stage 1.
        valid: ``(B, L)``, true on tokens.
        probability: Over 0, at most 1; 0.7 in stage 2, 0.2 in stage 1 [paper: figure; code].
        mask_id: Of the mask token.
        special_ids: Tokens never to be masked: EOS, vision and image tokens, the mask token.
        generator: Of the draws; made on its own device, so that a CPU one gives the same choice
            wherever the ids are.
        draws: ``(B, L)`` numbers from 0 to 1 in place of a generator, see ``span_draws``.

    Returns:
        The masked ids, and ``K >= B`` tokens; the given ids are left as they are.

    Raises:
        ValueError: Shapes differ, the probability is out of range, neither or both of generator and
            draws are given, or a row has no token that can be masked (names it).

    Example:
        >>> ids, all_ = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
        >>> taken = mask_tokens(
        ...     ids,
        ...     all_,
        ...     all_,
        ...     probability=1.0,
        ...     mask_id=3,
        ...     special_ids=[],
        ...     generator=torch.Generator(),
        ... )
        >>> taken.input_ids.tolist(), taken.read_positions.tolist(), taken.targets.tolist()
        ([[5, 3, 3]], [0, 1], [6, 7])
    """
    _check_valid(valid, input_ids)
    _check_valid(span, input_ids)
    if not 0 < probability <= 1:
        raise ValueError(f"probability={probability} must be over 0 and at most 1")
    if draws is None:
        if generator is None:
            raise ValueError("give a generator or draws")
        draws = torch.rand(
            input_ids.shape, generator=generator, device=generator.device, dtype=torch.float32
        )
    elif generator is not None or draws.shape != input_ids.shape:
        raise ValueError(
            f"draws must have shape {tuple(input_ids.shape)} and come without a generator, got "
            f"{tuple(draws.shape)}"
        )
    valid = valid.bool()
    special = torch.tensor(list(special_ids), dtype=input_ids.dtype, device=input_ids.device)
    allowed = span.bool() & valid & ~torch.isin(input_ids, special)
    allowed[:, :1] = False
    allowed[:, 1:] &= valid[:, :-1]
    empty = (~allowed.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} has no token that can be masked: its span is empty, or holds only "
            f"special tokens or the first token of the row; leave the row out"
        )
    draws = draws.to(input_ids.device).masked_fill(~allowed, 2.0)
    chosen = draws < probability
    # the least draw of a row: among those below the probability, or the one that has to be taken
    chosen.scatter_(1, draws.argmin(dim=1, keepdim=True), True)
    rows, positions = chosen.nonzero(as_tuple=True)
    masked = input_ids.masked_fill(chosen, mask_id)
    return MaskedTokens(masked, rows, positions, input_ids[rows, positions])


def span_draws(spans: Sequence[tuple[int, int]], seeds: Sequence[int], length: int) -> Tensor:
    """Numbers from 0 to 1 that decide what is masked: the n-th of a span by its row's seed alone.

    So what is masked of a row depends neither on its batch and padding nor on what precedes the
    span: ranks that share a batch mask what one process would, and a block can be compared behind
    two different ones [our choice].

    Args:
        spans: Of each row the first and last-plus-one place.
        seeds: One a row.
        length: L of the padded rows.

    Returns:
        ``(B, L)`` on the CPU; 1 outside the spans.

    Example:
        >>> one, other = span_draws([(1, 3), (2, 4)], [7, 7], 4)
        >>> torch.equal(one[1:3], other[2:4])
        True
    """
    draws = torch.ones(len(spans), length, dtype=torch.float32)
    for row, ((first, end), seed) in enumerate(zip(spans, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        draws[row, first:end] = torch.rand(end - first, generator=generator, dtype=torch.float32)
    return draws


def _with_padding(allowed: Tensor, valid: Tensor) -> Tensor:
    """Only tokens see tokens; padding sees itself. ``allowed`` is broadcast to (B, L, L)."""
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    among = valid[:, :, None] & valid[:, None, :] & allowed
    return (among | (itself & ~valid[:, :, None]))[:, None]


def _check_valid(valid: Tensor, input_ids: Tensor | None = None) -> None:
    shape = tuple(valid.shape)
    if valid.dim() != 2:
        raise ValueError(f"spans must have shape (B, L), got {shape}")
    if input_ids is not None and input_ids.shape != valid.shape:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, their span {shape}")
