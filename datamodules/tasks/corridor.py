"""Valid corridor: a walk through a large vocabulary in which few tokens are valid at each step.

The miniature of our TRE card, section 9 [our choice; measured there]. At position t of T only the
``num_classes`` words of that position are valid (their number is their class); all other words of
the vocabulary, most of which are valid nowhere, are the tail. A walk is valid if every word is; it
is cut after T words (``reward.truncated: null``), or, with ``end_token``, it must end by itself
there. Then one position has a single valid word, and a region of K tokens feeds the tail. Rewards:

* ``sparse``: 1 if the walk is valid and its class at each key position is 1, else 0.
* ``deceptive``: 1 as above; 0.3 if it is valid and none of these classes is 1, else 0.

Demonstrations are random valid walks with the class prior ``prior``; the warm start of a tiny model
leaves about a per cent of mass in the tail at each token. A bonus that feeds the tail therefore
loses ``1 - (1 - tail)^T`` of all walks: the damage grows with the length and the vocabulary.

Every record is the same walk to be found; records differ in their uid only, so that each has its
own sampling seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.base import Demonstration, Split, Task


class Corridor(Task):
    """The valid-corridor task.

    Args:
        vocabulary_size: Words besides ``<pad> <unk> <eos>``, valid anywhere or not.
        length: Words T of a walk.
        num_classes: Valid words a position.
        num_keys: Key positions, spread evenly over the walk.
        reward: ``sparse`` or ``deceptive``.
        end_token: Whether a walk must end by itself.
        prior: Probability of each class in the demonstrations.
        num_train: Records of the split ``train``.
        num_val: Records of the split ``val``.
        num_test: Records of the split ``test``.
        seed: Of the records' uids.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> Corridor(length=16, num_keys=3).keys
        (3, 8, 13)
    """

    name = "corridor"

    def __init__(
        self,
        *,
        vocabulary_size: int = 1024,
        length: int = 16,
        num_classes: int = 4,
        num_keys: int = 3,
        reward: Literal["sparse", "deceptive"] = "sparse",
        end_token: bool = False,
        prior: Sequence[float] = (0.85, 0.05, 0.05, 0.05),
        num_train: int = 64,
        num_val: int = 4,
        num_test: int = 16,
        seed: int = 0,
    ) -> None:
        problems = []
        needed = length * num_classes + 1
        if vocabulary_size < needed:
            problems.append(
                f"data.task.vocabulary_size={vocabulary_size} must be at least {needed}"
            )
        if not 0 < num_keys <= length:
            problems.append(f"data.task.num_keys={num_keys} must be 1 to length={length}")
        if num_classes < 2:
            problems.append(f"data.task.num_classes={num_classes} must be at least 2")
        if len(prior) != num_classes or min(prior) < 0 or not sum(prior) > 0:
            problems.append(f"data.task.prior={list(prior)}: give {num_classes} weights, 0 or more")
        if reward not in ("sparse", "deceptive"):
            problems.append(f"data.task.reward={reward!r}: give 'sparse' or 'deceptive'")
        if problems:
            raise ValueError("; ".join(problems))
        self.vocabulary_size, self.length, self.num_classes = vocabulary_size, length, num_classes
        self.keys = tuple(int((i + 0.5) * length / num_keys + 0.5) for i in range(num_keys))
        self.reward, self.end_token = reward, end_token
        self.prior, self.seed = tuple(prior), seed
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}

    def vocabulary(self) -> list[str]:
        """The prompt's word, the valid words ``w<position>.<class>``, then words valid nowhere."""
        valid = [f"w{t}.{c}" for t in range(self.length) for c in range(self.num_classes)]
        tail = [f"x{i}" for i in range(self.vocabulary_size - len(valid) - 1)]
        return ["walk", *valid, *tail]

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and look up the ids of the valid words."""
        super().bind(tokenizer)
        known = tokenizer.get_vocab()
        self._start = known["walk"]
        self._ids = [
            [known[f"w{t}.{c}"] for c in range(self.num_classes)] for t in range(self.length)
        ]

    def records(self, split: Split) -> list[str]:
        """Uids of a split; ``predict`` is the split ``test``."""
        source = "test" if split == "predict" else split
        return [f"{self.name}/{self.seed}/{source}/{i}" for i in range(self.sizes[source])]

    def prompt(self, record: str) -> Prompt:
        """One word: ``walk``."""
        return Prompt(
            uid=record,
            token_ids=(self._start,),
            task=self,
            domain=self.name,
            record=record,
            max_new_tokens=self.length + int(self.end_token),
        )

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """``reward``, ``valid`` (the whole walk) and ``keys`` (share of keys of class 1)."""
        walk = list(completion.token_ids)
        if self.end_token and walk and walk[-1] == self.tokenizer.eos_token_id:
            walk.pop()
        wanted = FinishReason.STOP if self.end_token else FinishReason.LENGTH
        classes = [
            self._ids[t].index(word) if t < self.length and word in self._ids[t] else None
            for t, word in enumerate(walk)
        ]
        is_over = completion.finish_reason is wanted
        is_valid = is_over and len(walk) == self.length and None not in classes
        hits = [t < len(classes) and classes[t] == 1 for t in self.keys]
        reward = float(is_valid and all(hits))
        if self.reward == "deceptive" and is_valid and not any(hits):
            reward = 0.3
        return {"reward": reward, "valid": float(is_valid), "keys": sum(hits) / len(hits)}

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Random valid walks, classes drawn from the prior."""
        rng = Random(f"{self.name}/demonstrations/{seed}/{step}")
        classes = range(self.num_classes)
        walks = [
            [ids[rng.choices(classes, self.prior)[0]] for ids in self._ids] for _ in range(count)
        ]
        end = (self.tokenizer.eos_token_id,) if self.end_token else ()
        return [Demonstration((self._start,), (*walk, *end), self.name) for walk in walks]
