"""Replays recorded rollouts: the same completions for the same prompts, whatever the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Completion, FinishReason, Prompt


class ScriptedEngine(Engine):
    """Answers each prompt with its recorded completions, in the order of the record.

    Args:
        path: JSON-lines with ``uid``, ``token_ids`` and, where they matter, ``logprobs``,
            ``finish_reason``, ``policy_version``: what the sample table writes with ``keep=all``.
        records: The same as dictionaries, instead of a file.
        repeat: Start over when a prompt's record is used up (otherwise that is an error).

    Raises:
        ValueError: Neither or both of ``path`` and ``records``; a line that cannot be read.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        records: Iterable[Mapping[str, Any]] | None = None,
        repeat: bool = True,
    ) -> None:
        if (path is None) == (records is None):
            raise ValueError("engine=scripted needs engine.path=<recorded rollouts>.jsonl")
        self.repeat = repeat
        self._script: dict[str, list[Completion]] = {}
        self._place: dict[str, int] = {}
        for where, record in _read(Path(path)) if path is not None else enumerate(records or ()):
            try:
                ids = tuple(int(token) for token in record["token_ids"])
                logprobs = tuple(float(v) for v in record.get("logprobs") or [0.0] * len(ids))
                reason = FinishReason(record.get("finish_reason", "stop"))
                uid = str(record["uid"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"engine.path: {where}: not a recorded rollout ({error!r})"
                ) from error
            if len(logprobs) != len(ids):
                raise ValueError(
                    f"engine.path: {where}: {len(ids)} tokens, {len(logprobs)} logprobs"
                )
            self._script.setdefault(uid, []).append(Completion(ids, logprobs, reason))

    def sync(self, policy: Any, version: int) -> None:
        """Recorded completions do not depend on weights; only the version is noted."""
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The next ``sampling.samples`` recorded completions of each prompt.

        Raises:
            ValueError: A prompt without (enough) recorded completions.
        """
        return [[self._next(prompt.uid) for _ in range(sampling.samples)] for prompt in prompts]

    def _next(self, uid: str) -> Completion:
        script, place = self._script.get(uid), self._place.get(uid, 0)
        if not script or (place >= len(script) and not self.repeat):
            used = f"only {len(script)} recorded completions" if script else "none"
            raise ValueError(f"engine=scripted: prompt {uid!r} has {used}")
        self._place[uid] = place + 1
        found = script[place % len(script)]
        return Completion(found.token_ids, found.logprobs, found.finish_reason, self.policy_version)


def _read(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"engine.path={path}: no such file")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
