"""A world of six passages, an agent that cannot think, and modules that search it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import AutoTokenizer

from datamodules.engines.search import Trace, Turn
from datamodules.experience import Completion, FinishReason
from datamodules.loader import Loader
from datamodules.pair_source import known_positives
from datamodules.pairs import PairDataModule
from datamodules.passages import Corpus, Passage
from datamodules.retrieval import Retriever
from datamodules.search_texts import retriever_input
from datamodules.tasks.embedding import EmbeddingTask, PairRow, PairSet
from datamodules.tasks.search_set import SearchSet
from datamodules.tasks.searching import Question
from datamodules.texts import TextEncoding
from datamodules.utility_source import UtilityBatch, UtilityPairRow, UtilitySource
from lightning_modules.backbones.tiny_encoder import TinyEncoderOptions, build_tiny_encoder
from lightning_modules.retriever.agentic_r import AgenticR

TEXTS = {
    "baker": "ann the baker born rome",
    "pilot": "ann the pilot born oslo",
    "rome": "rome in italy",
    "oslo": "oslo in norway",
    "empty": "where ann born",
    "tour": "bob tour",
}
WORDS = sorted({*" ".join(TEXTS.values()).split(), "country", "city"})
CORPUS = Corpus([Passage(uid, "", text) for uid, text in TEXTS.items()])

#: The first search finds its biography and the second the country: right, with both passages.
RIGHT = Question(
    "right", "country baker", ("Italy",), ("baker", "rome"), extra=("ann born", "{last} in")
)
#: Without a profession the empty passage is nearest; "born in" then finds Rome by its place.
MISLED = Question(
    "misled", "country", ("norway",), ("pilot", "oslo"), extra=("ann born", "{last} in")
)
#: One search; the answer is half of the right one.
HALF = Question("half", "city baker", ("rome city",), ("baker",), extra=("ann born",))
#: Does nothing that is allowed.
MUTE = Question("mute", "city pilot", ("oslo",), ("pilot",), extra=())
MULTI, SINGLE = (RIGHT, MISLED), (HALF, MUTE)


class LastWord:
    """Searches what ``Question.extra`` says and answers with the last word of the best passage.

    Args:
        top_k: Passages shown; it reads the first.
    """

    def __init__(self, top_k: int = 1) -> None:
        self.top_k = top_k
        self.seen: list[Retriever] = []

    def run(self, questions: Sequence[Question], retriever: Retriever) -> list[Completion]:
        """See ``SearchAgent``."""
        self.seen.append(retriever)
        return [self._episode(question, retriever) for question in questions]

    def _episode(self, question: Question, retriever: Retriever) -> Completion:
        turns: list[Turn] = []
        last = ""
        for template in question.extra:
            query = template.format(last=last)
            text = retriever_input("question_query", question.text, [query])
            places = retriever.search([text], self.top_k)[0]
            turns.append(Turn(query, tuple(places), len(turns) + 1))
            last = retriever.corpus[places[0]].text.split()[-1]
        if turns:
            return Completion((), (), FinishReason.STOP, trace=Trace(tuple(turns), last))
        # an answer that came too late: it must not count
        trace = Trace(answer="oslo", num_invalid=2, is_cut=True)
        return Completion((), (), FinishReason.LENGTH, trace=trace)


class SmallWorld(EmbeddingTask):
    """Pairs of that world, and its two sets of questions.

    Args:
        agent: Who searches.
        rows: Training rows; None for those of ``utility_rows``.
    """

    name = "small_world"

    def __init__(self, agent: Any = None, rows: Sequence[PairRow] | None = None) -> None:
        self.agent = agent or LastWord()
        self.rows = utility_rows() if rows is None else list(rows)

    def vocabulary(self) -> list[str]:
        """All words."""
        return WORDS

    def pairs(self, split: Any) -> list[PairSet]:
        """One data set."""
        return [PairSet("utility", self.rows)] if split == "train" else []

    def evaluations(self, split: Any) -> list[Any]:
        """The two sets."""
        groups = {"multi": MULTI, "single": SINGLE}
        return [SearchSet(name, each, CORPUS, self.agent) for name, each in groups.items()]


def utility_rows() -> list[UtilityPairRow]:
    """Eight rows with three negatives each; rows 0 and 1 are siblings of one turn."""
    texts = list(TEXTS.values())
    asked = ["city baker", "city baker", *(f"city {word}" for word in WORDS[:6])]
    rows = []
    for number, query in enumerate(asked):
        own = [texts[(number + step) % 6] for step in range(4)]
        scores = (90, 20 + number, 20, -1 if number == 3 else 40)
        rows.append(UtilityPairRow(str(number), query, own[0], tuple(own[1:]), "", scores))
    return rows


class UtilityData(PairDataModule):
    """Pairs with scores."""

    def train_dataloader(self) -> Loader:
        """Micro-batches with scores."""
        return Loader(UtilitySource(self))


class BagOfWords(nn.Module):
    """One dimension a word: cosines can be told by hand. Special tokens are zero vectors."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(len(tokenizer), len(tokenizer), dtype=torch.float32)
        known = torch.eye(len(tokenizer), dtype=torch.float32)
        known[tokenizer.all_special_ids] = 0
        self.words.weight = nn.Parameter(known)
        self.width = len(tokenizer)

    def forward(self, input_ids: Tensor, mask: Tensor, pool: Tensor) -> Tensor:
        """Sum of the words' vectors."""
        vectors: Tensor = (self.words(input_ids) * pool[:, :, None]).sum(1)
        return vectors


class CountingWords(AgenticR):
    """Agentic-R over a bag of words."""

    def build(self) -> None:
        """In place of a backbone."""
        self.policy = BagOfWords(self.texts.tokenizer)


def folder_of(folder: Path, **shape: Any) -> Path:
    """A random BERT with the world's words."""
    given = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2} | shape
    build_tiny_encoder(folder, WORDS, TinyEncoderOptions(**given), seed=0)
    return folder


def data_of(folder: Path, task: SmallWorld | None = None, **options: Any) -> UtilityData:
    """The world bound to a folder's tokenizer."""
    given = {"batch_size": 8, "num_negatives": 3, "encoding": TextEncoding(), "seed": 0} | options
    data = UtilityData(task=task or SmallWorld(), **given)
    data.bind(AutoTokenizer.from_pretrained(folder))
    return data


def collated(folder: Path, rows: list[UtilityPairRow], **options: Any) -> UtilityBatch:
    """A batch of rows."""
    data = data_of(folder, SmallWorld(rows=rows), **options)
    known = known_positives(rows)
    pairs = data.training_sets()[0]
    return UtilitySource(data).collate([(pairs, row, known) for row in rows], len(rows))


def module_of(folder: Path, kind: type[AgenticR] = AgenticR, **options: Any) -> AgenticR:
    """A module over a folder."""
    given: dict[str, Any] = {"optimizer": {"lr": 1e-2}} | options
    return kind(backbone={"path": str(folder)}, **given)


def trainer_of(**options: Any) -> Trainer:
    """A silent Trainer on the CPU."""
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(**given | options)
