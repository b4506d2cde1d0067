"""What a task is: records, a prompt template, a verifier; for judges also two prompt kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, Prompt

Split = Literal["train", "val", "test", "predict"]


@dataclass(frozen=True)
class Demonstration:
    """One supervised example for the warm start: token ids, the loss is on the completion only.

    Args:
        prompt_ids: Read, no loss.
        completion_ids: Learned.
        domain: As of ``Prompt``.
        observed: True for completion tokens that an environment wrote, one a token: no loss on
            them; None where there are none.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    domain: str = "default"
    observed: tuple[bool, ...] | None = None


class Bound(ABC):
    """What every task shares: a name, a vocabulary and the tokenizer of the backbone.

    ``bind`` must be called before texts are rendered or encoded.
    """

    name: str = "task"
    tokenizer: PreTrainedTokenizerBase

    def vocabulary(self) -> list[str] | None:
        """Words of a word-level tokenizer for the tiny backbone; None asks for a byte-level one.

        The words ``<pad>``, ``<unk>`` and ``<eos>`` are always there and are not listed.
        """
        return None

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer and refuse one that cannot encode this task.

        Raises:
            ValueError: A word of ``vocabulary()`` is unknown to the tokenizer.
        """
        words = self.vocabulary()
        known = tokenizer.get_vocab()
        missing = [word for word in words or [] if word not in known]
        if missing:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot encode "
                f"task '{self.name}': {len(missing)} of its words are unknown, such as "
                f"{missing[0]!r}"
            )
        self.tokenizer = tokenizer

    def embeddings(self, width: int) -> dict[str, Tensor]:
        """Input-embedding rows ``(width,)`` that words of a tiny backbone start from; {} for none.

        Args:
            width: Of the backbone.
        """
        return {}


class Task(Bound):
    """Records, a prompt template and a verifier. Trainers know no task by name."""

    #: Upper bound of a prompt where there is one; a plan uses it while prompts are not at hand.
    max_prompt_tokens: int | None = None

    @abstractmethod
    def records(self, split: Split) -> Sequence[Any]:
        """All records of a split, in a fixed order; ``predict`` needs no labels."""

    @abstractmethod
    def prompt(self, record: Any) -> Prompt:
        """Render one record as a prompt."""

    @abstractmethod
    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Score one completion: named reward parts; ``reward`` is the total. Never raises."""

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """``count`` supervised examples of step ``step``: a pure function of its arguments.

        An empty list means that the task has none, and then there is no warm start.
        """
        return []

    def render(self, token_ids: Sequence[int]) -> str:
        """Token ids as readable text, special tokens kept."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))


@dataclass(frozen=True)
class Pair:
    """A comparison of two responses.

    Args:
        uid: Stable identity of the pair; both orders share it.
        question: What was asked.
        responses: The two candidates, slot 1 first.
        label: Slot of the better one (1 or 2), None where unknown (prediction).
        swapped: True where the slots are exchanged with respect to the source.
        extra: Columns worth keeping, e.g. the benchmark's section.
    """

    uid: str
    question: str
    responses: tuple[str, str]
    label: int | None = None
    swapped: bool = False
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    def swap(self) -> Pair:
        """The same pair with its slots exchanged and its label negated."""
        first, second = self.responses
        label = None if self.label is None else 3 - self.label
        return replace(self, responses=(second, first), label=label, swapped=not self.swapped)


@dataclass(frozen=True)
class Verdict:
    """A parsed judgement.

    Args:
        winner: 1 or 2; None where the completion does not parse.
        analysis: The reasoning without the verdict, "" where it does not parse. Two samples with
            equal analyses are copies of each other.
        error: Why it does not parse, None where it does.
    """

    winner: int | None
    analysis: str = ""
    error: str | None = None


class JudgeTask(Task):
    """A task of comparisons: response preference (``pref``) and analysis preference (``refl``).

    ``verify`` gives ``{"reward": 1.0 | 0.0, "valid": 1.0 | 0.0}``: right verdict and parsable.
    Both prompt kinds share one output grammar: an analysis, then one verdict.
    """

    @abstractmethod
    def records(self, split: Split) -> Sequence[Pair]:
        """All pairs of a split."""

    def prompt(self, record: Pair) -> Prompt:
        """The response-preference prompt of a pair."""
        return self.preference_prompt(record)

    @abstractmethod
    def preference_prompt(self, pair: Pair) -> Prompt:
        """Which response is better: domain ``pref``, label of the pair, record = the pair."""

    @abstractmethod
    def reflection_prompt(
        self, pair: Pair, analyses: tuple[str, str], label: int | None = None, uid: str = ""
    ) -> Prompt:
        """Which analysis of the pair is better: domain ``refl``, record = (pair, analyses).

        Args:
            pair: The comparison that both analyses are about.
            analyses: ``Verdict.analysis`` of two parsed outputs, slot 1 first.
            label: Slot of the better analysis where known.
            uid: Identity of the prompt; "" derives it from the pair and its order.
        """

    @abstractmethod
    def parse(self, prompt: Prompt, completion: Completion) -> Verdict:
        """Read the verdict of either kind of prompt. Never raises, whatever was written.

        A completion that did not end by itself (``finish_reason`` is not ``stop``) is invalid.
        """

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """Right verdict 1, wrong or unparsable 0."""
        verdict = self.parse(prompt, completion)
        return {
            "reward": float(verdict.winner is not None and verdict.winner == prompt.label),
            "valid": float(verdict.winner is not None),
        }

    def better_analysis(self, pair: Pair, analyses: tuple[str, str]) -> int | None:
        """Slot of the truly better analysis by the task's own step truth, None where unknown."""
        return None

    def analysis_metrics(self, pair: Pair, verdict: Verdict) -> dict[str, float]:
        """Exact quality of one parsed analysis where the task can tell, e.g. ``step_acc``."""
        return {}
