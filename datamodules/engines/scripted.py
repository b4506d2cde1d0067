"""Replays recorded rollouts: the same completions for the same prompts, whatever the weights.

A tree (``tree.grow_trees``) asks for chain ``n`` of a prompt by a uid that ends in ``#n``, behind
a prefix of tokens that it took from an earlier chain. A record with the columns ``chain`` and
``branch_pos`` answers that with what the chain added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from datamodules.engines.base import Engine, Sampling
from datamodules.experience import Candidates, Completion, FinishReason, Prompt


class ScriptedEngine(Engine):
    """Answers each prompt with its recorded completions, in the order of the record.

    Args:
        path: JSON-lines with ``uid``, ``token_ids`` and, where they matter, ``logprobs``,
            ``finish_reason``, ``candidates`` (ids and log-probs), ``chain`` and ``branch_pos``:
            what the sample table writes with ``keep=all``.
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
        self._script: dict[str, list[_Recorded]] = {}
        self._place: dict[str, int] = {}
        for where, record in _read(Path(path)) if path is not None else enumerate(records or ()):
            try:
                ids = tuple(int(token) for token in record["token_ids"])
                logprobs = tuple(float(v) for v in record.get("logprobs") or [0.0] * len(ids))
                reason = FinishReason(record.get("finish_reason", "stop"))
                uid = str(record["uid"])
                candidates = _candidates(record.get("candidates"))
                start = int(record.get("branch_pos") or 0)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"engine.path: {where}: not a recorded rollout ({error!r})"
                ) from error
            if len(logprobs) != len(ids):
                raise ValueError(
                    f"engine.path: {where}: {len(ids)} tokens, {len(logprobs)} logprobs"
                )
            recorded = Completion(ids, logprobs, reason, candidates=candidates)
            self._script.setdefault(uid, []).append(_Recorded(recorded, 0))
            if record.get("chain") is not None:
                chain = f"{uid}#{int(record['chain'])}"
                self._script.setdefault(chain, []).append(_Recorded(recorded, start))

    def sync(self, policy: Any, version: int) -> None:
        """Recorded completions do not depend on weights; only the version is noted."""
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The next ``sampling.samples`` recorded completions of each prompt.

        Raises:
            ValueError: A prompt without (enough) recorded completions.
        """
        return [[self._next(prompt) for _ in range(sampling.samples)] for prompt in prompts]

    def _next(self, prompt: Prompt) -> Completion:
        uid = prompt.uid
        script, place = self._script.get(uid), self._place.get(uid, 0)
        if not script or (place >= len(script) and not self.repeat):
            used = f"only {len(script)} recorded completions" if script else "none"
            raise ValueError(f"engine=scripted: prompt {uid!r} has {used}")
        self._place[uid] = place + 1
        whole, start = script[place % len(script)]
        prefix = whole.token_ids[:start]
        if start and prompt.token_ids[-start:] != prefix:
            raise ValueError(
                f"engine=scripted: {uid!r} was recorded behind {start} tokens of an earlier chain, "
                f"and now branches elsewhere: replay it with the weights and options of the record"
            )
        return replace(
            whole,
            token_ids=whole.token_ids[start:],
            logprobs=whole.logprobs[start:],
            policy_version=self.policy_version,
            candidates=None if whole.candidates is None else _behind(whole.candidates, start),
        )


class _Recorded(NamedTuple):
    completion: Completion
    start: int  # tokens that it shares with an earlier chain


def _behind(candidates: Candidates, start: int) -> Candidates:
    return Candidates(candidates.ids[start:], candidates.logprobs[start:])


def _candidates(columns: Any) -> Candidates | None:
    if columns is None:
        return None
    ids, logprobs = torch.tensor(columns["ids"]), torch.tensor(columns["logprobs"])
    if ids.shape != logprobs.shape or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError("candidates.ids and candidates.logprobs must be tables of one shape")
    return Candidates(ids, logprobs.float())


def _read(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"engine.path={path}: no such file")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from error
