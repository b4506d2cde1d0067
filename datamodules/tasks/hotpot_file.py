"""Multi-hop questions from a file of HotpotQA, with the paragraphs of all rows as the corpus.

A row has ``question``, ``answer`` (a text or a list of them), ``context`` (titled paragraphs),
``supporting_facts`` (titles of those that hold the facts) and ``type``. Context and facts are read
in both public shapes:

    Hugging Face  {"title": [...], "sentences": [[...], ...]}    {"title": [...], "sent_id": [...]}
    original      [[title, [sentence, ...]], ...]                [[title, sent_id], ...]

A corpus of its own (``passages``) replaces the contexts; rows then need neither.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

from datamodules.passages import Corpus, Passage, read_passages
from datamodules.prompt_rows import BadRowError, Fields, PromptFile, Role
from datamodules.row_options import RowOptions
from datamodules.search_texts import ANSWER, END_ANSWER, END_SEARCH, SEARCH
from datamodules.sources import clean
from datamodules.tasks.base import Split
from datamodules.tasks.pair_file import set_name
from datamodules.tasks.searching import Question, SearchTask, read_transcript

UNKNOWN = "unknown"
MAX_TITLE = 400  # characters in which the agent looks for the end of a title
_TITLE = re.compile(r"Doc \d+\(Title: ")
_ROLES = {
    "question": Role(("question", "query")),
    "answer": Role(("answer", "answers", "golden_answers")),
    "supporting_facts": Role(("supporting_facts",), is_required=False),
    "type": Role(("type",), is_required=False),
}
_CONTEXT = ("context", "paragraphs")

Paragraph = tuple[str, str]  # title, text


class HotpotFile(RowOptions, SearchTask):
    """Questions of a file, split by a hash of the question.

    A question's group is its ``type`` (``bridge``, ``comparison``); without one ``multi`` where
    several passages support it, else ``single``. Paragraphs with equal title and text are one
    passage; its id is the title, ``title#2`` and so on for other texts of that title. All splits
    share one corpus: the paragraphs of all rows, in file order. ``predict`` is the whole main file.

    ``counts`` are those of ``PromptFile``, and ``empty_paragraphs``, which are left out.

    Args:
        passages: File of the corpus, see ``passages.read_passages``; None for the rows' contexts.
            All passages of a supporting title then support.
        limit: Most questions of a split, the first ones; the corpus stays whole. None for all.
        max_prompt_tokens: Upper bound of a prompt; the question is cut in its middle.
        max_new_tokens: Most tokens of an episode, observations included; None leaves the module's.
        **options: Of ``RowOptions``: ``path`` and the rest.

    Raises:
        ValueError: A value is not allowed; all such values are named at once.

    Example:
        >>> task = HotpotFile(path="hotpot.jsonl", val_fraction=0.2, test_fraction=0.5)
    """

    name = "hotpot_file"

    def __init__(
        self,
        *,
        passages: str | None = None,
        limit: int | None = None,
        max_prompt_tokens: int = 2048,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.passages, self.limit = passages or None, limit
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        sizes = {"limit": limit, "max_prompt_tokens": max_prompt_tokens}
        problems = [
            f"data.task.{key}={value} must be at least 1"
            for key, value in {**sizes, "max_new_tokens": max_new_tokens}.items()
            if value is not None and value < 1
        ]
        context = {"context": Role(_CONTEXT)} if self.passages is None else {}
        try:
            self.file: PromptFile[Question] = PromptFile(
                roles=_ROLES | context,
                make_record=self.make_record,
                key_of=lambda question: question.text,
                **options,
            )
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        self._uids: dict[Paragraph, str] = {}  # of the contexts read so far, in their order
        self._found: dict[str, Passage] = {}
        self._copies: Counter[str] = Counter()
        self._empty: set[tuple[str, str]] = set()
        self._corpus: Corpus | None = None
        self._titles: dict[str, list[str]] = {}

    @property
    def counts(self) -> Counter[str]:
        """What became of the rows and of empty paragraphs."""
        return Counter({**self.file.counts, "empty_paragraphs": len(self._empty)})

    @property
    def corpus(self) -> Corpus:
        """The passages: of their own file, or of the contexts of all rows.

        Raises:
            ValueError: A file cannot be read.
        """
        if self._corpus is None:
            if self.passages is not None:
                self._corpus = read_passages(self.passages)
            else:
                self.file.records("train")  # reads the contexts of all splits
                self._corpus = Corpus(list(self._found.values()), self.path)
            for one in self._corpus:
                self._titles.setdefault(_squeeze(one.title), []).append(one.uid)
        return self._corpus

    def records(self, split: Split) -> Sequence[Question]:
        """Questions of a split, in file order, ``limit`` at most.

        Args:
            split: ``train``, ``val``, ``test``, or ``predict`` for the whole main file.

        Raises:
            ValueError: The file cannot be read, or some row.
        """
        return self.file.records(split)[: self.limit]

    def make_record(self, fields: Fields) -> Question:
        """A question of a row; keeps the paragraphs of its context for the corpus.

        Args:
            fields: The row.

        Raises:
            BadRowError: Question or answers are missing or empty, the context has another shape, or
                a supporting title is not in the corpus.
        """
        text, answers = fields.text("question").strip(), _answers(fields)
        titles = _supporting_titles(fields)
        if self.passages is None:
            paragraphs = list(_paragraphs(fields))
            present = {title for title, body in paragraphs if body}
            _check_titles(fields, titles, present, "no title with a text in this row's context")
            supporting = self._keep(fields, paragraphs, titles)
        else:
            corpus = self.corpus
            titles = [_squeeze(title) for title in titles]
            _check_titles(fields, titles, self._titles.keys(), f"no title in {corpus.name}")
            supporting = [uid for title in titles for uid in self._titles[title]]
        group = "multi" if len(supporting) > 1 else "single"
        if fields.has("type"):
            group = set_name(fields.text("type"))
        uids = tuple(dict.fromkeys(supporting))
        return Question(fields.uid, text, answers, uids, group, where=fields.where)

    def _keep(
        self, fields: Fields, paragraphs: Sequence[Paragraph], titles: Sequence[str]
    ) -> list[str]:
        """Ids of the supporting paragraphs; all that hold a text become passages."""
        supporting = []
        for title, body in paragraphs:
            if not body:
                self._empty.add((fields.where, title))
                continue
            if (title, body) not in self._uids:
                self._copies[title] += 1
                copy = self._copies[title]
                uid = self._free_uid(title or "untitled", copy)
                self._uids[title, body] = uid
                self._found[uid] = Passage(uid, title, body, fields.where)
            if title in titles:
                supporting.append(self._uids[title, body])
        return supporting

    def _free_uid(self, title: str, copy: int) -> str:
        uid = title if copy == 1 else f"{title}#{copy}"
        while uid in self._found:  # another passage's title may look like a numbered one
            uid += "'"
        return uid

    def act(self, question: Question, transcript: str, coin: int) -> str:
        """An agent without a language model, which measures retrieval only: its EM is 0.

        It searches for the question, then for the title of the best passage it has been shown, then
        answers ``unknown``.

        Args:
            question: Which question.
            transcript: All text after the prompt so far, observations included.
            coin: Not used.
        """
        shown, queries = read_transcript(transcript)
        corpus = self.corpus  # also reads the titles
        title = first_title(shown, self._titles.keys()) if len(corpus) else None
        query = {0: question.text, 1: title}.get(len(queries))
        said = " ".join(re.sub("[<>]", " ", query or "").split())
        if not said or said in queries:
            return f"{ANSWER} {UNKNOWN} {END_ANSWER}"
        return f"{SEARCH} {said} {END_SEARCH}"


def first_title(shown: str, titles: Set[str]) -> str | None:
    """The title of the first passage of an observation, brackets in it included.

    Args:
        shown: Observations, with single spaces.
        titles: Those that there are.

    Returns:
        None where no passage has a known title.

    Example:
        >>> first_title("Doc 1(Title: Winner (band)) is a band", {"Winner (band)", "Winner (band"})
        'Winner (band)'
    """
    for mark in _TITLE.finditer(shown):
        rest = shown[mark.end() : mark.end() + MAX_TITLE]
        heads = [rest[: end.start()] for end in re.finditer(r"\)", rest)]
        known = [head for head in heads if head in titles]
        if known:
            return max(known, key=len)
    return None


# ---- Fields of a row -----------------------------------------------------------------------------


def _answers(fields: Fields) -> tuple[str, ...]:
    """All answers, each once."""
    value = fields.value("answer")
    if not isinstance(value, list):
        return (fields.text("answer", numbers=True).strip(),)
    texts = [_text(fields, "answer", one) for one in value]
    if not texts or not all(texts):
        raise fields.bad("answer", "no_answer", "holds no answer, or an empty one")
    return tuple(dict.fromkeys(texts))


def _supporting_titles(fields: Fields) -> list[str]:
    """Titles of the supporting paragraphs, each once; [] where the row has none."""
    if not fields.has("supporting_facts"):
        return []
    value = fields.value("supporting_facts")
    titles: Iterable[Any] | None = None
    if isinstance(value, dict) and isinstance(value.get("title"), list):
        titles = value["title"]
    elif isinstance(value, list) and all(isinstance(one, list) and one for one in value):
        titles = [one[0] for one in value]
    if titles is None:
        wanted = '{"title": [...], "sent_id": [...]} or a list of [title, sent_id]'
        raise fields.bad("supporting_facts", "bad_facts", f"must be {wanted}")
    return list(dict.fromkeys(_text(fields, "supporting_facts", title) for title in titles))


def _paragraphs(fields: Fields) -> Iterable[Paragraph]:
    """Title and text of each paragraph; the text may be empty."""
    value = fields.value("context")
    pairs: list[Any] = value if isinstance(value, list) else []
    if isinstance(value, dict):
        titles, bodies = value.get("title"), value.get("sentences")
        if isinstance(titles, list) and isinstance(bodies, list) and len(titles) == len(bodies):
            pairs = [list(pair) for pair in zip(titles, bodies, strict=True)]
    is_right = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if not pairs or not is_right:
        raise _bad_context(fields)
    for title, body in pairs:
        sentences = body if isinstance(body, list) else [body]
        texts = [_text(fields, "context", sentence) for sentence in sentences]
        yield _text(fields, "context", title), " ".join(text for text in texts if text)


def _bad_context(fields: Fields) -> BadRowError:
    shapes = '{"title": [...], "sentences": [[...], ...]} or a list of [title, sentences]'
    return fields.bad("context", "bad_context", f"must be {shapes}, with a paragraph at least")


def _text(fields: Fields, role: str, value: Any) -> str:
    if not isinstance(value, str):
        raise fields.bad(role, "not_text", f"holds a {type(value).__name__}; texts are needed")
    return clean(value.strip())


def _check_titles(fields: Fields, titles: Sequence[str], known: Set[str], what: str) -> None:
    missing = [title for title in titles if title not in known]
    if missing:
        raise fields.bad("supporting_facts", "unknown_title", f"names {missing[0]!r}, {what}")


def _squeeze(text: str) -> str:
    return " ".join(text.split())
