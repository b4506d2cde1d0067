"""Episodes with a search engine on any engine: the agent writes, passages come back, it goes on.

All episodes advance together: one step is one call of the engine for all that live and one call of
the retriever for all that search. Token ids of the agent are never encoded again, observations are
encoded apart, so training sees what the agent saw.

The engine stops at every token whose text holds ``>``: closing tags are cut up differently by
tokenizers, and only the decoded text says whether one is there. Each piece is asked for under the
uid ``<uid>/<sample>#<piece>``, so its tokens do not depend on the batch, the rank or a restart.

Where we differ from the released code [our choice]: an invalid action costs one of the budget; an
observation that is cut keeps its closing tag; a search beyond the budget ends the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.episodes import Episode, EpisodeStart, Rules, Trace, Turn
from datamodules.engines.policies import Ranks
from datamodules.experience import Completion, Prompt
from datamodules.search_texts import (
    END_ANSWER,
    END_INFORMATION,
    END_SEARCH,
    FORMS,
    information,
    invalid_note,
    retriever_input,
)

if TYPE_CHECKING:
    from datamodules.retrieval import Retriever
    from datamodules.tasks.searching import SearchTask

__all__ = ["EpisodeStart", "SearchEngine", "Trace", "Turn", "stop_tokens"]


def stop_tokens(tokenizer: Any, spaced: bool) -> tuple[int, ...]:
    """Tokens after which a closing tag may be there: all whose text holds ``>``.

    Special tokens (end, padding) are left out where they are no tags; a word-level tokenizer has
    just the closing tags.

    Args:
        tokenizer: Of the policy.
        spaced: Whether one token is one word.

    Raises:
        ValueError: The tokenizer cannot write a closing tag.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    closing = (END_SEARCH, END_ANSWER)
    if spaced:
        found = [vocabulary[tag] for tag in closing if tag in vocabulary]
    else:
        special = set(tokenizer.all_special_ids)
        found = [
            token
            for text, token in sorted(vocabulary.items(), key=lambda pair: pair[1])
            if ">" in text
            and (token not in special or text in closing)
            and ">" in tokenizer.decode([token])
        ]
    if not found or (spaced and len(found) < len(closing)):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this checkpoint'} cannot write "
            f"{' or '.join(closing)}, which search episodes need"
        )
    return tuple(found)


