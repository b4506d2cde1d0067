r"""Mathematics problems from files: a question, a reference answer, an exact 0/1 verifier.

Shapes: GSM8K (``question``, ``answer`` whose number follows ``####``), MATH (``problem``,
``solution`` with a ``\boxed{...}``), and files whose answer column holds the bare answer. The
reward is 1 where the final answer agrees with the reference, else 0; no format or length term
[paper: TRE card section 4, ROSE card section 4]. Unfinished completions score 0 [code]. Prompts are
in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import Fields, Role
from datamodules.sources import nearest
from datamodules.tasks.answers import (
    Agreement,
    AnswerStyle,
    Comparison,
    agree,
    find_answer,
    has_math_verify,
)
from datamodules.tasks.base import Demonstration
from datamodules.tasks.file_prompts import FilePrompts

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

    @property
    def text(self) -> str:
        """What is asked."""
        return self.question


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


class MathProblems(FilePrompts[Problem]):
    """Problems of a file, answered in a box or after ``####``.

    ``verify`` gives ``reward``; ``valid``, an answer stands where it was asked for;
    ``format_error``, none does; ``unfinished``, the completion did not end by itself;
    ``wrong_answer``, there is one but it does not agree.

    Args:
        prompt_style: Where the answer is asked for and looked for: ``boxed`` or ``hashes``.
        comparison: ``exact`` (normalised text), ``numeric``, ``symbolic`` (needs the extra
            ``math``) or ``auto`` (symbolic where installed), see ``answers``.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        domain: Name of these prompts in metrics.
        **options: Of ``FilePrompts`` and ``RowOptions``.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> task = MathProblems(path="gsm8k.jsonl", prompt_style="hashes", test_fraction=0.1)
    """

    name = "math_problems"
    roles = ROLES

    def __init__(
        self,
        *,
        prompt_style: Literal["boxed", "hashes"] = "boxed",
        comparison: Comparison = "auto",
        max_new_tokens: int | None = None,
        domain: str = "math",
        **options: Any,
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
        super().__init__(max_new_tokens=max_new_tokens, **options)
        self.prompt_style, self.comparison, self.domain = prompt_style, comparison, domain
        self.writer.after = _ASKS[prompt_style]

    def make_record(self, fields: Fields) -> Problem:
        """A problem of a row; without an answer only in ``predict``.

        Args:
            fields: The row.

        Raises:
            BadRowError: There is no question, or no final answer.
        """
        question, answer = fields.text("question"), None
        if fields.has("answer"):
            answer = reference_answer(fields.text("answer", numbers=True))
            if answer is None:
                what = "holds neither '#### n' nor \\boxed{...}, and is no short answer itself"
                raise fields.bad("answer", "no_answer", what)
        elif fields.is_scored:
            fields.value("answer")  # raises: it is missing
        return Problem(fields.uid, question, answer, fields.where)

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and forget what was measured with another.

        Args:
            tokenizer: A byte-level one or that of a real model.

        Raises:
            ValueError: It cannot write answers, or the instruction alone is too long.
        """
        super().bind(tokenizer)
        sample = _WRITES[self.prompt_style].format("-1/2")
        back = self.writer.read(self.writer.completion(sample))
        if back.strip() != sample:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write the "
                f"answers of task '{self.name}': {sample!r} comes back as {back!r}; use a "
                "byte-level tokenizer or a real model's"
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
