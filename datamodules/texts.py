"""From items to token ids: templates, truncation, and which tokens a vector is pooled from.

Pooling is decided here, where the tokens are made, and carried along as a position: a padding side
or a missing EOS token can then not be guessed wrong later (CoCoA's card, section 8).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from datamodules.tasks.embedding import Item

Pooling = Literal["mean", "last", "eos", "cls"]
Role = Literal["query", "passage"]


@dataclass(frozen=True)
class Encoded:
    """An item as the backbone reads it.

    Args:
        ids: L token ids.
        pool: First and last-plus-one token that the vector is the mean of.
        image: Its encoded image; None for a text.
    """

    ids: tuple[int, ...]
    pool: tuple[int, int]
    image: Any = None


@dataclass
class Chunk:
    """Items of one forward pass, padded on the right.

    Args:
        input_ids: ``(n, L)``.
        mask: ``(n, L)`` bool, True on tokens.
        pool: ``(n, L)`` bool, True on the tokens that the vector is the mean of.
        images: Encoded images of the rows that have one, in order.
    """

    input_ids: Tensor
    mask: Tensor
    pool: Tensor
    images: list[Any]

    def to(self, device: Any) -> Chunk:
        """The same on a device; images stay."""
        ids, mask, pool = (x.to(device) for x in (self.input_ids, self.mask, self.pool))
        return Chunk(ids, mask, pool, self.images)


def chunk_of(items: Sequence[Encoded], pad_id: int) -> Chunk:
    """Pad items into one chunk.

    Args:
        items: At least one.
        pad_id: What fills up; the mask hides it.

    Example:
        >>> chunk_of([Encoded((5, 6), (0, 2)), Encoded((7,), (0, 1))], 0).input_ids
        tensor([[5, 6],
                [7, 0]])
    """
    width = max(len(item.ids) for item in items)
    rows = [[*item.ids, *[pad_id] * (width - len(item.ids))] for item in items]
    places = torch.arange(width)
    lengths = torch.tensor([len(item.ids) for item in items])
    spans = torch.tensor([item.pool for item in items])
    return Chunk(
        input_ids=torch.tensor(rows),
        mask=places < lengths[:, None],
        pool=(places >= spans[:, :1]) & (places < spans[:, 1:]),
        images=[item.image for item in items if item.image is not None],
    )


def chunks_of(
    items: Sequence[Encoded], size: int | None, pad_id: int, *, longest_first: bool = True
) -> tuple[list[Chunk], list[int]]:
    """Cut items into chunks of similar lengths, so that little is padded.

    Args:
        items: At least one.
        size: Items a chunk; None for one chunk.
        pad_id: See ``chunk_of``.
        longest_first: What does not fit into memory then shows at once; False for shortest first.

    Returns:
        The chunks, and for each item its place among the rows of all chunks.
    """
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids), reverse=longest_first)
    step = size or len(items)
    chunks = [
        chunk_of([items[i] for i in order[start : start + step]], pad_id)
        for start in range(0, len(order), step)
    ]
    places = [0] * len(order)
    for place, i in enumerate(order):
        places[i] = place
    return chunks, places


class TextEncoding:
    """Renders and tokenises texts.

    Args:
        pooling: Tokens that a vector is made of: ``mean`` of all, the ``last`` one, an ``eos``
            token that is put at the end, or the first one (``cls``).
        max_query_tokens: Longest query, special tokens included; what is longer is cut.
        max_passage_tokens: Longest passage.
        query_template: What is read: ``{text}``, and ``{instruction}`` of the data set where
            wanted, e.g. ``"Instruct: {instruction}\\nQuery: {text}"`` (BOOM [code]).
        passage_template: The same for passages.
        instructions: Data set -> instruction, over what the task says.
        pool_template: Whether the tokens of the template before the text count in ``mean``.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> TextEncoding(query_template="query: {text}").render("dogs", "query")
        'query: dogs'
    """

    def __init__(
        self,
        *,
        pooling: Pooling = "mean",
        max_query_tokens: int = 512,
        max_passage_tokens: int = 512,
        query_template: str = "{text}",
        passage_template: str = "{text}",
        instructions: dict[str, str] | None = None,
        pool_template: bool = True,
    ) -> None:
        problems = []
        if pooling not in ("mean", "last", "eos", "cls"):
            problems.append(
                f"data.encoding.pooling={pooling!r} must be one of mean, last, eos, cls"
            )
        self.templates: dict[Role, str] = {"query": query_template, "passage": passage_template}
        for role, template in self.templates.items():
            if template.count("{text}") != 1 or not template.endswith("{text}"):
                problems.append(
                    f"data.encoding.{role}_template={template!r} must end with its one {{text}}: "
                    f"texts that are too long are cut at the end"
                )
        self.max_tokens: dict[Role, int] = {
            "query": max_query_tokens,
            "passage": max_passage_tokens,
        }
        problems += [
            f"data.encoding.max_{role}_tokens={most} must be at least 2"
            for role, most in self.max_tokens.items()
            if most < 2
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.pooling: Pooling = pooling
        self.instructions = dict(instructions or {})
        self.pool_template = pool_template
        self.tokenizer: Any = None
        self._prefixes: dict[str, int] = {}

    def bind(self, tokenizer: Any) -> Any:
        """Take the tokenizer of the backbone; for ``eos`` a copy that puts EOS at the end.

        Returns:
            The tokenizer that is used, to be exported with the model.

        Raises:
            ValueError: It has no EOS token where one is needed.
        """
        self.tokenizer = tokenizer
        self._prefixes = {}
        if self.pooling == "eos" and not self._ends_with_eos(tokenizer):
            if tokenizer.eos_token_id is None:
                raise ValueError("data.encoding.pooling=eos: the tokenizer has no EOS token")
            self.tokenizer = with_eos(tokenizer)
        return self.tokenizer

    @staticmethod
    def _ends_with_eos(tokenizer: Any) -> bool:
        ids = tokenizer("a")["input_ids"]
        return bool(ids) and ids[-1] == tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """What fills up; any id does, since it is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def render(self, text: str, role: Role, instruction: str = "") -> str:
        """The text as it is read.

        Args:
            text: Of the item.
            role: Which template.
            instruction: Of its data set.
        """
        return self.prefix(role, instruction) + text

    def prefix(self, role: Role, instruction: str = "") -> str:
        """What stands before a text.

        Args:
            role: Which template.
            instruction: Of its data set.
        """
        template = self.templates[role]
        return template.replace("{instruction}", instruction).removesuffix("{text}")

    def encode(
        self, items: Sequence[Item], role: Role, instruction: str = "", where: Sequence[str] = ()
    ) -> list[Encoded]:
        """Tokenise items.

        Args:
            items: Texts; images need a subclass.
            role: ``query`` or ``passage``.
            instruction: Of their data set.
            where: Of each item, for messages.

        Raises:
            ValueError: A text has no token, or is no text (names where it is from).
        """
        texts = []
        for place, item in enumerate(items):
            if not isinstance(item, str):
                raise ValueError(
                    f"{_place(where, place)}this backbone reads texts only, not images: use "
                    f"model=cocoa"
                )
            texts.append(self.render(item, role, instruction))
        return self.encode_texts(texts, role, instruction, where)

    def encode_texts(
        self, texts: Sequence[str], role: Role, instruction: str, where: Sequence[str]
    ) -> list[Encoded]:
        """Token ids of rendered texts; arguments as in ``encode``."""
        if not texts:
            return []
        most = self.max_tokens[role]
        # cut by hand where nothing is put behind: fast tokenizers then need no state
        made = self.tokenizer(
            list(texts), truncation=True, max_length=most, return_attention_mask=False
        )["input_ids"]
        skipped = self._prefix_tokens(role, instruction)
        found = []
        for place, ids in enumerate(made):
            if not ids:
                raise ValueError(
                    f"{_place(where, place)}the text {texts[place][:60]!r} has no token: nothing "
                    f"is left to embed"
                )
            found.append(Encoded(tuple(ids), self._pool(len(ids), skipped)))
        return found

    def _pool(self, length: int, skipped: int) -> tuple[int, int]:
        if self.pooling == "cls":
            return 0, 1
        if self.pooling == "mean":
            return (min(skipped, length - 1), length)
        return length - 1, length

    def _prefix_tokens(self, role: Role, instruction: str) -> int:
        """Tokens of the template that ``mean`` leaves out."""
        prefix = self.prefix(role, instruction)
        if self.pool_template or not prefix.strip():
            return 0
        if prefix not in self._prefixes:
            ids = self.tokenizer(prefix)["input_ids"]
            special = set(self.tokenizer.all_special_ids)
            while ids and ids[-1] in special:
                ids = ids[:-1]
            self._prefixes[prefix] = len(ids)
        return self._prefixes[prefix]


def with_eos(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer that puts its EOS token behind every text.

    Args:
        tokenizer: With an EOS token.
    """
    copied = copy.deepcopy(tokenizer)
    eos = copied.eos_token
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}",
        pair=f"$A {eos} $B:1 {eos}:1",
        special_tokens=[(eos, copied.eos_token_id)],
    )
    return copied


def _place(where: Sequence[str], place: int) -> str:
    return f"{where[place]}: " if place < len(where) and where[place] else ""
