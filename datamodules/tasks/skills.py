"""Three miniature skills over one range of words: a sum, a topic, an instruction (MGS card, 9C).

========== ================ ================================================== ================
class      prompt           right completion, then the end token               score
========== ================ ================================================== ================
ModularSum ``add a b =``    the one word ``(a + b) mod m``                     0 or 1
ChatTopics ``chat a b =``   many distinct words of the window ``a .. a + 7``   at most 1
RepeatTask ``repeat a b =`` a exactly ``c = 2 + b mod 4`` times, c + 2 words,  0, 1/3, 2/3 or 1
                            the last of them not a
========== ================ ================================================== ================

All three read and write the same words ``w0 .. w{m-1}``: the same two numbers have three right
answers, and only the first word of the prompt tells which. Demonstrations slip (``noise``) and
answer in the manner of any of the skills (``confusion``), so a model that copies them earns a part
of the reward and RL has to pull the skills apart. The reward is ``scale`` times the score, as
reward models have a scale of their own; the score is logged beside it, so that domains can be
compared. A completion that did not end by itself scores 0.

[our choice: the card names the skills, the modulus 23, the window of 8 and the scale of 10; one
shape of prompt, the third check of an instruction, noise and confusion are ours]
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Demonstration, Split, Task


@dataclass(frozen=True)
class Draw:
    """One record.

    Args:
        uid: Stable identity.
        numbers: The two words of the prompt that differ from record to record, as numbers.
    """

    uid: str
    numbers: tuple[int, int]


class Skill(Task):
    """What the three skills share: words, records, prompts and the shape of a score.

    Args:
        num_words: Words ``m`` that all skills read and write.
        num_train: Records of the split ``train``.
        num_val: Records of the split ``val``.
        num_test: Records of the split ``test``; ``predict`` is the same.
        seed: Of the records.
        noise: Demonstrations: probability of a slip (of the whole answer, or of a word of it).
        confusion: Demonstrations: probability of the manner of a random skill instead of its own.
        scale: Factor of the reward, as reward models have a scale of their own.

    Raises:
        ValueError: A value is out of range; all such values are named at once.
    """

    flag: str
    max_new_tokens: int

    def __init__(
        self,
        *,
        num_words: int = 23,
        num_train: int = 400,
        num_val: int = 50,
        num_test: int = 100,
        seed: int = 0,
        noise: float = 0.2,
        confusion: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        self.num_words, self.seed, self.scale = num_words, seed, scale
        self.noise, self.confusion = noise, confusion
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}
        problems = [
            f"{self.name}: num_{split}={size} must be at least 0"
            for split, size in self.sizes.items()
            if size < 0
        ]
        if num_words < 10:
            problems.append(f"{self.name}: num_words={num_words} must be at least 10")
        problems += [
            f"{self.name}: {key}={value} must be a probability, 0 to 1"
            for key, value in (("noise", noise), ("confusion", confusion))
            if not 0 <= value <= 1
        ]
        if not scale > 0:
            problems.append(f"{self.name}: scale={scale} must be above 0")
        if problems:
            raise ValueError("; ".join(problems))

    def vocabulary(self) -> list[str]:
        """The shared words, this skill's first word and ``=``."""
        return [*self._words(), "=", self.flag]

    def _words(self) -> list[str]:
        return [f"w{number}" for number in range(self.num_words)]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of all words once."""
        super().bind(tokenizer)
        known = tokenizer.get_vocab()
        self._ids = [known[word] for word in self._words()]
        self._frame = known[self.flag], known["="]
        self._number_of = {token: number for number, token in enumerate(self._ids)}

    def records(self, split: Split) -> list[Draw]:
        """All records of a split: a pure function of ``(seed, split, index)``."""
        source = "test" if split == "predict" else split
        uids = [f"{self.name}/{self.seed}/{source}/{i}" for i in range(self.sizes[source])]
        return [Draw(uid, self._numbers(Random(uid))) for uid in uids]

    def prompt(self, record: Draw) -> Prompt:
        """First word, numbers, ``=``."""
        return Prompt(
            uid=record.uid,
            token_ids=self._prompt_ids(record.numbers),
            task=self,
            domain=self.name,
            record=record,
            max_new_tokens=self.max_new_tokens,
        )

    def _prompt_ids(self, numbers: Sequence[int]) -> tuple[int, ...]:
        flag, equals = self._frame
        return (flag, *(self._ids[number] for number in numbers), equals)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """``score`` (at most 1) and ``reward``, which is ``scale`` times as much."""
        score = 0.0
        if completion.finish_reason is FinishReason.STOP:
            ids = list(completion.token_ids)
            if ids and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
            written = [self._number_of.get(token, -1) for token in ids]  # -1: another word
            score = self.score(prompt.record.numbers, written)
        return {"reward": self.scale * score, "score": score}

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Answers with slips to fresh prompts."""
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        made = []
        for _ in range(count):
            numbers, skill = self._numbers(rng), self
            if rng.random() < self.confusion:
                skill = rng.choice(SKILLS)(num_words=self.num_words, noise=self.noise)
            answer = [self._ids[number] for number in skill.answer(rng, numbers)]
            ids = (*answer, self.tokenizer.eos_token_id)
            made.append(Demonstration(self._prompt_ids(numbers), ids, self.name))
        return made

    def _any_word(self, rng: Random) -> int:
        return rng.randrange(self.num_words)

    def _numbers(self, rng: Random) -> tuple[int, int]:
        return self._any_word(rng), self._any_word(rng)

    @abstractmethod
    def answer(self, rng: Random, numbers: tuple[int, int]) -> list[int]:
        """A noisy answer, as numbers."""

    @abstractmethod
    def score(self, numbers: tuple[int, int], written: Sequence[int]) -> float:
        """Score, at most 1, of the numbers that were written before the end."""


