"""Judges of local relevance: a task's own rules, or a language model that is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.agents import load_language_model
from datamodules.engines.base import Engine, Sampling
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.labelling.judge_texts import (
    passage_text,
    read_facts,
    read_scores,
    relevance_text,
    sub_answer_text,
)
from datamodules.labelling.records import Judge, JudgeRequest, Trajectory
from datamodules.prepared import fingerprint
from datamodules.sources import nearest
from datamodules.tasks.base import Split, Task
from datamodules.tasks.searching import SearchTask
from datamodules.tasks.verdict_format import (
    as_chat,
    break_up,
    control_strings,
    cut_to_fit,
    token_ids,
)

LONGEST_TEMPLATE = 1024  # tokens that a prompt needs besides the texts that may be cut


class TaskJudge(Judge):
    """The task's own judge: exact rules, no language model.

    Args:
        task: Has ``relevance`` and ``sub_answers``.

    Raises:
        ValueError: The task has no judge of its own.
    """

    def __init__(self, task: SearchTask) -> None:
        if type(task).relevance is SearchTask.relevance:
            raise ValueError(
                f"data.judge: task '{task.name}' has no judge of its own; name a language model"
            )
        self.task = task
        self.fingerprint = f"task/{task.name}/{task.corpus.digest}"

    def sub_answers(self, trajectories: Sequence[Trajectory]) -> list[list[str] | None]:
        """See ``SearchTask.sub_answers``; None where the count differs from that of the queries."""
        found = [self.task.sub_answers(t.question, t.queries, t.is_right) for t in trajectories]
        pairs = zip(found, trajectories, strict=True)
        return [facts if len(facts) == len(t.turns) else None for facts, t in pairs]

    def scores(self, requests: Sequence[JudgeRequest]) -> list[list[int] | None]:
        """See ``SearchTask.relevance``; None where the count differs from that of the passages."""
        found: list[list[int] | None] = []
        for one in requests:
            scores = self.task.relevance(one.query, one.passages, one.sub_answer)
            is_whole = len(scores) == len(one.passages)
            found.append([min(100, max(0, int(score))) for score in scores] if is_whole else None)
        return found


class LMJudge(Judge):
    """Asks a language model, greedily [code: temperature 0, at most 1000 new tokens].

    Passages and transcripts are cut to one common bound where a prompt would be too long; the
    words of the prompt are never cut. An answer that did not end by itself is not read.

    Args:
        engine: Holds the judge's weights.
        tokenizer: Of the same model; its chat template is used if it has one.
        fingerprint: Names model and weights, e.g. ``prepared.fingerprint(folder)``.
        max_prompt_tokens: Longest prompt.
        max_new_tokens: Longest answer.
        batch_size: Most prompts a call of the engine.

    Raises:
        ValueError: The engine has no weights, or a bound is too small.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fingerprint: str,
        max_prompt_tokens: int = 8192,
        max_new_tokens: int = 1000,
        batch_size: int = 256,
    ) -> None:
        problems = []
        if not engine.is_ready:
            problems.append("data.judge: the engine has no weights, call sync(model, 0) first")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                problems.append(f"data.judge.{name}={value} must be at least 1")
        if max_prompt_tokens < LONGEST_TEMPLATE:
            problems.append(
                f"data.judge.max_prompt_tokens={max_prompt_tokens} must be at least "
                f"{LONGEST_TEMPLATE}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        self.engine, self.tokenizer, self.batch_size = engine, tokenizer, batch_size
        self.longest = max_prompt_tokens
        self.sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
        self.fingerprint = f"lm/{fingerprint}/{max_prompt_tokens}/{max_new_tokens}"
        self._controls = control_strings(tokenizer)

    def sub_answers(self, trajectories: Sequence[Trajectory]) -> list[list[str] | None]:
        """One prompt a trajectory; those without a search need none."""
        asked = [one for one in trajectories if one.turns]
        prompts = [self._sub_answer_prompt(number, one) for number, one in enumerate(asked)]
        answers = iter(self._answers(prompts))
        found: list[list[str] | None] = []
        for one in trajectories:
            text = next(answers) if one.turns else ""
            found.append(None if text is None else read_facts(text, len(one.turns)))
        return found

    def scores(self, requests: Sequence[JudgeRequest]) -> list[list[int] | None]:
        """One prompt a request."""
        prompts = [self._relevance_prompt(number, one) for number, one in enumerate(requests)]
        pairs = zip(self._answers(prompts), requests, strict=True)
        return [None if t is None else read_scores(t, len(one.passages)) for t, one in pairs]

    def _sub_answer_prompt(self, number: int, trajectory: Trajectory) -> Prompt:
        transcript = trajectory.prompt.task.render(trajectory.completion.token_ids)
        return self._prompt(
            f"sub_answers/{number}", [transcript], lambda texts: sub_answer_text(trajectory, *texts)
        )

    def _relevance_prompt(self, number: int, request: JudgeRequest) -> Prompt:
        texts = [passage_text(passage) for passage in request.passages]
        return self._prompt(f"scores/{number}", texts, lambda texts: relevance_text(request, texts))

    def _prompt(
        self, uid: str, texts: Sequence[str], ask: Callable[[Sequence[str]], str]
    ) -> Prompt:
        """A prompt whose texts are cut so that it fits."""

        def encode(cut: Sequence[str]) -> list[int]:
            text = as_chat(self.tokenizer, break_up(ask(cut), self._controls))
            return token_ids(self.tokenizer, text)

        room = self.longest - len(encode([""] * len(texts)))
        if room < 0:
            raise ValueError(
                f"data.judge.max_prompt_tokens={self.longest}: question and queries alone need "
                f"{-room} tokens more"
            )
        ids = cut_to_fit(self.tokenizer, texts, encode, room, self.longest)
        return Prompt(uid, tuple(ids), _Asked())

    def _answers(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """What the model wrote; None where it did not end by itself."""
        found: list[str | None] = []
        with self.engine.keyed("judge"):
            for start in range(0, len(prompts), self.batch_size):
                batch = prompts[start : start + self.batch_size]
                for (one,) in self.engine.generate(batch, self.sampling):
                    found.append(self._text(one))
        return found

    def _text(self, completion: Completion) -> str | None:
        if completion.finish_reason is not FinishReason.STOP:
            return None
        return str(self.tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))


class _Asked(Task):
    """The task of a judge's prompts: nothing is drawn from it or verified."""

    name = "judge"

    def records(self, split: Split) -> Sequence[Any]:
        return []

    def prompt(self, record: Prompt) -> Prompt:
        return record

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        return {"reward": 0.0}


def open_judge(options: Mapping[str, Any], task: SearchTask, *, needed: bool) -> Judge | None:
    """The judge that a config names.

    Args:
        options: ``data.judge``: ``path`` of a language model (None: the task's own judge), its
            ``engine`` and ``dtype``, bounds of ``LMJudge``.
        task: Questions and corpus.
        needed: Whether local labels are wanted; else nothing is loaded.

    Raises:
        ValueError: An unknown key, or the task has no judge of its own.
    """
    known = ("path", "engine", "dtype", "max_prompt_tokens", "max_new_tokens", "batch_size")
    unknown = [name for name in options if name not in known]
    if unknown:
        keys = (f"unknown key 'data.judge.{name}'{nearest(name, known)}" for name in unknown)
        raise ValueError("; ".join(keys))
    if not needed:
        return None
    values = {name: value for name, value in options.items() if name in known[3:]}
    path, engine = options.get("path"), options.get("engine") or HFEngine()
    if not path:
        return TaskJudge(task)
    model, tokenizer = load_language_model(path, options.get("dtype") or "auto")
    engine.sync(model, 0)
    return LMJudge(engine, tokenizer, fingerprint=fingerprint(path), **values)
