"""The texts of judging: what is asked, how long texts are cut, how an answer is written and read.

Prompt and output formats follow section 4 of the ReflectRM card [paper], in our own words: an
instruction, a context, two numbered items to judge; the answer is an ``<Analysis>`` and a
``<Result>`` with one of two statements.

Long texts are cut by one rule [our choice]: the template is never cut; the tokens that remain are
shared by question, responses and critiques with one common bound, so that short texts keep
everything, long ones are cut to the same length (length must not tell the responses apart), and
a cut text keeps its head and its tail with `` ... `` between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from datamodules.tasks.base import Verdict

MARK = " ... "
NOUNS = {"pref": "Response", "refl": "Critique"}
# Short and without any judging: they show the grammar, {0} is a noun with a number.
GENERIC_ANALYSES = ("{0} is sounder.", "{0} fits better.", "{0} has fewer faults.")
_TAGS = ("<Analysis>", "</Analysis>", "<Result>", "</Result>")
_TEMPLATES = {
    "pref": (
        "{ask}Context:\n{texts[0]}\n\nResponses for judgment:\n1. {texts[1]}\n\n2. {texts[2]}\n\n"
    ),
    "refl": (
        "{ask}Context:\n{texts[0]}\n\nResponse 1: {texts[1]}\n\nResponse 2: {texts[2]}\n\n"
        "Critiques for judgment:\n1. {texts[3]}\n\n2. {texts[4]}\n\n"
    ),
}


# ---- Tokens --------------------------------------------------------------------------------------


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, without the special tokens that a tokenizer may add.

    Args:
        tokenizer: Any tokenizer.
        text: What to encode.
    """
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Text of token ids as it was, special tokens kept.

    Args:
        tokenizer: Any tokenizer.
        ids: What to decode.
    """
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Characters (from, to) of each token; spread evenly where the tokenizer does not tell.

    Args:
        tokenizer: Any tokenizer.
        text: What to encode.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [(start, end) for start, end in encoded["offset_mapping"]]
    size = len(token_ids(tokenizer, text))
    return [(i * len(text) // size, (i + 1) * len(text) // size) for i in range(size)]


def control_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as control tokens, longest first.

    Args:
        tokenizer: Any tokenizer.
    """
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len)[::-1]


