"""ShapesCap: scenes, images and captions that say the same, splits and hard negatives apart."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

from datamodules.tasks import shapes_caption
from datamodules.tasks.shapes_caption import (
    COLOURS,
    QUADRANTS,
    SHAPES,
    Scene,
    SceneObject,
    ShapesCaption,
)

TASK = ShapesCaption(num_train=300, num_val=60, num_test=100)


@pytest.fixture(scope="module")
def scenes():
    return {split: TASK.records(split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def everything(scenes):
    return [scene for split in scenes.values() for scene in split]


def facts(scene):
    return {(item.colour, item.shape, item.quadrant) for item in scene.objects}


def said(caption):
    words = caption.split()
    assert len(words) % 5 == 0
    chunks = [words[start : start + 5] for start in range(0, len(words), 5)]
    assert all(a == "a" and at == "at" for a, _, _, at, _ in chunks)
    return [(colour, shape, quadrant) for _, colour, shape, _, quadrant in chunks]


def seen(image):
    """Colour, shape and quadrant of what is in an image, by matching of pixels."""
    found = set()
    for (name, (row, column)), (colour, rgb) in itertools.product(
        QUADRANTS.items(), COLOURS.items()
    ):
        quarter = image[row - 8 : row + 8, column - 8 : column + 8]
        places = np.argwhere((quarter == rgb).all(axis=-1))
        if len(places) == 0:
            continue
        height, width = places.max(0) - places.min(0) + 1
        sizes = {64: "square", 52: "circle", 28: "cross", 32: "bar", 40: "ring"}
        assert (height, width) == ((4, 8) if len(places) == 32 else (8, 8))
        found.add((colour, sizes[len(places)], name))
    return found


def test_image_and_caption_show_what_is_there(everything):
    for scene in everything:
        image = TASK.render(scene)
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert seen(image) == facts(scene) == set(said(TASK.caption(scene)))
        background = image[~(image >= 200).any(axis=-1)]
        assert background.max() <= 0.15 * 255 + 0.5 and background.std() > 5


def test_scenes_are_as_described(everything):
    numbers = {len(scene.objects) for scene in everything}
    assert numbers == {2, 3}
    items = [item for scene in everything for item in scene.objects]
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.shape for item in items} == set(SHAPES)
    assert {value for item in items for value in item.offset} == set(range(-4, 5))
    for scene in everything:
        places = [list(QUADRANTS).index(item.quadrant) for item in scene.objects]
        assert places == sorted(set(places)), "quadrants are distinct and in order"


def test_scenes_depend_on_seed_split_and_index_only(scenes):
    longer = ShapesCaption(num_train=310, num_val=0, num_test=5)
    assert longer.records("train")[:300] == scenes["train"]
    assert longer.records("test") == longer.records("predict") == scenes["test"][:5]
    other = ShapesCaption(seed=1, num_train=300).records("train")
    assert {s.scene_id for s in other} != {s.scene_id for s in scenes["train"]}
    scene = scenes["train"][3]
    assert np.array_equal(TASK.render(scene), longer.render(longer.records("train")[3]))
    assert not np.array_equal(TASK.render(scene), TASK.render(Scene("", scene.objects, 1)))
    # a stream that must never change: data of old runs would
    assert TASK.render(scene).astype(int).sum() == PIXELS and scene.uid.endswith("/0/train/3")


PIXELS = 81_960


def test_splits_share_no_scene_and_no_hard_negative(scenes):
    other = ShapesCaption(seed=7, num_train=300, num_val=60, num_test=100)
    ids = {
        split: {
            item.scene_id
            for scene in [*scenes[split], *other.records(split)]
            for item in (scene, TASK.swap(scene, "colours"), TASK.swap(scene, "positions"))
        }
        for split in scenes
    }
    for one, two in itertools.combinations(ids, 2):
        assert not ids[one] & ids[two]
    for split, found in scenes.items():
        assert len({scene.scene_id for scene in found}) == TASK.sizes[split]


def test_scene_ids_tell_scenes_apart_and_nothing_else():
    options = list(itertools.product(COLOURS, SHAPES))
    pairs = itertools.product(itertools.combinations(QUADRANTS, 2), options, options)
    ids, contents = set(), set()
    for places, one, two in pairs:
        objects = tuple(
            SceneObject(place, *what) for place, what in zip(places, (one, two), strict=True)
        )
        scene = Scene("x", objects, 0)
        moved = Scene("y", (SceneObject(places[1], *two, (1, 2)), objects[0]), 5)
        assert scene.scene_id == moved.scene_id
        ids.add(scene.scene_id)
        contents.add(frozenset(facts(scene)))
    assert len(ids) == len(contents) == 6 * 30 * 30 and min(ids) > 0 and max(ids) < 10**6


def test_hard_negatives_change_one_thing(everything):
    for scene in everything:
        for kind, kept in (("colours", (1, 2)), ("positions", (0, 1))):
            swapped = TASK.swap(scene, kind)
            assert swapped == TASK.swap(scene, kind) and swapped.uid == f"{scene.uid}/swap_{kind}"
            before, after = facts(scene), facts(swapped)
            assert len(before - after) == len(after - before) == 2
            assert scene.family == swapped.family and scene.scene_id != swapped.scene_id
            # (shape, quadrant) stay where colours are swapped, (colour, shape) where positions are
            assert {tuple(fact[k] for k in kept) for fact in before} == {
                tuple(fact[k] for k in kept) for fact in after
            }
            assert seen(TASK.render(swapped)) == after
        assert facts(TASK.swap(scene, "colours")) != facts(TASK.swap(scene, "positions"))


def test_a_swap_leaves_the_background():
    scene = next(s for s in TASK.records("train") if len(s.objects) == 3)
    one, other = TASK.render(scene), TASK.render(TASK.swap(scene, "colours"))
    is_dark = (one < 50).all(axis=-1)
    assert is_dark.any() and np.array_equal(one[is_dark], other[is_dark])


def test_captions_in_any_order(everything):
    for scene in everything[:50]:
        places = range(len(scene.objects))
        for order in itertools.permutations(places):
            named = said(TASK.caption(scene, order))
            assert named == [said(TASK.caption(scene))[TASK.order(scene).index(k)] for k in order]
    orders = {TASK.order(everything[0], draw) for draw in range(40)}
    assert orders == set(itertools.permutations(range(len(everything[0].objects))))
    first = [TASK.order(scene)[0] for scene in everything if len(scene.objects) == 2]
    assert 0.35 < sum(first) / len(first) < 0.65, "the order must not tell the quadrants"


def test_text_pairs_say_the_same_differently(everything):
    for scene in everything:
        one, two = TASK.text_pair(scene)
        assert one != two and set(said(one)) == set(said(two)) == facts(scene)
        assert (one, two) == TASK.text_pair(scene)
    scene = next(s for s in everything if len(s.objects) == 3)
    assert len({TASK.text_pair(scene, draw) for draw in range(300)}) == 6 * 5


def test_vocabulary_is_what_captions_need(everything):
    used = {word for scene in everything for word in TASK.caption(scene).split()}
    assert used == set(TASK.vocabulary()) and len(TASK.vocabulary()) == 17


def test_small_worlds_run_out_with_a_message():
    task = ShapesCaption(num_test=5000, max_objects=2)
    with pytest.raises(
        ValueError, match=r"num_test=5000: no scene of 2 to 2 objects is left after"
    ):
        task.records("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": -1, "noise": 2}, "num_train=-1.*noise=2"),
        ({"jitter": 5}, "jitter=5 must be at most 4"),
        ({"max_objects": 5}, "min_objects=2 and max_objects=5"),
        ({"min_objects": 4}, "min_objects=4 and max_objects=3"),
        ({"min_objects": 1}, "min_objects=1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesCaption(**options)


def test_calls_are_checked():
    scene = TASK.records("train")[0]
    with pytest.raises(ValueError, match="split 'dev' is none of"):
        TASK.records("dev")
    with pytest.raises(ValueError, match="must name each of"):
        TASK.caption(scene, (0, 0))
    with pytest.raises(ValueError, match="kind='shapes' is none of colours, positions"):
        TASK.swap(scene, "shapes")
    same = Scene("s", (SceneObject("tl", "red", "bar"), SceneObject("br", "red", "ring")), 0)
    with pytest.raises(ValueError, match="no two objects differ"):
        TASK.swap(same, "colours")


def test_examples():
    result = doctest.testmod(shapes_caption)
    assert result.attempted and not result.failed