class SearchEngine(Engine):
    """Runs search episodes; to everything else it is an engine like any other.

    Args:
        engine: Writes the agent's text.
        task: Gives the tokenizer and says whether texts are spaced.
        retriever: Finds passages.
        input: What it is asked, see ``search_texts.retriever_input``.
        top_k: Passages a search [code: 3].
        max_searches: Searches and invalid actions of an episode [code: 4 in PPO, 5 for labels].
        turn_tokens: Tokens that the agent may write between two observations [code: 512].
        observation_tokens: Most tokens of an observation; None for no bound.
        fit: Writes what the retriever is asked from (form, question, queries), such as
            ``search_texts.fit_input`` with a bound; None takes ``retriever_input``, unbounded.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> engine = SearchEngine(HFEngine(), task=task, retriever=retriever)  # doctest: +SKIP
        >>> engine.generate(prompts, Sampling(samples=5))[0][0].trace.answer  # doctest: +SKIP
        'peru'
    """

    def __init__(
        self,
        engine: Engine,
        *,
        task: SearchTask,
        retriever: Retriever,
        input: str = "query",
        top_k: int = 3,
        max_searches: int = 4,
        turn_tokens: int = 512,
        observation_tokens: int | None = None,
        fit: Callable[[str, str, Sequence[str]], str] | None = None,
    ) -> None:
        problems = [
            f"data.search.{name}={value} must be at least {least}"
            for name, value, least in (
                ("top_k", top_k, 1),
                ("max_searches", max_searches, 0),
                ("turn_tokens", turn_tokens, 1),
                ("observation_tokens", observation_tokens, 1),
            )
            if value is not None and value < least
        ]
        if input not in FORMS:
            problems.append(f"data.retriever.input={input!r} must be one of {', '.join(FORMS)}")
        if problems:
            raise ValueError("; ".join(problems))
        self.engine, self.task, self.retriever = engine, task, retriever
        self.input, self.top_k, self.max_searches = input, top_k, max_searches
        self.turn_tokens, self.observation_tokens = turn_tokens, observation_tokens
        self.fit = fit or retriever_input
        self._policy: Any = None
        self._tokenizer: Any = None  # whose stop tokens are kept
        self._stops: tuple[int, ...] = ()

    # ------------------------------------------------------------------ the inner engine's

    @property
    def key(self) -> str:  # type: ignore[override]
        """Names the stream of sampling seeds; the inner engine's own."""
        return self.engine.key

    @key.setter
    def key(self, value: str) -> None:
        self.engine.key = value

    @property
    def policy_version(self) -> int:  # type: ignore[override]
        """Optimizer steps that the inner engine's weights have seen."""
        return self.engine.policy_version

    def sync(self, policy: Any, version: int) -> None:
        """Give the inner engine the weights. See ``Engine.sync``."""
        self._policy = policy
        self.engine.sync(policy, version)

    def rest(self) -> None:
        """The inner engine may free the device."""
        self.engine.rest()

    def close(self) -> None:
        """Stop what the inner engine runs."""
        self.engine.close()

    # ------------------------------------------------------------------ episodes

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.samples`` episodes for every prompt. See ``Engine.generate``.

        Raises:
            ValueError: Candidates or stop tokens are asked for.
        """
        size = sampling.samples
        starts = [
            EpisodeStart(prompt, uid=f"{prompt.uid}/{sample}")
            for prompt in prompts
            for sample in range(size)
        ]
        flat = self.run(starts, sampling)
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    def run(self, starts: Sequence[EpisodeStart], sampling: Sampling) -> list[Completion]:
        """One episode a start, also from the middle of an earlier one.

        Args:
            starts: Where to begin. Under sharding every rank must call, with none if need be.
            sampling: ``samples`` is ignored; ``max_new_tokens`` bounds all tokens behind the
                prompt, prefix and observations included.

        Returns:
            What is behind prompt and prefix, in the order of the starts.

        Raises:
            ValueError: Candidates or stop tokens are asked for.
        """
        if sampling.candidates or sampling.stop_ids:
            raise ValueError(
                f"search episodes report no candidates and have stop tokens of their own: sampling "
                f"has candidates={sampling.candidates} and {len(sampling.stop_ids)} stop tokens"
            )
        asked = replace(sampling, samples=1, stop_ids=self._stop_ids())
        rules = self._rules(sampling)
        episodes = [
            Episode(start, replace(rules, max_tokens=self._bound(start.prompt, sampling)))
            for start in starts
        ]
        policy = self._policy
        ranks = None if policy is None else Ranks(policy, next(policy.parameters()).device)
        while True:
            live = [episode for episode in episodes if episode.is_live]
            if not (ranks.any(bool(live)) if ranks is not None else live):
                return [episode.completion() for episode in episodes]
            answers = self.engine.generate([episode.ask() for episode in live], asked)
            for episode, (answer,) in zip(live, answers, strict=True):
                episode.take(answer)
            self._search([episode for episode in live if episode.query is not None])

    def observation(self, places: Sequence[int], room: int | None = None) -> tuple[int, ...]:
        """Tokens of an information block.

        Args:
            places: Passages of the retriever's corpus, the best first.
            room: Tokens at most, besides ``observation_tokens``; None for no bound of its own. A
                block that is cut keeps its closing tag where there is room for it.
        """
        bounds = [bound for bound in (room, self.observation_tokens) if bound is not None]
        corpus, spaced = self.retriever.corpus, self.task.spaced
        ids = self._encode(information([corpus[place] for place in places], spaced))
        if not bounds or len(ids) <= min(bounds):
            return ids
        bound = max(min(bounds), 0)
        tail = self._encode(END_INFORMATION if spaced else f"\n{END_INFORMATION}\n")
        return ids[: bound - len(tail)] + tail if bound > len(tail) else ids[:bound]

    def _search(self, episodes: Sequence[Episode]) -> None:
        """Ask the retriever once for all, each text once, and show what it found."""
        if not episodes:
            return
        texts = [self._input(episode) for episode in episodes]
        unique = list(dict.fromkeys(texts))
        found = dict(zip(unique, self.retriever.search(unique, self.top_k), strict=True))
        for episode, text in zip(episodes, texts, strict=True):
            places = found[text]
            episode.observe(places, self.observation(places, episode.room))

    def _input(self, episode: Episode) -> str:
        assert episode.query is not None
        question = episode.start.prompt.record.text
        return self.fit(self.input, question, [*episode.queries, episode.query])

    def _bound(self, prompt: Prompt, sampling: Sampling) -> int:
        """Tokens behind the prompt at most."""
        bound = min(sampling.max_new_tokens, prompt.max_new_tokens or sampling.max_new_tokens)
        longest = int(getattr(self.engine, "bound", 0))
        if longest:  # at least 1: the engine itself says what is wrong with a prompt that fills it
            bound = min(bound, max(longest - len(prompt.token_ids), 1))
        return bound

    def _rules(self, sampling: Sampling) -> Rules:
        return Rules(
            max_searches=self.max_searches,
            turn_tokens=self.turn_tokens,
            max_tokens=sampling.max_new_tokens,
            stop_ids=frozenset(self._stop_ids()),
            decode=self._decode,
            invalid_ids=self._encode(invalid_note(self.task.spaced)),
        )

    # ------------------------------------------------------------------ the tokenizer

    def _stop_ids(self) -> tuple[int, ...]:
        tokenizer = self.task.tokenizer
        if tokenizer is not self._tokenizer:
            self._stops = stop_tokens(tokenizer, self.task.spaced)
            self._tokenizer = tokenizer
        return self._stops

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.task.tokenizer.encode(text, add_special_tokens=False))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.task.tokenizer.decode(list(ids), skip_special_tokens=False))