class ModularSum(Skill):
    """``add a b =`` wants the word ``(a + b) mod m`` and the end; 0 or 1."""

    name, flag, max_new_tokens = "math", "add", 12

    def answer(self, rng: Random, numbers: tuple[int, int]) -> list[int]:
        """The sum, or any word."""
        slips = rng.random() < self.noise
        return [self._any_word(rng) if slips else sum(numbers) % self.num_words]

    def score(self, numbers: tuple[int, int], written: Sequence[int]) -> float:
        """1 where the sum stands alone."""
        return float(list(written) == [sum(numbers) % self.num_words])


class ChatTopics(Skill):
    """``chat a b =`` wants many distinct words of the window ``a .. a + 7`` (modulo m), any order.

    Each distinct word of the window earns 1/8, every other word (outside, or once more) costs
    half as much. ``scale`` is 10 in our configs, the size of a reward model's scores.
    """

    name, flag, max_new_tokens = "chat", "chat", 12
    window = 8

    def answer(self, rng: Random, numbers: tuple[int, int]) -> list[int]:
        """The first three to six words of the window, some of them replaced by any word."""
        return [
            self._any_word(rng)
            if rng.random() < self.noise
            else (numbers[0] + offset) % self.num_words
            for offset in range(rng.randint(3, 6))
        ]

    def score(self, numbers: tuple[int, int], written: Sequence[int]) -> float:
        """Distinct words of the window less half of all other words, over 8."""
        window = {(numbers[0] + offset) % self.num_words for offset in range(self.window)}
        right = len(window & set(written))
        return (right - 0.5 * (len(written) - right)) / self.window


class RepeatTask(Skill):
    """``repeat a b =`` wants word a c times, c + 2 words in all, and a last word that is not a.

    The reward is the fraction of the three checks that hold.
    """

    name, flag, max_new_tokens = "if", "repeat", 12

    @staticmethod
    def count(numbers: tuple[int, int]) -> int:
        """How often the word is asked for, 2 to 5."""
        return 2 + numbers[1] % 4

    def answer(self, rng: Random, numbers: tuple[int, int]) -> list[int]:
        """The word, its count maybe off, then the words after it, as many as asked for or not."""
        word, count = numbers[0], self.count(numbers)
        slips = rng.random() < self.noise
        times = max(1, count + rng.choice((-1, 1))) if slips else count
        others = rng.choice((0, 1, 3)) if rng.random() < self.noise else 2
        return [word] * times + [(word + 1 + i) % self.num_words for i in range(others)]

    def score(self, numbers: tuple[int, int], written: Sequence[int]) -> float:
        """Fraction of the checks that hold; nothing written scores 0."""
        word, count = numbers[0], self.count(numbers)
        if not written:
            return 0.0
        checks = written.count(word) == count, len(written) == count + 2, written[-1] != word
        return sum(checks) / len(checks)


#: In whose manner demonstrations may answer.
SKILLS: tuple[type[Skill], ...] = (ModularSum, ChatTopics, RepeatTask)