def break_up(text: str, controls: Iterable[str]) -> str:
    """Break up control tokens: data must not end a turn or open another.

    Args:
        text: Any text.
        controls: As of ``control_strings``.
    """
    for token in controls:
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as a user's turn in the tokenizer's chat template, as it is where there is none.

    Args:
        tokenizer: Any tokenizer.
        text: What the user says.
    """
    if not getattr(tokenizer, "chat_template", None):
        return text
    chat = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


# ---- Cutting -------------------------------------------------------------------------------------


def share_budget(lengths: Sequence[int], budget: int) -> int:
    """The largest common bound under which all lengths fit into a budget.

    Args:
        lengths: Tokens of each text.
        budget: Tokens that there are for all of them.

    Returns:
        ``b`` with ``sum(min(length, b)) <= budget``; the longest length where all fit.
    """
    remaining, ordered = max(budget, 0), sorted(lengths)
    for index, length in enumerate(ordered):
        share = remaining // (len(ordered) - index)
        if length > share:
            return share
        remaining -= length
    return ordered[-1] if ordered else 0


def cut_middle(text: str, spans: Sequence[tuple[int, int]], bound: int, mark_tokens: int) -> str:
    """A text of at most ``bound`` tokens that keeps head and tail, cut between characters.

    Args:
        text: What to cut.
        spans: Characters (from, to) of each of its tokens.
        bound: Tokens to keep, the mark included; where not even the mark fits, a bare head.
        mark_tokens: Tokens of the mark.
    """
    size = len(spans)
    if size <= bound:
        return text
    keep = bound - mark_tokens
    if keep < 2:
        return text[: spans[bound][0]] if bound > 0 else ""
    tail = keep // 2
    # The start of the first token left out: a character of which one byte is out, is out.
    return text[: spans[keep - tail][0]] + MARK + text[spans[size - tail - 1][1] :]


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, bound: int) -> str:
    """One text cut by ``cut_middle``.

    Args:
        tokenizer: Any tokenizer.
        text: What to cut.
        bound: Tokens to keep.
    """
    mark_tokens = len(token_ids(tokenizer, MARK))
    return cut_middle(text, token_spans(tokenizer, text), bound, mark_tokens)


def cut_to_fit(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], list[int]],
    budget: int,
    limit: int,
) -> list[int]:
    """Ids of a prompt whose texts are cut to one common bound, so that it fits.

    Args:
        tokenizer: What ``encode`` uses.
        texts: The texts of the prompt.
        encode: Makes the ids of the prompt from the texts.
        budget: Tokens that there are for all texts.
        limit: Tokens that there are for the prompt.
    """
    spans = [token_spans(tokenizer, text) for text in texts]
    mark_tokens = len(token_ids(tokenizer, MARK))
    while True:
        bound = share_budget([len(span) for span in spans], budget)
        pieces = zip(texts, spans, strict=True)
        ids = encode([cut_middle(text, span, bound, mark_tokens) for text, span in pieces])
        over = len(ids) - limit
        if over <= 0:
            return ids
        # Merges across a seam can cost a token or two: give them back and try again.
        budget -= over


# ---- Questions and answers -----------------------------------------------------------------------


def format_question(domain: str, texts: Sequence[str]) -> str:
    """What is asked, as one text.

    Args:
        domain: ``pref`` or ``refl``.
        texts: Question and both responses; for ``refl`` also both critiques.
    """
    ask = (
        f"Judge which {NOUNS[domain].lower()} is better. Answer as <Analysis>why</Analysis><Result>"
        f"{statement(domain, 1)}</Result> or the reverse.\n\n"
    )
    return _TEMPLATES[domain].format(ask=ask, texts=texts)


def statement(domain: str, winner: int) -> str:
    """The verdict in words, e.g. ``Response 1 is better than Response 2``.

    Args:
        domain: ``pref`` or ``refl``.
        winner: 1 or 2.
    """
    noun = NOUNS[domain]
    return f"{noun} {winner} is better than {noun} {3 - winner}"


def format_answer(domain: str, analysis: str, winner: int) -> str:
    """A legal output, the inverse of ``parse_answer``.

    Args:
        domain: ``pref`` or ``refl``.
        analysis: The reasoning.
        winner: 1 or 2.
    """
    return f"<Analysis>{analysis}</Analysis><Result>{statement(domain, winner)}</Result>"


def parse_answer(text: str, domain: str) -> Verdict:
    """Read an output whose end token is already gone. Never raises.

    Rules [our choice of the card]: each tag exactly once and in order, nothing but white space
    after ``</Result>``, the statement one of the two of this domain, letter by letter. Text
    before ``<Analysis>`` is let through: chat models put an empty thinking block there. An empty
    analysis is legal.

    Args:
        text: What the model wrote.
        domain: ``pref`` wants responses, ``refl`` critiques.
    """
    for tag in _TAGS:
        if text.count(tag) != 1:
            return Verdict(None, error=f"{tag} stands there {text.count(tag)} times, not once")
    places = [text.index(tag) for tag in _TAGS]
    if places != sorted(places):
        return Verdict(None, error="the tags are not in the order of " + "".join(_TAGS))
    analysis = text[places[0] + len(_TAGS[0]) : places[1]].strip()
    result = text[places[2] + len(_TAGS[2]) : places[3]].strip()
    if text[places[3] + len(_TAGS[3]) :].strip():
        return Verdict(None, error="text after </Result>")
    for winner in (1, 2):
        if domain in NOUNS and result == statement(domain, winner):
            return Verdict(winner, analysis)
    wanted = statement(domain, 1) if domain in NOUNS else f"a verdict of domain {domain}"
    return Verdict(None, error=f"the result is not '{wanted}' or the reverse: {result[:60]!r}")


def check_writes_answers(tokenizer: PreTrainedTokenizerBase, task: str) -> None:
    """Refuse a tokenizer that loses something of an answer.

    Args:
        tokenizer: What a task is bound to.
        task: Name of that task.

    Raises:
        ValueError: An answer does not survive encoding and decoding.
    """
    sample = format_answer("pref", "Response 1: 12 < 3, so no.", 2)
    ids = token_ids(tokenizer, sample)
    back = token_text(tokenizer, ids)
    if tokenizer.unk_token_id in ids or back.strip() != sample:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write the "
            f"verdicts of task '{task}': {sample!r} comes back as {back!r}; use a byte-level "
            "tokenizer or a real model's"
        )
