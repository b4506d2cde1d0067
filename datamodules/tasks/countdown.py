"""Countdown: combine given numbers with + - * / into a target, each number exactly once.

Rows are drawn by our own generator [our choice of the TRE card, section 4: hub data cannot be
assumed] or come from a file of the public set's shape (``nums``, ``target``). Scoring stands in
``countdown_puzzles``. Two styles, scored alike, since both are read as text:

    words   ``3 5 7 to 56``                    for word-level tiny models: a number is one token
            ``<think> </think> <answer> ( 3 + 5 ) * 7 </answer>``
    text    the prompt in words with a worked example [paper], for byte-level and real tokenizers
            ``<think>3 + 5 = 8, 8 * 7 = 56</think> <answer>(3 + 5) * 7</answer>``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prompt_rows import BadRowError, Fields, PromptFile, Role
from datamodules.prompt_writer import PromptWriter
from datamodules.row_options import RowOptions
from datamodules.sources import nearest
from datamodules.tasks.base import Demonstration, Split, Task
from datamodules.tasks.countdown_puzzles import (
    TAGS,
    DrawnPuzzles,
    Outcome,
    Puzzle,
    PuzzleShape,
    score_answer,
)

ROLES = {
    "numbers": Role(("nums", "numbers")),
    "target": Role(("target",)),
}
_SIGNS = ("(", ")", "+", "-", "*", "/", "to")
_SPECIAL = 3  # <pad> <unk> <eos>
_MAX_NUMBERS = 20
_EXAMPLE = "<think>1 + 2 = 3, 3 * 4 = 12</think> <answer>(1 + 2) * 4</answer>"


class Countdown(RowOptions, Task):
    """Countdown puzzles with an exact 0/1 verifier.

    ``verify`` gives ``reward``, ``valid`` (the answer block is there), and of ``format_error``,
    ``wrong_numbers``, ``bad_expression``, ``wrong_value`` the one that holds where it is not right.

    Args:
        num_operands: Drawn puzzles: how many numbers, one of these.
        min_number: Drawn puzzles: smallest number.
        max_number: Drawn puzzles: largest number. With ``style=words`` also of a file.
        min_target: Drawn puzzles: smallest target.
        max_target: Drawn puzzles: largest target. With ``style=words`` also of a file.
        operators: Drawn puzzles: operators behind the target.
        num_train: Drawn puzzles of the split ``train``.
        num_val: Drawn puzzles of the split ``val``.
        num_test: Drawn puzzles of the split ``test``.
        path: File of puzzles; None draws them.
        style: ``words`` or ``text``, see above.
        pad_vocabulary: ``words``: unused words ``<unused_i>`` fill the vocabulary up to this size;
            0 for none. Trust-region entropy needs a large one (TRE card, section 9).
        noise: Share of demonstrations whose signs are drawn anew, so that most are wrong.
        chat_template: ``auto`` uses the tokenizer's where it has one, ``off`` never.
        max_prompt_tokens: Longest prompt; a longer one is an error, as it cannot be cut.
        max_new_tokens: Most tokens of a completion; None leaves the module's bound.
        domain: Name of these prompts in metrics.
        **options: Of ``RowOptions``; ``seed`` is that of drawn puzzles too.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> Countdown(num_operands=[3], max_number=9, num_train=8).records("train")[0].numbers
        (3, 3, 8)
    """

    name = "countdown"

    def __init__(
        self,
        *,
        num_operands: Sequence[int] = (3, 4),
        min_number: int = 1,
        max_number: int = 99,
        min_target: int = 10,
        max_target: int = 100,
        operators: str = "+-*/",
        num_train: int = 1000,
        num_val: int = 100,
        num_test: int = 200,
        path: str | None = None,
        style: Literal["words", "text"] = "words",
        pad_vocabulary: int = 0,
        noise: float = 0.0,
        chat_template: Literal["auto", "off"] = "auto",
        max_prompt_tokens: int = 512,
        max_new_tokens: int | None = None,
        domain: str = "countdown",
        **options: Any,
    ) -> None:
        super().__init__(path=path or "", **options)
        self.shape = PuzzleShape(
            tuple(num_operands), min_number, max_number, min_target, max_target, operators
        )
        self.style, self.pad_vocabulary, self.noise = style, pad_vocabulary, noise
        self.max_new_tokens, self.domain = max_new_tokens, domain
        sizes = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        self._check(sizes)
        self.puzzles: DrawnPuzzles | PromptFile[Puzzle]
        if path is None:
            self.puzzles = DrawnPuzzles(self.shape, **sizes, seed=self.seed)
        else:
            self.puzzles = PromptFile(
                path,
                roles=ROLES,
                make_record=self._read_row,
                key_of=lambda puzzle: puzzle.key,
                **options,
            )
        self.max_prompt_tokens = max_prompt_tokens
        self.writer = PromptWriter(
            chat_template=chat_template,
            max_prompt_tokens=max_prompt_tokens,
            on_too_long="error",
        )

    def _check(self, sizes: dict[str, int]) -> None:
        shape, styles = self.shape, ("words", "text")
        used = len(self._words()) + _SPECIAL
        checks = [
            (self.style in styles, "style", self.style, f"words or text{_near(self.style)}"),
            (0 <= self.noise <= 1, "noise", self.noise, "a share from 0 to 1"),
            (
                bool(shape.num_operands) and all(2 <= n <= 6 for n in shape.num_operands),
                "num_operands",
                list(shape.num_operands),
                "a list of numbers from 2 to 6",
            ),
            (shape.min_number >= 0, "min_number", shape.min_number, "0 or more"),
            (
                shape.max_number >= shape.min_number,
                "max_number",
                shape.max_number,
                f"at least data.task.min_number={shape.min_number}",
            ),
            (
                shape.max_target >= shape.min_target >= 0,
                "max_target",
                shape.max_target,
                f"at least data.task.min_target={shape.min_target}, and that 0 or more",
            ),
            (
                bool(shape.operators) and set(shape.operators) <= set("+-*/"),
                "operators",
                shape.operators,
                "some of +-*/",
            ),
            (
                self.pad_vocabulary == 0 or self.pad_vocabulary >= used,
                "pad_vocabulary",
                self.pad_vocabulary,
                f"0 or at least {used}, the words that are needed",
            ),
            (sizes["num_train"] >= 1, "num_train", sizes["num_train"], "1 or more"),
            (sizes["num_val"] >= 0, "num_val", sizes["num_val"], "0 or more"),
            (sizes["num_test"] >= 0, "num_test", sizes["num_test"], "0 or more"),
        ]
        problems = [
            f"data.task.{k}={v!r}: {what}" for is_right, k, v, what in checks if not is_right
        ]
        if problems:
            raise ValueError("\n".join(problems))

    # ---- Records --------------------------------------------------------------------------------

    def records(self, split: Split) -> list[Puzzle]:
        """All puzzles of a split; ``predict`` is the split ``test``, or the whole file.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            ValueError: The file cannot be read, or the ranges hold too few puzzles.
        """
        return self.puzzles.records(split)

    def _read_row(self, fields: Fields) -> Puzzle:
        numbers, target = _integers(fields, "numbers"), _integers(fields, "target")
        if not 2 <= len(numbers) <= _MAX_NUMBERS:
            what = f"holds {len(numbers)} numbers; 2 to {_MAX_NUMBERS} are needed"
            raise fields.bad("numbers", "bad_numbers", what)
        if min(numbers) < 0:
            raise fields.bad(
                "numbers", "bad_numbers", "holds a negative number; 0 or more are needed"
            )
        if self.style == "words":
            bounds = ("numbers", numbers, "max_number"), ("target", target, "max_target")
            for role, values, key in bounds:
                if not 0 <= min(values) <= max(values) <= getattr(self.shape, key):
                    what = f"is not within 0 to data.task.{key}={getattr(self.shape, key)}"
                    raise fields.bad(
                        role, "out_of_vocabulary", f"{what}; raise it or use style=text"
                    )
        return Puzzle(fields.uid, tuple(numbers), target[0], where=fields.where)

    # ---- Prompts --------------------------------------------------------------------------------

    def _words(self) -> list[str]:
        largest = max(self.shape.max_number, self.shape.max_target)
        return [*TAGS, *_SIGNS, *map(str, range(largest + 1))]

    def vocabulary(self) -> list[str] | None:
        """Tags, signs and numbers, then ``<unused_i>``; None (byte-level) for ``style=text``."""
        if self.style == "text":
            return None
        words = self._words()
        return words + [f"<unused_{i}>" for i in range(self.pad_vocabulary - len(words) - _SPECIAL)]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer.

        Args:
            tokenizer: Word-level for ``style=words``, else a byte-level or a real model's.

        Raises:
            ValueError: It cannot write answers, or a prompt is too long.
        """
        super().bind(tokenizer)
        self.writer.bind(tokenizer)
        sample = "<think> </think> <answer> ( 1 + 2 ) * 3 / 1 - 2 </answer>"
        back = self.writer.read(self.writer.completion(sample))
        if back.split() != sample.split():
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write the "
                f"answers of task '{self.name}': {sample!r} comes back as {back!r}"
            )

    def prompt(self, record: Puzzle) -> Prompt:
        """The prompt of a puzzle.

        Args:
            record: The puzzle.
        """
        ids, was_cut = self.writer.prompt(self._ask(record))
        if was_cut:
            raise ValueError(
                f"{record.where or record.uid}: the prompt is longer than "
                f"data.task.max_prompt_tokens={self.writer.max_prompt_tokens}; raise it"
            )
        return Prompt(
            record.uid, ids, self, self.domain, None, record, max_new_tokens=self.max_new_tokens
        )

    def _ask(self, puzzle: Puzzle) -> str:
        if self.style == "words":
            return f"{' '.join(map(str, puzzle.numbers))} to {puzzle.target}"
        *first, last = map(str, puzzle.numbers)
        return (
            f"Write an expression that equals {puzzle.target} with the numbers {', '.join(first)} "
            f"and {last}. Use +, -, * and /, and every number exactly once. Think first, then give "
            f"the expression alone. With 1, 2 and 4 for 12: {_EXAMPLE}\n"
        )

    # ---- Outputs --------------------------------------------------------------------------------

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Score a completion by ``score_answer``. Never raises.

        Args:
            prompt: What was asked; its record is the puzzle.
            completion: What was written; one that did not end by itself is a format error.
        """
        outcome, puzzle = Outcome.FORMAT_ERROR, prompt.record
        if completion.finish_reason == FinishReason.STOP:
            text = self.writer.read(completion.token_ids)
            outcome = score_answer(text, puzzle.numbers, puzzle.target)
        parts = {str(other): float(outcome is other) for other in Outcome}
        return parts | {"valid": float(outcome is not Outcome.FORMAT_ERROR)}

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Solved puzzles that are none of validation and test; none for puzzles of a file.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        if isinstance(self.puzzles, PromptFile):
            rng = Random(f"countdown/demonstrations/{seed}/{step}")
            puzzles = self.puzzles.records("train")
            return [self._demonstrate(rng.choice(puzzles), rng) for _ in range(count)]
        rng = Random(f"countdown/demonstrations/{seed}/{step}")
        return [self._demonstrate(self.puzzles.draw_train(rng), rng) for _ in range(count)]

    def _demonstrate(self, puzzle: Puzzle, rng: Random) -> Demonstration:
        solution, steps = puzzle.solution, ", ".join(puzzle.steps)
        if not solution:  # a row of a file: the format, with any signs between its numbers
            solution, steps = " + ".join(map(str, puzzle.numbers)), "Try this."
        if not puzzle.solution or rng.random() < self.noise:
            signs = self.shape.operators
            solution = " ".join(rng.choice(signs) if p in "+-*/" else p for p in solution.split())
        if self.style == "words":
            answer = f"<think> </think> <answer> {solution} </answer>"
        else:
            tight = solution.replace("( ", "(").replace(" )", ")")
            answer = f"<think>{steps}</think> <answer>{tight}</answer>"
        ids, _ = self.writer.prompt(self._ask(puzzle))
        return Demonstration(ids, self.writer.completion(answer), self.domain)


def _near(style: str) -> str:
    return nearest(str(style), ("words", "text"))


def _integers(fields: Fields, role: str) -> list[int]:
    """Whole numbers of a field: a list, one number, or either as text (as in csv files)."""
    value = fields.value(role)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = value.replace(",", " ").split()
            value = [int(v) if v.isascii() and v.isdigit() and len(v) < 19 else v for v in value]
    values = value if isinstance(value, list) and role == "numbers" else [value]
    is_whole = all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 10**12 and v == int(v)
        for v in values
    )
    if not is_whole:
        error: BadRowError = fields.bad(
            role, f"bad_{role}", f"is {str(value)[:40]!r}; {_WANTED[role]}"
        )
        raise error
    return [int(v) for v in values]


_WANTED = {
    "numbers": "a list of whole numbers is needed, such as [3, 5, 7]",
    "target": "a whole number is needed",
}
