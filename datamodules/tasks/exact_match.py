"""Exact match and token F1 of a short answer, as search agents are scored.

Normalising follows the reward of the published agent [code: qa_em.py of Search-R1, card 2.4 (c)]:
lower case, no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """A text in the form in which answers are compared.

    Args:
        text: Any text.

    Returns:
        Lower case, without ASCII punctuation and articles, words parted by single spaces. A text
        of nothing but articles keeps them (an answer may be ``A``) [our choice].

    Example:
        >>> normalise(" The Eiffel  Tower!")
        'eiffel tower'
    """
    bare = " ".join(text.lower().translate(_NO_PUNCTUATION).split())
    return " ".join(_ARTICLES.sub(" ", bare).split()) or bare


def exact_match(prediction: str | None, answers: Sequence[str]) -> bool:
    """Whether a prediction equals some answer.

    Args:
        prediction: What was answered; None for nothing.
        answers: Gold answers.

    Returns:
        False too where nothing is left of the prediction [our choice].

    Example:
        >>> exact_match("the Danube.", ["Danube", "Donau"])
        True
    """
    said = normalise(prediction or "")
    return bool(said) and any(said == normalise(answer) for answer in answers)


def f1(prediction: str | None, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, against the best answer.

    Args:
        prediction: What was answered; None for nothing.
        answers: Gold answers.

    Returns:
        From 0 to 1.

    Example:
        >>> f1("river Danube", ["Danube"])
        0.6666666666666666
    """
    said = normalise(prediction or "").split()
    return max((_overlap(said, normalise(answer).split()) for answer in answers), default=0.0)


def _overlap(said: list[str], gold: list[str]) -> float:
    shared = (Counter(said) & Counter(gold)).total()
    return 2 * shared / (len(said) + len(gold)) if shared else 0.0
