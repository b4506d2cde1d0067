"""Writing prompts from a file, each of a hidden type: long texts want a plan, short ones none.

A row has a ``prompt`` (text, or ``messages`` as in ``chat_prompts``) and a ``type``, ``long`` or
``short``. The type is for rewards and metrics only, as on our UniCreative card, sections 2 and 8
[summary site]: neither it nor any other column reaches token ids. Reference texts are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import Fields, Role
from datamodules.tasks.chat_prompts import ROLES as CHAT_ROLES
from datamodules.tasks.chat_prompts import Chat, ChatPrompts, ChatRecord
from datamodules.tasks.planning import (
    THINK_TAGS,
    Kind,
    Mode,
    PlannedTask,
    PlannedText,
    read_plan_text,
)
from datamodules.tasks.verdict_format import token_ids, token_text

ROLES = {
    "prompt": Role((*CHAT_ROLES["prompt"].names, "query")),
    "type": Role(("type", "kind", "length"), is_label=True),
}
KINDS: dict[str, Kind] = {"long": "long", "short": "short"}


def plan_prompt(tags: Sequence[str]) -> str:
    """The usual system prompt: a plan is optional, and nobody reads it.

    Args:
        tags: The opening and the closing one.
    """
    return (
        f"Planning is optional: you may plan inside {tags[0]} and {tags[1]} first, or write the "
        "text at once. Readers see the text only, without the plan."
    )


@dataclass(frozen=True)
class WritingRecord(ChatRecord):
    """One conversation that waits for a text.

    Args:
        kind: The hidden type; None where the split ``predict`` has none.
    """

    kind: Kind | None = None


class WritingPrompts(ChatPrompts, PlannedTask):
    """Writing prompts of a hidden type, with an optional plan in front of the text.

    A prompt's domain is its type, so that ``data.prompts_per_rollout`` can balance both; it is
    ``writing`` where the type is not known.

    Args:
        system_prompt: ``auto`` says that planning is optional (``plan_prompt``); None for nothing.
        tags: Opening and closing tag of a plan; those of Qwen3 by default.
        min_plan_tokens: Fewest tokens of a plan [our choice, card section 3: 8].
        **options: Of ``ChatPrompts``, ``FilePrompts`` and ``RowOptions``.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "writing_prompts"
    domain = "writing"
    roles = ROLES
    needs_reward_model = False  # verify knows whether the mode is right

    def __init__(
        self,
        *,
        system_prompt: str | None = "auto",
        tags: Sequence[str] = THINK_TAGS,
        min_plan_tokens: int = 8,
        **options: Any,
    ) -> None:
        problems = _tag_problems(tags)
        if min_plan_tokens < 1:
            problems.append(f"data.task.min_plan_tokens={min_plan_tokens}: 1 or more is needed")
        if problems:
            raise ValueError("\n".join(problems))
        said = plan_prompt(tags) if system_prompt == "auto" else system_prompt
        super().__init__(system_prompt=said, **options)
        self.tags, self.min_plan_tokens = (tags[0], tags[1]), min_plan_tokens

    def make_record(self, fields: Fields) -> WritingRecord:
        """A conversation of a row, and its type.

        Args:
            fields: The row.

        Raises:
            BadRowError: As in ``ChatPrompts``, or the type is neither long nor short.
        """
        chat = super().make_record(fields)
        kind: Kind | None = None
        if fields.is_scored or fields.has("type"):
            value = fields.text("type")
            kind = KINDS.get(value.strip().lower())
            if kind is None:
                raise fields.bad("type", "bad_type", f"is {value[:40]!r}; use long or short")
        return WritingRecord(chat.uid, chat.chat, chat.where, kind)

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and refuse one with which a policy cannot choose.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: It cannot write the tags, its chat template opens a plan by itself, or what
                stands around a text alone is too long.
        """
        super().bind(tokenizer)
        sample = f"{self.tags[0]}a{self.tags[1]}b"
        ids = token_ids(tokenizer, sample)
        back = token_text(tokenizer, ids)
        if tokenizer.unk_token_id in ids or back.strip() != sample:
            raise ValueError(
                f"data.task.tags={list(self.tags)}: the tokenizer of "
                f"{tokenizer.name_or_path or 'this checkpoint'} writes {sample!r} as {back!r}; "
                "choose other tags, a byte-level tokenizer or a real model's"
            )
        frame = token_text(tokenizer, self.writer.prompt("a")[0]).rstrip()
        if frame.endswith(self.tags[0]):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path or 'this checkpoint'} ends with "
                f"{self.tags[0]}, so that every text begins with a plan: use a model that may "
                "choose, data.task.chat_template=off or other data.task.tags"
            )

    def prompt(self, record: ChatRecord) -> Prompt:
        """The prompt of a record.

        Args:
            record: One of ``records``.
        """
        kind = record.kind if isinstance(record, WritingRecord) else None
        return replace(super().prompt(record), domain=kind or self.domain)

    def kind(self, prompt: Prompt) -> Kind:
        """The hidden type.

        Args:
            prompt: One of this task.

        Raises:
            ValueError: Its row has none, as the split ``predict`` allows.
        """
        record: WritingRecord = prompt.record
        if record.kind is None:
            raise ValueError(f"{record.where}: the row has no type, long or short")
        return record.kind

    def read_plan(self, prompt: Prompt, completion: Completion) -> PlannedText:
        """Take a completion apart by its text, see ``planning``. Never raises.

        Args:
            prompt: What was asked.
            completion: What was written.
        """
        return read_plan_text(
            completion.token_ids,
            self.tokenizer,
            is_finished=completion.finish_reason is FinishReason.STOP,
            tags=self.tags,
            min_plan_tokens=self.min_plan_tokens,
        )

    def conversation(self, prompt: Prompt, completion: Completion) -> tuple[Chat, str]:
        """What a judge or a reward model reads: the turns before, and the text without its plan.

        Args:
            prompt: What was asked; the turns are the file's own, not cut.
            completion: What was written; one that does not parse gives "".
        """
        return prompt.record.chat, self.read_plan(prompt, completion).content

    def plan_prefix(self, mode: Mode) -> tuple[int, ...]:
        """The opening tag, or an empty span as the chat template of Qwen3 writes it.

        Args:
            mode: ``plan`` or ``direct``.
        """
        first, last = self.tags
        text = first if mode == "plan" else f"{first}\n\n{last}\n\n"
        return tuple(token_ids(self.tokenizer, text))

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Whether the mode is right; the text itself is for judges. Never raises.

        Args:
            prompt: What was asked.
            completion: What was written.

        Returns:
            ``reward`` and ``mode``, 1 where a plan is there if and only if it should be and the
            completion parses; ``plan``; ``valid``; ``content_tokens``. Without a type the mode is
            not right.
        """
        read = self.read_plan(prompt, completion)
        kind = prompt.record.kind
        is_right = kind is not None and read.has_plan == (kind == "long")
        is_valid = read.error is None
        return {
            "reward": float(is_right and is_valid),
            "mode": float(is_right and is_valid),
            "plan": float(read.has_plan),
            "valid": float(is_valid),
            "content_tokens": float(read.content_tokens),
        }


def _tag_problems(tags: Sequence[str]) -> list[str]:
    """What is wrong with the tags: one message or none."""
    is_right = not isinstance(tags, str) and len(tags) == 2
    is_right = is_right and all(isinstance(tag, str) and tag and tag == tag.strip() for tag in tags)
    if is_right and tags[0] not in tags[1] and tags[1] not in tags[0]:
        return []
    shown = tags if isinstance(tags, str) else list(tags)
    return [f"data.task.tags={shown!r}: two texts without white space around them are needed, "
            "neither of them part of the other"]  # fmt: skip
