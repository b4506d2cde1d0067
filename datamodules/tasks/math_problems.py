r"""Mathematics problems from files: a question, a reference answer, an exact 0/1 verifier.

Shapes: GSM8K (``question``, ``answer`` whose number follows ``####``), MATH (``problem``,
``solution`` with a ``\boxed{...}``), and files whose answer column holds the bare answer. The
reward is 1 where the final answer agrees with the reference, else 0; no format or length term
[paper: TRE card section 4, ROSE card section 4]. Unfinished completions score 0 [code]. Prompts are
in our own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import Fields, PromptFile, Role
from datamodules.prompt_writer import LongPolicy, PromptWriter
from datamodules.sources import BadRowPolicy, nearest
from datamodules.tasks.answers import (
    Agreement,
    AnswerStyle,
    Comparison,
    agree,
    find_answer,
    has_math_verify,
)
from datamodules.tasks.base import Demonstration, Split, Task

ROLES = {
    "question": Role(("question", "problem", "prompt", "query", "input")),
    "answer": Role(("answer", "solution", "final_answer", "output"), is_label=True),
}
STYLES: dict[str, AnswerStyle] = {"boxed": "boxed", "hashes": "hashes"}
_ASKS = {
    "boxed": "\n\nThink step by step and put the final answer in \\boxed{}.\n",
    "hashes": "\n\nThink step by step and end with a line #### and the final answer.\n",
}
_WRITES = {"boxed": "So it is \\boxed{{{}}}.", "hashes": "So it is\n#### {}"}
_BARE_LENGTH = 100  # characters of an answer that stands there without marks


@dataclass(frozen=True)
class Problem:
    """A question and its final answer.

    Args:
        uid: Stable identity.
        question: As in the file.
        answer: The final answer alone; None where unknown (prediction).
        where: ``file:line``.
    """

    uid: str
    question: str
    answer: str | None = None
    where: str = ""


def reference_answer(text: str) -> str | None:
    r"""The final answer of a reference: after ``####``, else the last box, else a short bare one.

    Args:
        text: The answer column of a row.

    Example:
        >>> reference_answer("2 + 2 = 4\n#### 4")
        '4'
    """
    marked = find_answer(text, "hashes") or find_answer(text, "boxed")
    if marked or "####" in text or "\\boxed" in text:
        return marked
    bare = text.strip()
    return bare if len(bare) <= _BARE_LENGTH and "\n" not in bare else None


class MathProblems(Task):
    """Problems of a file, answered in a box or after ``####``.

    ``verify`` gives ``reward``; ``valid``, an answer stands where it was asked for;
    ``format_error``, none does; ``unfinished``, the completion did not end by itself;
    ``wrong_answer``, there is one but it does not agree.

    Args:
        path: File, folder of ``datasets.save_to_disk`` or hub name, see ``sources.scan_rows``.
        prompt_style: Where the answer is asked for and looked for: ``boxed`` or ``hashes``.
        comparison: ``exact`` (normalised text), ``numeric``, ``symbolic`` (needs the extra
            ``math``) or ``auto`` (symbolic where installed), see ``answers``.
        system_prompt: Said before the question; None for nothing.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        max_prompt_tokens: Upper bound of a prompt.
        on_too_long: ``cut`` (the question, in its middle), ``skip`` or ``error``.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        domain: Name of these prompts in metrics.
        seed: Changes the split.
        columns: Role to column where the usual names do not do; this and the rest as in
            ``PromptFile``.
        format: ``auto`` or a format of ``sources.FORMATS``.
        split: Split of a hub data set behind ``path``.
        val_path: Validation rows from elsewhere.
        val_split: Split of the hub data set for validation.
        test_path: Test rows from elsewhere.
        test_split: Split of the hub data set for testing.
        val_fraction: Share of the rows of ``path`` for validation.
        test_fraction: Share of the rows of ``path`` for testing.
        on_bad_row: ``error`` or ``skip`` and count.
        max_bad_share: Share of bad rows that ``error`` leaves out with a warning.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> task = MathProblems(path="gsm8k.jsonl", prompt_style="hashes", test_fraction=0.1)
    """

    name = "math_problems"

    def __init__(
        self,
        *,
        path: str,
        prompt_style: Literal["boxed", "hashes"] = "boxed",
        comparison: Comparison = "auto",
        system_prompt: str | None = None,
        chat_template: Literal["auto", "off"] = "auto",
        max_prompt_tokens: int = 512,
        on_too_long: LongPolicy = "cut",
        max_new_tokens: int | None = None,
        domain: str = "math",
        seed: int = 0,
        columns: Mapping[str, str | None] | None = None,
        format: str = "auto",
        split: str | None = None,
        val_path: str | None = None,
        val_split: str | None = None,
        test_path: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        on_bad_row: BadRowPolicy = "error",
        max_bad_share: float = 0.0,
    ) -> None:
        comparisons = ("exact", "numeric", "symbolic", "auto")
        problems = [
            f"data.task.{key}={value!r}: allowed are {', '.join(allowed)}{nearest(value, allowed)}"
            for key, value, allowed in (
                ("prompt_style", str(prompt_style), tuple(STYLES)),
                ("comparison", str(comparison), comparisons),
            )
            if value not in allowed
        ]
        if comparison == "symbolic" and not has_math_verify():
            problems.append(
                "data.task.comparison='symbolic' needs math_verify: pip install -e '.[math]', or "
                "set data.task.comparison=numeric"
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            problems.append(f"data.task.max_new_tokens={max_new_tokens}: 1 or more is needed")
        if problems:
            raise ValueError("\n".join(problems))
        self.path, self.prompt_style, self.comparison = path, prompt_style, comparison
        self.max_new_tokens, self.domain = max_new_tokens, domain
        self.file: PromptFile[Problem] = PromptFile(
            path,
            roles=ROLES,
            make_record=_read_row,
            seed=seed,
            columns=columns,
            format=format,
            split=split,
            val_path=val_path,
            val_split=val_split,
            test_path=test_path,
            test_split=test_split,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            on_bad_row=on_bad_row,
            max_bad_share=max_bad_share,
        )
        self.writer = PromptWriter(
            after=_ASKS[prompt_style],
            system_prompt=system_prompt,
            chat_template=chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_too_long=on_too_long,
        )
        self._screened: dict[Split, list[Problem]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows: ``PromptFile.counts`` and ``<split>/too_long``."""
        long = {
            f"{split}/too_long": len(self.file.records(split)) - len(kept)
            for split, kept in self._screened.items()
        }
        return dict(self.file.counts) | long

    def records(self, split: Split) -> list[Problem]:
        """All problems of a split, in file order; long ones by ``on_too_long`` once bound.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or no problem is left.
        """
        if not hasattr(self, "tokenizer"):
            return self.file.records(split)
        if split not in self._screened:
            problems = self.file.records(split)
            self._screened[split] = self.writer.screen(problems, lambda p: (p.question, p.where))
        return self._screened[split]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and forget what was measured with another.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: It cannot write answers, or the instruction alone is too long.
        """
        super().bind(tokenizer)
        self.writer.bind(tokenizer)
        self._screened = {}
        sample = _WRITES[self.prompt_style].format("-1/2")
        back = self.writer.read(self.writer.completion(sample))
        if back.strip() != sample:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write the "
                f"answers of task '{self.name}': {sample!r} comes back as {back!r}; use a "
                "byte-level tokenizer or a real model's"
            )

    def prompt(self, record: Problem) -> Prompt:
        """The prompt of a problem.

        Args:
            record: The problem.
        """
        ids, _ = self.writer.prompt(record.question)
        return Prompt(
            record.uid, ids, self, self.domain, None, record, max_new_tokens=self.max_new_tokens
        )

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Compare the final answer with the reference. Never raises.

        Args:
            prompt: What was asked; its record is the problem.
            completion: What was written.
        """
        is_finished = completion.finish_reason == FinishReason.STOP
        answer: str | None = None
        agreement: Agreement | None = None
        if is_finished:
            answer = find_answer(self.writer.read(completion.token_ids), STYLES[self.prompt_style])
        if answer is not None and prompt.record.answer is not None:
            agreement = agree(answer, prompt.record.answer, self.comparison)
        return {
            "reward": float(agreement is not None),
            "valid": float(answer is not None),
            "format_error": float(is_finished and answer is None),
            "unfinished": float(not is_finished),
            "wrong_answer": float(answer is not None and agreement is None),
        }

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Examples of the answer format from the train split, without any reasoning.

        They teach where the answer goes, not mathematics. A pure function of its arguments; empty
        where the train split is.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        known = [problem for problem in self.records("train") if problem.answer is not None]
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        return [self._demonstrate(rng.choice(known)) for _ in range(count if known else 0)]

    def _demonstrate(self, problem: Problem) -> Demonstration:
        said = _WRITES[self.prompt_style].format(problem.answer)
        ids = self.prompt(problem).token_ids
        return Demonstration(ids, self.writer.completion(said), self.domain)


def _read_row(fields: Fields) -> Problem:
    question, answer = fields.text("question"), None
    if fields.has("answer"):
        answer = reference_answer(fields.text("answer", numbers=True))
        if answer is None:
            what = "holds neither '#### n' nor \\boxed{...}, and is no short answer itself"
            raise fields.bad("answer", "no_answer", what)
    elif fields.is_scored:
        fields.value("answer")  # raises: it is missing
    return Problem(fields.uid, question, answer, fields.where)
