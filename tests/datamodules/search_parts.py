"""What the tests of search episodes share: a little world, an engine that writes given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.search import SearchEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.passages import Corpus, Passage
from datamodules.retrieval import Retriever
from datamodules.search_texts import words_of_protocol
from datamodules.tasks.searching import Question, SearchTask
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer

CORPUS = Corpus(
    [
        Passage("p0", "ann", "was born in rome"),
        Passage("p1", "rome", "is in italy"),
        Passage("p2", "bob", "was born in lima"),
        Passage("p3", "lima", "is in peru"),
    ]
)
PLACES = ["ann", "bob", "rome", "lima", "italy", "peru"]
BODIES = [*PLACES, "was", "born", "in", "is", "where", "who", "said", "so", "that", "the", "a", "b"]
SAMPLING = Sampling(max_new_tokens=400)


class Overlap(Retriever):
    """Passages by shared words with the last part of the text; ties by place."""

    def __init__(self) -> None:
        self.corpus, self.fingerprint = CORPUS, "overlap"
        self.calls: list[list[str]] = []

    def search(self, texts: Sequence[str], k: int) -> list[list[int]]:
        self.calls.append(list(texts))
        asked = [set(text.rpartition("[SEP]")[2].split()) for text in texts]
        return [
            sorted(range(len(CORPUS)), key=lambda p: -len(a & {*CORPUS[p].encoded_text.split()}))[
                :k
            ]
            for a in asked
        ]


class Quiz(SearchTask):
    """Questions of the little world; words or bytes."""

    name = "quiz"
    corpus = CORPUS

    def __init__(self, spaced: bool = True) -> None:
        self.words = [*words_of_protocol(3), *BODIES] if spaced else None
        self.bind(byte_tokenizer() if self.words is None else word_tokenizer(self.words))

    def vocabulary(self) -> list[str] | None:
        return self.words

    def records(self, split: Any) -> list[Question]:
        return [Question(f"q{n}", f"where was {who} born", ("rome",)) for n, who in enumerate("ab")]

    def prompt(self, record: Question) -> Prompt:
        return Prompt(record.uid, self.ids(record.text), self, record=record)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        return {"reward": float(completion.trace.answer in prompt.record.answers)}

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


class Writer(Engine):
    """Goes on with a list of texts for each episode, stopping where a real engine would.

    A text that ends in ``$`` ends with the end token.
    """

    def __init__(self, task: Quiz, texts: dict[str, list[str]]) -> None:
        self.task, self.policy_version = task, 3
        self.left = {uid: list(pieces) for uid, pieces in texts.items()}
        self.asked: list[list[Prompt]] = []

    def sync(self, policy: Any, version: int) -> None:
        self.policy_version = version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        self.asked.append(list(prompts))
        return [[self._write(prompt, sampling)] for prompt in prompts]

    def _write(self, prompt: Prompt, sampling: Sampling) -> Completion:
        assert prompt.max_new_tokens is not None and sampling.samples == 1
        pieces = self.left[prompt.uid.rpartition("#")[0]]
        text = pieces.pop(0)
        eos = (self.task.tokenizer.eos_token_id,)
        ids = self.task.ids(text.removesuffix("$")) + (eos if text.endswith("$") else ())
        ends = [n for n, token in enumerate(ids, start=1) if token in {*sampling.stop_ids, *eos}]
        stop = min([*ends, len(ids)])
        if stop < len(ids):  # the rest is written when it is asked for
            pieces.insert(0, self.task.tokenizer.decode(list(ids[stop:]), skip_special_tokens=True))
            if text.endswith("$"):
                pieces[0] += "$"
        ids = ids[:stop]
        is_cut = len(ids) > prompt.max_new_tokens
        ids = ids[: prompt.max_new_tokens]
        reason = FinishReason.LENGTH if is_cut else FinishReason.STOP
        return Completion(ids, (-0.5,) * len(ids), reason, self.policy_version)


def play(
    *texts: str, spaced: bool = True, sampling: Sampling = SAMPLING, **options: Any
) -> tuple[Completion, SearchEngine, Quiz]:
    """One episode of the first question."""
    task = Quiz(spaced)
    prompt = task.prompt(task.records("train")[0])
    inner = Writer(task, {"q0/0": list(texts)})
    engine = SearchEngine(inner, task=task, retriever=Overlap(), **options)
    ((completion,),) = engine.generate([prompt], sampling)
    return completion, engine, task


def agent_text(task: Quiz, completion: Completion, observed: bool = False) -> str:
    pairs = zip(completion.token_ids, completion.observed, strict=True)
    return str(task.tokenizer.decode([token for token, mark in pairs if mark is observed]))
