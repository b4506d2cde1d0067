"""A vLLM server's answers, its guard and its watcher, where vLLM is not needed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from datamodules.engines.pushed import Request
from datamodules.engines.vllm_endpoint import Endpoint, read_answer
from datamodules.engines.vllm_guard import KeyGuard
from datamodules.engines.vllm_server import VLLMServerEngine
from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.options import BackboneOptions
from tests.runs import REPO, environment

SECRET = "a-key-that-nobody-may-see"


# --- answers --------------------------------------------------------------------------------------


def answer(**changes: Any) -> dict[str, Any]:
    choice = {
        "token_ids": [5, 2],
        "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]},
        "weight_versions": [{"version": "v1", "start": 0, "end": 2}],
    }
    return {"choices": [choice | changes]}


def test_an_answer_is_read() -> None:
    read = read_answer(answer(), "here")
    assert (read.token_ids, read.logprobs) == ((5, 2), (-0.5, -1.0))
    assert (read.finish_reason, read.labels) == ("stop", frozenset({"v1"}))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (None, "choices"),
        ([], "choices"),
        ({"choices": []}, "token_ids"),
        ({"choices": ["x"]}, "token_ids"),
        (answer(token_ids=None), "token_ids"),
        (answer(token_ids="__import__('os')"), "token_ids"),
        (answer(token_ids=[5, "2"]), "token_ids"),
        (answer(token_ids=[5, -2]), "token_ids"),
        (answer(token_ids=[5, 2.0]), "token_ids"),
        (answer(finish_reason=3), "finish_reason"),
        (answer(logprobs=None), "logprobs"),
        (answer(logprobs={"content": [{"logprob": -1}]}), "1 entries for 2 tokens"),
        (answer(logprobs={"content": [{"logprob": "-1"}, {}]}), r"content\[0\].logprob"),
        (answer(logprobs={"content": [{"logprob": -1}, {"logprob": 2}]}), r"content\[1\].logprob"),
        (answer(logprobs={"content": [{"logprob": float("nan")}] * 2}), r"content\[0\].logprob"),
        (answer(weight_versions=None), "weight_versions"),
        (answer(weight_versions=[{}]), r"weight_versions\[\].version"),
    ],
)
def test_a_malformed_answer_names_endpoint_and_field(content: Any, field: str) -> None:
    with pytest.raises(ValueError, match=rf"http://h:1/x: .*{field}"):
        read_answer(content, "http://h:1/x")


class Scripted(BaseHTTPRequestHandler):
    """A server that answers what the test wants."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str | None]] = []
    status, body = 200, b""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        type(self).seen.append((self.path, self.headers.get("Authorization")))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[Any, str]]:
    handler: Any = type("Handler", (Scripted,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"{}", "answered 401.*engine.api_key_env"),
        (404, b"{}", "answered 404.*VLLM_SERVER_DEV_MODE=1.*--enable-scale-out"),
        (307, b"", "answered 307"),
        (500, b"boom", "answered 500: boom"),
        (200, b"<html>", "answered with no JSON"),
        (200, b"\xff\xfe", "answered with no JSON"),
        (200, b"{}", "choices should be a list"),
    ],
)
def test_what_a_strange_server_answers(
    status: int, body: bytes, message: str, scripted: Any
) -> None:
    handler, url = scripted
    handler.status, handler.body = status, body
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(url, SECRET).complete(Request([3], {"max_tokens": 1}))
    assert url in str(caught.value)
    assert SECRET not in str(caught.value)
    assert handler.seen == [("/inference/v1/generate", f"Bearer {SECRET}")], "no redirect"


def test_a_server_that_is_not_there() -> None:
    endpoint = Endpoint("http://127.0.0.1:9", None, explain=lambda: " Its log ends with: out.")
    with pytest.raises(ConnectionError, match=r"1:9 does not answer.*out\..*resume=auto"):
        endpoint.ask("/health")


def test_a_users_server_must_report_the_right_logprobs(scripted: Any, tiny_folder: Path) -> None:
    handler, url = scripted
    model = {"logprobs_mode": "raw_logprobs", "max_model_len": 64}
    handler.body = json.dumps({"vllm_config": {"model_config": model}}).encode()
    engine = VLLMServerEngine(url=url)
    policy = load_causal_lm(BackboneOptions(path=str(tiny_folder)))
    with pytest.raises(ValueError, match="logprobs_mode='raw_logprobs'.*processed_logprobs"):
        engine.sync(policy, 0)
    assert not engine.is_ready


# --- what runs beside the server ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/health", b"", 200),
        ("/collective_rpc", b"", 401),
        ("/weight_info", b"Bearer wrong", 401),
        ("/collective_rpc", f"Bearer {SECRET}".encode(), 200),
        ("/health/../collective_rpc", b"", 401),
    ],
)
def test_the_guard_wants_the_key_everywhere(
    path: str, header: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    scope = {"type": "http", "path": path, "headers": [(b"authorization", header)]}
    asyncio.run(KeyGuard(app)(scope, None, send))
    assert sent[0]["status"] == status
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY"):
        KeyGuard(app)


def is_alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_the_watcher_ends_everything_when_its_starter_is_killed(tmp_path: Path) -> None:
    grandchild = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid); sys.stdout.flush(); p.wait()"  # noqa: E501
    starter = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'datamodules.engines.vllm_watch', "
        f"{str(tmp_path / 'weights')!r}, '--', "
        f"sys.executable, '-c', {grandchild!r}], stdin=subprocess.PIPE)\n"
        "time.sleep(300)\n"
    )
    (tmp_path / "weights").mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", starter],
        cwd=REPO,
        env=environment(PYTHONPATH=str(REPO)),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    sleeper = int(parent.stdout.readline())
    assert is_alive(sleeper)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while (is_alive(sleeper) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(sleeper)
    assert not (tmp_path / "weights").exists()
    parent.stdout.close()
