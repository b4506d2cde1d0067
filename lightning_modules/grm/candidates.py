"""What inference chooses from: the sampled judgements of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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

    @property
    def num_tokens(self) -> int:
        """Tokens that were written for all of them."""
        written = [*self.samples, *([self.greedy] if self.greedy else [])]
        return sum(len(one.completion.token_ids) for one in written)

    def uniform(self, purpose: str) -> float:
        """A draw in [0, 1) of this prompt for one purpose."""
        return uniform_of(self.key, self.prompt.uid, purpose)

    @property
    def coin(self) -> float:
        """The coin that decides tied votes."""
        return self.uniform("coin")


@dataclass(frozen=True)
class Comparison:
    """What a judge said of one order of a pair.

    Args:
        winner: 1, 2, or None for a tie or what does not parse.
        outcome: For response 1: 1 won, -1 lost, between them for soft verdicts.
        is_parsed: Whether there is a verdict at all.
        first_slot: Share of the verdicts that name the slot shown first; 0.5 where there is none.
        flip: 1 where both orders were judged and disagree.
        tokens: What the judge wrote for it.
    """

    winner: int | None
    outcome: float
    is_parsed: bool = True
    first_slot: float = 0.5
    flip: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, winner: int | None, outcome: float, tokens: int = 0) -> Comparison:
        """A verdict on the order as it was shown; None is one that does not parse."""
        slot = {1: 1.0, 2: 0.0}.get(winner or 0, 0.5)
        return cls(winner, outcome, winner is not None, slot, tokens=tokens)

    @classmethod
    def unread(cls, has_first: bool, has_second: bool) -> Comparison:
        """Of texts of which one at least is empty: a text beats none, two empty ones tie."""
        outcome = float(has_first) - float(has_second)
        return cls({1.0: 1, -1.0: 2}.get(outcome), outcome)

    @property
    def tie(self) -> bool:
        """Parsed, and for neither."""
        return self.is_parsed and self.winner is None

    @property
    def unparsed(self) -> bool:
        """No verdict."""
        return not self.is_parsed

    def swap(self) -> Comparison:
        """The same for the two responses exchanged; which slot was named does not change."""
        winner = None if self.winner is None else 3 - self.winner
        return replace(self, winner=winner, outcome=-self.outcome)

    def again(self) -> Comparison:
        """The same, known from before: nothing was written for it."""
        return replace(self, tokens=0)
