"""The learned parts between both models: memory tokens, prompts and the projector.

``h`` is a memory state of the compressor, ``z`` what the decoder reads in its place; ``rms``
divides by the root mean square over the dimensions.

======== =================================================================
kind     z
======== =================================================================
identity h (equal widths)
linear   W h + b
mlp      W2 gelu(W1 h + b1) + b2
low_rank U (rms(D h) + noise), biases with both; the second trial's form
======== =================================================================

With ``match_scale`` the result is ``gain * rms(z)``, the gain starting at the mean size of the
decoder's input embeddings; noise of the kinds without a bottleneck comes last, in units of that
size. Noise is a function of one seed a row: equal whatever the batch, the rank or the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.options import BackboneOptions

Prompt = Literal["ae", "qa", "lm"]
PROMPTS: tuple[Prompt, ...] = ("ae", "qa", "lm")
BRIDGE_FILE = "bridge.safetensors"


class Projector(nn.Module):
    """Memory states of the compressor to vectors of the decoder; see the table above.

    Args:
        width_in: Of the compressor, d_c.
        width_out: Of the decoder, d_d.
        options: Which kind.
        scale: Mean root mean square of the decoder's input embeddings.

    Raises:
        ValueError: ``identity`` between different widths.
    """

    def __init__(
        self, width_in: int, width_out: int, options: ProjectorOptions, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.options = options
        self.scale = scale
        if options.kind == "identity" and width_in != width_out:
            raise ValueError(
                f"model.projector.kind='identity' needs equal widths: the compressor has "
                f"{width_in} and the decoder {width_out}; use 'linear', 'mlp' or 'low_rank'"
            )
        self.down, self.up = _layers(width_in, width_out, options)
        self.gain = nn.Parameter(torch.full((width_out,), scale)) if options.match_scale else None

    def forward(self, hidden: Tensor, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """``(B, M, d_c)`` to ``(B, M, d_d)``.

        Args:
            hidden: Memory states.
            noise_seeds: One a row; needed where there is noise.

        Raises:
            ValueError: Noise without seeds.
        """
        is_narrow = self.options.kind == "low_rank"
        values = self.down(hidden)
        if is_narrow and self.options.normalise_bottleneck:
            values = rms_normalised(values)
        if is_narrow:
            values = self._noisy(values, 1.0, noise_seeds)
        values = self.up(values)
        if self.gain is not None:
            values = rms_normalised(values) * self.gain
        return values if is_narrow else self._noisy(values, self.scale, noise_seeds)

    def _noisy(self, values: Tensor, unit: float, seeds: Sequence[int] | None) -> Tensor:
        deviation = self.options.noise
        if not deviation or not (self.training or self.options.noise_in_eval):
            return values
        if seeds is None or len(seeds) != len(values):
            raise ValueError(
                f"model.projector.noise={deviation} needs one noise seed for each of the "
                f"{len(values)} texts"
            )
        noise = torch.stack([_normal(seed, values.shape[1:]) for seed in seeds])
        return values + deviation * unit * noise.to(values)


class Bridge(nn.Module):
    """Memory tokens of the compressor, prompts of the decoder, and the projector.

    Args:
        compressor_table: ``(K_c, d_c)`` input embeddings of tokens of the compressor.
        decoder_table: ``(K_d, d_d)`` input embeddings of tokens of the decoder.
        memory: Of the memory; ``form=kv`` has neither prompts nor projector.
        projector: Of the projector.

    Attributes:
        tokens: ``(m, d_c)`` memory tokens, M, at first as large as the compressor's embeddings.
        prompts: ``(3, d_d)`` vectors in the order of ``PROMPTS``, or None. One parameter, so that
            it has a gradient whichever prompt a batch uses.
        projector: Or None.
    """

    def __init__(
        self,
        compressor_table: Tensor,
        decoder_table: Tensor,
        memory: MemoryOptions,
        projector: ProjectorOptions,
    ) -> None:
        super().__init__()
        self.options = memory
        widths = compressor_table.shape[1], decoder_table.shape[1]
        scale = mean_rms(decoder_table)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(memory.seed)
            first = torch.randn(memory.tokens, widths[0]) * mean_rms(compressor_table)
            prompts = torch.randn(len(PROMPTS), widths[1]) * scale
            has_projector = memory.form == "embeds"
            self.projector = Projector(*widths, projector, scale) if has_projector else None
        self.tokens = nn.Parameter(first)
        self.prompts = nn.Parameter(prompts) if has_projector else None
        self.to(device=decoder_table.device, dtype=decoder_table.dtype)

    def forward(self, hidden: Tensor, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """Z of memory states; see ``Projector.forward``."""
        if self.projector is None:
            raise ValueError("model.memory.form='kv' has no projector")
        return self.projector(hidden, noise_seeds)

    def prompt(self, name: Prompt, rows: int) -> Tensor:
        """The prompt vector of every row, ``(rows, 1, d_d)``; ``(rows, 0, d_d)`` for none.

        Args:
            name: ``ae`` reconstructs the text, ``qa`` answers a question, ``lm`` continues the
                text (no vector without ``continuation_prompt``).
            rows: Texts.

        Raises:
            ValueError: The prompt is unknown.
        """
        if name not in PROMPTS:
            raise ValueError(f"prompt={name!r}: give one of {', '.join(PROMPTS)}")
        assert self.prompts is not None
        count = 0 if name == "lm" and not self.options.continuation_prompt else 1
        place = PROMPTS.index(name)
        return self.prompts[place : place + 1][None, :count].expand(rows, -1, -1)


def part_problems(parts: Sequence[str], memory: MemoryOptions) -> list[str]:
    """What is wrong with the names of ``model.bridge_parts``, as far as no model is needed.

    Args:
        parts: Beginnings of parameter names of a ``Bridge``.
        memory: Of the bridge.

    Example:
        >>> part_problems(["projector.up", "tokens"], MemoryOptions(tokens=2))
        []
    """
    own = ["tokens"] if memory.form == "kv" else ["tokens", "prompts", "projector"]
    odd = [part for part in parts if part.split(".")[0] not in own]
    return [
        f"model.bridge_parts has {part!r}: with model.memory.form={memory.form!r} there are "
        f"{', '.join(own)}; model.bridge_parts=[] starts them all anew"
        for part in odd
    ]


def mean_rms(table: Tensor) -> float:
    """Mean over the rows of a table ``(V, d)`` of their root mean square.

    Example:
        >>> mean_rms(torch.tensor([[3.0, 3.0], [1.0, -1.0]]))
        2.0
    """
    return float(table.detach().float().square().mean(1).sqrt().mean())


def rms_normalised(values: Tensor, eps: float = 1e-6) -> Tensor:
    """Values ``(..., d)`` with a root mean square of 1 over the last dimension.

    Example:
        >>> rms_normalised(torch.tensor([2.0, -2.0]))
        tensor([ 1.0000, -1.0000])
    """
    return functional.rms_norm(values, values.shape[-1:], eps=eps)


def continue_bridge(bridge: Bridge, backbone: BackboneOptions, parts: Sequence[str]) -> None:
    """Start a bridge from a folder: all of it from an exported pair of the same shape, else parts.

    Args:
        bridge: Is changed.
        backbone: Whose path is the folder. With ``random_init`` nothing is read: the checkpoint
            brings the bridge.
        parts: As of ``start_bridge``; they are frozen.

    Raises:
        ValueError: As ``start_bridge``.
    """
    if backbone.random_init:
        return
    file = Path(backbone.path) / BRIDGE_FILE
    state = load_file(file) if file.is_file() else {}
    own = {name: tuple(value.shape) for name, value in bridge.state_dict().items()}
    if state and own == {name: tuple(value.shape) for name, value in state.items()}:
        bridge.load_state_dict(state)
    elif "tokens" in state:
        rank_zero_warn(
            f"{file} is of another shape than model.memory and model.projector: memory tokens and "
            f"projector start anew, but for model.bridge_parts={list(parts)}"
        )
    if parts:
        start_bridge(bridge, backbone.path, parts, freeze=True)


def start_bridge(bridge: Bridge, folder: str | Path, parts: Sequence[str], *, freeze: bool) -> None:
    """Start parts of a bridge from those of an exported pair [card, second trial: stage 0].

    Args:
        bridge: Is changed.
        folder: Of the exported pair.
        parts: Beginnings of parameter names, such as ``projector.up`` or ``prompts``.
        freeze: Whether these parts stay as they are from now on.

    Raises:
        ValueError: The folder holds no pair, a part names nothing, or shapes differ.
    """
    path = Path(folder) / BRIDGE_FILE
    if not path.is_file():
        raise ValueError(f"backbone.path={str(folder)!r} has no {BRIDGE_FILE}")
    state, own = load_file(path), dict(bridge.named_parameters())
    problems, chosen = [], {}
    for part in parts:
        names = [name for name in own if f"{name}.".startswith(f"{part}.")]
        if not names:
            problems.append(f"model.bridge_parts: {part!r} is no part of {', '.join(own)}")
        for name in names:
            found = tuple(state[name].shape) if name in state else None
            if found != tuple(own[name].shape):
                problems.append(f"{name} is {tuple(own[name].shape)} here and {found} in {path}")
            chosen[name] = own[name]
    if problems:
        raise ValueError("; ".join(problems))
    with torch.no_grad():
        for name, parameter in chosen.items():
            parameter.copy_(state[name])
            parameter.requires_grad_(parameter.requires_grad and not freeze)


def _layers(wide: int, out: int, options: ProjectorOptions) -> tuple[nn.Module, nn.Module]:
    """What comes before the bottleneck (or the activation, included) and behind it."""
    if options.kind == "identity":
        return nn.Identity(), nn.Identity()
    if options.kind == "linear":
        return nn.Identity(), nn.Linear(wide, out)
    if options.kind == "mlp":
        inner = options.hidden or max(wide, out)
        return nn.Sequential(nn.Linear(wide, inner), nn.GELU()), nn.Linear(inner, out)
    assert options.rank is not None
    return nn.Linear(wide, options.rank), nn.Linear(options.rank, out)


def _normal(seed: int, shape: Sequence[int]) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
