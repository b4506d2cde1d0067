"""What a compression task is: texts to compress, the facts in them, questions, evaluation sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
    """

    uid: str
    text: str
    slots: tuple[Slot, ...] = ()
    probes: tuple[Probe, ...] = ()
    twin: str = ""
    where: str = field(default="", compare=False)


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


class CompressionTask(Task):
    """Texts to compress and what they say. Modules know no task by name."""

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

    def pretraining_texts(self, seed: int, step: int, count: int) -> list[str]:
        """Texts of the world for language-model pretraining (where priors come from); [] for none.

        Args:
            seed: Of the run.
            step: Which batch.
            count: Texts.
        """
        return []

    def neutral_texts(self, seed: int, step: int, count: int) -> list[str]:
        """Texts in which no fact is more usual than another, for a decoder without a prior.

        Args:
            seed: Of the run.
            step: Which batch.
            count: Texts.
        """
        return []

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
