"""What a compression task is: texts to compress, the facts in them, questions, evaluation sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import Demonstration, Task
from datamodules.tasks.base import Split as Split

#: attribute (colour, material, place), relation (who did what to whom), negation, number
SlotKind = Literal["attribute", "relation", "negation", "number"]


@dataclass(frozen=True)
class Slot:
    """A fact in a text.

    Args:
        key: Unique in its text, such as ``strawberry/colour``.
        kind: Of fact.
        value: In the source; a relation is ``agent verb patient``, a negation ``yes`` or ``no``.
        prior: The value that the world makes one expect; None where there is none.
        spans: Character spans of the text that carry the value, ``(start, end)`` each.
        name: Which attribute, such as ``colour``; "" for other kinds.
    """

    key: str
    kind: SlotKind
    value: str
    prior: str | None = None
    spans: tuple[tuple[int, int], ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Probe:
    """A question about a text, with one right answer.

    Args:
        question: Text.
        answer: Text.
        prior: Answer that the world makes one expect; None where there is none.
        kind: ``overwriting`` (a fact against the prior) or ``drift`` (who did what).
        key: Slot that it asks for.
    """

    question: str
    answer: str
    prior: str | None = None
    kind: str = "overwriting"
    key: str = ""


@dataclass(frozen=True)
class Context:
    """A text to compress.

    Args:
        uid: Stable identity.
        text: The text.
        slots: Facts in it, keys all different.
        probes: Questions about it.
        twin: ``uid`` of its minimal pair, equal but for the slots that the pair is about; "" for
            none.
        where: ``file:line``, for messages.

    Raises:
        ValueError: Two slots have one key.
    """

    uid: str
    text: str
    slots: tuple[Slot, ...] = ()
    probes: tuple[Probe, ...] = ()
    twin: str = ""
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        keys = [slot.key for slot in self.slots]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(
                f"{self.where or self.uid}: the slot {twice[0]!r} occurs twice in one text: every "
                f"fact needs a key of its own"
            )


@dataclass(frozen=True)
class ContextSet:
    """Contexts that fidelity is measured on together.

    Args:
        name: In metrics: ``pc`` prior-consistent, ``cf`` counterfactual, ``sw``
            roles against their usual order, ``neu`` no prior, ``neg`` negations.
        contexts: At least one.
    """

    name: str
    contexts: Sequence[Context]


#: The word that source masking writes, in the vocabulary of every task of words.
MASK = "<mask>"


class DrawnContexts(Sequence[Context]):
    """Contexts that are made when they are asked for, the same each time.

    Args:
        count: How many there are.
        draw: Makes context ``i``, a pure function.

    Example:
        >>> DrawnContexts(10**9, lambda i: Context(f"{i}", f"text {i}"))[-1].uid
        '999999999'
    """

    def __init__(self, count: int, draw: Callable[[int], Context]) -> None:
        self._length = count
        self._draw = draw

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Context: ...

    @overload
    def __getitem__(self, index: slice) -> list[Context]: ...

    def __getitem__(self, index: int | slice) -> Context | list[Context]:
        if isinstance(index, slice):
            return [self._draw(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"context {index} of {self._length}")
        return self._draw(index % self._length)


class CompressionTask(Task):
    """Texts to compress and what they say. Modules know no task by name."""

    def records(self, split: Split) -> Sequence[Context]:
        """The contexts of a split."""
        return self.contexts(split)

    def prompt(self, record: Context) -> Prompt:
        """The text of a context, then EOS: what is behind it repeats the text.

        Args:
            record: One of ``contexts``.
        """
        ids = self.tokenizer(record.text, add_special_tokens=False)["input_ids"]
        return Prompt(
            record.uid, (*ids, int(self.tokenizer.eos_token_id)), self, self.name, record=record
        )

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Share of the facts that a completion keeps; of a text without facts, whether it is equal.

        Args:
            prompt: Its record is the context.
            completion: What was written.

        Returns:
            ``reward``, and ``valid``: the share of the facts that can be read at all.
        """
        ids, context = list(completion.token_ids), prompt.record
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if not context.slots:
            return {"reward": float(text.strip() == context.text.strip()), "valid": 1.0}
        found, count = self.read(context, text), len(context.slots)
        right = sum(found.get(slot.key) == slot.value for slot in context.slots)
        lost = sum(found.get(slot.key) is None for slot in context.slots)
        return {"reward": right / count, "valid": 1 - lost / count}

    @abstractmethod
    def contexts(self, split: Split) -> Sequence[Context]:
        """Texts of a split, in a fixed order; ``train`` is what is trained on."""

    @abstractmethod
    def evaluations(self, split: Split) -> list[ContextSet]:
        """What a split is measured on, in a fixed order."""

    @abstractmethod
    def read(self, context: Context, text: str) -> Mapping[str, str | None]:
        """The facts of a decoded text: slot key of the context -> value, None where it is lost.

        Never raises, whatever the text. Paraphrases that keep the meaning keep the value.

        Args:
            context: The source.
            text: What was decoded.
        """

    def read_answer(self, context: Context, probe: Probe, text: str) -> str | None:
        """What a decoded answer says, in the form in which answer and prior are compared with it.

        Args:
            context: The source.
            probe: Question about it.
            text: What was decoded.

        Returns:
            Here the text without the space around it; None where nothing is left.
        """
        return text.strip() or None

    def pretraining_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts of the world for language-model pretraining (where priors come from); [] for none.

        Args:
            seed: Of the run.
            step: Which batch.
            count: Texts.
        """
        return []

    def neutral_contexts(self, seed: int, step: int, count: int) -> list[Context]:
        """Texts in which no fact is more usual than another, for a decoder without a prior.

        Args:
            seed: Of the run.
            step: Which batch.
            count: Texts.
        """
        return []

    def pretraining_texts(self, seed: int, step: int, count: int) -> list[str]:
        """The texts alone of ``pretraining_contexts``, whose arguments these are."""
        return [context.text for context in self.pretraining_contexts(seed, step, count)]

    def neutral_texts(self, seed: int, step: int, count: int) -> list[str]:
        """The texts alone of ``neutral_contexts``, whose arguments these are."""
        return [context.text for context in self.neutral_contexts(seed, step, count)]

    def hidden_words(self) -> Sequence[str]:
        """Words that source masking may hide (values of slots); [] hides any word."""
        return []

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """The pretraining texts as what a backbone is fitted to: no prompt but one EOS token."""
        rows = []
        for text in self.pretraining_texts(seed, step, count):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            end = int(self.tokenizer.eos_token_id)
            rows.append(Demonstration((end,), (*ids, end)))
        return rows


class DrawnWorld(CompressionTask):
    """A world that writes its texts when they are asked for: override three methods for your own.

    ``predict`` is the split ``test``.

    Args:
        num_train: Training texts.
        num_val: Texts of each evaluation set in ``val``.
        num_test: Texts of each evaluation set in ``test``.
    """

    def __init__(self, *, num_train: int, num_val: int, num_test: int) -> None:
        self.num_train = num_train
        self.sizes = {"val": num_val, "test": num_test}
        self._sets: dict[str, list[ContextSet]] = {}

    @abstractmethod
    def set_names(self) -> Sequence[str]:
        """The evaluation sets, in the order in which they are measured; ``pc`` first."""

    @abstractmethod
    def training_context(self, index: int) -> Context:
        """Training text ``index``, a pure function.

        Args:
            index: From 0 to ``num_train - 1``.
        """

    @abstractmethod
    def evaluation_context(self, part: str, name: str, index: int) -> Context:
        """Text ``index`` of a set, a pure function.

        Args:
            part: ``train``, ``val`` or ``test``.
            name: Of the set; text ``index`` of most sets is the twin of that of ``pc``.
            index: From 0 on.
        """

    def contexts(self, split: Split) -> Sequence[Context]:
        """Training texts; of another split those of its first set.

        Args:
            split: ``predict`` is ``test``.
        """
        if split == "train":
            return DrawnContexts(self.num_train, self.training_context)
        sets = self.evaluations(split)
        return sets[0].contexts if sets else []

    def evaluations(self, split: Split) -> list[ContextSet]:
        """The sets of ``set_names``.

        Args:
            split: ``train`` too has sets here, of as many texts as ``val``.

        Returns:
            The sets; none where the split has no texts.
        """
        part = "test" if split == "predict" else split
        count = self.sizes.get(part, self.sizes["val"])
        if part not in self._sets:
            names = self.set_names() if count else ()
            self._sets[part] = [
                ContextSet(name, [self.evaluation_context(part, name, i) for i in range(count)])
                for name in names
            ]
        return self._sets[part]


def range_problems(
    ranges: Mapping[str, tuple[int, int, int | None]], shares: Mapping[str, float]
) -> list[str]:
    """What is wrong with the numbers of a world, one message each.

    Args:
        ranges: Key below ``data.task`` -> value, least and most (None: no bound).
        shares: Key below ``data.task`` -> a value that must be in [0, 1].
    """
    problems = []
    for key, (value, least, most) in ranges.items():
        if value < least or (most is not None and value > most):
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            problems.append(f"data.task.{key}={value} must be {allowed}")
    problems += [
        f"data.task.{key}={value} must be in [0, 1]"
        for key, value in shares.items()
        if not 0 <= value <= 1
    ]
    return problems
