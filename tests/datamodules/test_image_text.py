"""CoCoA's stages as a data stream: order, shares of ranks, truncation, images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_encoding import ImageTextEncoding
from datamodules.image_text import ImageTextDataModule, ReconstructionBatch, StagedSource
from datamodules.pairs import PairBatch
from datamodules.tasks.embedding import ImageText
from datamodules.tasks.image_text_file import ImageTextFile
from datamodules.tasks.shapes_pairs import ShapesPairs
from lightning_modules.backbones.tiny_vl import TinyVLOptions, build_tiny_vl

STAGES = [{"name": name, "steps": steps} for name, steps in
          (("warmup", 2), ("bridge", 3), ("contrastive", 2))]  # fmt: skip
SHAPE = TinyVLOptions(
    hidden_size=24, num_heads=2, num_kv_heads=2, intermediate_size=24, num_layers=1,
    vision_hidden_size=8, vision_heads=1, vision_intermediate_size=8, vision_layers=1,
    patch_size=8, merge_size=1, image_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of one layer; 16 tokens for 32 x 32 pixels."""
    path = tmp_path_factory.mktemp("vl")
    build_tiny_vl(path, ShapesPairs().vocabulary(), SHAPE, seed=0)
    return path


@pytest.fixture
def encoding(folder: Path) -> Any:
    """``make(**options)`` -> an encoding bound to the folder."""

    def make(**options: Any) -> ImageTextEncoding:
        made = ImageTextEncoding(pooling="eos", **options)
        data(folder, encoding=made)
        return made

    return make


class OneOfTwo(ImageTextDataModule):
    """The data of one of two ranks."""

    rank = 0

    @property
    def ranks(self) -> tuple[int, int]:
        return self.rank, 2


def data(
    folder: Path, kind: type[ImageTextDataModule] = ImageTextDataModule, **options: Any
) -> Any:
    """A prepared datamodule of 10 scenes."""
    values: dict[str, Any] = {
        "task": ShapesPairs(num_train=10, num_val=2, num_test=2, draws=2),
        "encoding": ImageTextEncoding(pooling="eos"),
        "stages": STAGES,
        "batch_size": 4,
    }
    made = kind(**values | options)
    made.prepare(str(folder), "unused")
    return made


def kinds(source: StagedSource) -> list[str]:
    batches = [source.batch(0, index) for index in range(len(source))]
    return [b.stage if isinstance(b, ReconstructionBatch) else "contrastive" for b in batches]


# --- the stream -----------------------------------------------------------------------------------


def test_stages_come_in_order_and_windows_are_whole(folder: Path) -> None:
    made = data(folder, micro_batches=2)
    assert made.stage_steps == [2, 3, 2]
    source = StagedSource(made)
    assert kinds(source) == ["warmup"] * 4 + ["bridge"] * 6 + ["contrastive"] * 4
    assert [made.stage_at(step) for step in (0, 1, 2, 3, 5, 6, 7, 8)] == [
        None, "warmup", "warmup", "bridge", "bridge", "contrastive", "contrastive", "contrastive",
    ]  # fmt: skip
    left_out = data(folder, stages=[{"name": "warmup", "steps": 0}, STAGES[1]])
    assert left_out.stage_steps == [3] and kinds(StagedSource(left_out)) == ["bridge"] * 3


def test_a_batch_is_a_function_of_its_number(folder: Path) -> None:
    one, other = StagedSource(data(folder)), StagedSource(data(folder))
    backwards = {index: other.batch(0, index) for index in reversed(range(len(other)))}
    for index in range(len(one)):
        mine, again = one.batch(0, index), backwards[index]
        assert mine.state() == again.state()
        if isinstance(mine, ReconstructionBatch):
            assert (mine.seeds, mine.spans, mine.bridges) == (
                again.seeds, again.spans, again.bridges,
            )  # fmt: skip
    fresh = StagedSource(data(folder, seed=1))
    assert fresh.batch(0, 2).seeds != one.batch(0, 2).seeds
    assert len({seed for index in range(5) for seed in one.batch(0, index).seeds}) == 20
    assert len({tuple(one.batch(0, index).uids) for index in range(7)}) == 7


