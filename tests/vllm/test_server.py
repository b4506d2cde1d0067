"""The engine ``vllm_server`` with a real server: started by us, and as a user would start one."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import train
from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.vllm_endpoint import LocalServer
from datamodules.engines.vllm_server import VLLMServerEngine, close_servers
from tests.runs import SHORT, call, command, environment, read_jsonl
from tests.vllm.parts import (
    GREEDY,
    NEEDS_VLLM,
    build,
    ids_of,
    load,
    prompts,
    step,
    trainer_logprobs,
)

pytestmark = NEEDS_VLLM
#: The run's backbone has the shape and the vocabulary of ``build``, so the server can be shared.
RUN = [
    "model=grpo", "engine=vllm_server", *SHORT, "data.task.length=4",
    "backbone.tiny.hidden_size=64", "backbone.tiny.intermediate_size=64",
    "backbone.tiny.num_layers=2", "backbone.warm_start.steps=20",
    "backbone.warm_start.batch_size=8",
    "engine.kv_cache_gib=0.1", "engine.max_num_seqs=32",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "vllm_server.log"


@pytest.fixture(scope="module", autouse=True)
def _no_server_is_left() -> Iterator[None]:
    yield
    close_servers()


@pytest.fixture
def policy(folder: Path) -> Any:
    return load(folder)


@pytest.fixture
def engine(policy: Any, log: Path) -> VLLMServerEngine:
    """Engines of one model and equal options share the running server."""
    engine = VLLMServerEngine(kv_cache_gib=0.1, max_num_seqs=32, log=str(log))
    engine.sync(policy, 0)
    return engine


def by_hugging_face(policy: Any, asked: Any) -> Any:
    reference = HFEngine()
    reference.sync(policy, 0)
    return ids_of(reference.generate(asked, GREEDY))


def request(url: str, method: str, path: str, headers: dict[str, str]) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    connection.request(method, path, body="{}" if method == "POST" else None, headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_tokens_before_and_after_a_push(engine: VLLMServerEngine, policy: Any) -> None:
    asked = prompts()
    before = engine.generate(asked, GREEDY)
    assert ids_of(before) == by_hugging_face(policy, asked)
    step(policy)
    assert ids_of(engine.generate(asked, GREEDY)) == ids_of(before), "nothing was pushed yet"
    engine.sync(policy, 1)
    after = engine.generate(asked, GREEDY)
    assert ids_of(after) == by_hugging_face(policy, asked) != ids_of(before)
    assert {c.policy_version for group in after for c in group} == {1}
    sampled = engine.generate(asked, Sampling(samples=2, max_new_tokens=12, temperature=0.8))
    for prompt, group in zip(asked, sampled, strict=True):
        for completion in group:
            mine = trainer_logprobs(policy, prompt, completion, 0.8)
            assert torch.allclose(mine, torch.tensor(completion.logprobs), atol=1e-4)
    again = engine.generate(asked[::-1], Sampling(samples=2, max_new_tokens=12, temperature=0.8))
    assert ids_of(again)[::-1] == ids_of(sampled)


def test_only_the_newest_weights_stay_on_disk(engine: VLLMServerEngine, policy: Any) -> None:
    for version in range(1, 4):
        step(policy)
        engine.sync(policy, version)
    assert engine._folders is not None
    assert [path.name for path in engine._folders.root.iterdir()] == [engine.label]


def test_every_route_but_health_wants_the_key(engine: VLLMServerEngine) -> None:
    assert engine._endpoint is not None
    url = engine._endpoint.url
    assert url.startswith("http://127.0.0.1:")
    assert request(url, "GET", "/health", {}) == 200
    for method, path in (
        ("POST", "/collective_rpc"), ("POST", "/reset_prefix_cache"), ("GET", "/weight_info"),
        ("POST", "/update_weight_version"), ("GET", "/server_info"), ("GET", "/v1/models"),
        ("POST", "/inference/v1/generate"), ("POST", "/abort_requests"), ("GET", "/docs"),
    ):  # fmt: skip
        assert request(url, method, path, {}) == 401, path
        assert request(url, method, path, {"Authorization": "Bearer guess"}) == 401, path
    key = str(engine._endpoint._key)
    assert request(url, "GET", "/weight_info", {"Authorization": f"Bearer {key}"}) == 200
    assert key not in engine.log.read_text()
    command_lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not [line for line in command_lines if key.encode() in line]


def test_as_a_users_server(
    engine: VLLMServerEngine, policy: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine._endpoint is not None
    monkeypatch.setenv("USERS_KEY", str(engine._endpoint._key))
    options: dict[str, Any] = {"url": engine._endpoint.url, "api_key_env": "USERS_KEY"}
    users = VLLMServerEngine(**options)
    other = load(folder)
    step(other)
    users.sync(other, 3)
    assert users.max_model_len == 2048, "as the server says"
    assert ids_of(users.generate(prompts(), GREEDY)) == by_hugging_face(other, prompts())
    with pytest.raises(RuntimeError, match="other weights.*Does another run"):
        engine.generate(prompts(), GREEDY)
    engine.sync(policy, 0)
    assert ids_of(engine.generate(prompts(), GREEDY)) == by_hugging_face(policy, prompts())
    users.close()
    assert request(options["url"], "GET", "/health", {}) == 200, "it is the user's"
    monkeypatch.setenv("USERS_KEY", "wrong")
    with pytest.raises(ValueError, match="answered 401.*engine.api_key_env"):
        VLLMServerEngine(**options).sync(policy, 0)
    missing = VLLMServerEngine(weights_dir=str(folder / "nowhere"), **options)
    monkeypatch.setenv("USERS_KEY", str(engine._endpoint._key))
    missing.start(policy)
    with pytest.raises(ValueError, match="/collective_rpc answered 500"):
        missing._ask(
            "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/gone"}}
        )


def test_a_run_of_two_steps(
    engine: VLLMServerEngine, log: Path, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    before = _servers()
    metrics = train.run(make_config(*RUN, f"engine.log={log}"))
    assert metrics["steps"] == 2
    assert metrics["train/sampler_logprob_gap"] < 1e-4
    assert _servers() == before, "the same model: the server that runs already"
    text = (tmp_path / "grpo" / "s0" / "config.yaml").read_text()
    assert before[0].key not in text
    records = read_jsonl(tmp_path / "grpo" / "s0" / "samples.jsonl")
    assert {record["policy_version"] for record in records} == {0, 1}


def test_two_sharded_processes_share_a_users_server(
    engine: VLLMServerEngine, tmp_path: Path, warm_cache: Path
) -> None:
    assert engine._endpoint is not None
    users = [f"engine.url={engine._endpoint.url}", "engine.api_key_env=USERS_KEY"]
    two = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "mode=fit"]
    words = command(*RUN, *users, *two, output_dir=tmp_path, cache_dir=warm_cache)
    key = str(engine._endpoint._key)
    result = call(*words, env=environment(USERS_KEY=key))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "grpo" / "s0" / "metrics.json").read_text())
    assert metrics["train/sampler_logprob_gap"] < 1e-4
    texts = [p.read_bytes() for p in (tmp_path / "grpo").rglob("*") if p.is_file()]
    assert not [text for text in texts if key.encode() in text]
    assert key not in result.stdout + result.stderr


def test_a_dead_server_is_named(engine: VLLMServerEngine, policy: Any) -> None:
    (server,) = _servers()
    children = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children")
    (child,) = [int(number) for number in children.read_text().split()]
    os.killpg(child, signal.SIGKILL)
    server._process.wait(timeout=30)
    with pytest.raises(ConnectionError, match=r"does not answer.*ended.*its log.*resume=auto"):
        engine.generate(prompts(), GREEDY)
    with pytest.raises(ConnectionError, match="resume=auto"):
        engine.sync(policy, 1)


def test_a_server_that_does_not_come_up(folder: Path, tmp_path: Path) -> None:
    start, weights = time.monotonic(), tmp_path / "weights"
    weights.mkdir()
    with pytest.raises(ConnectionError, match=r"engine\.startup_timeout=1 s.*its log"):
        LocalServer(folder, [], log=tmp_path / "slow.log", startup_timeout=1, weights=weights)
    assert time.monotonic() - start < 40
    assert not weights.exists()
    with pytest.raises(ConnectionError, match=r"ended with status .*no-such-argument"):
        LocalServer(
            folder, ["--no-such-argument"], log=tmp_path / "x", startup_timeout=120, weights=weights
        )


def _servers() -> list[LocalServer]:
    from datamodules.engines import vllm_server

    return list(vllm_server._LIVE.values())
