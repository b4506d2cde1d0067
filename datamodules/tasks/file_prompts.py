"""Tasks whose prompts are rows of a file: reading, splitting, writing; no verifier.

A subclass names its roles, makes the record of a row and verifies; see ``chat_prompts``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Prompt
from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.prompt_writer import LongPolicy, PromptWriter
from datamodules.row_options import RowOptions
from datamodules.tasks.base import Split, Task


class Asked(Protocol):
    """What every record of a file tells: identity, text of the prompt, ``file:line``."""

    @property
    def uid(self) -> str:
        """Stable identity."""

    @property
    def text(self) -> str:
        """What is asked."""

    @property
    def where(self) -> str:
        """``file:line``."""


Record = TypeVar("Record", bound=Asked)


class FilePrompts(RowOptions, Task, Generic[Record]):
    """Prompts from a file, one a row.

    Args:
        system_prompt: Said first; None for nothing.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        max_prompt_tokens: Upper bound of a prompt.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        on_too_long: ``cut`` (the text, in its middle), ``skip`` or ``error``.
        **options: Of ``RowOptions``: ``path`` and the rest.

    Raises:
        ValueError: A value is not allowed.
    """

    #: What a row holds, the question first.
    roles: ClassVar[Mapping[str, Role]]
    #: Name of these prompts in metrics.
    domain: str

    def __init__(
        self,
        *,
        system_prompt: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        max_prompt_tokens: int = 512,
        max_new_tokens: int | None = None,
        on_too_long: LongPolicy = "cut",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.max_new_tokens = max_new_tokens
        self.file: PromptFile[Record] = PromptFile(
            roles=self.roles, make_record=self.make_record, **options
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.writer = PromptWriter(
            system_prompt=system_prompt,
            chat_template=chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_too_long=on_too_long,
        )
        self._screened: dict[Split, list[Record]] = {}

    @abstractmethod
    def make_record(self, fields: Fields) -> Record:
        """The record of a row.

        Args:
            fields: The row.

        Raises:
            BadRowError: The row cannot be used.
        """

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows: ``PromptFile.counts`` and ``<split>/too_long``."""
        long = {
            f"{split}/too_long": len(self.file.records(split)) - len(kept)
            for split, kept in self._screened.items()
        }
        return dict(self.file.counts) | long

    def records(self, split: Split) -> list[Record]:
        """All records of a split, in file order; long ones by ``on_too_long`` once bound.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or no record is left.
        """
        if not hasattr(self, "tokenizer"):
            return self.file.records(split)
        if split not in self._screened:
            records = self.file.records(split)
            self._screened[split] = self.writer.screen(records, lambda r: (r.text, r.where))
        return self._screened[split]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and forget what was measured with another.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: What stands around a text alone is too long.
        """
        super().bind(tokenizer)
        self.writer.bind(tokenizer)
        self._screened = {}

    def prompt(self, record: Record) -> Prompt:
        """The prompt of a record.

        Args:
            record: One of ``records``.
        """
        ids, _ = self.writer.prompt(record.text)
        return Prompt(
            record.uid, ids, self, self.domain, None, record, max_new_tokens=self.max_new_tokens
        )
