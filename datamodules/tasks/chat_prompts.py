"""Chat prompts from a file, without answers: a reward model scores what is written.

A row has a ``prompt`` (text) or ``messages`` (a conversation that ends with a turn of the user).
The task has no verifier of its own: ``verify`` gives 0, and ``reward=model`` scores its domain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, Prompt
from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.prompt_writer import LongPolicy, PromptWriter
from datamodules.sources import BadRowPolicy
from datamodules.tasks.base import Split, Task

Chat = tuple[tuple[str, str], ...]
ROLES = {"prompt": Role(("prompt", "messages", "conversation", "question", "instruction"))}


def answer_part(text: str, *, strict: bool = False) -> str:
    """A response without its thinking part and without the tags around the rest.

    Thinking ends with the last ``</think>``; of ``<response> ... </response>`` the inside stays.

    Args:
        text: What the policy wrote.
        strict: Give "" for thinking that never ends; else it is taken as it is [code].

    Example:
        >>> answer_part("<think>hm</think> <response>Yes.</response>")
        'Yes.'
    """
    _, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return "" if strict else text.strip()
    inside = re.search(r"<response>(.*?)(?:</response>|\Z)", rest, re.DOTALL)
    return (inside.group(1) if inside else rest).strip()


@dataclass(frozen=True)
class ChatRecord:
    """One conversation that waits for an answer.

    Args:
        uid: Stable identity.
        chat: Turns as (role, content).
        where: ``file:line``.
    """

    uid: str
    chat: Chat
    where: str

    @property
    def text(self) -> str:
        """What is asked: the one turn as it is, several with their roles."""
        if len(self.chat) == 1:
            return self.chat[0][1]
        return "\n".join(f"{role}: {content}" for role, content in self.chat)


def make_record(fields: Fields) -> ChatRecord:
    """A conversation of a row.

    Args:
        fields: The row.

    Raises:
        BadRowError: It is neither text nor a conversation that ends with a turn of the user.
    """
    value: Any = fields.value("prompt")
    if not isinstance(value, list):
        return ChatRecord(fields.uid, (("user", fields.text("prompt")),), fields.where)
    turns = []
    for turn in value:
        role, content = (
            (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else ("", 0)
        )
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            shape = '{"role": system | user | assistant, "content": text}'
            raise fields.bad("prompt", "not_a_chat", f"needs messages {shape}")
        turns.append((role, content))
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise fields.bad("prompt", "no_question", "must end with a message of the user")
    return ChatRecord(fields.uid, tuple(turns), fields.where)


class ChatPrompts(Task):
    """Conversations from a file, for a reward model to score the answers.

    Args:
        path: File, folder of ``datasets.save_to_disk`` or hub name.
        before: Text before every prompt, such as how to think and to answer.
        after: Text behind every prompt.
        system_prompt: Said first; None for nothing.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never. Several turns
            become one text with their roles [our choice: base models have no template].
        max_prompt_tokens: Upper bound of a prompt.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        on_too_long: ``cut`` (in the middle), ``skip`` or ``error``.
        columns: Role (``prompt``, ``uid``) to column where the usual names do not do.
        format: ``auto`` or a format of ``sources.FORMATS``.
        val_path: Validation prompts from elsewhere.
        test_path: Test prompts from elsewhere.
        val_fraction: Share of the rows of ``path`` for validation.
        test_fraction: Share of the rows of ``path`` for testing.
        seed: Changes the split.
        on_bad_row: ``error`` or ``skip`` and count.
        max_bad_share: Share of bad rows that ``error`` leaves out with a warning.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "chat_prompts"
    #: Only a reward model can score this task: ``rewards.VerifierReward`` refuses it.
    needs_reward_model = True

    def __init__(
        self,
        *,
        path: str,
        before: str = "",
        after: str = "",
        system_prompt: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        max_prompt_tokens: int = 512,
        max_new_tokens: int | None = None,
        on_too_long: LongPolicy = "cut",
        columns: Mapping[str, str | None] | None = None,
        format: str = "auto",
        val_path: str | None = None,
        test_path: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        seed: int = 0,
        on_bad_row: BadRowPolicy = "error",
        max_bad_share: float = 0.0,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.writer = PromptWriter(
            before=before,
            after=after,
            system_prompt=system_prompt,
            chat_template=chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_too_long=on_too_long,
        )
        self.file: PromptFile[ChatRecord] = PromptFile(
            path,
            roles=ROLES,
            make_record=make_record,
            columns=columns,
            format=format,
            val_path=val_path,
            test_path=test_path,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            on_bad_row=on_bad_row,
            max_bad_share=max_bad_share,
        )

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer."""
        super().bind(tokenizer)
        self.writer.bind(tokenizer)

    def records(self, split: Split) -> list[ChatRecord]:
        """All conversations of a split that fit."""
        records = self.file.records(split)
        return self.writer.screen(records, lambda record: (record.text, record.where))

    def prompt(self, record: ChatRecord) -> Prompt:
        """The conversation as one prompt."""
        return Prompt(
            uid=record.uid,
            token_ids=self.writer.prompt(record.text)[0],
            task=self,
            domain="chat",
            record=record,
            max_new_tokens=self.max_new_tokens,
        )

    def conversation(self, prompt: Prompt, completion: Completion) -> tuple[Chat, str]:
        """What a reward model judges: the turns before, and the text that was written.

        Args:
            prompt: What was asked; the turns are the file's own, not cut and without ``before``.
            completion: What was written.
        """
        return prompt.record.chat, self.writer.read(completion.token_ids)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Nothing to verify: 0."""
        return {"reward": 0.0}
