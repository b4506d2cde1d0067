"""Verifiable instructions from a file in the shape of IFEval: a prompt and checks of the response.

A row has ``prompt``, ``instruction_id_list`` (ids of ``instruction_checks.CHECKS``) and ``kwargs``
(their arguments, one mapping an id, or the same as JSON text). The reward is the fraction of checks
that hold on the response without its thinking part and code-fence lines [code]; no checks give 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import Fields, Role
from datamodules.tasks.chat_prompts import answer_part
from datamodules.tasks.file_prompts import FilePrompts
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


class InstructionFile(FilePrompts[Instructed]):
    """Requests with checkable instructions; the reward is the fraction that was followed.

    Args:
        before: Text before every prompt, such as how to think and to answer.
        after: Text behind every prompt.
        strict: Thinking that never ends leaves no response; else all of it is checked [code].
        val_fraction: As in ``RowOptions``.
        test_fraction: As in ``RowOptions``; IFEval's own rows go into ``test_path``.
        **options: Of ``FilePrompts`` and ``RowOptions``.

    Raises:
        ValueError: A value is not allowed.
    """

    name = "instructions"
    domain = "if"
    roles = ROLES

    def __init__(
        self,
        *,
        before: str = "",
        after: str = "",
        strict: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, test_fraction=test_fraction, **options)
        self.writer.before, self.writer.after = before, after
        self.strict = strict

    def make_record(self, fields: Fields) -> Instructed:
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
            message = (
                f"has {len(arguments)} entries for {len(ids)} ids; one mapping an id is needed"
            )
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
