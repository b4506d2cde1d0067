"""What inference chooses from: the sampled judgements of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from datamodules.engines.base import sample_seed
from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import Pair, Verdict


def uniform_of(key: str, uid: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return sample_seed(f"{key}/{purpose}", uid, 0) / 2**64


@dataclass(frozen=True)
class Judgement:
    """One completion read as a judgement.

    Args:
        verdict: What it says.
        confidence: Mean of its lowest token log-probs (nats).
        completion: What was written.
    """

    verdict: Verdict
    confidence: float
    completion: Completion

    @property
    def winner(self) -> int | None:
        """1, 2, or None where it does not parse."""
        return self.verdict.winner


@dataclass
class Candidates:
    """All judgements of one prompt (one order of one pair).

    Args:
        pair: The comparison in this order.
        prompt: Its preference prompt.
        key: Stream of sampling seeds they came from.
        greedy: The greedy judgement, if it was made.
        samples: Independent samples at temperature 1.
    """

    pair: Pair
    prompt: Prompt
    key: str
    greedy: Judgement | None = None
    samples: list[Judgement] = field(default_factory=list)

    @property
    def verdicts(self) -> list[int]:
        """Verdicts of the samples, 0 where one does not parse."""
        return [sample.winner or 0 for sample in self.samples]

    @property
    def confidences(self) -> list[float]:
        """Confidences of the samples."""
        return [sample.confidence for sample in self.samples]

    def uniform(self, purpose: str) -> float:
        """A draw in [0, 1) of this prompt for one purpose."""
        return uniform_of(self.key, self.prompt.uid, purpose)

    @property
    def coin(self) -> float:
        """The coin that decides tied votes."""
        return self.uniform("coin")
