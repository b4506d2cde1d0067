"""Images and texts in one sequence, as CoCoA's three stages read them (arXiv 2603.01471).

    warmup       image, then caption
    bridge       ``[A] [EOS] [B]``
    contrastive  an image, a text or both, then EOS

Every message names the row: its ``where``, or the item's key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from transformers import AutoConfig, Qwen2VLImageProcessorPil

from datamodules.images import EncodedImages, encode_images
from datamodules.sources import nearest
from datamodules.tasks.embedding import ImageText, Item
from datamodules.texts import Encoded, Role, TextEncoding

StageName = Literal["warmup", "bridge", "contrastive"]
LEAST_TARGET = 4  # tokens of block B that are kept, however long A is


class ImageTextEncoding(TextEncoding):
    """Images and texts in one sequence: vision tokens, the text, EOS.

    Args:
        max_sequence_tokens: Longest sequence of the first two stages.
        image_sizes: Stage -> side in pixels of the square that its images are resized to, such as
            ``{warmup: 336, bridge: 448}`` [code]; ``contrastive`` is that of the vectors. A stage
            that is not named leaves the size to the image processor.
        cache_images: Encoded images that are kept.
        **options: Of ``TextEncoding``; CoCoA pools the EOS token.

    Raises:
        ValueError: A value is out of range, or an unknown stage.
    """

    def __init__(
        self,
        *,
        max_sequence_tokens: int = 4096,
        image_sizes: Mapping[str, int] | None = None,
        cache_images: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        sizes, known = dict(image_sizes or {}), get_args(StageName)
        problems = [
            f"data.encoding.image_sizes.{name}: no such stage; there are {', '.join(known)}"
            f"{nearest(name, known)}"
            for name in sizes
            if name not in known
        ]
        problems += [
            f"data.encoding.image_sizes.{name}={side} must be at least 1"
            for name, side in sizes.items()
            if side < 1
        ]
        if max_sequence_tokens < LEAST_TARGET + 2:
            problems.append(
                f"data.encoding.max_sequence_tokens={max_sequence_tokens} must be at least "
                f"{LEAST_TARGET + 2}"
            )
        if cache_images < 0:
            problems.append(f"data.encoding.cache_images={cache_images} must be 0 or more")
        if problems:
            raise ValueError("; ".join(problems))
        self.max_sequence_tokens, self.cache_images = max_sequence_tokens, cache_images
        self.image_sizes = sizes
        self.processor: Any = None
        self._vision: tuple[int, int, int] = (-1, -1, -1)
        self._special: set[int] = set()
        self._cache: OrderedDict[tuple[str, int | None], EncodedImages] = OrderedDict()

    def bind(self, tokenizer: Any) -> Any:
        """As in ``TextEncoding``."""
        bound = super().bind(tokenizer)
        self._special = set(bound.all_special_ids)
        return bound

    def bind_images(self, backbone: str) -> None:
        """Take the image processor and the vision tokens of a Qwen-VL folder.

        Raises:
            ValueError: It has none.
        """
        try:
            config: Any = AutoConfig.from_pretrained(backbone)
            self._vision = (
                config.vision_start_token_id,
                config.image_token_id,
                config.vision_end_token_id,
            )
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(backbone)
        except (OSError, AttributeError, ValueError) as error:
            raise ValueError(
                f"backbone.path={backbone!r} reads no images: give a Qwen2-VL or Qwen2.5-VL folder"
            ) from error
        self._cache.clear()

    def image(
        self, item: ImageText, where: str = "", stage: StageName = "contrastive"
    ) -> EncodedImages:
        """Its patches, from the cache where they are.

        Raises:
            ValueError: It does not decode, or is too small or too narrow (names where it is from).
        """
        side = self.image_sizes.get(stage)
        key = item.key, side
        found = self._cache.get(key)
        if found is None:
            try:
                found = encode_images(self.processor, [item.image], square=side)
            except ValueError as error:
                raise ValueError(f"{where or item.where or item.key}: {error}") from error
            self._cache[key] = found
        self._cache.move_to_end(key)
        while len(self._cache) > self.cache_images:
            self._cache.popitem(last=False)
        return found

    def image_ids(self, image: EncodedImages) -> list[int]:
        """Vision start, the image's tokens, vision end."""
        start, token, end = self._vision
        return [start, *[token] * image.num_tokens(self.processor.merge_size)[0], end]

    # ------------------------------------------------------------------ vectors

    def encode(
        self, items: Sequence[Item], role: Role, instruction: str = "", where: Sequence[str] = ()
    ) -> list[Encoded]:
        """Token ids of images and texts, each with EOS where that is pooled.

        Raises:
            ValueError: An image does not decode, or a text has no token or one that stands for an
                image (names where it is from).
        """
        texts = [item for item in items if isinstance(item, str)]
        places = [place for place, item in enumerate(items) if isinstance(item, str)]
        told = [where[place] for place in places] if where else []
        rendered = [self.render(text, role, instruction) for text in texts]
        made = iter(self.encode_texts(rendered, role, instruction, told))
        found = []
        for place, item in enumerate(items):
            source = where[place] if where else ""
            if isinstance(item, str):
                one = next(made)
                self._check_text(one.ids, source or repr(item[:60]))
                found.append(one)
                continue
            image = self.image(item, source)
            head = self.image_ids(image)
            # the text behind it, or EOS alone, is what the tokenizer makes of it
            tail = self.tokenizer(self.render(item.text, role, instruction))["input_ids"]
            self._check_text(tail, source or item.where or item.key)
            room = max(self.max_tokens[role] - len(head), 1)
            tail = tail if len(tail) <= room else [*tail[: room - 1], tail[-1]]
            ids = (*head, *tail)
            found.append(Encoded(ids, self._pool(len(ids), 0), image))
        return found

    # ------------------------------------------------------------------ reconstruction

    def plain_ids(self, text: str, where: str = "") -> list[int]:
        """Token ids of a text without special tokens.

        Raises:
            ValueError: One of them stands for an image.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self._check_text(ids, where)
        return ids

    def warmup(self, items: Sequence[ImageText]) -> tuple[list[Encoded], list[tuple[int, int]]]:
        """Image then caption, and where the caption is.

        Raises:
            ValueError: A caption has no token to be masked, or no room beside its image.
        """
        found, spans = [], []
        for item in items:
            where = item.where or item.key
            image = self.image(item, stage="warmup")
            head, text = self.image_ids(image), self.plain_ids(item.text, where)
            ids = (head + text)[: self.max_sequence_tokens]
            if not self._is_text(ids[len(head) :]):
                raise ValueError(
                    f"{where}: the caption has no token that can be masked, or no room beside its "
                    f"{len(head)} image tokens (data.encoding.max_sequence_tokens="
                    f"{self.max_sequence_tokens})"
                )
            found.append(Encoded(tuple(ids), (len(ids) - 1, len(ids)), image))
            spans.append((len(head), len(ids)))
        return found, spans

    def bridge(
        self, rows: Sequence[tuple[Item, str, str]]
    ) -> tuple[list[Encoded], list[tuple[int, int]], list[int]]:
        """``[A] [EOS] [B]``: sequences, where B is, and where EOS is.

        Text of A is cut before B loses its first tokens; image tokens never are.

        Args:
            rows: Block A, block B, and where they are from.

        Raises:
            ValueError: A has no token, B has none to be masked, or an image leaves no room.
        """
        found, spans, bridges = [], [], []
        most = self.max_sequence_tokens
        for source, target, where in rows:
            image = None if isinstance(source, str) else self.image(source, where, "bridge")
            head = [] if image is None else self.image_ids(image)
            text = self.plain_ids(source if isinstance(source, str) else source.text, where)
            own = self.plain_ids(target, where)
            room = most - len(head) - 1 - min(len(own), LEAST_TARGET)
            first = head + text[: max(room, 0)]
            own = own[: max(most - len(first) - 1, 0)]
            if room < 0 or not first or not self._is_text(own):
                raise ValueError(
                    f"{where}: block A needs a token, block B one that can be masked, and both "
                    f"room (A has {len(head)} image tokens, data.encoding.max_sequence_tokens="
                    f"{most})"
                )
            ids = (*first, self.tokenizer.eos_token_id, *own)
            found.append(Encoded(ids, (len(first), len(first) + 1), image))
            bridges.append(len(first))
            spans.append((len(first) + 1, len(ids)))
        return found, spans, bridges

    def _is_text(self, ids: Sequence[int]) -> bool:
        """Whether one of them may be masked."""
        return not self._special.issuperset(ids)

    def _check_text(self, ids: Sequence[int], where: str) -> None:
        if self._vision[1] in ids:
            token = self.tokenizer.convert_ids_to_tokens(self._vision[1])
            raise ValueError(f"{where}: the text holds {token!r}, which stands for an image")
