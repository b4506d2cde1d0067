"""A vLLM server over HTTP: what is asked of it, and one that we start and stop ourselves.

vLLM's own key guards ``/v1`` and ``/inference`` but not the development routes, through which
weights are loaded; the server that we start is guarded whole (``vllm_guard.KeyGuard``).
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datamodules.engines.pushed import Answer, Request, top_candidates

MAX_ANSWER_BYTES = 2**28
GENERATE = "/inference/v1/generate"
#: What a server must be started with; vLLM's defaults lack all of it.
SERVER_NEEDS = (
    "VLLM_SERVER_DEV_MODE=1 and --enable-scale-out --logprobs-mode processed_logprobs "
    "--generation-config vllm (on a CPU also --no-enable-chunked-prefill)"
)


def check_url(url: str, key: str | None) -> None:
    """Refuse an endpoint that would give weights and completions to anybody.

    Args:
        url: Of the server.
        key: Sent as a bearer token; None for none.

    Raises:
        ValueError: It is no plain http(s) address, holds a password, or is open to a network.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"engine.url={url!r} must look like http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.path.strip("/"):
        raise ValueError(
            "engine.url must be scheme, host and port alone; a key belongs into an environment "
            "variable: engine.api_key_env=<its name>"
        )
    if key is None and not is_loopback(parts.hostname):
        raise ValueError(
            f"engine.url={url!r} is not on this machine and has no key: whoever reaches it can "
            f"load weights. Start the server with VLLM_API_KEY, export the same key here and give "
            f"engine.api_key_env=<name of the variable>"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint:
    """Requests to a server, from any thread.

    Args:
        url: Scheme, host and port.
        key: Bearer token, kept in memory alone.
        timeout: Seconds an answer may take.
        explain: What to add to the error when it does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout: float = 600.0,
        explain: Callable[[], str] = str,
    ) -> None:
        check_url(url, key)
        self.url, self.timeout = url.rstrip("/"), timeout
        self._key, self._explain = key, explain

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON, or None where it is empty; a body makes it a POST.

        Raises:
            ConnectionError: It does not answer.
            ValueError: It answers with an error, or with something that is no JSON.
        """
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body)
        try:
            status, text = self._send("GET" if data is None else "POST", path, data, headers)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"the vLLM endpoint {self.url} does not answer ({type(error).__name__}: {error})."
                f"{self._explain()} Once it can run again, go on with resume=auto"
            ) from error
        if status != 200:
            hint = f"; it must be started with {SERVER_NEEDS}" if status in (403, 404) else ""
            hint = "; is the key of engine.api_key_env the server's?" if status == 401 else hint
            raise ValueError(f"{self.url}{path} answered {status}: {text[:300]}{hint}")
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.url}{path} answered with no JSON: {text[:100]!r}") from error

    def _send(
        self, method: str, path: str, data: str | None, headers: dict[str, str]
    ) -> tuple[int, str]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        # a connection of its own: kept ones go stale while the trainer trains
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES + 1)
        if len(content) > MAX_ANSWER_BYTES:
            raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        return response.status, content.decode("utf-8", errors="replace")

    def complete(self, request: Request) -> Answer:
        """One completion."""
        body = {"token_ids": request.prompt_ids, "sampling_params": request.parameters}
        count = int(request.parameters.get("logprobs") or 0)
        return read_answer(self.ask(GENERATE, body), f"{self.url}{GENERATE}", count)


