"""Checks of verifiable instructions: ``text -> bool``, in the ids and arguments of IFEval.

Paper: IFEval, arXiv 2311.07911; ids and argument names are those of its public data, so its rows
and the many data sets in its shape are read as they are. ``CHECKS`` maps ids to functions.

Where we differ from its code [our choice: no tokenizer of language, no detector of languages]:
words are runs of letters and digits also where capital words are counted; sentences end with
``. ! ?`` before a space; the two case checks do not test for English; keywords are plain text,
never patterns; ``language:response_language`` is not offered. An empty text follows nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datamodules.sources import nearest

RELATIONS = ("less than", "at least")
#: Ids of the public data that need more than the text.
NOT_OFFERED = {"language:response_language": "it needs a detector of languages"}
#: Checks that see the code fences of a response; they are removed for all others [code].
SEES_FENCES = ("detectable_format:json_format",)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE_LINE = re.compile(r"^\s*```.*$\n?", re.MULTILINE)


def without_fences(text: str) -> str:
    """A text without the lines that open or close a code block; what they enclose stays.

    Args:
        text: Any text.
    """
    return _FENCE_LINE.sub("", text)


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    """Pieces that end with ``. ! ?`` (and closing quotes or brackets) before a space or the end."""
    pieces = re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip())
    return [piece for piece in pieces if words(piece)]


def _holds(number: int, relation: str, bound: int) -> bool:
    if relation not in RELATIONS:  # ``problem_of`` refuses such rows; this is for direct callers
        raise ValueError(f"relation={relation!r}: allowed are {', '.join(RELATIONS)}")
    return number < bound if relation == "less than" else number >= bound


def _count(text: str, part: str) -> int:
    return text.lower().count(part.lower())


# ---- Length ---------------------------------------------------------------------------------


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """Fewer than, or at least, so many words."""
    return _holds(len(words(text)), relation, num_words)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """Fewer than, or at least, so many sentences."""
    return _holds(len(sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs between dividers ``***``, none of them empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if parts and not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return len(parts) == num_paragraphs and all(parts)


def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many paragraphs between empty lines, of which the n-th (from 1) begins with a word."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = parts[nth_paragraph - 1].split()[0].strip("\"'.,?!:;()")
    return first.lower() == first_word.lower()


# ---- Words and letters ----------------------------------------------------------------------


def existence(text: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, in any case."""
    return all(_count(text, keyword) for keyword in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs fewer than, or at least, so many times."""
    return _holds(_count(text, keyword), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a word of its own."""
    found = (
        re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in forbidden_words
    )
    return not any(found)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter (any one character) occurs fewer than, or at least, so many times."""
    return _holds(_count(text, letter), let_relation, let_frequency)


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Fewer than, or at least, so many words are all capitals."""
    number = sum(word.isupper() for word in words(text))
    return _holds(number, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """All letters are capitals."""
    return text.isupper()


def english_lowercase(text: str) -> bool:
    """No letter is a capital."""
    return text.islower()


def no_comma(text: str) -> bool:
    """There is no comma."""
    return "," not in text


# ---- Format ---------------------------------------------------------------------------------


def json_format(text: str) -> bool:
    """All of it is JSON, inside a code block or not."""
    body = re.sub(r"^\s*```(json|JSON|Json)?|```\s*$", "", text.strip()).strip()
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines are bullet points (``* `` or ``-``)."""
    found = re.findall(r"^\s*(?:\*(?!\*)|-(?!-)).*\S", text, re.MULTILINE)
    return len(found) == num_bullets


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders such as ``[name]``."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many passages stand between ``*`` or ``**`` on one line."""
    bold = re.findall(r"\*\*[^\n*]*[^\s*][^\n*]*\*\*", text)
    rest = re.sub(r"\*\*[^\n*]*\*\*", " ", text)
    return len(bold) + len(re.findall(r"\*[^\n*]*[^\s*][^\n*]*\*", rest)) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections are headed by the word and a number (their spelling of the key)."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def title(text: str) -> bool:
    """Somewhere stands a title in double angle brackets, ``<<like this>>``."""
    return any(inside.strip(" <>") for inside in re.findall(r"<<([^\n]+?)>>", text))


def constrained_response(text: str) -> bool:
    """It holds one of the three answers yes, no and maybe in their full form."""
    return any(answer in text for answer in _ANSWERS)


def postscript(text: str, *, postscript_marker: str) -> bool:
    """After some text comes a postscript that begins with the marker (``P.S.``, ``P.P.S``)."""
    marker = r"\s?".join(re.escape(char) for char in postscript_marker.rstrip(".").lower())
    return bool(re.search(rf"(?<!\w){marker}\b", text.lower()))


# ---- Beginning, end, repetition -------------------------------------------------------------


def quotation(text: str) -> bool:
    """All of it stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def end_checker(text: str, *, end_phrase: str) -> bool:
    """It ends with a phrase, in any case, quotation marks around it aside."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def start_checker(text: str, *, start_phrase: str) -> bool:
    """It begins with a phrase, in any case [our addition]."""
    return text.strip().strip('"').lower().startswith(start_phrase.strip().lower())


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the request, word for word, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text: str) -> bool:
    """Two different responses with six asterisks between them."""
    parts = [part.strip() for part in text.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


CHECKS: dict[str, Callable[..., bool]] = {
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "detectable_format:json_format": json_format,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:title": title,
    "detectable_format:constrained_response": constrained_response,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "startend:quotation": quotation,
    "startend:end_checker": end_checker,
    "startend:start_checker": start_checker,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
}


def problem_of(check_id: str, arguments: Mapping[str, Any]) -> str | None:
    """Why a check cannot be made of an id and arguments, None where it can.

    Args:
        check_id: An id of ``CHECKS``.
        arguments: Its arguments; ``plain_arguments`` has been applied.
    """
    if check_id in NOT_OFFERED:
        return f"asks for {check_id!r}: {NOT_OFFERED[check_id]}"
    if check_id not in CHECKS:
        return f"asks for {check_id!r}, which is no check{nearest(check_id, CHECKS)}"
    wanted = inspect.signature(CHECKS[check_id], eval_str=True).parameters
    types = {name: item.annotation for name, item in wanted.items() if name != "text"}
    for name, value in arguments.items():
        if name not in types:
            known = ", ".join(types) or "none"
            return f"gives {check_id!r} the argument {name!r}; it takes {known}"
        if not _is_a(value, types[name]):
            needed = {int: "a whole number", str: "text"}.get(types[name], "a list of texts")
            return f"gives {check_id!r} {name}={value!r}; {needed} is needed"
        if name.endswith("relation") and value not in RELATIONS:
            return f"gives {check_id!r} {name}={value!r}; allowed are {', '.join(RELATIONS)}"
    missing = [name for name in types if name not in arguments]
    return f"gives {check_id!r} no {missing[0]!r}" if missing else None


def _is_a(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and bool(value)
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value) and bool(value)


def plain_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments as a check takes them: those that columnar files fill with null left out.

    Args:
        arguments: A row's own; whole numbers may stand there as floats.
    """
    kept = {name: value for name, value in (arguments or {}).items() if value is not None}
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in kept.items()
    }


def fraction_followed(text: str, checks: Sequence[tuple[str, Mapping[str, Any]]]) -> float:
    """Fraction of checks that hold; no checks at all hold. A check that raises does not hold.

    Args:
        text: A response without its thinking part.
        checks: Ids and arguments.

    Example:
        >>> fraction_followed("yes, no", [("punctuation:no_comma", {}), ("startend:quotation", {})])
        0.0
    """
    if not checks:
        return 1.0
    plain = without_fences(text)
    return sum(
        _follows(text if check_id in SEES_FENCES else plain, check_id, arguments)
        for check_id, arguments in checks
    ) / len(checks)


def _follows(text: str, check_id: str, arguments: Mapping[str, Any]) -> bool:
    try:
        return bool(text.strip()) and CHECKS[check_id](text, **arguments)
    except Exception:  # model-written text must never end a run [code]
        return False
