"""Bags in turn, merged at the end: starts, borders, the merge itself, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

import train
from callbacks.model_merging import ModelMerging
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from lightning_modules.embedding.base import EmbeddingModule
from lightning_modules.functional.merging import merge_states
from lightning_modules.optim import lr_factor
from lightning_modules.options import OptimizerOptions
from tests.embedding_runs.parts import BOOM, WATCHED, Watch
from tests.runs import assert_same_weights, board, last_of, scalars, weights

Make = Callable[..., Any]
BASE = [*BOOM, "test_base=false", "mode=fit", "trainer.limit_val_batches=0", "logger=none"]
#: Steps of the three bags.
BAGS = [2, 4, 6]
KEY = "callbacks.model_merging"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, compose: Make
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Runs BOOM with overrides in a folder of its own; gives the run folder and the metrics."""

    def call(*overrides: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("boom")
        config = compose(*BASE, f"output_dir={folder}", *overrides, smoke=False)
        return folder / "boom" / "s0", train.run(config)

    return call


@pytest.fixture(scope="module")
def plain(run: Any) -> tuple[Path, dict[str, Any]]:
    """An ordinary run, watched."""
    found = run(*WATCHED, "data.micro_batches=1")
    return found[0], found[1] | {"seen": Watch.seen, "ends": Watch.factors}


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bags(folder: Path, count: int = 3) -> list[dict[str, Tensor]]:
    return [state(folder / "bags" / str(number)) for number in range(count)]


def assert_merged(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """The merge on disk, the export and the checkpoint are what is expected."""
    for one in ("bags/merged", "export"):
        assert_same_weights(state(folder / one), expected, atol=1e-6)
    saved = weights(last_of(folder))
    for name, value in expected.items():
        whole = f"policy.model.{name}"
        if whole in saved:
            assert torch.allclose(saved[whole], value, atol=1e-6), name
    assert not list(folder.rglob("*.unfinished"))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_every_bag_starts_anew(plain: tuple[Path, dict[str, Any]]) -> None:
    seen = plain[1]["seen"]
    assert len(seen) == sum(BAGS) == plain[1]["steps"]
    starts = [0, 2, 6]
    for place in starts:
        assert_same_weights(seen[place]["weights"], seen[0]["weights"])
        assert seen[place]["states"] == 0, "the optimizer knows nothing of the last bag"
    for place in set(range(12)) - set(starts):
        assert seen[place]["states"] > 0
        assert distance(seen[place]["weights"], seen[0]["weights"]) > 1e-5
    uids = [tuple(sorted(seen[place]["uids"])) for place in starts]
    assert len(set(uids)) == 3, "the bags are drawn apart"
    start = load_file(plain[0] / "bags" / "start.safetensors")
    assert_same_weights(start, seen[0]["weights"])


def test_the_learning_rate_starts_again_with_a_bag(plain: tuple[Path, dict[str, Any]]) -> None:
    options = OptimizerOptions(**OmegaConf.load(plain[0] / "config.yaml").optimizer)
    expected = [
        options.lr * lr_factor(step, options, size) for size in BAGS for step in range(size)
    ]
    assert [one["lr"] for one in plain[1]["seen"]] == pytest.approx(expected)
    assert expected[5] < expected[6] and len(set(expected)) > 3, "it has a schedule"


def test_a_bag_is_exported_as_it_ends_and_the_merge_is_what_is_left(
    plain: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = plain
    ends = [found["ends"][place] for place in (1, 5, 11)]
    for bag, end in zip(bags(folder), ends, strict=True):
        trained = {name.removeprefix("policy.model."): value for name, value in end.items()}
        assert_same_weights(bag, trained)
    assert_merged(folder, merge_states(bags(folder), method="multislerp", weights=BAGS))
    info = json.loads((folder / "bags" / "merged" / "merge.json").read_text())
    assert info["weights"] == pytest.approx([size / 12 for size in BAGS])
    assert 0.9 < found["merge/cosine"] < 1.0
    assert found["merge/norm_factor"] >= 1.0
    assert found["merge/distance"] > 0 and found["merge/update_cosine"] < 1.0
    assert sorted(path.name for path in (folder / "bags").iterdir()) == [
        "0", "1", "2", "merged", "start", "start.safetensors",
    ]  # fmt: skip


METHODS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "linear": ([f"{KEY}.weights=[1,2,5]"], {"weights": [1.0, 2.0, 5.0]}),
    "multislerp": ([f"{KEY}.weights=equal", f"{KEY}.use_base=true"], {}),
    "ties": ([f"+{KEY}.options.density=0.4"], {"weights": BAGS, "options": {"density": 0.4}}),
    "dare": (
        [f"{KEY}.options={{}}", f"+{KEY}.options.density=0.5", f"+{KEY}.options.seed=3"],
        {"weights": BAGS, "options": {"density": 0.5, "seed": 3}},
    ),
    "task_arithmetic": (
        [f"{KEY}.weights=equal", f"+{KEY}.options.scale=0.5"],
        {"options": {"scale": 0.5}},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_is_that_of_the_exports(method: str, run: Any, plain: Any) -> None:
    options, expected = METHODS[method]
    folder, found = run(f"{KEY}.method={method}", *options)
    parts = bags(folder)
    for mine, other in zip(parts, bags(plain[0]), strict=True):
        assert_same_weights(mine, other)  # how bags are merged changes none of them
    base = None if method == "linear" else state(folder / "bags" / "start")
    merged = merge_states(parts, method=method, base=base, **expected)
    assert_merged(folder, merged)
    assert distance(merged, state(plain[0] / "export")) > 1e-5, "the methods must differ"
    if base is not None:
        assert_same_weights({f"policy.model.{k}": v for k, v in base.items()},
                            load_file(folder / "bags" / "start.safetensors"))  # fmt: skip
        total = sum(float((merged[k] - base[k]).double().square().sum()) for k in merged) ** 0.5
        assert found["merge/distance"] == pytest.approx(total, rel=1e-4)
        assert -1.0 <= found["merge/update_cosine"] < 1.0
        assert found["merge/distance_models"] > 0


def test_an_earlier_export_is_merged_with_one_bag(run: Any, plain: Any) -> None:
    earlier = plain[0] / "export"
    folder, found = run("data.datasets=null", f"{KEY}.include=[{earlier}]",
                        "data.schedule.bags=[{percent: {domain_1: 100, rest: 40}}]",
                        f"{KEY}.weights=[3,1]", f"{KEY}.method=linear")  # fmt: skip
    (bag,) = bags(folder, 1)
    merged = merge_states([bag, state(earlier)], weights=[3.0, 1.0])
    assert_merged(folder, merged)
    assert distance(merged, bag) > 1e-5 and "merge/distance" in found


def test_adapters_are_folded_before_they_are_merged(run: Any) -> None:
    rank = ["lora=default", "lora.r=4", "lora.alpha=64", "optimizer.lr=0.01"]
    folder, found = run(*rank, *WATCHED, f"{KEY}.method=linear", f"{KEY}.weights=equal")
    ends = [Watch.factors[place] for place in (1, 5, 11)]
    assert found["steps"] == 12 and all("lora_" in name for name in ends[0])
    expected = merge_states(bags(folder))
    assert_same_weights(state(folder / "export"), expected, atol=1e-6)
    path, _, _ = next(iter(ends[0])).partition(".lora_")
    a, b = (torch.stack([end[f"{path}.lora_{x}.default.weight"] for end in ends]) for x in "AB")
    scale = 64 / 4
    folded, apart = (b @ a).mean(0) * scale, b.mean(0) @ a.mean(0) * scale
    name = path.removeprefix("policy.model.base_model.model.") + ".weight"
    start = state(Path(OmegaConf.load(folder / "config.yaml").backbone.path or _start(folder)))
    assert torch.allclose(expected[name], start[name] + folded, atol=1e-5)
    assert float((folded - apart).abs().max()) > 1e-4, "a mean of products is no product of means"
    # the checkpoint holds what the backbone does not give back
    module = EmbeddingModule.load_from_checkpoint(last_of(folder), weights_only=True)
    assert_same_weights(dict(module.policy.named_weights()), expected, atol=1e-6)


def _start(folder: Path) -> str:
    saved = torch.load(last_of(folder), weights_only=True)
    return str(saved["hyper_parameters"]["backbone"]["path"])


@pytest.mark.parametrize(
    ("steps", "options", "count", "shares"),
    [
        (3, [f"{KEY}.weights=size"], 2, [2.0, 1.0]),
        (9, [f"{KEY}.weights=[5,1,2]"], 3, [5.0, 1.0, 2.0]),
        (3, [f"{KEY}.weights=[5,1,2]"], 2, [5.0, 1.0]),
        (6, [f"{KEY}.weights=equal"], 2, [1.0, 1.0]),
    ],
)
def test_a_run_that_ends_early_merges_what_was_trained(
    steps: int, options: list[str], count: int, shares: list[float], run: Any, plain: Any
) -> None:
    folder, found = run(f"trainer.max_steps={steps}", f"{KEY}.method=linear", *options)
    assert found["steps"] == steps
    parts = bags(folder, count)
    assert not (folder / "bags" / str(count)).exists()
    for place, whole in enumerate(bags(plain[0])[: count - 1]):
        assert_same_weights(parts[place], whole)
    assert_merged(folder, merge_states(parts, weights=shares))


@pytest.mark.parametrize(
    ("options", "end"),
    [
        (["trainer.max_steps=1"], 0),
        (["trainer.max_steps=2"], 1),  # a border, the second bag has not begun
        (["data.schedule.bags=[{percent: 40}]"], 1),
    ],
)
def test_one_model_is_its_own_merge(
    options: list[str], end: int, run: Any, plain: tuple[Path, dict[str, Any]]
) -> None:
    folder, found = run(*options)
    assert not (folder / "bags" / "merged").exists()
    assert not [tag for tag in found if tag.startswith("merge/")]
    trained = plain[1]["ends"][end]
    assert_same_weights(
        {f"policy.model.{name}": value for name, value in state(folder / "export").items()}, trained
    )


def test_one_bag_is_scaled_where_differences_are_merged(run: Any, plain: Any) -> None:
    folder, found = run("data.schedule.bags=[{percent: 40}]", f"{KEY}.method=task_arithmetic",
                        f"+{KEY}.options.scale=0.5")  # fmt: skip
    start, bag = state(folder / "bags" / "start"), bags(folder, 1)[0]
    assert_same_weights(bag, bags(plain[0])[0])
    assert_merged(folder, {name: (start[name] + bag[name]) / 2 for name in bag})
    assert found["merge/distance"] * 2 == pytest.approx(found["merge/distance_models"], rel=1e-4)


def test_the_merge_is_validated_and_logged(run: Any, compose: Make, tmp_path: Path) -> None:
    folder, found = run("trainer.limit_val_batches=1.0", "trainer.val_check_interval=12",
                        "logger=tensorboard", f"{KEY}.use_base=true")  # fmt: skip
    options = [f"output_dir={tmp_path}", "mode=validate", f"ckpt_path={last_of(folder)}"]
    config = compose(*BASE, *options, "trainer.limit_val_batches=1.0", smoke=False)
    again = train.run(config)
    tags = [tag for tag in found if tag.startswith("val/merged/")]
    assert {"val/merged/ndcg_at_10", "val/merged/domain_0/recall_at_1"} <= set(tags)
    for tag in tags:
        assert found[tag] == pytest.approx(again[tag.replace("val/merged/", "val/")], abs=1e-6)
    assert found["val/ndcg_at_10"] != found["val/merged/ndcg_at_10"], "the last bag, the merge"
    reader = board(folder)
    for tag in ("val/merged/ndcg_at_10", "merge/cosine", "merge/update_cosine", "merge/distance"):
        ((step, value),) = scalars(reader, tag)
        assert step == 12 and value == pytest.approx(found[tag], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([f"{KEY}.weights=[1,2]"], rf"{KEY}.weights=\[1.0, 2.0\]: 3 numbers are needed"),
        ([f"{KEY}.weights=sise"], "weights='sise' must be equal, size or a list"),
        ([f"{KEY}.method=multislrp"], rf"{KEY}.method='multislrp' .*did you mean 'multislerp'"),
        (
            [f"{KEY}.method=multislrp", "data.schedule.bags=null"],
            rf"{KEY}.method='multislrp' .*did you mean 'multislerp'",
        ),
        ([f"{KEY}.method=slerp"], rf"{KEY}.method='slerp' merges 2 models, not 3"),
        ([f"+{KEY}.options.densty=1"], rf"unknown key '{KEY}.options.densty' of multislerp"),
        ([f"{KEY}.weights=[1,-1,1]"], "multislerp takes none below 0"),
        (
            [f"{KEY}.include=[/nowhere/export]", f"{KEY}.weights=equal"],
            rf"{KEY}.include: /nowhere/export is no folder; give a run's export/",
        ),
        (
            [f"{KEY}.include=[/nowhere]"],
            rf"{KEY}.weights=size does not know the sizes of {KEY}.include",
        ),
        (["trainer.max_epochs=2"], r"trainer.max_epochs=2 must be 1 with data.schedule.bags"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_trained(
    options: list[str], message: str, run: Any
) -> None:
    Watch.seen = []
    with pytest.raises(Exception, match=message):
        run(*WATCHED, *options)
    assert not Watch.seen, "it has trained"


def test_an_export_of_another_model_is_refused_before_anything_is_trained(
    run: Any, plain: Any, tmp_path: Path
) -> None:
    words = [line for line in json.loads(
        (plain[0] / "export" / "tokenizer.json").read_text())["model"]["vocab"]]  # fmt: skip
    shape = {"intermediate_size": 32, "num_layers": 1, "num_heads": 2}
    build_tiny_encoder(tmp_path, words[3:], TinyEncoderOptions(hidden_size=16, **shape), seed=0)
    for folder, message in (
        (tmp_path, r"cannot be merged with .*start: embeddings\S+ is \(\d+,.* there and"),
        (plain[0] / "checkpoints", "no exported model"),
    ):
        Watch.seen = []
        with pytest.raises(ValueError, match=message):
            run(*WATCHED, f"{KEY}.include=[{folder}]", f"{KEY}.weights=equal")
        assert not Watch.seen


def test_a_lost_start_is_told_on_resume(compose: Make, tmp_path: Path) -> None:
    overrides = [*BASE, f"output_dir={tmp_path}", "callbacks.checkpoint.every_n_steps=1"]
    stop = ["+callbacks.crash._target_=tests.runs.CrashAt", "+callbacks.crash.batch=4"]
    with pytest.raises(KeyError, match="crashed before"):
        train.run(compose(*overrides, *stop, smoke=False))
    (tmp_path / "boom" / "s0" / "bags" / "start.safetensors").unlink()
    with pytest.raises(ValueError, match="start.safetensors is gone: the bags to come could not"):
        train.run(compose(*overrides, "resume=auto", smoke=False))


def test_plain_arguments() -> None:
    assert ModelMerging(folder="bags").method == "multislerp"
    with pytest.raises(ValueError, match="must be equal, size or a list of numbers"):
        ModelMerging(folder="bags", weights="even")
