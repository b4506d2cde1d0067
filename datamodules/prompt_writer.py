"""Texts as prompts: system prompt, chat template, bound on the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from datamodules.sources import nearest
from datamodules.tasks.verdict_format import (
    break_up,
    control_strings,
    cut_to_fit,
    token_ids,
    token_text,
)

Item = TypeVar("Item")
LongPolicy = Literal["cut", "skip", "error"]


class PromptWriter:
    """Writes prompts of one text each, and reads and writes completions.

    Control tokens inside a text are broken up. A text that is too long is cut in the middle
    (``verdict_format.cut_middle``); what stands around it is never cut.

    Args:
        before: What stands before every text.
        after: What stands behind every text, such as the instruction.
        system_prompt: Said first: as a turn of its own where there is a chat template, else as a
            paragraph; None for nothing.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        max_prompt_tokens: Upper bound of a prompt.
        on_too_long: ``cut``, ``skip`` (leave the record out) or ``error``.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> writer = PromptWriter(after="\\nAnswer with one word.", max_prompt_tokens=256)
    """

    def __init__(
        self,
        *,
        before: str = "",
        after: str = "",
        system_prompt: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        max_prompt_tokens: int = 512,
        on_too_long: LongPolicy = "cut",
    ) -> None:
        problems = [
            f"data.task.{key}={value!r}: allowed are {', '.join(allowed)}{nearest(value, allowed)}"
            for key, value, allowed in (
                ("chat_template", str(chat_template), ("auto", "off")),
                ("on_too_long", str(on_too_long), ("cut", "skip", "error")),
            )
            if value not in allowed
        ]
        if max_prompt_tokens < 1:
            problems.append(f"data.task.max_prompt_tokens={max_prompt_tokens}: 1 or more is needed")
        if problems:
            raise ValueError("\n".join(problems))
        self.before, self.after = before, after
        self.system_prompt, self.chat_template = system_prompt, chat_template
        self.max_prompt_tokens, self.on_too_long = max_prompt_tokens, on_too_long
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._controls: list[str] = []
        self._frame_tokens = 0

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and measure what stands around a text.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: What stands around a text alone is longer than ``max_prompt_tokens``.
        """
        self._tokenizer, self._controls = tokenizer, control_strings(tokenizer)
        self._frame_tokens = len(self._encode(""))
        if self._frame_tokens >= self.max_prompt_tokens:
            raise ValueError(
                f"data.task.max_prompt_tokens={self.max_prompt_tokens}: what stands around the "
                f"text of a prompt alone takes {self._frame_tokens} tokens with this tokenizer; "
                f"set at least {2 * self._frame_tokens}"
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The bound tokenizer."""
        if self._tokenizer is None:
            raise RuntimeError("bind a tokenizer to the task before making prompts")
        return self._tokenizer

    def prompt(self, text: str) -> tuple[tuple[int, ...], bool]:
        """Token ids of a prompt and whether its text had to be cut.

        Args:
            text: What is asked.
        """
        tokenizer, bound = self.tokenizer, self.max_prompt_tokens
        text = break_up(text, self._controls)
        ids = self._encode(text)
        if len(ids) <= bound:
            return tuple(ids), False
        budget = bound - self._frame_tokens
        cut = cut_to_fit(tokenizer, [text], lambda texts: self._encode(texts[0]), budget, bound)
        return tuple(cut), True

    def screen(
        self, items: Sequence[Item], describe: Callable[[Item], tuple[str, str]]
    ) -> list[Item]:
        """The items whose prompts fit, by ``on_too_long``; all of them where it is ``cut``.

        Args:
            items: Records of a split.
            describe: Text of an item, and where it stands.

        Raises:
            ValueError: With ``error`` one is too long, with ``skip`` all are.
        """
        if self.on_too_long == "cut":
            return list(items)
        bound, kept = f"data.task.max_prompt_tokens={self.max_prompt_tokens}", []
        for item in items:
            text, where = describe(item)
            size = len(self._encode(break_up(text, self._controls)))
            if size <= self.max_prompt_tokens:
                kept.append(item)
            elif self.on_too_long == "error":
                raise ValueError(
                    f"{where}: the prompt takes {size} tokens, more than {bound}; raise it, or set "
                    "data.task.on_too_long=cut or skip"
                )
        if items and not kept:
            raise ValueError(
                f"{describe(items[0])[1]}: this prompt and all others of its split are longer than "
                f"{bound}; raise it or set data.task.on_too_long=cut"
            )
        return kept

    def completion(self, text: str) -> tuple[int, ...]:
        """Token ids of a completion, with the end token.

        Args:
            text: What is answered.
        """
        end = self.tokenizer.eos_token_id
        return (*token_ids(self.tokenizer, text), *([] if end is None else [end]))

    def read(self, ids: Sequence[int]) -> str:
        """Text of a completion without its end token; "" where the ids do not decode.

        Args:
            ids: What an engine wrote.
        """
        ends = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        kept = list(ids[:-1] if ids and ids[-1] in ends else ids)
        try:
            return token_text(self.tokenizer, kept)
        except Exception:  # ids outside the vocabulary, in whatever way tokenizers fail on them
            return ""

    def _encode(self, text: str) -> list[int]:
        said = f"{self.before}{text}{self.after}"
        if self.chat_template == "auto" and getattr(self.tokenizer, "chat_template", None):
            chat = [{"role": "user", "content": said}]
            if self.system_prompt:
                chat.insert(0, {"role": "system", "content": self.system_prompt})
            said = str(
                self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        elif self.system_prompt:
            said = f"{self.system_prompt}\n\n{said}"
        return token_ids(self.tokenizer, said)
