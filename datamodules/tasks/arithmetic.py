"""Arithmetic: ``12 + 7`` and the like, drawn at random, with answers that can be checked.

A small domain ``math`` without files [our choice]: words are digits and signs, so a tiny model can
learn it, and demonstrations are wrong now and then, so that a warm-started policy is right only
part of the time and RL has something to improve.

    prompt      ``1 2 + 7 =``
    completion  ``#### 1 9``            (``####`` as in GSM8K; a negative result begins with ``-``)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.sources import stable_hash
from datamodules.tasks.base import Demonstration, Split, Task

MARK = "####"
_DIGITS = tuple("0123456789")
_MAX_TRIES = 100_000


@dataclass(frozen=True)
class Sum:
    """One problem ``left sign right``.

    Args:
        uid: Stable identity.
        left: First number.
        sign: ``+``, ``-`` or ``*``.
        right: Second number.
    """

    uid: str
    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """The right answer."""
        values = {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
        }
        return values[self.sign]

    @property
    def text(self) -> str:
        """What is asked, e.g. ``1 2 + 7 =``."""
        return f"{spell(self.left)} {self.sign} {spell(self.right)} ="


def spell(number: int) -> str:
    """A number as words: ``-12`` is ``- 1 2``.

    Args:
        number: Any integer.
    """
    return " ".join(str(number))


class Arithmetic(Task):
    """Sums, differences and products of two numbers with an exact 0/1 verifier.

    A hash of the problem tells its split, so no problem of the test is demonstrated or trained on.
    ``verify`` gives ``reward``, ``valid``, ``format_error`` and ``wrong_value``.

    Args:
        max_number: Both numbers are 0 to this.
        operators: Some of ``+-*``.
        num_train: Problems of the split ``train``.
        num_val: Problems of the split ``val``.
        num_test: Problems of the split ``test``; ``predict`` is the same.
        seed: Of the problems.
        noise: Share of demonstrations with a wrong result, off by 1 to 3.
        domain: Name of these prompts in metrics.

    Raises:
        ValueError: A value is out of range, or there are too few different problems.

    Example:
        >>> Arithmetic().records("test")[0].text
        '1 0 - 4 ='
    """

    name = "arithmetic"

    def __init__(
        self,
        *,
        max_number: int = 49,
        operators: str = "+-",
        num_train: int = 800,
        num_val: int = 100,
        num_test: int = 200,
        seed: int = 0,
        noise: float = 0.3,
        domain: str = "math",
    ) -> None:
        self.max_number, self.operators, self.noise = max_number, operators, noise
        self.sizes: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.seed, self.domain = seed, domain
        self._records: dict[Split, list[Sum]] | None = None
        self._check()

    def _check(self) -> None:
        checks = [
            (1 <= self.max_number < 10**6, "max_number", self.max_number, "1 to 999999"),
            (
                bool(self.operators) and set(self.operators) <= set("+-*"),
                "operators",
                self.operators,
                "some of +-*",
            ),
            (0 <= self.noise <= 1, "noise", self.noise, "a share from 0 to 1"),
            (self.sizes["train"] >= 1, "num_train", self.sizes["train"], "1 or more"),
            (self.sizes["val"] >= 0, "num_val", self.sizes["val"], "0 or more"),
            (self.sizes["test"] >= 0, "num_test", self.sizes["test"], "0 or more"),
        ]
        problems = [
            f"data.task.{k}={v!r}: {what}" for is_right, k, v, what in checks if not is_right
        ]
        there = (self.max_number + 1) ** 2 * len(set(self.operators))
        if not problems and sum(self.sizes.values()) * 2 > there:
            problems.append(
                f"data.task.num_train, num_val, num_test: {sum(self.sizes.values())} problems are "
                f"more than half of the {there} there are with data.task.max_number="
                f"{self.max_number}; raise it or ask for fewer"
            )
        if problems:
            raise ValueError("\n".join(problems))

    # ---- Records --------------------------------------------------------------------------------

    def records(self, split: Split) -> list[Sum]:
        """All problems of a split, none twice.

        Args:
            split: ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            ValueError: There are too few different problems.
        """
        if self._records is None:
            self._records = self._draw_all()
        return self._records["test" if split == "predict" else split]

    def _draw_all(self) -> dict[Split, list[Sum]]:
        rng = Random(f"{self.name}/{self.seed}")
        found: dict[Split, list[Sum]] = {"train": [], "val": [], "test": []}
        seen: set[str] = set()
        for _ in range(_MAX_TRIES + 50 * sum(self.sizes.values())):
            if all(len(found[split]) >= size for split, size in self.sizes.items()):
                return found
            drawn = self._draw(rng)
            split = self._split_of(drawn)
            if drawn.text not in seen and len(found[split]) < self.sizes[split]:
                seen.add(drawn.text)
                uid = f"{self.name}/{self.seed}/{split}/{len(found[split])}"
                found[split].append(Sum(uid, drawn.left, drawn.sign, drawn.right))
        raise ValueError(
            f"data.task.max_number={self.max_number}: too few different problems for "
            f"{self.sizes}; raise it or ask for fewer"
        )

    def _draw(self, rng: Random) -> Sum:
        left, right = rng.randint(0, self.max_number), rng.randint(0, self.max_number)
        return Sum("", left, rng.choice(self.operators), right)

    def _split_of(self, problem: Sum) -> Split:
        share = stable_hash("split", self.seed, problem.text) / 2**64
        place = share * sum(self.sizes.values())
        if place < self.sizes["test"]:
            return "test"
        return "val" if place < self.sizes["test"] + self.sizes["val"] else "train"

    # ---- Prompts and outputs --------------------------------------------------------------------

    def vocabulary(self) -> list[str]:
        """Digits, signs, ``=`` and the mark: 15 words, whatever the ranges are."""
        return [*_DIGITS, "+", "-", "*", "=", MARK]

    def prompt(self, record: Sum) -> Prompt:
        """The prompt of a problem.

        Args:
            record: The problem.
        """
        longest = len(str(self.max_number)) * 2 + 3  # mark, sign, digits of a product, end
        ids = tuple(self._ids(record.text.split()))
        return Prompt(record.uid, ids, self, self.domain, None, record, max_new_tokens=longest)

    def _ids(self, words: Sequence[str]) -> list[int]:
        known = self.tokenizer.get_vocab()
        return [known[word] for word in words]

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """The mark, the result digit by digit, the end: right 1, all else 0. Never raises.

        Args:
            prompt: What was asked; its record is the problem.
            completion: What was written; one that did not end by itself is a format error.
        """
        words = self._words(completion)
        body = words[1:] if words and words[0] == MARK else []
        digits = body[1:] if body and body[0] == "-" else body
        is_valid = bool(digits) and all(word in _DIGITS for word in digits)
        is_right = is_valid and " ".join(body) == spell(prompt.record.result)
        return {
            "reward": float(is_right),
            "valid": float(is_valid),
            "format_error": float(not is_valid),
            "wrong_value": float(is_valid and not is_right),
        }

    def _words(self, completion: Completion) -> list[str]:
        if completion.finish_reason != FinishReason.STOP:
            return []
        word_of = {index: word for word, index in self.tokenizer.get_vocab().items()}
        ids = list(completion.token_ids)
        ids = ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
        return [word_of.get(index, "<other>") for index in ids]

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Fresh problems that are none of validation and test, some of them answered wrongly.

        Args:
            seed: Seed of the warm start.
            step: Step of the warm start.
            count: How many.
        """
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        return [self._demonstrate(rng) for _ in range(count)]

    def _demonstrate(self, rng: Random) -> Demonstration:
        problem = self._draw(rng)
        while self._split_of(problem) != "train":
            problem = self._draw(rng)
        result = problem.result
        if rng.random() < self.noise:
            result += rng.choice((-3, -2, -1, 1, 2, 3))
        ids = self._ids([MARK, *spell(result).split()])
        end = self.tokenizer.eos_token_id
        return Demonstration(
            tuple(self._ids(problem.text.split())),
            (*ids, *([] if end is None else [end])),
            self.domain,
        )
