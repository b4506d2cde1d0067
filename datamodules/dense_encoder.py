"""Vectors of texts from an encoder folder, with nothing but ``transformers``.

Our exports are such folders, and so are most encoders of the hub (E5, BGE, MiniLM). The vectors
are those of ``module.embed`` of the module that wrote the folder, for the same ``TextEncoding``.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as hub_logging

from datamodules.prepared import digest
from datamodules.texts import Chunk, Role, TextEncoding, chunks_of

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_TEXTS = ("config.json", "*token*", "vocab*", "merges.txt", "*.model", "*.spm", "*.py")
_hashes: dict[tuple[str, int, int, int], str] = {}


class DenseEncoder:
    """A frozen bi-encoder, loaded when it is first used.

    Args:
        path: Folder or hub name.
        encoding: Templates, lengths and pooling; it is copied, so it may be bound elsewhere.
        normalize: Vectors of length 1, so that inner products are cosines.
        batch_size: Texts a forward pass.
        key: Config key of these options, for messages.

    Raises:
        ValueError: There is no such folder or no configuration in it, or no texts a batch.

    Example:
        >>> encoder = DenseEncoder("intfloat/e5-base-v2", encoding)  # doctest: +SKIP
        >>> encoder.encode(["a dog"], "query").shape  # doctest: +SKIP
        torch.Size([1, 768])
    """

    def __init__(
        self,
        path: str | Path,
        encoding: TextEncoding,
        *,
        normalize: bool = True,
        batch_size: int = 64,
        key: str = "data.retriever",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{key}.batch_size={batch_size} must be at least 1")
        self.path, self.key = str(path), key
        self.normalize, self.batch_size = normalize, batch_size
        self.encoding = copy.copy(encoding)
        self.folder = _folder_of(self.path, key)
        #: Identity of weights, configuration, tokenizer and how texts are read.
        self.digest = self._digest()

    @property
    def bound_encoding(self) -> TextEncoding:
        """How texts are read, with the tokenizer, which comes with the model."""
        _ = self._model
        return self.encoding

    @property
    def width(self) -> int:
        """Dimensions of a vector."""
        return int(self._model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], role: Role, where: Sequence[str] = ()) -> Tensor:
        """Vectors of texts, in their order.

        Args:
            texts: May be empty.
            role: Which template: ``query`` or ``passage``.
            where: Of each text, for messages.

        Returns:
            ``(N, d)`` float32 on the CPU.

        Raises:
            ValueError: A text has no token, or more than the model has positions for; the folder
                cannot be loaded, or has changed since it was named.
        """
        if not texts:
            return torch.zeros(0, self.width)
        model = self._model  # binds the tokenizer as well
        items = self.encoding.encode(texts, role, where=where)
        chunks, places = chunks_of(items, self.batch_size, self.encoding.pad_id)
        found = torch.cat([self._vectors(model, chunk) for chunk in chunks])[places]
        return F.normalize(found, dim=-1) if self.normalize else found

    def _vectors(self, model: Any, chunk: Chunk) -> Tensor:
        if self._most_tokens is not None and chunk.input_ids.shape[1] > self._most_tokens:
            raise ValueError(
                f"a text of {chunk.input_ids.shape[1]} tokens, and {self.key}.path={self.path!r} "
                f"has positions for {self._most_tokens}: lower max_query_tokens and "
                f"max_passage_tokens of its encoding"
            )
        chunk = chunk.to(model.device)
        with torch.autocast(model.device.type, enabled=False):  # the index is of float32
            hidden = model(input_ids=chunk.input_ids, attention_mask=chunk.mask.long())
        weights = chunk.pool.float()[:, :, None]
        pooled: Tensor = (hidden.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        return pooled.cpu()

    @cached_property
    def _model(self) -> Any:
        """The model in evaluation mode; its tokenizer is bound to the encoding."""
        before = hub_logging.get_verbosity()
        hub_logging.set_verbosity_error()  # a pooling layer is left out or made up: of no use here
        try:
            with torch.random.fork_rng(devices=[]):  # made up weights draw random numbers
                model, info = AutoModel.from_pretrained(
                    self.path, dtype=torch.float32, output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.key}.path={self.path!r} cannot be loaded: {first}") from error
        finally:
            hub_logging.set_verbosity(before)
        missing = [name for name in info["missing_keys"] if "pooler." not in name]
        if missing:
            raise ValueError(
                f"{self.key}.path={self.path!r} lacks {len(missing)} weights of an encoder, such "
                f"as {sorted(missing)[0]}"
            )
        if self._digest() != self.digest:
            raise ValueError(
                f"{self.key}.path={self.path!r} has changed since the index was chosen: start again"
            )
        self.encoding.bind(tokenizer)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.eval().requires_grad_(False).to(device)

    @cached_property
    def _most_tokens(self) -> int | None:
        """Tokens that a table of learned positions has room for; None without one."""
        tables = [
            part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
            for name, part in self._model.named_modules()
            if name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
        ]
        return min(tables, default=None)

    def _digest(self) -> str:
        texts = self.encoding
        return digest(
            {
                "encoder": 1,
                "files": _files_digest(self.folder),
                "templates": texts.templates,
                "max_tokens": texts.max_tokens,
                "pooling": texts.pooling,
                "pool_template": texts.pool_template,
                "normalize": self.normalize,
            }
        )


def _folder_of(path: str, key: str) -> Path:
    """The folder itself, or where a hub name's files are kept."""
    try:
        config = cached_file(path, "config.json")
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{key}.path={path!r} cannot be loaded: {first}") from error
    return Path(str(config)).parent


def _files_digest(folder: Path) -> str:
    """Hash of what the vectors depend on; a snapshot of the hub is named by its content."""
    if folder.parent.name == "snapshots":
        return folder.name
    names = {file for pattern in (*_WEIGHTS, *_TEXTS) for file in folder.glob(pattern)}
    return digest({file.name: _file_hash(file) for file in sorted(names) if file.is_file()})


def _file_hash(file: Path) -> str:
    """Hash of a file's content, computed again when its size or time has changed."""
    about = file.stat()
    known = (str(file.resolve()), about.st_ino, about.st_size, about.st_mtime_ns)
    if known not in _hashes:
        with file.open("rb") as opened:
            _hashes[known] = hashlib.file_digest(opened, "sha256").hexdigest()
    return _hashes[known]
