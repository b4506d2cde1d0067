"""Reward functions: a batch of rollouts in, one number each (and its parts) out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from datamodules.experience import FinishReason, Rollouts
from datamodules.tasks.chat_prompts import Chat, answer_part


class RewardFunction(Protocol):
    """Scores a whole batch at once, so that a reward may look at its group."""

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Named parts ``(N,)``; ``reward`` is the total."""


class VerifierReward:
    """The verifier of each prompt's own task.

    Args:
        truncated: Reward of a completion that was cut off or failed; None lets the verifier judge
            it as it is.
    """

    def __init__(self, *, truncated: float | None = 0.0) -> None:
        self.truncated = truncated

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Verify each completion by its own task. Parts that a task lacks are 0.

        Raises:
            ValueError: A task that only a reward model can score.
        """
        for task in {id(prompt.task): prompt.task for prompt in rollouts.prompts}.values():
            if getattr(task, "needs_reward_model", False):
                raise ValueError(
                    f"task '{task.name}' has no verifier, and reward=verifier has nothing else: "
                    f"use reward=model reward.path=<folder or hub name of a reward model>"
                )
        return self.verified(rollouts)

    def verified(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """What the verifiers say, whether or not a task has one of its own."""
        rows = []
        for prompt, completion in zip(rollouts.prompts, rollouts.completions, strict=True):
            row = dict(prompt.task.verify(prompt, completion))
            if self.truncated is not None and completion.finish_reason is not FinishReason.STOP:
                row["reward"] = self.truncated
            rows.append(row)
        names = sorted({name for row in rows for name in row} | {"reward"})
        return {name: torch.tensor([row.get(name, 0.0) for row in rows]) for name in names}


class RewardModel(VerifierReward):
    """A scalar reward model for some domains, the verifiers for all others.

    The score is the one logit of a sequence-classification model on the conversation with the
    response, the thinking part removed, written by the model's own tokenizer and chat template.
    Rule rewards stand beside raw logits, unaligned [code]; GRPO's division by the group's standard
    deviation takes the scales away. A score that is not finite counts in the part ``reward_nan``
    and becomes the lowest finite score of its group, 0 where there is none [our choice: it must
    neither win nor end the run].

    The model is loaded on first use and is no part of the module: it is neither trained, saved nor
    sharded, and every rank has its own.

    Args:
        path: Folder or hub name of the model.
        domains: Those it scores; None for all prompts whose task has a ``conversation``.
        device: ``cpu``, ``cuda`` ...; None for the accelerator of this process where there is one.
        dtype: Of its parameters: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        batch_size: Conversations a forward pass.
        max_tokens: Longer conversations lose their beginning.
        strict: Thinking that never ends leaves an empty response; else all of it is scored [code].
        truncated: Reward of a completion that was cut off or failed, in every domain; None scores
            it as it is [code].
        trust_remote_code: Run code that comes with the model; off unless asked.
        revision: Of a hub repository.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> reward = RewardModel(path="Skywork/Skywork-Reward-V2-Llama-3.1-8B", domains=["chat"])
    """

    def __init__(
        self,
        *,
        path: str,
        domains: Sequence[str] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
        max_tokens: int = 8192,
        strict: bool = False,
        truncated: float | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        super().__init__(truncated=truncated)
        problems = [
            f"reward.{name}={value} must be at least 1"
            for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens))
            if value < 1
        ]
        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            problems.append(f"reward.dtype={dtype!r}: allowed are float32, bfloat16, float16, auto")
        if not path:
            problems.append("reward.path is not set: name a folder or hub name of a reward model")
        if problems:
            raise ValueError("; ".join(problems))
        self.path, self.domains = path, None if domains is None else tuple(domains)
        self.device, self.dtype = device, dtype
        self.batch_size, self.max_tokens, self.strict = batch_size, max_tokens, strict
        self.options: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        self._model: Any = None
        self._tokenizer: Any = None

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Verify all, then put scores over the rewards of this model's domains.

        Raises:
            ValueError: A task without a verifier is of none of ``reward.domains``, or the model
                cannot be used.
        """
        rows = self._own_rows(rollouts)
        parts = self.verified(rollouts)
        model_score = torch.zeros(len(rollouts))
        is_nan = torch.zeros(len(rollouts))
        if rows:
            chats = [
                rollouts.prompts[row].task.conversation(  # type: ignore[attr-defined]
                    rollouts.prompts[row], rollouts.completions[row]
                )
                for row in rows
            ]
            where = torch.tensor(rows)
            scores = self.scores(
                [(chat, answer_part(text, strict=self.strict)) for chat, text in chats]
            )
            is_nan[where] = (~scores.isfinite()).float()
            model_score[where] = replace_bad(scores, rollouts.groups[where])
            is_done = torch.tensor(
                [rollouts.completions[row].finish_reason is FinishReason.STOP for row in rows]
            )
            is_judged = where if self.truncated is None else where[is_done]
            parts["reward"][is_judged] = model_score[is_judged]
        return parts | {"reward_model": model_score, "reward_nan": is_nan}

    def _own_rows(self, rollouts: Rollouts) -> list[int]:
        rows = []
        for row, prompt in enumerate(rollouts.prompts):
            can = hasattr(prompt.task, "conversation")
            is_asked = can if self.domains is None else prompt.domain in self.domains
            if is_asked and not can:
                raise ValueError(
                    f"reward.domains has {prompt.domain!r}, but its task '{prompt.task.name}' has "
                    f"no conversations that a reward model could read; leave it to its verifier"
                )
            if not is_asked and getattr(prompt.task, "needs_reward_model", False):
                raise ValueError(
                    f"reward.domains={list(self.domains or ())} leaves out {prompt.domain!r}, "
                    f"whose task '{prompt.task.name}' has no verifier: add it"
                )
            rows += [row] if is_asked else []
        return rows

    def scores(self, items: Sequence[tuple[Chat, str]]) -> Tensor:
        """Raw logits ``(N,)`` of conversations and responses, in float32 on the CPU.

        Args:
            items: Turns before the response, and the response.
        """
        self._load()
        texts = [self._text(chat, response) for chat, response in items]
        # like lengths together: less padding; the order is put back below
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        out = torch.zeros(len(texts))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self._tokenizer(
                [texts[place] for place in places],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                add_special_tokens=not self._tokenizer.chat_template,
            ).to(self._model.device)
            with torch.no_grad():
                logits = self._model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits
            out[torch.tensor(places)] = logits[:, 0].float().cpu()
        return out

    def _text(self, chat: Chat, response: str) -> str:
        turns = [{"role": role, "content": content} for role, content in chat]
        turns.append({"role": "assistant", "content": response})
        if self._tokenizer.chat_template:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)

    def _load(self) -> None:
        if self._model is not None:
            return
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                self.path, dtype=self.dtype, num_labels=1, **self.options
            )
            tokenizer = AutoTokenizer.from_pretrained(self.path, **self.options)
        except (OSError, ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300]
            raise ValueError(
                f"reward.path={self.path!r} could not be loaded as a sequence-classification "
                f"model with one label ({first})"
            ) from error
        tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # the classification head reads the last token that is no padding
        model.config.pad_token_id = tokenizer.pad_token_id
        self._model = model.requires_grad_(False).eval().to(self._place())
        self._tokenizer = tokenizer

    def _place(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else (torch.device("cpu"))
        )


def replace_bad(scores: Tensor, groups: Tensor) -> Tensor:
    """Scores ``(N,)`` with those that are not finite replaced by their group's lowest, else 0.

    Args:
        scores: ``(N,)``.
        groups: ``(N,)`` index of the prompt.

    Example:
        >>> replace_bad(torch.tensor([2.0, math.nan, 1.0, math.nan]), torch.tensor([0, 0, 0, 1]))
        tensor([2., 1., 1., 0.])
    """
    out = scores.clone()
    for row in (~scores.isfinite()).nonzero().flatten().tolist():
        others = scores[(groups == groups[row]) & scores.isfinite()]
        out[row] = others.min() if len(others) else 0.0
    return out