def test_two_ranks_share_what_one_process_has(folder: Path) -> None:
    alone = StagedSource(data(folder))
    ranks = []
    for rank in (0, 1):
        made = data(folder, OneOfTwo)
        made.rank = rank
        ranks.append(StagedSource(made))
    for index in range(len(alone)):
        whole = alone.batch(0, index)
        parts = [source.batch(0, index) for source in ranks]
        assert [len(part.uids) for part in parts] == [2, 2]
        if isinstance(whole, PairBatch):
            assert Counter(whole.uids) == Counter(parts[0].uids + parts[1].uids)
            continue
        seeds = dict(zip(whole.uids, whole.seeds, strict=True))
        for part in parts:
            assert {uid: seeds.pop(uid) for uid in part.uids} == dict(
                zip(part.uids, part.seeds, strict=True)
            )
        assert not seeds


def test_rows_come_once_a_pass_and_then_in_another_order(folder: Path) -> None:
    source = StagedSource(data(folder, stages=[{"name": "bridge", "steps": 12}]))
    uids = [uid for index in range(10) for uid in source.batch(0, index).uids]
    first, second = uids[:20], uids[20:]
    assert len(set(first)) == len(set(second)) == 20, "10 scenes told twice"
    assert first != second and sorted(first) == sorted(second)


def test_a_stage_that_comes_back_goes_on(folder: Path) -> None:
    parts = [STAGES[1], STAGES[2], {"name": "bridge", "steps": 2}]
    source = StagedSource(data(folder, stages=parts))
    whole = StagedSource(data(folder, stages=[{"name": "bridge", "steps": 5}]))
    found = [source.batch(0, index) for index in (0, 1, 2, 5, 6)]
    for number, batch in enumerate(found):
        assert (batch.uids, batch.seeds) == (
            whole.batch(0, number).uids, whole.batch(0, number).seeds,
        )  # fmt: skip


def test_a_stage_may_have_its_own_batch(folder: Path) -> None:
    stages = [STAGES[0], {**STAGES[1], "batch_size": 3}, {**STAGES[2], "batch_size": 6}]
    source = StagedSource(data(folder, stages=stages, bridge_batch_size=5))
    assert [len(source.batch(0, index).uids) for index in (0, 2, 5)] == [5, 3, 6]
    with pytest.raises(ValueError, match=r"batches of 3 rows \(bridge\) cannot be shared evenly"):
        StagedSource(data(folder, OneOfTwo, stages=stages)).batch(0, 2)
    few = StagedSource(data(folder, batch_size=16))
    with pytest.raises(ValueError, match="10 rows do not fill one window"):
        few.batch(0, 6)


def test_every_scene_is_told_of_by_image_and_by_text(folder: Path) -> None:
    for share, wanted in ((0.5, 20), (0.25, 10), (0.0, 0), (1.0, 40)):
        task = ShapesPairs(num_train=10, num_val=2, num_test=2, draws=4, text_share=share)
        by_text = [row.uid for row in task.bridges("train") if isinstance(row.source, str)]
        scenes = Counter(uid.rpartition("/")[0] for uid in by_text)
        assert len(by_text) == wanted and set(scenes.values()) <= {int(4 * share)}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"stages": [{"name": "bridgee", "steps": 1}]}, "data.stages[0].name='bridgee' must be one "
         "of warmup, bridge, contrastive; did you mean 'bridge'"),
        ({"stages": [{"name": "bridge", "step": 1}]}, "data.stages[0]={'name': 'bridge', 'step': "
         "1} must be {name: bridge, steps: 500}"),
        ({"stages": ["bridge"]}, "data.stages[0]='bridge' must be {name: bridge, steps: 500}"),
        ({"stages": [{"name": "bridge", "steps": -1}]}, "data.stages[0].steps=-1 must be 0"),
        ({"stages": [{"name": "bridge", "steps": True}]}, "data.stages[0].steps=True must be 0"),
        ({"stages": [{**STAGES[2], "batch_size": 1}]}, "data.stages[0].batch_size=1 must be at "),
        ({"stages": [{"name": "bridge", "steps": 0}]}, "data.stages holds no stage with steps"),
        ({"bridge_batch_size": 0}, "data.bridge_batch_size=0 must be at least 1"),
    ],
)  # fmt: skip
def test_bad_stages_are_refused(folder: Path, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError) as error:
        data(folder, **options)
    assert wanted in str(error.value)


