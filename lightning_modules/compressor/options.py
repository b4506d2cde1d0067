"""Option groups of the compressor-decoder pair; each refuses what it cannot mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["embeds", "kv"]
ProjectorKind = Literal["identity", "linear", "mlp", "low_rank"]
Training = Literal["frozen", "lora", "full"]


@dataclass
class MemoryOptions:
    """What a text becomes.

    Args:
        tokens: Memory vectors of a segment, m [code: 128 in ICAE v2].
        form: ``embeds`` hands the decoder m vectors through the projector; ``kv`` hands it the
            keys and values of the memory tokens in every layer, for two models of one
            architecture [code: 500xCompressor].
        segment_tokens: Most text tokens that are compressed together; longer texts are cut into
            equal segments and their memories put in a row [code: ICAE v2]. None never cuts.
        on_short: What a segment with fewer tokens than memory vectors does: ``refuse`` it, or
            ``count`` it (``Memory.num_short``) and go on.
        continuation_prompt: Also a learned vector before a continuation; without it the text
            follows the memory at once [code: ICAE's ``add_special_token_for_lm`` is off].
        kv_positions: Of ``form=kv``: ``memory`` counts positions so that the memory ends where the
            decoder's text begins [our choice]; ``source`` leaves the rotary positions that the
            keys have in the compressor, behind the whole source [code: 500xCompressor].
        seed: Of the first memory tokens, prompts and projector.

    Raises:
        ValueError: Names every bad key.
    """

    tokens: int = 128
    form: Form = "embeds"
    segment_tokens: int | None = None
    on_short: Literal["refuse", "count"] = "refuse"
    continuation_prompt: bool = False
    kv_positions: Literal["memory", "source"] = "memory"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            *_at_least("model.memory.tokens", self.tokens, 1),
            *_one_of("model.memory.form", self.form, ("embeds", "kv")),
            *_one_of("model.memory.on_short", self.on_short, ("refuse", "count")),
            *_one_of("model.memory.kv_positions", self.kv_positions, ("memory", "source")),
        ]
        if self.segment_tokens is not None:
            problems += _at_least("model.memory.segment_tokens", self.segment_tokens, 1)
        if self.form == "kv" and self.continuation_prompt:
            problems.append(
                "model.memory.continuation_prompt=true has no place with model.memory.form='kv', "
                "whose text follows one start token"
            )
        _refuse(problems)


@dataclass
class ProjectorOptions:
    """How the compressor's memory states become vectors that the decoder reads; ``form=embeds``.

    Args:
        kind: ``identity`` (equal widths only), ``linear``, ``mlp`` (two layers, GELU) or
            ``low_rank`` (down to ``rank``, up again).
        rank: Width of the bottleneck of ``low_rank``.
        hidden: Inner width of ``mlp``; None for the wider of both models.
        normalise_bottleneck: RMS-normalise the bottleneck [card, second trial].
        match_scale: RMS-normalise the result and give it the size that the decoder's input
            embeddings have at the start, as a learned gain (card, section 8). Without it a frozen
            decoder ignores the memory for long.
        noise: Standard deviation of Gaussian noise on the bottleneck of ``low_rank``, or on the
            vectors of the other kinds in units of the decoder's embeddings; 0 for none.
        noise_in_eval: Noise, where there is any, in evaluation too [card, second trial].

    Raises:
        ValueError: Names every bad key.
    """

    kind: ProjectorKind = "linear"
    rank: int | None = None
    hidden: int | None = None
    normalise_bottleneck: bool = True
    match_scale: bool = True
    noise: float = 0.0
    noise_in_eval: bool = False

    def __post_init__(self) -> None:
        kinds = ("identity", "linear", "mlp", "low_rank")
        problems = _one_of("model.projector.kind", self.kind, kinds)
        for name, kind in (("rank", "low_rank"), ("hidden", "mlp")):
            value = getattr(self, name)
            if value is not None and self.kind != kind:
                problems.append(f"model.projector.{name}={value} belongs to kind={kind!r} only")
            elif value is not None:
                problems += _at_least(f"model.projector.{name}", value, 1)
        if self.kind == "low_rank" and self.rank is None:
            problems.append(
                "model.projector.kind='low_rank' needs model.projector.rank, such as 16"
            )
        problems += _at_least("model.projector.noise", self.noise, 0)
        _refuse(problems)


@dataclass
class RankControl:
    """Penalties on the rank of the memory at a fixed size (card, section 6).

    Args:
        nuclear: Weight of ``nuclear_norm`` (lowers the rank).
        whitening: Weight of ``whitening`` (raises it).
        erank_floor: Effective rank below which ``erank_shortfall`` acts; None for none.
        erank_weight: Weight of that.

    Raises:
        ValueError: Names every bad key.
    """

    nuclear: float = 0.0
    whitening: float = 0.0
    erank_floor: float | None = None
    erank_weight: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            problem
            for name in ("nuclear", "whitening", "erank_weight")
            for problem in _at_least(f"model.rank_control.{name}", getattr(self, name), 0)
        ]
        if self.erank_floor is not None:
            problems += _at_least("model.rank_control.erank_floor", self.erank_floor, 1)
        _refuse(problems)


@dataclass
class EntropyControl:
    """What raises or lowers the entropy of the decoder's predictions (card, section 6).

    Args:
        label_smoothing: Share of the target spread over the vocabulary, in [0, 1) (raises).
        penalty: Weight of the mean entropy in the loss (lowers); negative values raise it.
        temperature: Of free-running decoding; 0 is greedy.

    Raises:
        ValueError: Names every bad key.
    """

    label_smoothing: float = 0.0
    penalty: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        problems = _at_least("model.entropy_control.temperature", self.temperature, 0)
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(
                f"model.entropy_control.label_smoothing={self.label_smoothing} must be in [0, 1)"
            )
        _refuse(problems)


@dataclass
class LossOptions:
    """Which tokens count how much.

    Args:
        slot_weight: Of tokens that state a fact, where others have 1.
        skip: First tokens of a continuation without loss [code: ICAE, 8].

    Raises:
        ValueError: Names every bad key.
    """

    slot_weight: float = 1.0
    skip: int = 8

    def __post_init__(self) -> None:
        problems = [
            *_at_least("model.loss.slot_weight", self.slot_weight, 0),
            *_at_least("model.loss.skip", self.skip, 0),
        ]
        _refuse(problems)


def _at_least(key: str, value: float, least: float) -> list[str]:
    return [] if value >= least else [f"{key}={value} must be at least {least}"]


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{key}={value!r}: give one of {', '.join(allowed)}"]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))
