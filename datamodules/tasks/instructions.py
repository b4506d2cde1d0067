"""Verifiable instructions from a file in the shape of IFEval: a prompt and checks of the response.

A row has ``prompt``, ``instruction_id_list`` (ids of ``instruction_checks.CHECKS``) and ``kwargs``
(their arguments, one mapping an id, or the same as JSON text). The reward is the fraction of checks
that hold on the response without its thinking part and code-fence lines [code]; no checks give 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.prompt_writer import LongPolicy, PromptWriter
from datamodules.sources import BadRowPolicy
from datamodules.tasks.base import Split, Task
from datamodules.tasks.chat_prompts import answer_part
from datamodules.tasks.instruction_checks import fraction_followed, plain_arguments, problem_of

ROLES = {
    "prompt": Role(("prompt", "question", "instruction", "query")),
    "instruction_id_list": Role(("instruction_id_list", "instruction_ids"), is_label=True),
    "kwargs": Role(("kwargs", "instruction_kwargs"), is_label=True),
}


@dataclass(frozen=True)
class Instructed:
    """A request and what a response has to satisfy.

    Args:
        uid: Stable identity.
        text: The request.
        checks: Ids and arguments.
        where: ``file:line``.
    """

    uid: str
    text: str
    checks: tuple[tuple[str, dict[str, Any]], ...]
    where: str


def make_record(fields: Fields) -> Instructed:
    """A request of a row; without ids and arguments (allowed in ``predict``) it has no checks.

    Args:
        fields: The row.

    Raises:
        BadRowError: Ids and arguments do not fit together, or a check is unknown.
    """
    text = fields.text("prompt")
    ids = _list_of(fields, "instruction_id_list")
    arguments = _list_of(fields, "kwargs")
    if len(ids) != len(arguments):
        message = f"has {len(arguments)} entries for {len(ids)} ids; one mapping an id is needed"
        raise fields.bad("kwargs", "bad_kwargs", message)
    checks = []
    for check_id, given in zip(ids, arguments, strict=True):
        if not isinstance(check_id, str) or not isinstance(given, (Mapping, type(None))):
            message = "needs ids as texts and arguments as mappings"
            raise fields.bad("instruction_id_list", "bad_check", message)
        plain = plain_arguments(given)
        if problem := problem_of(check_id, plain):
            raise fields.bad("instruction_id_list", "bad_check", problem)
        checks.append((check_id, plain))
    return Instructed(fields.uid, text, tuple(checks), fields.where)


def _list_of(fields: Fields, role: str) -> list[Any]:
    """A field that is a list, or JSON text of one; nothing where the file has no such column."""
    if role not in fields.columns:
        return []
    value = fields.value(role)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise fields.bad(role, "bad_json", f"does not parse as JSON ({error})") from error
    if not isinstance(value, list):
        raise fields.bad(role, "not_a_list", f"is a {type(value).__name__}; a list is needed")
    return value


class InstructionFile(Task):
    """Requests with checkable instructions; the reward is the fraction that was followed.

    Args:
        path: File, folder of ``datasets.save_to_disk`` or hub name.
        before: Text before every prompt, such as how to think and to answer.
        after: Text behind every prompt.
        system_prompt: Said first; None for nothing.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        max_prompt_tokens: Upper bound of a prompt.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        on_too_long: ``cut`` (in the middle), ``skip`` or ``error``.
        strict: Thinking that never ends leaves no response; else all of it is checked [code].
        columns: Role (a key of ``ROLES``, ``uid``) to column where the usual names do not do.
        format: ``auto`` or a format of ``sources.FORMATS``.
        val_path: Validation rows from elsewhere.
        test_path: Test rows from elsewhere, such as IFEval's own.
        val_fraction: Share of the rows of ``path`` for validation.
        test_fraction: Share of the rows of ``path`` for testing.
        seed: Changes the split.
        on_bad_row: ``error`` or ``skip`` and count.
        max_bad_share: Share of bad rows that ``error`` leaves out with a warning.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "instructions"

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
        strict: bool = False,
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
        self.max_new_tokens, self.strict = max_new_tokens, strict
        self.writer = PromptWriter(
            before=before,
            after=after,
            system_prompt=system_prompt,
            chat_template=chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_too_long=on_too_long,
        )
        self.file: PromptFile[Instructed] = PromptFile(
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

    def records(self, split: Split) -> list[Instructed]:
        """All requests of a split that fit."""
        records = self.file.records(split)
        return self.writer.screen(records, lambda record: (record.text, record.where))

    def prompt(self, record: Instructed) -> Prompt:
        """The request."""
        return Prompt(
            uid=record.uid,
            token_ids=self.writer.prompt(record.text)[0],
            task=self,
            domain="if",
            record=record,
            max_new_tokens=self.max_new_tokens,
        )

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """``reward``: the fraction followed; ``all_followed``: 1 where that is all (strict IFEval).

        A response that did not end by itself is checked as it stands; the reward function decides
        about truncated ones (``reward.truncated``).
        """
        if completion.finish_reason is FinishReason.ERROR:
            return {"reward": 0.0, "all_followed": 0.0}
        text = answer_part(self.writer.read(completion.token_ids), strict=self.strict)
        followed = fraction_followed(text, prompt.record.checks)
        return {"reward": followed, "all_followed": float(followed == 1.0)}
