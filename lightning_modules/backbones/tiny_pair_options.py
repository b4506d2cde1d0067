"""Options of a tiny pair: shape of compressor, decoder and bridge, and what they are fitted to.

Everything but the compressor's width follows from it in the proportions of the card's second trial
(section 9), so that a sweep of sizes sets ``backbone.tiny.hidden_size`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_modules.backbones.tiny import TinyOptions
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.options import OptimizerOptions, read_options

Texts = Literal["neutral", "prior"]


@dataclass
class TinyPairOptions:
    """Shape of a small compressor, of the decoder, and of the bridge between them.

    Args:
        hidden_size: Width of the compressor.
        intermediate_size: Width of its MLP; None for four times its width [card].
        num_layers: Its layers [card: 2].
        num_heads: Its query heads; None for a head every 16 dimensions, one at least [card].
        num_kv_heads: Its key and value heads; None for as many.
        head_dim: Width of a head; None for the width shared among the heads.
        max_positions: Longest sequence of both models (tokens).
        tie_embeddings: One matrix for the compressor's input embeddings and its head.
        init_std: Standard deviation of random weights of both models. 0.1 [our choice]: with
            Qwen3's 0.02 a compressor of width 16 hardly learns in 700 steps.
        decoder_width: Width of the decoder, all else in the proportions above [card: 64].
        decoder_layers: Its layers [card: 2].
        memory_tokens: Memory vectors of a text, as ``model.memory.tokens``.
        memory_form: ``embeds`` or ``kv``, as ``model.memory.form``.
        rank: Bottleneck of the projector, as ``model.projector.rank`` [card: 16]; None for a plain
            linear projector.
        noise: As ``model.projector.noise`` [card: 0.1]; None for none.
        normalise_bottleneck: As ``model.projector.normalise_bottleneck``.
        match_scale: As ``model.projector.match_scale``.

    Raises:
        ValueError: Names every bad key.

    Example:
        >>> TinyPairOptions(hidden_size=32).compressor.num_heads
        2
    """

    hidden_size: int = 64
    intermediate_size: int | None = None
    num_layers: int = 2
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 512
    tie_embeddings: bool = False
    init_std: float = 0.1
    decoder_width: int = 64
    decoder_layers: int = 2
    memory_tokens: int = 2
    memory_form: Literal["embeds", "kv"] = "embeds"
    rank: int | None = 16
    noise: float | None = 0.1
    normalise_bottleneck: bool = True
    match_scale: bool = True

    def __post_init__(self) -> None:
        names = ("hidden_size", "num_layers", "max_positions", "decoder_width", "decoder_layers")
        derived = ("intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rank")
        given = [*names, "memory_tokens", *(n for n in derived if getattr(self, n) is not None)]
        problems = _too_small("backbone.tiny", {name: getattr(self, name) for name in given}, 1)
        problems += _too_small("backbone.tiny", {"noise": self.noise or 0}, 0)
        if self.init_std <= 0:
            problems.append(f"backbone.tiny.init_std={self.init_std} must be above 0")
        if self.memory_form not in ("embeds", "kv"):
            problems.append(
                f"backbone.tiny.memory_form={self.memory_form!r} must be one of embeds, kv"
            )
        problems = problems or [*self._odd_shapes()]
        if problems:
            raise ValueError("; ".join(problems))

    def _odd_shapes(self) -> list[str]:
        problems = []
        heads = self.compressor.num_heads, self.compressor.num_kv_heads
        if heads[0] % heads[1]:
            problems.append(
                f"backbone.tiny.num_heads={heads[0]} must be a multiple of "
                f"backbone.tiny.num_kv_heads={heads[1]}"
            )
        widths = {"hidden_size": self.hidden_size, "decoder_width": self.decoder_width}
        if self.head_dim is not None:
            widths = {"head_dim": self.head_dim, "decoder_width": self.decoder_width}
        dims = self.compressor.head_dim, _in_proportion(self.decoder_width).head_dim
        problems += [
            f"backbone.tiny.{name}={value} gives heads of {dim} dimensions, which must be even for "
            f"rotary positions"
            for (name, value), dim in zip(widths.items(), dims, strict=True)
            if dim % 2
        ]
        return problems

    @property
    def compressor(self) -> TinyOptions:
        """Shape of the compressor."""
        shape = _in_proportion(self.hidden_size, self.num_heads)
        return replace(
            shape,
            intermediate_size=self.intermediate_size or shape.intermediate_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads or shape.num_heads,
            head_dim=self.head_dim or shape.head_dim,
            max_positions=self.max_positions,
            tie_embeddings=self.tie_embeddings,
            init_std=self.init_std,
        )

    @property
    def decoder(self) -> TinyOptions:
        """Shape of the decoder, and of the compressor that stage 0 throws away."""
        shape = _in_proportion(self.decoder_width)
        return replace(
            shape,
            num_layers=self.decoder_layers,
            max_positions=self.max_positions,
            init_std=self.init_std,
        )

    @property
    def memory(self) -> MemoryOptions:
        """Memory of the pair."""
        return MemoryOptions(tokens=self.memory_tokens, form=self.memory_form)

    @property
    def projector(self) -> ProjectorOptions:
        """Projector of the pair."""
        return ProjectorOptions(
            kind="linear" if self.rank is None else "low_rank",
            rank=self.rank,
            normalise_bottleneck=self.normalise_bottleneck,
            match_scale=self.match_scale,
            noise=self.noise or 0.0,
            noise_in_eval=bool(self.noise),
        )

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Parts of the bridge that fit every width of the compressor; see ``start_bridge``."""
        if self.memory_form == "kv":
            return ()
        up = () if self.rank is None else ("projector.up",)
        return ("prompts", *up, *(("projector.gain",) if self.match_scale else ()))


