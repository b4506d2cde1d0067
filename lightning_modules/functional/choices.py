"""One message for every misspelt option of the pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed names.

    Args:
        name: Name of the argument, for the message.
        value: What the caller gave.
        allowed: The legal names.

    Raises:
        ValueError: If ``value`` is not allowed; names the allowed values and the nearest spelling.

    Example:
        >>> check_choice("mode", "token_mean", ["token_mean", "sequence_mean"])
    """
    if isinstance(value, str) and value in allowed:
        return
    message = f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}"
    nearest = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.4)
    raise ValueError(f"{message}; did you mean {nearest[0]!r}?" if nearest else message)
