r"""Final answers of mathematics: found in a text, brought to one form, compared.

Finding: the last ``\boxed{...}`` with balanced braces (MATH), what follows the last ``####``
(GSM8K), or the last number. Comparing goes from strict to lenient, and each step only adds:

    exact     equal strings after the usual normalisation of LaTeX [paper: MATH reward of the cards]
    numeric   equal exact fractions, read from ``1,234``, ``0.5``, ``1/2``, ``\frac{1}{2}`` [our
              choice: 0.50 and 1/2 are one answer]
    symbolic  ``math_verify`` says so (extra ``math``) [our choice]

``math_verify`` calls sympy, which can take forever (``9^{9^{9}}``), and its own time limits use
signals, which only the main thread may set. So a helper process compares, within three seconds of
CPU time; an answer that takes longer does not agree.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Literal

AnswerStyle = Literal["boxed", "hashes", "number"]
Comparison = Literal["exact", "numeric", "symbolic", "auto"]
MAX_ANSWER = 300  # characters of a final answer; longer ones are none
_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?", re.ASCII)


class Agreement(StrEnum):
    """By which comparison two answers agree."""

    EXACT = "exact"
    NUMERIC = "numeric"
    SYMBOLIC = "symbolic"


# ---- Finding -------------------------------------------------------------------------------------


def find_answer(text: str, style: AnswerStyle) -> str | None:
    r"""The final answer of a text, as it is written; None where there is none.

    Args:
        text: A completion or a reference solution.
        style: ``boxed`` (last ``\boxed{...}``), ``hashes`` (the line after the last ``####``) or
            ``number`` (the last number).

    Example:
        >>> find_answer(r"so \boxed{\frac{1}{2}}.", "boxed")
        '\\frac{1}{2}'
    """
    finders = {"boxed": last_boxed, "hashes": after_hashes, "number": last_number}
    answer = finders[style](text)
    answer = None if answer is None else answer.strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` or ``\fbox{...}``; None where its braces do not close.

    Args:
        text: Any text. ``\boxed 7`` counts too, up to the next space or dollar sign.
    """
    start, command = max((text.rfind(name), name) for name in (r"\boxed", r"\fbox"))
    if start < 0:
        return None
    rest = text[start + len(command) :].lstrip(" ")
    if not rest.startswith("{"):
        words = re.split(r"[\s$]", rest, maxsplit=1) if text[start + len(command) :] != rest else []
        return words[0].rstrip(".,") if words else None
    depth, escaped = 0, False
    for index, character in enumerate(rest):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        else:
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:index]
    return None


def after_hashes(text: str) -> str | None:
    """What follows the last ``####`` on its line; None without one.

    Args:
        text: Any text.
    """
    _, hashes, rest = text.rpartition("####")
    return rest.split("\n", 1)[0].strip().rstrip(".") if hashes else None


def last_number(text: str) -> str | None:
    """The last number, such as ``-1,234.5``; None without one.

    Args:
        text: Any text; only its last 2000 characters are read.
    """
    numbers = _NUMBER.findall(text[-2000:])
    return numbers[-1] if numbers else None


# ---- Normalising ---------------------------------------------------------------------------------

