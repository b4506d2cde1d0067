"""Bounds of search episodes (``data.search.*``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.search import SearchEngine
from datamodules.retrieval import Retriever
from datamodules.search_texts import fit_input
from datamodules.sources import nearest
from datamodules.tasks.searching import SearchTask
from datamodules.texts import TextEncoding


def input_writer(encoding: TextEncoding) -> Callable[[str, str, Sequence[str]], str]:
    """Writes a retriever's input from (form, question, queries), within the longest query.

    Args:
        encoding: Of the retriever, bound to its tokenizer.
    """

    def count_tokens(text: str) -> int:  # ``encode`` itself would cut what is too long
        ids = encoding.tokenizer(encoding.render(text, "query"), verbose=False)["input_ids"]
        return len(ids)

    return partial(fit_input, count_tokens=count_tokens, max_tokens=encoding.max_tokens["query"])


@dataclass(frozen=True)
class SearchOptions:
    """What an agent may do in an episode.

    Args:
        top_k: Passages shown after a search [code: 3].
        max_searches: Searches at most [code: 4 in PPO, 5 for trajectories].
        max_new_tokens: Tokens at most, observations included.
        turn_tokens: Tokens that the agent writes in a row at most [code: 512].
        observation_tokens: Tokens of an observation at most; None for no bound.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> SearchOptions(top_k=0)
        Traceback (most recent call last):
        ...
        ValueError: data.search.top_k=0 must be at least 1
    """

    top_k: int = 3
    max_searches: int = 5
    max_new_tokens: int = 4096
    turn_tokens: int = 512
    observation_tokens: int | None = None

    def __post_init__(self) -> None:
        low = [
            f"data.search.{item.name}={getattr(self, item.name)} must be at least 1"
            for item in fields(self)
            if (getattr(self, item.name) or 0) < 1
            and not (item.name == "observation_tokens" and self.observation_tokens is None)
        ]
        if low:
            raise ValueError("; ".join(low))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> SearchOptions:
        """From a config's mapping.

        Args:
            values: ``data.search``.

        Raises:
            ValueError: An unknown key, or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown key 'data.search.{name}'{nearest(name, known)}")
        return cls(**values)

    def engine(
        self,
        engine: Engine,
        task: SearchTask,
        retriever: Retriever,
        form: str,
        fit: Callable[[str, str, Sequence[str]], str] | None = None,
    ) -> SearchEngine:
        """An engine that runs episodes within these bounds.

        Args:
            engine: Writes the agent's texts.
            task: Bound to the tokenizer of the agent.
            retriever: Finds passages.
            form: What the retriever reads, see ``search_texts.retriever_input``.
            fit: Writes it within a bound, see ``SearchEngine``; None for no bound.
        """
        return SearchEngine(
            engine,
            task=task,
            retriever=retriever,
            input=form,
            top_k=self.top_k,
            max_searches=self.max_searches,
            turn_tokens=self.turn_tokens,
            observation_tokens=self.observation_tokens,
            fit=fit,
        )

    def sampling(self, temperature: float = 0.0, samples: int = 1) -> Sampling:
        """How whole episodes are drawn.

        Args:
            temperature: Of the agent; 0 is greedy.
            samples: Episodes a question.
        """
        return Sampling(
            temperature=temperature, samples=samples, max_new_tokens=self.max_new_tokens
        )