def read_answer(content: Any, where: str, num_candidates: int = 0) -> Answer:
    """A completion from a server's JSON: numbers and short texts, nothing else.

    Args:
        content: What the server sent.
        where: For messages.
        num_candidates: Most probable tokens a position that were asked for.

    Raises:
        ValueError: Names the field that is missing or of another kind.
    """

    def field(node: Any, name: str, kind: type, place: str) -> Any:
        value = node.get(name) if isinstance(node, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value)[:60]
            raise ValueError(
                f"{where}: the answer's {place}{name} should be a {kind.__name__}, got {shown}"
            )
        return value

    choices = field(content, "choices", list, "")
    choice = choices[0] if choices else None
    ids = field(choice, "token_ids", list, "choices[0].")
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise ValueError(f"{where}: the answer's choices[0].token_ids are not all token ids")
    reason = field(choice, "finish_reason", str, "choices[0].")
    reported = field(choice, "logprobs", dict, "choices[0].")
    content = field(reported, "content", list, "choices[0].logprobs.")
    logprobs = [
        _logprob(item, where, f"choices[0].logprobs.content[{i}].")
        for i, item in enumerate(content)
    ]
    if len(logprobs) != len(ids):
        raise ValueError(
            f"{where}: the answer's choices[0].logprobs.content has {len(logprobs)} entries for "
            f"{len(ids)} tokens"
        )
    spans = field(choice, "weight_versions", list, "choices[0].")
    labels = [field(one, "version", str, "choices[0].weight_versions[].") for one in spans]
    positions = []
    for i, item in enumerate(content if num_candidates else ()):
        place = f"choices[0].logprobs.content[{i}].top_logprobs"
        listed = field(item, "top_logprobs", list, place.removesuffix("top_logprobs"))
        positions.append(
            {field(one, "token_id", int, f"{place}[]."): _logprob(one, where, f"{place}[].")
             for one in listed}
        )  # fmt: skip
    candidates = top_candidates(positions, num_candidates)
    return Answer(tuple(ids), tuple(logprobs), reason, frozenset(labels), candidates)


def _logprob(item: Any, where: str, place: str) -> float:
    value = item.get("logprob") if isinstance(item, dict) else None
    # not <= also finds nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= 1e-3:
        raise ValueError(
            f"{where}: the answer's {place}logprob should be a log-probability, got {value!r}"
        )
    return float(value)


class LocalServer:
    """A vLLM server of our own: loopback, a free port, a random key, ended with this process.

    Args:
        model: Folder with configuration and weights.
        arguments: Of vLLM's server, besides those that every server of ours gets.
        log: File of its output.
        startup_timeout: Seconds until it must answer.
        weights: Folder that is removed when the server has ended.
        devices: ``CUDA_VISIBLE_DEVICES`` of the server; None leaves it.

    Raises:
        ConnectionError: It died or did not answer in time; the message has the log's end.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        *,
        log: Path,
        startup_timeout: float,
        weights: Path,
        devices: str | None = None,
    ) -> None:
        self.log, self.weights, self.key = log, weights, secrets.token_urlsafe(32)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | dict(os.environ)
        environment |= {
            "VLLM_API_KEY": self.key,  # not on the command line, which every user can read
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # of the trainer's processes
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--served-model-name", "policy"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--enable-scale-out"]
        command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        command += ["--skip-tokenizer-init", "--uvicorn-log-level", "warning"]
        command += ["--middleware", "datamodules.engines.vllm_guard.KeyGuard", *arguments]
        watch = [sys.executable, "-m", "datamodules.engines.vllm_watch", str(weights.resolve())]
        watch += ["--", *command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            # the watcher ends the server when this pipe closes, however this process ends
            self._process = subprocess.Popen(
                watch, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment
            )
        try:
            self._wait(startup_timeout)
        except BaseException:
            self.close()
            raise

    def _wait(self, limit: float) -> None:
        endpoint = Endpoint(self.url, self.key, timeout=5.0)
        deadline = time.monotonic() + limit
        while True:
            if self._process.poll() is not None:
                raise ConnectionError(
                    f"the vLLM server ended with status {self._process.returncode} before it "
                    f"answered.{self.tail()}"
                )
            try:
                endpoint.ask("/health")
                return
            except (ConnectionError, ValueError):
                pass
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"the vLLM server did not answer within engine.startup_timeout={limit:g} s."
                    f"{self.tail()}"
                )
            time.sleep(0.3)

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def tail(self, lines: int = 8) -> str:
        """The end of its log, for messages."""
        text = self.log.read_text(errors="replace") if self.log.is_file() else ""
        last = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
        state = "is running" if self.is_running else f"ended ({self._process.returncode})"
        shown = " | ".join(last).replace(self.key, "<key>")
        return f" The server {state}; its log {self.log} ends with: {shown}"

    def close(self) -> None:
        """End the server and wait for it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
