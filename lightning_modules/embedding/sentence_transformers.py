"""The files that make an exported folder one of sentence-transformers: equal vectors there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datamodules.texts import Role, TextEncoding

_MODES = {"mean": "mean", "last": "lasttoken", "eos": "lasttoken", "cls": "cls"}
_PACKAGE = "sentence_transformers.models"


def write_sentence_transformers(
    folder: Path,
    encoding: TextEncoding,
    *,
    width: int,
    normalize: bool,
    without_pooler: bool = False,
) -> None:
    """Add ``modules.json``, pooling, normalisation and prompts to a folder with a model.

    ``SentenceTransformer(folder)`` then gives the same vectors: queries by ``encode_query``,
    passages by ``encode_document``. Texts are cut at the longer of both limits.

    Args:
        folder: A Hugging Face folder.
        encoding: How texts become tokens.
        width: Dimensions of a vector.
        normalize: Whether vectors have length 1.
        without_pooler: The model was built without the pooling layer that its class knows; a random
            one would be made there.
    """
    parts: list[dict[str, Any]] = [
        {"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{_PACKAGE}.Pooling"},
    ]
    if normalize:
        parts.append(
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{_PACKAGE}.Normalize"}
        )
    names = ("cls", "mean", "lasttoken")
    flags = {
        "cls": "pooling_mode_cls_token",
        "mean": "pooling_mode_mean_tokens",
        "lasttoken": "pooling_mode_lasttoken",
    }
    mode = _MODES[encoding.pooling]
    pooling: dict[str, Any] = {"word_embedding_dimension": width}
    pooling |= {flags[name]: name == mode for name in names}
    # without it there, cls would be the first token behind the prompt
    pooling["include_prompt"] = encoding.pool_template or encoding.pooling != "mean"
    roles: dict[str, Role] = {"query": "query", "document": "passage"}
    own = {
        "prompts": {name: encoding.prefix(role) for name, role in roles.items()},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine" if normalize else "dot",
    }
    model: dict[str, Any] = {"max_seq_length": max(encoding.max_tokens.values())}
    model["do_lower_case"] = False
    if without_pooler:
        model["model_args"] = {"add_pooling_layer": False}
    for name in ("1_Pooling", "2_Normalize")[: len(parts) - 1]:
        (folder / name).mkdir(exist_ok=True)
    for path, content in (
        ("modules.json", parts),
        ("1_Pooling/config.json", pooling),
        ("config_sentence_transformers.json", own),
        ("sentence_bert_config.json", model),
    ):
        (folder / path).write_text(json.dumps(content, indent=1) + "\n")
