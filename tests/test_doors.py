"""Every way in which a file, a model or a row of data could make us run its code, tried."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.runs import REPO, SHORT, SMALL, call, command, environment, last_of, main

SHRINK = [*SMALL, *SHORT, "backbone.warm_start.steps=0", "trainer.max_steps=1"]
SILENT = "hydra/job_logging=none"
Make = Callable[..., Any]


class Poison:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A folder that poison makes; it must not be there in the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code from outside was run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The folder of a finished run of a model of random weights, with pending mini-batches."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["model=grpo", *SHRINK, "data.mini_batches=2", "mode=fit", SILENT]
    script = command(*overrides, output_dir=folder, cache_dir=warm_cache)[2:]
    status, _, errors = main(*script)
    assert status == 0, errors
    return folder / "grpo" / "s0"


def put(checkpoint: dict[str, Any], place: str, poison: Poison) -> None:
    """Poison into a place of a checkpoint that is whole otherwise."""
    if place == "pending":
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]
        pending = loop["combined_loader"][0]["source"]["pending"]
        assert pending[0], "there is an open rollout"
        pending[0][0]["mask"] = poison
    elif place == "callbacks":
        checkpoint["callbacks"]["RngState"] = poison
    elif place == "optimizer":
        checkpoint["optimizer_states"][0]["state"]["x"] = poison
    else:
        checkpoint["litpost"][place] = poison


@pytest.mark.parametrize("place", ["pending", "callbacks", "optimizer", "files"])
@pytest.mark.parametrize("door", ["resume=auto", "ckpt_path", "mode=test"])
def test_a_poisoned_checkpoint(
    door: str, place: str, trained: Path, make_config: Make, tmp_path: Path, marker: Path
) -> None:
    checkpoint = torch.load(last_of(trained), weights_only=True)
    put(checkpoint, place, Poison(marker))
    name = "best.ckpt" if door == "mode=test" else "last.ckpt"
    file = tmp_path / "grpo" / "s0" / "checkpoints" / name
    file.parent.mkdir(parents=True)
    torch.save(checkpoint, file)
    given = {"resume=auto": [door], "mode=test": [door, f"ckpt_path={file}"]}
    overrides = given.get(door, [f"ckpt_path={file}", "run_id=s1"])
    with pytest.raises(ValueError, match=r"refused, not a plain checkpoint .*would call .*mkdir"):
        train.run(make_config("model=grpo", *SHRINK, *overrides, "logger=none"))


def test_the_poison_works_where_it_is_let_in(tmp_path: Path) -> None:
    torch.save({"x": Poison(tmp_path / "made")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "made").is_dir()


def test_a_checkpoint_that_slurm_would_have_left(
    make_config: Make, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning takes hpc_ckpt files by itself where it finds SLURM."""
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = tmp_path / "grpo" / "s0"
    run.mkdir(parents=True)
    torch.save({"x": Poison(marker)}, run / "hpc_ckpt_1.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        train.run(make_config("model=grpo", *SHRINK, "resume=auto"))


@pytest.mark.parametrize("door", ["resume=auto", "ckpt_path"])
def test_a_distributed_checkpoint(
    door: str, make_config: Make, tmp_path: Path, marker: Path
) -> None:
    """Its file .metadata is a pickle."""
    folder = tmp_path / "grpo" / "s0" / "checkpoints" / "last.ckpt"
    folder.mkdir(parents=True)
    for name in (".metadata", "meta.pt"):
        (folder / name).write_bytes(pickle.dumps(Poison(marker)))
    overrides = [door] if door == "resume=auto" else ["run_id=s1", f"ckpt_path={folder}"]
    with pytest.raises(ValueError, match="is a folder; distributed checkpoints are refused"):
        train.run(make_config("model=grpo", *SHRINK, *overrides))


@pytest.mark.parametrize("name", ["own.json", "base.json", "metrics.json", "config.yaml"])
def test_files_of_a_run_folder_are_data(
    name: str, trained: Path, make_config: Make, tmp_path: Path, marker: Path
) -> None:
    run = tmp_path / "grpo" / "s0"
    shutil.copytree(trained, run)
    if name != "metrics.json":
        (run / "metrics.json").unlink()
    (run / name).write_bytes(pickle.dumps(Poison(marker)))
    overrides = ["model=grpo", *SHRINK, "data.mini_batches=2", "resume=auto", "test_base=true"]
    with pytest.raises(ValueError, match=rf"s0/{name}: not "):
        train.run(make_config(*overrides))
    if name == "config.yaml":
        (run / name).write_text(f"x: !!python/object/apply:os.mkdir ['{marker}']\n")
        with pytest.raises(ValueError, match=rf"s0/{name}: not a config of ours"):
            train.run(make_config(*overrides))
        (run / name).write_text(f"x: {{_target_: os.mkdir, path: {marker}}}\n")
        with pytest.warns(UserWarning, match="changed keys"):
            train.run(make_config(*overrides))


def test_pickled_weights_of_a_backbone(trained: Path, make_config: Make, tmp_path: Path) -> None:
    """An exported folder with pytorch_model.bin in place of safetensors."""
    folder, marker = tmp_path / "export", tmp_path / "marker"
    shutil.copytree(trained / "export", folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "x": Poison(marker)}, folder / "pytorch_model.bin")
    overrides = ["model=grpo", *SHORT, "trainer.max_steps=1", "backbone=hf", "mode=test",
                 f"backbone.path={folder}", "backbone.dtype=float32"]  # fmt: skip
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        train.run(make_config(*overrides))
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_model(
    part: str, trained: Path, tmp_path: Path, marker: Path
) -> None:
    """It is not run, and nobody is asked on the terminal: a "y" waits there."""
    folder = tmp_path / "export"
    shutil.copytree(trained / "export", folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    name = "config.json" if part == "model" else "tokenizer_config.json"
    values = json.loads((folder / name).read_text())
    if part == "model":
        values |= {"model_type": "own", "architectures": ["Own"]}
        values["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    else:
        values |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / name).write_text(json.dumps(values))
    overrides = ["model=grpo", *SHORT, "backbone=hf", f"backbone.path={folder}", "mode=test",
                 "backbone.dtype=float32"]  # fmt: skip
    result = call(
        *command(*overrides, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache"),
        input="y\n" * 9, env=environment(HF_HOME=str(tmp_path / "hub")),
    )  # fmt: skip
    assert "Do you wish to run" not in result.stdout + result.stderr
    if part == "model":
        assert result.returncode == 1, result.stdout
        assert "backbone.trust_remote_code=true" in result.stderr


def test_rows_and_answers_are_text(make_config: Make, tmp_path: Path, marker: Path) -> None:
    """Python, templates, interpolations and paths in data; the tiny model writes at random."""
    evil = [
        f"__import__('os').mkdir({str(marker)!r})",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "${oc.env:HOME}", "$(mkdir marker)", "!!python/object/apply:os.mkdir [marker]",
        "{0.__class__}", "%(x)s", "<|im_end|>", "\\boxed{__import__('os').system('true')}",
    ]  # fmt: skip
    rows = [
        {"question": f"{i} {text}", "response_A": text, "response_B": f"{text} no", "label": "A>B"}
        for i, text in enumerate(evil * 3)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["model=grpo", "data=preference_file", f"data.path={path}", *SMALL,
                 "backbone.warm_start.steps=0", "trainer.max_steps=1", "data.eval_batch_size=4",
                 "data.task.max_analysis_tokens=8", "model.max_new_tokens=8",
                 "callbacks.sample_table.keep=all"]  # fmt: skip
    train.run(make_config(*overrides))
    written = (tmp_path / "grpo" / "s0" / "samples.jsonl").read_text()
    assert "__subclasses__" in written or "oc.env" in written or "__import__" in written


# --- the source -----------------------------------------------------------------------------------

#: Files that may call such a thing, and why.
ALLOWED: dict[str, set[str]] = {}
NAMES = {"eval", "exec", "compile", "__import__", "input"}
LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch", "np",
           "numpy", "yaml"}  # fmt: skip


def risks(tree: ast.Module) -> Iterator[str]:
    """Calls that could run what they are given, as ``line: name``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        words = {w.arg: getattr(w.value, "value", None) for w in node.keywords}
        function = node.func
        name, owner = getattr(function, "attr", ""), getattr(function, "value", None)
        of = getattr(owner, "id", "")
        if isinstance(function, ast.Name) and function.id in NAMES:
            yield f"{node.lineno}: {function.id}"
        if name in ("load", "loads", "Unpickler", "unsafe_load", "full_load") and of in LOADERS:
            if not (of == "torch" and words.get("weights_only") is True):
                yield f"{node.lineno}: {of}.{name}"
        if (of == "os" and name in ("system", "popen")) or words.get("shell"):
            yield f"{node.lineno}: a shell"
        if words.get("trust_remote_code") is True or words.get("allow_pickle"):
            yield f"{node.lineno}: {sorted(words)}"


def sources() -> list[str]:
    folders = ("lightning_modules", "datamodules", "callbacks", "run_tools", "kernels")
    files = [REPO / "train.py", *(f for folder in folders for f in (REPO / folder).rglob("*.py"))]
    return sorted(file.relative_to(REPO).as_posix() for file in files)


@pytest.mark.parametrize("name", sources())
def test_nothing_is_evaluated(name: str) -> None:
    found = list(risks(ast.parse((REPO / name).read_text())))
    left = [risk for risk in found if risk.split(": ")[1] not in ALLOWED.get(name, set())]
    assert not left, f"{name}: {left}"


@pytest.mark.parametrize(
    "text",
    [
        "eval(x)", "exec(x)", "pickle.loads(x)", "torch.load(x)", "os.system(x)",
        "torch.load(x, weights_only=False)", "f(x, shell=True)", "g(x, trust_remote_code=True)",
        "yaml.load(x)",
    ],
)  # fmt: skip
def test_what_the_search_finds(text: str) -> None:
    assert list(risks(ast.parse(text)))
    assert not list(risks(ast.parse("m.eval(); torch.load(x, weights_only=True); re.compile(x)")))


def test_defaults_trust_nobody(make_config: Make) -> None:
    config = make_config("model=grpo", "backbone=hf", "backbone.path=x")
    assert config.backbone.trust_remote_code is False
    assert not [path for path in (REPO / "conf").rglob("*.yaml")
                if "trust_remote_code: true" in path.read_text().lower()]  # fmt: skip
