"""Judging under criteria: what the tasks of AC-GenRM offer besides those of any judge.

Paper: "UniCreative", arXiv 2604.05517. Criteria c(x) are written from the query alone, then two
texts are compared under them: p(c, z, v | x, A, B) = p(c | x) p(z | x, c, A, B) p(v | ...).
Two generations instead of one, so that all pairs of a query can share its criteria [our choice].
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import JudgeTask, Pair

#: Domains of the two kinds of prompts.
CRITERIA, JUDGEMENT = "criteria", "judgement"


@dataclass(frozen=True)
class Criteria:
    """Parsed criteria of a query.

    Args:
        text: As it goes into the judgement prompt, in one canonical form; "" where nothing parses.
        names: What is looked at, in order.
        error: Why it does not parse, None where it does.
    """

    text: str = ""
    names: tuple[str, ...] = ()
    error: str | None = None


class CriteriaJudgeTask(JudgeTask):
    """A task of comparisons under criteria.

    Prompts come in two kinds, by domain: ``criteria`` and ``judgement``. Both orders of a pair have
    judgement prompts of different uids; criteria do not know a pair.
    """

    @abstractmethod
    def criteria_prompt(self, question: str) -> Prompt:
        """Which criteria a text for this query must meet: domain ``criteria``, record = question.

        Its uid and its tokens depend on the query alone: a judge that has seen the texts would
        write criteria to fit its verdict.
        """

    @abstractmethod
    def parse_criteria(self, prompt: Prompt, completion: Completion) -> Criteria:
        """Read criteria. Never raises; a completion that did not end by itself does not parse."""

    @property
    @abstractmethod
    def static_criteria(self) -> Criteria:
        """One list for all queries."""

    @abstractmethod
    def judgement_prompt(self, pair: Pair, criteria: Criteria | None) -> Prompt:
        """Which text is better under criteria: domain ``judgement``, record = the pair.

        Args:
            pair: The comparison; its label becomes that of the prompt.
            criteria: None, or one without text, asks without criteria.
        """

    @abstractmethod
    def verdict_margin(self, prompt: Prompt, completion: Completion) -> float | None:
        """Log-odds (nats) of slot 1 against slot 2 where the verdict was written.

        None where the engine kept no candidates (``Sampling.candidates``) or the completion does
        not parse. A slot that is not among the candidates counts as the least of them.
        """

    def preference_prompt(self, pair: Pair) -> Prompt:
        """The judgement prompt without criteria."""
        return self.judgement_prompt(pair, None)

    def reflection_prompt(
        self, pair: Pair, analyses: tuple[str, str], label: int | None = None, uid: str = ""
    ) -> Prompt:
        """There are none.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"task '{self.name}' has no reflections: use a method without them")
