"""An optional plan in front of a text: how a completion is read, and what tasks of it offer.

    completion = [opening tag, plan, closing tag], text, end

Facts are those of our UniCreative card, sections 2 and 4: the text without the plan is what judges
and lengths see; the type of a query is for rewards only [summary site]. A span that is empty or
tiny is no plan, and it is no part of the text either [our choice].

Errors of ``PlannedText.error`` [our choice]; the text is "" with each of them:

============= ====================================================================================
unfinished    it did not end by itself; what was written is counted as it stands
unclosed      an opening tag and no closing one
nested        an opening tag inside the span
second_span   another span behind the first
stray_close   a closing tag without an opening one
late_span     text before the span: what follows the text is no plan for it
empty         no text; the plan, if any, is counted
undecodable   token ids that the tokenizer fails on
============= ====================================================================================
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import Pair, Task
from datamodules.tasks.chat_prompts import Chat
from datamodules.tasks.verdict_format import token_text

Kind = Literal["long", "short"]
Mode = Literal["plan", "direct"]
Decode = Callable[[Sequence[int]], str]
THINK_TAGS = ("<think>", "</think>")
UNKNOWN = "\ufffd"  # what a decoder writes for the bytes of half a character
MAX_PENDING = 8  # tokens that may wait for the rest of a character; one has 4 bytes at most


@dataclass(frozen=True)
class PlannedText:
    """A completion, taken apart. With an error in its tags all but ``error`` is empty.

    Args:
        plan_span: First token of the span and the one behind it, tags included; (0, 0) for none.
            A token that holds the end of a tag and something else belongs to the span.
        plan_tokens: Tokens inside the tags that are not blank.
        content: The text, without white space around it; "" where there is an error.
        content_tokens: Tokens of the text that are not blank, without the end token.
        has_plan: Whether there are ``min_plan_tokens`` inside the tags.
        error: Why it does not parse, see the module's docstring; None where it does.
    """

    plan_span: tuple[int, int] = (0, 0)
    plan_tokens: int = 0
    content: str = ""
    content_tokens: int = 0
    has_plan: bool = False
    error: str | None = None


def read_plan_ids(
    ids: Sequence[int],
    tags: tuple[int, int],
    *,
    decode: Decode,
    is_finished: bool,
    ends: Collection[int] = (),
    min_plan_tokens: int = 1,
) -> PlannedText:
    """Read a completion in which each tag is one token and no token is blank. Never raises.

    Args:
        ids: What an engine wrote.
        tags: Ids of the opening and of the closing tag.
        decode: Token ids as text.
        is_finished: Whether it ended by itself.
        ends: End tokens; one at the end is no part of the text.
        min_plan_tokens: Fewest tokens of a plan, 1 or more.

    Example:
        >>> read = partial(read_plan_ids, tags=(7, 8), decode=str, is_finished=True)
        >>> read([7, 1, 8, 2, 3]).plan_span, read([7, 1, 8, 2, 3]).content
        ((0, 3), '[2, 3]')
    """
    body = list(ids[:-1] if ids and ids[-1] in ends else ids)
    places = [place for place, token in enumerate(body) if token in tags]
    fault = _fault([body[place] == tags[0] for place in places])
    start, stop = (places[0], places[1] + 1) if places and not fault else (0, 0)
    fault = fault or ("late_span" if start else None)
    if fault:
        return PlannedText(error=fault if is_finished else "unfinished")
    rest = body[stop:]
    try:
        content = decode(rest).strip() if rest else ""
    except Exception:  # ids outside of the vocabulary, in whatever way a decoder fails on them
        return PlannedText(error="undecodable")
    inside = max(stop - 2, 0)
    return _judged((0, stop), inside, content, len(rest), is_finished, min_plan_tokens)


def read_plan_text(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_finished: bool,
    tags: tuple[str, str] = THINK_TAGS,
    min_plan_tokens: int = 8,
) -> PlannedText:
    """Read a completion by its decoded text, where a tag may be several tokens. Never raises.

    Args:
        ids: What an engine wrote; a special token at its end is no part of the text.
        tokenizer: Any tokenizer.
        is_finished: Whether it ended by itself.
        tags: The opening and the closing tag; those of Qwen3 by default.
        min_plan_tokens: Fewest tokens of a plan, 1 or more; 8 as on our card [our choice].
    """
    decode = partial(token_text, tokenizer)
    try:
        specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        is_end = bool(ids) and ids[-1] in specials and decode(ids[-1:]).strip() not in tags
        body = list(ids[:-1] if is_end else ids)
        text = decode(body)
        spans = decoded_spans(body, decode, text)
    except Exception:  # see above
        return PlannedText(error="undecodable")
    found = list(re.finditer("|".join(map(re.escape, tags)), text))
    fault = _fault([match.group() == tags[0] for match in found])
    first, last = (found[0], found[1]) if found and not fault else (None, None)
    if first and text[: first.start()].strip():
        fault = "late_span"
    if fault:
        return PlannedText(error=fault if is_finished else "unfinished")

    def tokens(start: int, stop: int) -> list[int]:
        """Those with a character between start and stop that is not blank."""
        return [
            place
            for place, (a, b) in enumerate(spans)
            if text[max(a, start) : min(b, stop)].strip()
        ]

    span, inside, behind = (0, 0), 0, 0
    if first and last:
        whole, behind = tokens(first.start(), last.end()), last.end()
        span, inside = (whole[0], whole[-1] + 1), len(tokens(first.end(), last.start()))
    size, content = len(tokens(behind, len(text))), text[behind:].strip()
    return _judged(span, inside, content, size, is_finished, min_plan_tokens)


def _fault(are_open: Sequence[bool]) -> str | None:
    """What is wrong with the order of tags, each True if it opens; None where nothing is."""
    order = "".join("(" if is_open else ")" for is_open in are_open)
    if order in ("", "()"):
        return None
    if order.startswith(")"):
        return "stray_close"
    if order.startswith("(("):
        return "nested"
    if order == "(":
        return "unclosed"
    return "second_span" if order.startswith("()(") else "stray_close"


def _judged(
    span: tuple[int, int], inside: int, content: str, size: int, is_finished: bool, least: int
) -> PlannedText:
    error = None if is_finished else "unfinished"
    error = error or (None if content else "empty")
    return PlannedText(span, inside, "" if error else content, size, inside >= least, error)


def decoded_spans(ids: Sequence[int], decode: Decode, text: str) -> list[tuple[int, int]]:
    """Characters (from, to) of the decoded text that each token stands for.

    Tokens that share one character (bytes of it) have the same span. One token after the other is
    decoded beside the tokens before it, as some decoders treat the first one in a way of its own.

    Args:
        ids: Token ids.
        decode: Token ids as text.
        text: ``decode(ids)``.
    """
    pieces = {token: decode([token]) for token in set(ids)}
    spans: list[tuple[int, int]] = []
    done = 0
    if "".join(pieces[token] for token in ids) == text and UNKNOWN not in text:
        for token in ids:  # tokens do not change each other, as in most texts
            spans.append((done, done + len(pieces[token])))
            done = spans[-1][1]
        return spans
    before = after = 0  # ids[before:after] are the last tokens with whole characters
    for stop in range(1, len(ids) + 1):
        new = decode(ids[before:stop])
        if new.endswith(UNKNOWN) and stop < len(ids) and stop - after < MAX_PENDING:
            continue
        end = done + len(new) - len(decode(ids[before:after]) if after else "")
        spans += [(done, end)] * (stop - after)
        before, after, done = after, stop, end
    return spans


class PlannedTask(Task):
    """A task of texts that may have a plan in front, long ones and short ones.

    Whether a query wants a long text (with a plan) or a short one (without) is hidden: rewards
    know it, prompts do not tell.
    """

    @abstractmethod
    def read_plan(self, prompt: Prompt, completion: Completion) -> PlannedText:
        """Take a completion apart. Never raises."""

    @abstractmethod
    def kind(self, prompt: Prompt) -> Kind:
        """The hidden type of a query: for rewards and metrics, never in token ids."""

    @abstractmethod
    def conversation(self, prompt: Prompt, completion: Completion) -> tuple[Chat, str]:
        """The turns before, and the text without its plan; "" where it does not parse.

        Reward models and judges read this: the length of a plan cannot buy their favour.
        """

    @abstractmethod
    def plan_prefix(self, mode: Mode) -> tuple[int, ...]:
        """Token ids that force a mode where they stand first in a completion.

        Args:
            mode: ``plan`` gives the opening tag, ``direct`` a span without a plan.
        """

    def compare(self, pair: Pair) -> float:
        """A judge in code: utility of response 1 less that of response 2.

        Args:
            pair: Two texts of one query.

        Raises:
            ValueError: The task has none.
        """
        raise ValueError(
            f"task '{self.name}' cannot compare two texts itself: "
            "use reward=judge, which asks a judge model"
        )
