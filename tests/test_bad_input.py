"""What a user does wrong ends in one clear line, a non-zero exit and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from tests import runs
from tests.runs import SHORT, SMALL, call, command

UNFITTED = [*SMALL, "backbone.warm_start.steps=0"]
#: No logging to a stream that pytest closes.
SILENT = "hydra/job_logging=none"


def main(*overrides: str, output_dir: Path, cache_dir: Path) -> tuple[int, str]:
    """The command line in this process: exit status and standard error."""
    arguments = command(*overrides, SILENT, output_dir=output_dir, cache_dir=cache_dir)[2:]
    status, _, errors = runs.main(*arguments)
    return status, errors


def check(status: int, errors: str, fragments: list[str], output_dir: Path) -> None:
    """One line that holds the fragments; no run folder is left."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status == 1, errors
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in {lines[0]!r}"
    left = [path for path in output_dir.rglob("*") if path.is_file()]
    assert not left, f"half-written: {left}"


NAMES: dict[str, tuple[list[str], list[str]]] = {
    "unknown model": (
        ["model=reflektrm"],
        ["model=reflektrm", "did you mean 'reflectrm'", "grpo"],
    ),
    "unknown trainer": (["trainer=fdsp"], ["trainer=fdsp", "did you mean 'fsdp'", "auto"]),
    "unknown callbacks": (["callbacks=defualt"], ["did you mean 'default'"]),
    "misspelt key": (["model.klcoef=0.1"], ["'model.klcoef'", "did you mean 'model.kl_coef'"]),
    "misspelt task key": (["data.task.nam_val=3"], ["did you mean 'data.task.num_val'"]),
    "added key": (["+optimizer.learning_rate=1"], ["unknown key 'optimizer.learning_rate'"]),
    "added model key": (["+model.clip_hi=1"], ["'model.clip_hi'", "did you mean 'clip_high'"]),
    "key of another option": (["lora.r=4"], ["lora.r", "lora=default"]),
    "no override": (["resume"], ["resume"]),
    "no whole number": (["trainer.max_steps=abc"], ["trainer.max_steps='abc'", "a whole number"]),
    "fraction of a step": (["trainer.max_steps=1.5"], ["trainer.max_steps=1.5", "a whole number"]),
    "no number": (["model.kl_coef=high"], ["model.kl_coef='high'", "a number"]),
    "seed": (["seed=one"], ["seed='one'", "a whole number"]),
    "no boolean": (["overwrite=maybe"], ["overwrite='maybe'", "true or false"]),
    "mode": (["mode=fittest"], ["mode='fittest'", "validate", "did you mean 'fit_test'"]),
    "literal": (
        ["model.loss_aggregation=token_maen"],
        ["model.loss_aggregation='token_maen'", "sequence_mean", "did you mean 'token_mean'"],
    ),
    "literal of a callback": (
        ["callbacks.sample_table.keep=al"],
        ["callbacks.sample_table.keep='al'", "extremes", "did you mean 'all'"],
    ),
    "backbone literal": (["backbone.dtype=float23"], ["backbone.dtype='float23'", "'float32'"]),
    "several at once": (
        ["trainer.max_steps=abc", "model.kl_coef=high"],
        ["trainer.max_steps='abc'", "model.kl_coef='high'"],
    ),
    "resume and overwrite": (
        ["resume=auto", "overwrite=true"],
        ["resume=auto", "overwrite=true", "contradict"],
    ),
    "resume": (["resume=yes"], ["resume='yes'", "auto"]),
    "unknown arm": (["model=reflectrm", "compare=[rtf]"], ["'rtf'", "did you mean 'rft'"]),
    "arm of another model": (["model=grpo", "compare=[rft]"], ["unknown arm 'rft'", "none"]),
    "missing data.path": (["data=preference_file"], ["data.path is required", "data.path=<"]),
    "missing engine.path": (["engine=scripted"], ["engine.path is required"]),
    "missing backbone.path": (
        ["model=grpo", "backbone=hf", "~experiment"],
        ["backbone.path is required"],
    ),
    "predict without a model": (["mode=predict"], ["mode=predict", "ckpt_path=", "backbone.path="]),
    "report of no claim": (["mode=report"], ["report.claim=", "reflectrm"]),
    "report of an unknown claim": (
        ["mode=report", "report.claim=reflectrn"],
        ["report.claim=reflectrn", "did you mean 'reflectrm'"],
    ),
    "report of a claim without runs": (
        ["mode=report", "report.claim=reflectrm"],
        ["no finished runs", "python train.py -m"],
    ),
    "ckpt_path": (["mode=test", "ckpt_path=gone.ckpt"], ["ckpt_path=gone.ckpt", "no such file"]),
    "ckpt_path is a folder": (["mode=test", "ckpt_path=conf"], ["ckpt_path=conf", "is a folder"]),
    "inference": (
        ["model.inference=two_stages", *UNFITTED],
        ["model.inference='two_stages'", "greedy", "did you mean 'two_stage'"],
    ),
    "temperature": (["model.temperature=0", *UNFITTED], ["model.temperature=0", "above 0"]),
    "micro-batches": (["data.micro_batches=0", *UNFITTED], ["data.micro_batches=0", "at least 1"]),
    "cut window": (
        [*SHORT, *UNFITTED, "model=grpo", "data.micro_batches=2", "trainer.limit_train_batches=3"],
        ["trainer.limit_train_batches=3", "window of 2", "trainer.limit_train_batches=2"],
    ),
    "given window": (
        [*SHORT, *UNFITTED, "model=grpo", "trainer.accumulate_grad_batches=3"],
        ["trainer.accumulate_grad_batches=3", "data.micro_batches"],
    ),
    "strategy": (["trainer.strategy=dpp", *UNFITTED, "model=grpo"], ["strategy='dpp'", "ddp"]),
    "optimizer": (
        ["optimizer.class_path=torch.optim.Adamw", *UNFITTED, "model=grpo", *SHORT],
        ["optimizer.class_path='torch.optim.Adamw'", "torch.optim.AdamW"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_wrong_words(case: str, tmp_path: Path, warm_cache: Path) -> None:
    overrides, fragments = NAMES[case]
    check(*main(*overrides, output_dir=tmp_path, cache_dir=warm_cache), fragments, tmp_path)


GOOD = {"question": "What is 2 + 2?", "response_A": "four", "response_B": "five", "label": "A>B"}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key != name}


ROWS: dict[str, tuple[bytes | None, list[str]]] = {
    "no such file": (None, ["pairs.jsonl", "no such file"]),
    "empty file": (b"", ["pairs.jsonl", "empty"]),
    "no JSON": (b"{", ["pairs.jsonl:1", "JSON"]),
    "missing field": (
        "\n".join(map(json.dumps, [GOOD, without("response_B")])).encode(),
        ["pairs.jsonl:2", "'response_B' is missing"],
    ),
    "label of neither side": (
        "\n".join(map(json.dumps, [GOOD, GOOD, GOOD | {"label": "C"}])).encode(),
        ["pairs.jsonl:3", "'label' is 'C'", "A>B"],
    ),
    "ambiguous label": (json.dumps(GOOD | {"label": 0}).encode(), ["pairs.jsonl:1", "'label'"]),
    "equal responses": (
        json.dumps(GOOD | {"response_B": "four"}).encode(),
        ["pairs.jsonl:1", "'response_A' equals field 'response_B'"],
    ),
    "invalid UTF-8": (
        json.dumps(GOOD).encode() + b'\n{"question": "\xff"}',
        ["pairs.jsonl:2", "invalid UTF-8"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_wrong_rows(case: str, tmp_path: Path, warm_cache: Path) -> None:
    content, fragments = ROWS[case]
    path, output_dir = tmp_path / "pairs.jsonl", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    overrides = ["data=preference_file", f"data.path={path}", *UNFITTED]
    status, errors = main(*overrides, output_dir=output_dir, cache_dir=warm_cache)
    check(status, errors, fragments, output_dir)


def pairs_file(path: Path, count: int = 24, length: int = 1) -> Path:
    rows = [GOOD | {"question": f"{i}? " * length, "uid": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIRS = ["model=grpo", "data=preference_file", "data.eval_batch_size=4", *UNFITTED]
FEW = ["trainer.max_steps=1", "data.task.max_analysis_tokens=8", "model.max_new_tokens=8"]


def test_long_prompts_follow_the_stated_rule(tmp_path: Path, warm_cache: Path) -> None:
    path, output_dir = pairs_file(tmp_path / "pairs.jsonl", length=400), tmp_path / "out"
    folders = {"output_dir": output_dir, "cache_dir": warm_cache}
    overrides = [*PAIRS, *FEW, f"data.path={path}"]
    refused = main(*overrides, "data.task.on_too_long=error", **folders)
    check(*refused, ["pairs.jsonl:", "data.task.max_prompt_tokens=512", "cut"], output_dir)
    refused = main(*overrides, "data.task.on_too_long=skip", **folders)
    check(*refused, ["data.task.max_prompt_tokens=512", "on_too_long=cut"], output_dir)
    status, errors = main(*overrides, "model.annotate_batch_size=8", **folders)
    assert status == 0, errors
    records = (output_dir / "grpo" / "s0" / "samples.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in records]
    assert prompts
    assert all(len(prompt.encode()) <= 512 < 400 * 3 for prompt in prompts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The folder of a finished run on prefix audit."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["model=grpo", "trainer.max_steps=1", *UNFITTED, *SHORT]
    status, errors = main(*overrides, output_dir=folder, cache_dir=warm_cache)
    assert status == 0, errors
    return folder / "grpo" / "s0"


def test_checkpoint_of_another_model(trained: Path, tmp_path: Path, warm_cache: Path) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    wider = ["backbone.tiny.hidden_size=48", "backbone.tiny.num_layers=1"]
    status, errors = main(
        "model=grpo", f"ckpt_path={last}", *UNFITTED, *SHORT, *wider, "test_base=false",
        output_dir=tmp_path, cache_dir=warm_cache,
    )  # fmt: skip
    fragments = ["checkpoint is of another model", "policy.", "GRPO", "'prefix_audit'", "backbone="]
    check(status, errors, fragments, tmp_path)


@pytest.mark.parametrize("mode", ["test", "validate"])
@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_data_that_the_tokenizer_cannot_encode(
    mode: str, source: str, trained: Path, tmp_path: Path, warm_cache: Path
) -> None:
    path, output_dir = pairs_file(tmp_path / "pairs.jsonl"), tmp_path / "out"
    last = trained / "checkpoints" / "last.ckpt"
    given = f"ckpt_path={last}" if source == "checkpoint" else f"backbone.path={trained / 'export'}"
    status, errors = main(
        *PAIRS, f"data.path={path}", f"mode={mode}", given,
        output_dir=output_dir, cache_dir=warm_cache,
    )  # fmt: skip
    check(status, errors, ["cannot write", "trained on task 'prefix_audit'"], output_dir)


def test_a_draw_larger_than_the_pool_warns(make_config: Callable[..., Any]) -> None:
    overrides = ["model=grpo", "trainer.max_steps=1", *UNFITTED, *SHORT, "callbacks={}"]
    with pytest.warns(UserWarning, match=r"prompts_per_rollout=100, .* only 24"):
        metrics = train.run(make_config(*overrides, "data.prompts_per_rollout=100"))
    assert metrics["steps"] == 1


#: Values that a module refuses, where the backbone would have to be made first.
BEFORE = {
    "temperature": (["model=grpo", "model.temperature=0"], "model.temperature=0"),
    "projector": (["model=compressor", "model.projector.kind=conv"], "give one of identity"),
    "decoder": (["model=compressor", "model.decoder.train=frozn"], "give one of frozen, lora"),
    "part": (["model=compressor", "model.bridge_parts=[prompt]"], "there are tokens, prompts"),
    "part of kv": (["model=compressor", "model.memory.form=kv"], "model.bridge_parts=[]"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_bad_value_costs_no_warm_start(case: str, tmp_path: Path) -> None:
    overrides, fragment = BEFORE[case]
    output_dir, cache_dir = tmp_path / "out", tmp_path / "cache"
    found = main(*overrides, output_dir=output_dir, cache_dir=cache_dir)
    check(*found, [fragment], output_dir)
    assert not list(cache_dir.rglob("*")), "something was made before the value was refused"


def test_after_a_mistake_the_corrected_command_runs(tmp_path: Path, warm_cache: Path) -> None:
    folders = {"output_dir": tmp_path, "cache_dir": warm_cache}
    overrides = ["model=grpo", "trainer.max_steps=1", "mode=fit", *UNFITTED, *SHORT]
    check(*main(*overrides, "model.temperature=-1", **folders), ["model.temperature=-1"], tmp_path)
    status, errors = main(*overrides, **folders)
    assert status == 0, errors
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, errors = main(*overrides, **folders)
    assert status == 1
    assert "holds a finished run" in errors
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_no_checkpoint_of_ours(tmp_path: Path, warm_cache: Path) -> None:
    alien, output_dir = tmp_path / "alien.ckpt", tmp_path / "out"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, alien)
    folders = {"output_dir": output_dir, "cache_dir": warm_cache}
    errors = main("mode=test", f"ckpt_path={alien}", **folders)
    check(*errors, ["alien.ckpt", "not a LitPost checkpoint", "backbone.path"], output_dir)
    alien.write_bytes(b"no checkpoint at all")
    errors = main("mode=test", f"ckpt_path={alien}", **folders)
    check(*errors, ["alien.ckpt", "refused"], output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_the_command_itself(debug: bool, tmp_path: Path, warm_cache: Path) -> None:
    extra = ["debug=default"] if debug else []
    overrides = ["model.loss_aggregation=token_maen", *extra]
    result = call(*command(*overrides, output_dir=tmp_path, cache_dir=warm_cache))
    if debug:
        assert result.returncode != 0
        assert "Traceback" in result.stderr
        assert "did you mean 'token_mean'" in result.stderr
    else:
        check(result.returncode, result.stderr, ["did you mean 'token_mean'"], tmp_path)
