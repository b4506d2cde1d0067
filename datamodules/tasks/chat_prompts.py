"""Chat prompts from a file, without answers: a reward model scores what is written.

A row has a ``prompt`` (text) or ``messages`` (a conversation that ends with a turn of the user).
The task has no verifier of its own: ``verify`` gives 0, and ``reward=model`` scores its domain.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datamodules.experience import Completion, Prompt
from datamodules.prompt_rows import Fields, Role
from datamodules.tasks.file_prompts import FilePrompts

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


class ChatPrompts(FilePrompts[ChatRecord]):
    """Conversations from a file, for a reward model to score the answers.

    Args:
        before: Text before every prompt, such as how to think and to answer.
        after: Text behind every prompt.
        val_fraction: As in ``RowOptions``.
        test_fraction: As in ``RowOptions``.
        **options: Of ``FilePrompts`` and ``RowOptions``. With a chat template, several turns
            become one text with their roles [our choice: base models have no template].

    Raises:
        ValueError: A value is not allowed.
    """

    name = "chat_prompts"
    domain = "chat"
    roles = ROLES
    #: Only a reward model can score this task: ``rewards.VerifierReward`` refuses it.
    needs_reward_model = True

    def __init__(
        self,
        *,
        before: str = "",
        after: str = "",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **options)
        self.writer.before, self.writer.after = before, after

    def make_record(self, fields: Fields) -> ChatRecord:
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