@dataclass
class PairWarmStart:
    """What both models are fitted to before the run.

    Args:
        steps: Optimizer steps of stage 1; 0 for a random compressor.
        decoder_steps: Optimizer steps of stage 0; 0 for a random decoder.
        decoder_texts: What the decoder learns to read: ``neutral`` texts, or ``prior`` for those
            of stage 1 [card: the regime with the prior in the decoder].
        qa_ratio: Share of the steps of stage 0 that answer a question instead of rebuilding the
            text, so that a frozen decoder knows questions; none in its first third. Learnt together
            from the start, both stop at memories of colours without their nouns [our choice].
        batch_size: Texts a step, fresh every step.
        gradient_clip: Norm of the gradient at most.
        decoder_lr: Peak learning rate of stage 0; None goes by ``lr_of_width``.
        optimizer: As everywhere, ``lr`` that of stage 1 alone; None goes by ``lr_of_width``.

    Raises:
        ValueError: Names every bad key.
    """

    steps: int = 300
    decoder_steps: int = 500
    decoder_texts: Texts = "neutral"
    qa_ratio: float = 0.0
    batch_size: int = 64
    gradient_clip: float = 1.0
    decoder_lr: float | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        key = "backbone.warm_start"
        counts = {"steps": self.steps, "decoder_steps": self.decoder_steps}
        problems = _too_small(key, counts, 0)
        problems += _too_small(key, {"batch_size": self.batch_size}, 2)
        problems += _too_small(key, {"gradient_clip": self.gradient_clip}, 0)
        if not 0 <= self.qa_ratio <= 1:
            problems.append(f"{key}.qa_ratio={self.qa_ratio} must be in [0, 1]")
        if self.decoder_texts not in ("neutral", "prior"):
            problems.append(
                f"{key}.decoder_texts={self.decoder_texts!r} must be one of neutral, prior"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def optimizer_of(self, width: int, *, is_decoder: bool) -> OptimizerOptions:
        """Options of the optimizer of a stage, its learning rate filled in.

        Args:
            width: Of the compressor that is fitted.
            is_decoder: Whether it is stage 0.
        """
        lr = self.decoder_lr if is_decoder else self.optimizer.get("lr")
        values = {**self.optimizer, "lr": lr_of_width(width) if lr is None else lr}
        return read_options(OptimizerOptions, values, "backbone.warm_start.optimizer")


def lr_of_width(width: int) -> float:
    """Peak learning rate of a small compressor [card, section 9, second trial].

    Args:
        width: Of the compressor.

    Example:
        >>> [lr_of_width(width) for width in (8, 16, 32, 64, 128)]
        [0.004, 0.004, 0.003, 0.002, 0.002]
    """
    return 4e-3 if width <= 16 else 3e-3 if width <= 32 else 2e-3


def _in_proportion(width: int, heads: int | None = None) -> TinyOptions:
    """Heads of 16 dimensions, one at least, and an MLP four times as wide [card]."""
    count = heads or max(1, width // 16)
    size = max(1, width // count)
    return TinyOptions(width, 4 * width, num_heads=count, num_kv_heads=count, head_dim=size)


def _too_small(key: str, values: Mapping[str, float], least: int) -> list[str]:
    return [
        f"{key}.{name}={value} must be at least {least}"
        for name, value in values.items()
        if value < least
    ]