_DROPPED = (
    r"\left", r"\right", r"\!", r"\,", r"\;", r"\:", r"\ ", r"\$", "$", r"\%", "%", r"^{\circ}",
    r"^\circ", r"\displaystyle", r"\mathrm", r"\limits", "~",
)  # fmt: skip
_WRAPPERS = (r"\text", r"\textbf", r"\mathbf", r"\mbox", r"\boldsymbol")
_UNIT = re.compile(r"(?<=[0-9}])\s*\\(?:text|mbox|mathrm)\{[^{}]*\}\s*$")
_NAME = re.compile(r"^[a-zA-Z]\s*=\s*")
_SHORT_FRACTION = re.compile(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])")
_HALF_SHORT_FRACTION = re.compile(r"\\frac(\{[^{}]*\})\s*([0-9a-zA-Z])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_SLASH = re.compile(r"^(-?)([0-9]+)/([0-9]+)$", re.ASCII)


def normalise(text: str) -> str:
    r"""One form for the ways in which an answer is written in LaTeX.

    Spacing, size commands, dollar and percent signs, degrees, a trailing unit in ``\text`` and a
    leading ``x =`` go; ``\dfrac``, ``\tfrac``, ``\frac12`` and ``1/2`` become ``\frac{1}{2}``,
    ``\sqrt2`` becomes ``\sqrt{2}``; thousands lose their commas, ``.5`` gains its zero.

    Args:
        text: A final answer.

    Example:
        >>> normalise(r"x = \dfrac12\text{ cm}")
        '\\frac{1}{2}'
    """
    text = _UNIT.sub("", text.replace("\n", " ").strip())
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace("\u2212", "-")
    for dropped in _DROPPED:
        # \left must not eat the head of \leftarrow
        pattern = re.escape(dropped) + (r"(?![a-zA-Z])" if dropped[-1:].isalpha() else "")
        text = re.sub(pattern, "", text)
    for wrapper in _WRAPPERS:
        text = re.sub(re.escape(wrapper) + r"\{([^{}]*)\}", r"\1", text)
    text = _NAME.sub("", text.strip())
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_SHORT_FRACTION.sub(r"\\frac\1{\2}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    if _NUMBER.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    return _SLASH.sub(r"\1\\frac{\2}{\3}", text)


_FRACTION = re.compile(r"(-?)\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}", re.ASCII)
_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?", re.ASCII)


def number_of(text: str) -> Fraction | None:
    """The exact value of a normalised answer that is a number, else None.

    Args:
        text: As of ``normalise``.
    """
    text = text.removeprefix("+")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    found = _FRACTION.fullmatch(text)
    if not found or not int(found[3]):
        return None
    return Fraction(int(found[2]), int(found[3])) * (-1 if found[1] else 1)


# ---- Comparing -----------------------------------------------------------------------------------


def has_math_verify() -> bool:
    """Whether the package ``math_verify`` (extra ``math``) is installed."""
    return importlib.util.find_spec("math_verify") is not None


def agree(answer: str, reference: str, comparison: Comparison = "auto") -> Agreement | None:
    """By which comparison two answers agree, the strictest one first; None where they do not.

    Never raises on what a model wrote.

    Args:
        answer: What was written.
        reference: What is right.
        comparison: The most lenient one to try; ``auto`` is ``symbolic`` where ``math_verify`` is
            installed, else ``numeric``.

    Raises:
        ImportError: ``symbolic`` without ``math_verify``.

    Example:
        >>> agree("1,234.0", "1234").value
        'numeric'
    """
    if max(len(answer), len(reference)) > MAX_ANSWER:
        return None
    one, other = normalise(answer), normalise(reference)
    if one == other and one:
        return Agreement.EXACT
    if comparison == "exact":
        return None
    first, second = number_of(one), number_of(other)
    if first is not None and second is not None:
        return Agreement.NUMERIC if first == second else None
    if comparison == "numeric" or (comparison == "auto" and not has_math_verify()):
        return None
    return Agreement.SYMBOLIC if _symbolically_equal(one, other) else None


# What the helper process runs. Its own CPU clock ends it, by the signal's default action: sympy
# needs not cooperate, a loaded machine does not shorten the time, and no orphan can spin for ever.
_HELPER = """
import json, logging, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.CRITICAL)
from math_verify import parse, verify
for line in sys.stdin:
    answer, reference, seconds = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        gold, own = (parse(f"${text}$", parsing_timeout=None) for text in (reference, answer))
        is_equal = bool(verify(gold, own, timeout_seconds=None))
    except Exception:
        is_equal = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(int(is_equal), flush=True)
"""
_SECONDS = 3.0  # of CPU time for one comparison
_lock = threading.Lock()
_helper: subprocess.Popen[str] | None = None


@lru_cache(maxsize=10_000)  # the samples of a group often agree with each other
def _symbolically_equal(answer: str, reference: str) -> bool:
    """Ask the helper process; False where it fails, or takes too long and ends."""
    global _helper
    if not has_math_verify():
        raise ImportError("comparison 'symbolic' needs math_verify: pip install -e '.[math]'")
    with _lock:
        if _helper is None:
            _helper = subprocess.Popen(
                [sys.executable, "-c", _HELPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        assert _helper.stdin is not None and _helper.stdout is not None
        try:
            _helper.stdin.write(json.dumps([answer, reference, _SECONDS]) + "\n")
            _helper.stdin.flush()
            said = _helper.stdout.readline()
        except OSError:  # it ended between two questions
            said = ""
        if not said:
            _end_helper()
        return said.strip() == "1"


@atexit.register
def _end_helper() -> None:
    global _helper
    if _helper is not None:
        _helper.kill()
        with contextlib.suppress(OSError):  # what it was told last may still wait in the pipe
            _helper.communicate()
        _helper = None
