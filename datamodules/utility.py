"""Measured utility as a data stream: agent -> trajectories -> labels -> rows -> pairs.

Before the first step (``prepare``) the agent answers the training questions with the retriever of
the round, candidates of every turn are labelled, and rows are selected; from then on the data are
pairs like any others. Finished labels are on disk, so a killed labelling run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from datamodules.agents import Agent
from datamodules.dense_encoder import DenseEncoder
from datamodules.dense_retrieval import DenseRetriever
from datamodules.engines.base import Engine
from datamodules.experience import Completion
from datamodules.index_options import read_index_options
from datamodules.labelling.judges import open_judge
from datamodules.labelling.options import LabelOptions
from datamodules.labelling.pipeline import Labelled, label_turns
from datamodules.labelling.records import UtilityRow
from datamodules.pair_source import PairSource
from datamodules.pairs import PairDataModule
from datamodules.prepared import digest
from datamodules.retrieval import Retriever
from datamodules.search_options import SearchOptions, input_writer
from datamodules.search_texts import FORMS
from datamodules.sources import nearest
from datamodules.tasks.searching import Question
from datamodules.tasks.utility_pairs import UtilityPairs
from datamodules.utility_source import UtilitySource


class UtilityDataModule(PairDataModule):
    """Owns the agent, the judge, the labels and the pairs made of them.

    Args:
        task: Questions, corpus, and the pairs.
        agent: Who searches.
        judge: ``path`` of a language model (null: the task's own judge), ``engine``, ``dtype``,
            ``max_new_tokens``.
        retriever: ``path`` of the encoder that trajectories search with (null: the untrained
            backbone) and ``input``, what it reads.
        index: Of that encoder, see ``IndexOptions``.
        search: Bounds of an episode, see ``SearchOptions``.
        labels: How passages are labelled and selected, see ``LabelOptions``.
        labels_folder: Where finished labels are kept.
        input: What the trained retriever reads: ``query`` | ``question_query`` |
            ``question_history_query`` | ``history_query``.
        base_input: What the untrained one is measured with: an encoder that never saw question and
            query together gets worse when fed both (card, section 8.6).
        **kwargs: Of ``PairDataModule``.

    Raises:
        ValueError: A value is not allowed.
    """

    def __init__(
        self,
        *,
        task: UtilityPairs,
        agent: Agent,
        judge: Mapping[str, Any],
        retriever: Mapping[str, Any],
        index: Mapping[str, Any],
        search: Mapping[str, Any],
        labels: Mapping[str, Any],
        labels_folder: str,
        input: str = "question_query",
        base_input: str = "query",
        **kwargs: Any,
    ) -> None:
        super().__init__(task=task, **kwargs)
        self.utility, self.agent, self.judge = task, agent, dict(judge)
        self.retriever = dict(retriever)
        self.index, self.search = read_index_options(index), SearchOptions.read(search)
        self.labels, self.labels_folder = LabelOptions.read(labels), Path(labels_folder)
        self.input, self.base_input = input, base_input
        forms = {"input": input, "base_input": base_input, "retriever.input": retriever["input"]}
        if problems := [
            f"data.{key}={form!r} must be one of {', '.join(FORMS)}{nearest(form, FORMS)}"
            for key, form in forms.items()
            if form not in FORMS
        ]:
            raise ValueError("; ".join(problems))
        #: What labelling found, for the first log line of a run
        self.labelled: Labelled | None = None
        self._engine: Engine | None = None
        self._is_fit = False

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Bind the tokenizer, open the agent and, for training, make or read the labels.

        Args:
            backbone: Folder or hub name of the encoder to train; also the round's retriever where
                ``data.retriever.path`` is null.
            cache_dir: Where indexes live.
            task_settings: Plain values that identify the task.
            for_training: Whether training follows.

        Raises:
            ValueError: No turn gave a row.
        """
        super().prepare(backbone, cache_dir, task_settings, for_training)
        self._engine = self.agent.open(self.utility.search)
        self._is_fit = for_training
        self.utility.measured_by(lambda: Episodes(self, self._form_now()))
        if for_training:
            path, settings = self.retriever.get("path") or backbone, task_settings or {}
            self.labelled = self._label(
                str(path), cache_dir, {k: v for k, v in settings.items() if k != "files"}
            )
            if not self.labelled.rows:
                raise ValueError(
                    f"no turn gave a training row ({self.labelled.why_none()}): the agent is never "
                    f"right, or the judge never convinced; data.labels.label=local needs no right "
                    f"answers, data.labels.label=gold_ids no judge"
                )
            self.utility.take(self.labelled.rows, self.text_of)

    def _label(self, path: str, cache_dir: str | Path, settings: Mapping[str, Any]) -> Labelled:
        """Labels of the round, by one process; the others wait and read."""
        task, form = self.utility.search, self.retriever["input"]
        self.labels_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.labels_folder / "labels.lock"):
            retriever = self.retriever_of(path, cache_dir)
            return label_turns(
                task=task,
                engine=self.episode_engine(retriever, form),
                retriever=retriever,
                judge=open_judge(self.judge, task, needed=self.labels.needs_judge),
                options=self.labels,
                search=self.search,
                agent=f"{self.agent.fingerprint}/{digest(settings)}",
                folder=self.labels_folder,
            )

    def retriever_of(self, path: str, cache_dir: str | Path) -> Retriever:
        """The dense retriever of an encoder folder over the task's corpus.

        Args:
            path: Folder or hub name.
            cache_dir: Where its index is kept.
        """
        encoder = DenseEncoder(path, self.encoding, batch_size=self.eval_batch_size)
        return DenseRetriever(self.utility.search.corpus, encoder, self.index, cache_dir)

    def episode_engine(self, retriever: Retriever, form: str) -> Any:
        """The agent with a retriever.

        Args:
            retriever: Finds passages.
            form: What it reads.
        """
        assert self._engine is not None, "prepare() comes first"
        task = self.utility.search
        return self.search.engine(self._engine, task, retriever, form, self.input_text)

    def text_of(self, row: UtilityRow) -> str:
        """The retriever's input of a row, cut so that the query survives (card, section 8.5)."""
        return self.input_text(self.input, row.question, (*row.history, row.query))

    def input_text(self, form: str, question: str, queries: Sequence[str]) -> str:
        """The retriever's input, within ``data.encoding.max_query_tokens``.

        Args:
            form: Which form.
            question: Text.
            queries: Of the trajectory so far, the current one last.
        """
        return input_writer(self.encoding)(form, question, queries)

    def _form_now(self) -> str:
        """Of the retriever that is measured: the untrained one reads ``base_input``."""
        trainer = self.trainer
        if trainer is None or not (self._is_fit and trainer.testing) or trainer.global_step:
            return self.input
        return self.base_input

    def train_source(self) -> PairSource:
        """Batches with the judge's scores."""
        return UtilitySource(self)


@dataclass
class Episodes:
    """Whole greedy episodes of questions, for evaluations.

    Args:
        data: Whose agent.
        form: What the retriever reads.
    """

    data: UtilityDataModule
    form: str

    def fit(self, form: str, question: str, queries: Sequence[str]) -> str:
        """The retriever's input, see ``UtilityDataModule.input_text``.

        Args:
            form: Which form.
            question: Text.
            queries: So far, the current one last.
        """
        return self.data.input_text(form, question, queries)

    def run(self, questions: Sequence[Question], retriever: Retriever) -> list[Completion]:
        """One episode a question, in their order.

        Args:
            questions: What is asked.
            retriever: Finds passages.
        """
        engine = self.data.episode_engine(retriever, self.form)
        task = self.data.utility.search
        prompts = [task.prompt(question) for question in questions]
        with engine.keyed("evaluation"):
            groups = engine.generate(prompts, self.data.search.sampling())
        return [completion for (completion,) in groups]