def test_bad_encodings_are_refused_together(tiny_folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        ImageTextEncoding(
            max_sequence_tokens=5, image_sizes={"bridgee": 8, "bridge": 0}, cache_images=-1
        )
    for wanted in ("image_sizes.bridgee: no such stage; there are warmup", "mean 'bridge'",
                   "image_sizes.bridge=0", "max_sequence_tokens=5", "cache_images=-1"):  # fmt: skip
        assert wanted in str(error.value)
    with pytest.raises(ValueError, match="reads no images: give a Qwen2-VL or Qwen2.5-VL folder"):
        ImageTextEncoding().bind_images(str(tiny_folder))


# --- sequences ------------------------------------------------------------------------------------

PICTURE = ImageText("p", np.zeros((32, 32, 3), dtype=np.uint8), "a red ring")
LONG = " ".join(["a red ring at tl"] * 8)  # 40 tokens


def test_warmup_is_image_then_caption(encoding: Any) -> None:
    made = encoding()
    [item], [span] = made.warmup([PICTURE])
    known = made.tokenizer.get_vocab()
    image = [known["<|vision_start|>"], *[known["<|image_pad|>"]] * 16, known["<|vision_end|>"]]
    assert list(item.ids) == [*image, known["a"], known["red"], known["ring"]]
    assert span == (18, 21) and item.image.num_tokens(1) == [16]
    cut = encoding(max_sequence_tokens=19).warmup([PICTURE])
    assert (cut[0][0].ids, cut[1]) == (item.ids[:19], [(18, 19)])


@pytest.mark.parametrize("source", [LONG, ImageText("q", PICTURE.image, LONG)])
@pytest.mark.parametrize("most", [24, 40, 63, 64, 83, 200])
def test_bridge_cuts_a_then_b_and_nothing_else(encoding: Any, source: Any, most: int) -> None:
    made = encoding(max_sequence_tokens=most)
    target = "a blue bar at br"
    [item], [(first, end)], [bridge] = made.bridge([(source, target, "here")])
    eos = made.tokenizer.eos_token_id
    ids = list(item.ids)
    head = 0 if isinstance(source, str) else 18
    assert (ids.index(eos), ids.count(eos), first, end) == (bridge, 1, bridge + 1, len(ids))
    assert len(ids) == min(most, head + 40 + 1 + 5)
    kept = end - first
    assert kept == (5 if most >= head + 40 + 1 + 5 else 4), "the first four tokens stay at least"
    assert ids[first:] == made.plain_ids(target)[:kept]
    assert ids[head:bridge] == made.plain_ids(LONG)[: bridge - head]
    if head:
        assert ids[:head] == made.image_ids(item.image)
    assert item.pool == (bridge, bridge + 1)


def test_bridge_of_an_image_alone_and_of_short_targets(encoding: Any) -> None:
    made = encoding(max_sequence_tokens=20)
    [item], [span], [bridge] = made.bridge([(ImageText("p", PICTURE.image), "red", "here")])
    assert (len(item.ids), span, bridge) == (20, (19, 20), 18)


@pytest.mark.parametrize(
    ("most", "source", "target", "wanted"),
    [
        (22, ImageText("p", PICTURE.image), "a red ring at", "A has 18 image tokens, data.enc"),
        (200, "", "a red ring at", "block A needs a token"),
        (200, "a", "", "block A needs a token, block B one that can be masked"),
        (200, "a", "unheard words", "block B one that can be masked"),
        (200, "a <|image_pad|>", "a", "the text holds '<|image_pad|>', which stands for an image"),
        (200, "a", "a <|image_pad|>", "the text holds '<|image_pad|>', which stands for an image"),
    ],
)
def test_bridges_that_cannot_be_are_named(
    encoding: Any, most: int, source: Any, target: str, wanted: str
) -> None:
    with pytest.raises(ValueError) as error:
        encoding(max_sequence_tokens=most).bridge([(source, target, "rows.jsonl:3")])
    assert str(error.value).startswith("rows.jsonl:3: ") and wanted in str(error.value)


def test_captions_that_cannot_be_masked_are_named(encoding: Any) -> None:
    for text, most in (("", 99), ("unheard", 99), ("a red ring", 18), ("<|image_pad|>", 99)):
        item = ImageText("p", PICTURE.image, text, "rows.jsonl:4")
        with pytest.raises(ValueError, match="rows.jsonl:4: the (caption|text)"):
            encoding(max_sequence_tokens=most).warmup([item])


def test_vectors_end_with_eos_however_long_the_item(encoding: Any) -> None:
    items = ["a red ring", LONG, PICTURE, ImageText("q", PICTURE.image, LONG)]
    made = encoding(max_query_tokens=24)
    eos = made.tokenizer.eos_token_id
    found = made.encode(items, "query")
    assert [len(one.ids) for one in found] == [4, 24, 22, 24]
    for one in found:
        assert one.ids[-1] == eos and one.ids.count(eos) == 1
        assert one.pool == (len(one.ids) - 1, len(one.ids))
    assert list(found[3].ids[:18]) == made.image_ids(found[3].image)
    tight = encoding(max_query_tokens=4).encode(items, "query")
    assert [len(one.ids) for one in tight] == [4, 4, 19, 19], "image tokens are never cut"
    with pytest.raises(ValueError, match="^f:2: the text holds '<|image_pad|>'"):
        made.encode(["a", "<|image_pad|>"], "query", where=["f:1", "f:2"])


# --- images ---------------------------------------------------------------------------------------


def test_cache_is_bounded_and_keeps_what_was_used_last(encoding: Any) -> None:
    made = encoding(cache_images=2)
    items = [ImageText(str(n), np.full((32, 32, 3), n, dtype=np.uint8)) for n in range(3)]
    first, second = made.image(items[0]), made.image(items[1])
    assert made.image(items[0]) is first
    made.image(items[2])
    assert made.image(items[0]) is first and made.image(items[1]) is not second
    assert len(made._cache) == 2
    none = encoding(cache_images=0)
    again = [none.image(items[0]) for _ in range(2)]
    assert again[0] is not again[1] and not none._cache
    assert torch.equal(again[0].pixel_values, first.pixel_values)


def test_a_stage_may_have_its_own_size_of_images(encoding: Any) -> None:
    wide = ImageText("w", np.zeros((20, 44, 3), dtype=np.uint8), "a red ring")
    made = encoding(image_sizes={"warmup": 16, "bridge": 48})
    grids = [
        made.warmup([wide])[0][0].image.image_grid_thw.tolist(),
        made.bridge([(wide, "a", "here")])[0][0].image.image_grid_thw.tolist(),
        made.encode([wide], "query")[0].image.image_grid_thw.tolist(),
    ]
    assert grids == [[[1, 2, 2]], [[1, 6, 6]], [[1, 2, 6]]]


def test_a_broken_image_names_its_row_when_its_turn_comes(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(PICTURE.image).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(PICTURE.image[:4]).save(tmp_path / "thin.png")
    for name, problem in (("cut.png", "does not decode"), ("thin.png", "is 32 x 4 pixels")):
        rows = [
            {"image": name, "caption": "a red ring"},
            {"qry": "a ring", "pos_text": "", "pos_image_path": "good.png"},
            {"qry": "", "qry_image_path": name, "pos_text": "a red ring"},
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = ImageTextFile(path=str(path), val_fraction=0, test_fraction=0)
        made = data(folder, task=task, batch_size=2, bridge_batch_size=1)
        source = StagedSource(made)
        for index, line in ((0, 1), (2, 3), (5, 3)):
            with pytest.raises(ValueError) as error:
                source.batch(0, index)
            assert str(error.value).startswith(f"{path}:{line}: "), error.value
            assert name in str(error.value) and problem in str(error.value)
        with pytest.raises(ValueError, match=f"^{path}:3: .*{name}"):
            made.encoding.encode(task.evaluations("train")[0].queries, "query")


def test_a_stage_without_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"qry": "a red ring", "pos_text": "a blue bar"}) + "\n")
    task = ImageTextFile(path=str(path), val_fraction=0, test_fraction=0)
    source = StagedSource(data(folder, task=task, batch_size=2, bridge_batch_size=1))
    with pytest.raises(ValueError, match="no row has image .* leave the stage out of data.stages"):
        source.batch(0, 0)
    nobody = ImageTextFile(path=str(path), val_fraction=0, test_fraction=1)
    source = StagedSource(data(folder, task=nobody, batch_size=2, bridge_batch_size=1))
    with pytest.raises(ValueError, match="the stage 'bridge', and the task has no rows for it"):
        source.batch(0, 2)
