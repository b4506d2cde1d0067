"""Options refuse what they cannot mean, by their full keys, all at once."""

from __future__ import annotations

import pytest

from lightning_modules.compressor.folders import DecoderOptions
from lightning_modules.compressor.options import (
    EntropyControl,
    LossOptions,
    MemoryOptions,
    ProjectorOptions,
    RankControl,
)

BAD = [
    (MemoryOptions, {"tokens": 0}, "model.memory.tokens=0 must be at least 1"),
    (MemoryOptions, {"form": "text"}, "model.memory.form='text': give one of embeds, kv"),
    (MemoryOptions, {"segment_tokens": 0}, "model.memory.segment_tokens=0 must be at least 1"),
    (MemoryOptions, {"on_short": "pad"}, "on_short='pad': give one of refuse, count"),
    (MemoryOptions, {"kv_positions": "x"}, "kv_positions='x': give one of memory, source"),
    (MemoryOptions, {"form": "kv", "continuation_prompt": True}, "has no place with"),
    (ProjectorOptions, {"kind": "conv"}, "model.projector.kind='conv': give one of identity"),
    (ProjectorOptions, {"rank": 4}, "rank=4 belongs to kind='low_rank' only"),
    (ProjectorOptions, {"hidden": 4}, "hidden=4 belongs to kind='mlp' only"),
    (ProjectorOptions, {"kind": "low_rank"}, "needs model.projector.rank"),
    (ProjectorOptions, {"kind": "low_rank", "rank": 0}, "projector.rank=0 must be at least 1"),
    (ProjectorOptions, {"noise": -1.0}, "model.projector.noise=-1.0 must be at least 0"),
    (RankControl, {"nuclear": -1}, "model.rank_control.nuclear=-1 must be at least 0"),
    (RankControl, {"erank_floor": 0.5}, "erank_floor=0.5 must be at least 1"),
    (EntropyControl, {"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
    (EntropyControl, {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
    (LossOptions, {"slot_weight": -1}, "model.loss.slot_weight=-1 must be at least 0"),
    (DecoderOptions, {"backbone": "x", "train": "all"}, "model.decoder.train='all': give one of"),
    (DecoderOptions, {"backbone": "x", "lora": {}}, "model.decoder.lora has no use with"),
]


@pytest.mark.parametrize("cls,values,message", BAD)
def test_bad_values_are_named(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_all_problems_at_once():
    with pytest.raises(ValueError, match="tokens=0 must be at least 1; model.memory.form='x'"):
        MemoryOptions(tokens=0, form="x")


def test_defaults_are_those_of_the_card():
    assert (MemoryOptions().tokens, MemoryOptions().form) == (128, "embeds")
    assert DecoderOptions("x").train == "frozen" and LossOptions().skip == 8
    assert DecoderOptions("x", "lora", {"r": 4}).lora_options.r == 4
