"""Search episodes as rollouts: policy RL of a search agent, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.dense_retrieval import DenseRetriever, retriever_from
from datamodules.index_options import read_index_options
from datamodules.rollouts import RolloutDataModule
from datamodules.search_options import SearchOptions, input_writer
from datamodules.search_texts import FORMS
from datamodules.sources import nearest
from datamodules.tasks.searching import SearchTask
from datamodules.texts import TextEncoding


class SearchRolloutDataModule(RolloutDataModule):
    """Rollouts whose engine searches: completions hold observations, which nothing trains on.

    Args:
        task: Questions and corpus.
        retriever: ``path`` of an encoder (null searches by words, BM25) and ``input``, what it
            reads.
        index: Of the encoder, see ``IndexOptions``.
        search: Bounds of an episode, see ``SearchOptions``; its ``max_new_tokens`` is the module's
            ``model.max_new_tokens``.
        encoding: How the encoder reads texts.
        **kwargs: Of ``RolloutDataModule``.

    Raises:
        ValueError: A value is not allowed.
    """

    def __init__(
        self,
        *,
        task: SearchTask,
        retriever: Mapping[str, Any],
        index: Mapping[str, Any],
        search: Mapping[str, Any],
        encoding: TextEncoding,
        **kwargs: Any,
    ) -> None:
        super().__init__(task=task, **kwargs)
        self.questions, self.retriever, self.encoding = task, dict(retriever), encoding
        self.index, self.search = read_index_options(index), SearchOptions.read(search)
        form = self.retriever["input"]
        if form not in FORMS:
            raise ValueError(
                f"data.retriever.input={form!r} must be one of {', '.join(FORMS)}"
                f"{nearest(form, FORMS)}"
            )

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizer, build the index, and let the engine search.

        Args:
            backbone: Folder or hub name of the agent to train.
            cache_dir: Where the index is kept.
            task_settings: Plain values that identify the task.
            for_training: Whether training follows.
        """
        super().prepare(backbone, cache_dir, task_settings, for_training)
        options = {"path": self.retriever.get("path"), "index": self.index}
        corpus = self.questions.corpus
        retriever = retriever_from(options, corpus, cache_dir, self.encoding)
        fit = None  # words have no bound, an encoder reads so many tokens only
        if isinstance(retriever, DenseRetriever):
            fit = input_writer(retriever.encoder.bound_encoding)
        self.engine = self.search.engine(
            self.engine, self.questions, retriever, self.retriever["input"], fit
        )
