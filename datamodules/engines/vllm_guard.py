"""Runs inside the vLLM server that we start: every route but ``/health`` wants the key."""

from __future__ import annotations

import os
import secrets
from typing import Any


class KeyGuard:
    """ASGI middleware that refuses requests without the key of ``VLLM_API_KEY``.

    Args:
        app: What it guards.

    Raises:
        RuntimeError: There is no key.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ.get('VLLM_API_KEY', '')}".encode()
        if self.expected == b"Bearer ":
            raise RuntimeError("VLLM_API_KEY is not set")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or answer 401."""
        is_open = scope["type"] == "lifespan" or scope.get("path") == "/health"
        given = dict(scope.get("headers") or []).get(b"authorization", b"")
        if is_open or secrets.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "no key"}'})
