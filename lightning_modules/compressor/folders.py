"""A pair from two backbones, and as one folder: two Hugging Face models and the bridge.

=========================== ==============================================
file                        what it holds
=========================== ==============================================
the folder itself           the compressor and its tokenizer
``decoder/``                the decoder and its tokenizer
``bridge.safetensors``      memory tokens, prompts, projector
``bridge.json``             their options, and how the decoder was trained
=========================== ==============================================

Adapters are merged, so both models load with plain ``transformers``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.export import export_hf
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions, Training
from lightning_modules.compressor.pair import Pair
from lightning_modules.compressor.projector import BRIDGE_FILE
from lightning_modules.options import BackboneOptions, KernelOptions, LoraOptions, read_options

OPTIONS_FILE = "bridge.json"
#: In ``litpost.json`` of a tiny pair: the task that has no texts to fit its decoder to.
UNFITTED = "decoder_without_texts"


@dataclass
class DecoderOptions:
    """The model that reads the memory.

    Args:
        backbone: Folder or hub name, or options as of ``model.backbone``; a folder that holds an
            exported pair gives its decoder.
        train: ``frozen`` [code: ICAE, 500xCompressor], ``lora`` [code: PISCO] or ``full``.
        lora: Of the adapters; None for their defaults.

    Raises:
        ValueError: Names every bad key.
    """

    backbone: str | Mapping[str, Any] | BackboneOptions
    train: Training = "frozen"
    lora: Mapping[str, Any] | LoraOptions | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.train not in ("frozen", "lora", "full"):
            problems.append(f"model.decoder.train={self.train!r}: give one of frozen, lora, full")
        if self.lora is not None and self.train != "lora":
            problems.append(f"model.decoder.lora has no use with model.decoder.train={self.train}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def backbone_options(self) -> BackboneOptions:
        """How the model is loaded."""
        given = self.backbone
        values = {"path": given} if isinstance(given, str) else given
        options = read_options(BackboneOptions, values, "decoder.backbone")
        own = Path(options.path) / "decoder"
        is_pair = (own.parent / OPTIONS_FILE).is_file() and own.is_dir()
        return replace(options, path=str(own)) if is_pair else options

    @property
    def lora_options(self) -> LoraOptions | None:
        """Adapters, where the decoder learns through them."""
        return (
            read_options(LoraOptions, self.lora, "decoder.lora") if self.train == "lora" else None
        )


def build_pair(
    backbone: BackboneOptions,
    decoder: DecoderOptions,
    memory: MemoryOptions | None = None,
    projector: ProjectorOptions | None = None,
    *,
    lora: LoraOptions | None = None,
    kernel: KernelOptions | None = None,
) -> Pair:
    """Load both models and put a new bridge between them.

    Args:
        backbone: Of the compressor.
        decoder: Of the decoder.
        memory: None for the defaults.
        projector: None for the defaults.
        lora: Adapters of the compressor; None trains all of it.
        kernel: Of the decoder's fused head.

    Raises:
        ValueError: A folder is no causal LM, the two do not fit together, or a tiny decoder is to
            be frozen that is random without having been asked for
            (``backbone.warm_start.decoder_steps=0``).
    """
    _refuse_unfitted(decoder)
    return Pair(
        load_causal_lm(backbone, lora),
        load_causal_lm(decoder.backbone_options, decoder.lora_options, kernel=kernel),
        memory or MemoryOptions(),
        projector or ProjectorOptions(),
        decoder.train,
    )


def export_pair(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    decoder_tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    info: dict[str, Any] | None = None,
    is_writer: bool = True,
) -> None:
    """Write a pair as one folder, replaced as a whole.

    Args:
        pair: What to export.
        tokenizer: Of the compressor.
        decoder_tokenizer: Of the decoder.
        folder: Where to.
        info: Written to ``litpost.json``.
        is_writer: Whether this rank writes (all ranks must call under sharding).
    """
    bridge = {name: _whole(value) for name, value in pair.bridge.state_dict().items()}
    beside = Path(folder).with_name(Path(folder).name + ".decoder")
    export_hf(pair.decoder, decoder_tokenizer, beside, is_writer=is_writer)

    def add(target: Path) -> None:
        shutil.move(beside, target / "decoder")
        save_file(bridge, target / BRIDGE_FILE)
        (target / OPTIONS_FILE).write_text(json.dumps(_options(pair), indent=1) + "\n")

    export_hf(pair.compressor, tokenizer, folder, info=info, is_writer=is_writer, extras=add)


def load_pair(
    folder: str | Path,
    *,
    dtype: Any = "float32",
    attn_implementation: str = "sdpa",
    kernel: KernelOptions | None = None,
) -> Pair:
    """Load an exported pair: equal memories and log-probs. In evaluation mode.

    Args:
        folder: As ``export_pair`` wrote it.
        dtype: Of the parameters.
        attn_implementation: As in transformers.
        kernel: Of the decoder's fused head.

    Raises:
        ValueError: The folder holds no pair, or files of different pairs.
    """
    path = Path(folder)
    if not (path / OPTIONS_FILE).is_file():
        raise ValueError(f"{str(path)!r} holds no exported pair: it has no {OPTIONS_FILE}")
    found = json.loads((path / OPTIONS_FILE).read_text(encoding="utf-8"))
    parts = [
        BackboneOptions(str(one), dtype=dtype, attn_implementation=attn_implementation)
        for one in (path, path / "decoder")
    ]
    pair = Pair(
        load_causal_lm(parts[0]),
        load_causal_lm(parts[1], kernel=kernel),
        read_options(MemoryOptions, found["memory"], "memory"),
        read_options(ProjectorOptions, found["projector"], "projector"),
        "frozen" if found["decoder_train"] == "frozen" else "full",
    )
    try:
        pair.bridge.load_state_dict(load_file(path / BRIDGE_FILE))
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(
            f"{path / BRIDGE_FILE} does not fit {path / OPTIONS_FILE}: {lines}"
        ) from error
    return pair.eval()


def _refuse_unfitted(decoder: DecoderOptions) -> None:
    """Refuse to freeze a decoder that stayed random only because its task has no texts for it."""
    options = decoder.backbone_options
    file = Path(options.path).with_name("litpost.json")
    if decoder.train != "frozen" or options.random_init or not file.is_file():
        return
    if task := json.loads(file.read_text(encoding="utf-8")).get(UNFITTED):
        raise ValueError(
            f"model.decoder.train=frozen would leave the tiny decoder random: task '{task}' has no "
            f"texts to fit it to before the run. Train it with the compressor "
            f"(model.decoder.train=full model.bridge_parts=[]), name a decoder that can read "
            f"(model.decoder.backbone), or ask for a random one (backbone.warm_start.decoder_steps"
            f"=0)"
        )


def _options(pair: Pair) -> dict[str, Any]:
    projector = pair.projector_options
    train = "frozen" if pair.is_decoder_frozen else "full"
    return {"memory": asdict(pair.options), "projector": asdict(projector), "decoder_train": train}


def _whole(value: Tensor) -> Tensor:
    gather = getattr(value, "full_tensor", None)
    with torch.no_grad():
        return (value if gather is None else gather()).detach().cpu().clone().contiguous()
