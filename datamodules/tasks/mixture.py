"""Several tasks as one: the domains of a multi-domain run.

Any task can be a part, procedural or from a file. A prompt keeps its own task, so that its own
verifier scores it; its domain is the name of the part, under which metrics are logged and by which
``data.prompts_per_rollout`` and ``data.shares`` count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.experience import Completion, Prompt
from datamodules.tasks.base import Demonstration, JudgeTask, Split, Task


@dataclass(frozen=True)
class MixedRecord:
    """A record of one part.

    Args:
        part: Name of the part.
        record: What its task calls a record.
    """

    part: str
    record: Any


class Mixture(Task):
    """Tasks side by side, each under its own name.

    Args:
        tasks: Name (the domain) to task; null removes one.

    Raises:
        ValueError: No tasks, a name that is no plain word, something that is no task, or a judge
            task under another name than ``pref``.

    Example:
        >>> task = Mixture(tasks={"math": ModularSum(), "chat": ChatTopics(scale=10.0)})
        >>> [prompt.domain for prompt in map(task.prompt, task.records("test"))][:1]
        ['math']
    """

    name = "mixture"

    def __init__(self, *, tasks: Mapping[str, Task | None]) -> None:
        self.tasks = {name: task for name, task in tasks.items() if task is not None}
        if not self.tasks:
            raise ValueError("data.task.tasks names no task; add for example data.task.tasks.math")
        problems = []
        for name, task in self.tasks.items():
            key = f"data.task.tasks.{name}"
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
                problems.append(f"{key}: a name is a letter, then letters, digits or _")
            if not isinstance(task, Task):
                problems.append(f"{key} is a {type(task).__name__}; a task with _target_ is needed")
            elif isinstance(task, JudgeTask) and name != "pref":
                # its verifier reads the domain to tell responses from analyses
                problems.append(f"{key} judges pairs, whose domain is pref: name it pref")
        if problems:
            raise ValueError("; ".join(problems))
        bounds = [task.max_prompt_tokens for task in self.tasks.values()]
        known = [bound for bound in bounds if bound is not None]
        self.max_prompt_tokens = max(known) if len(known) == len(bounds) else None

    def vocabulary(self) -> list[str] | None:
        """All words in the order of the parts, each once; None where no part lists words.

        Raises:
            ValueError: Some parts list words and others do not: no tiny tokenizer suits both.
        """
        lists = {name: task.vocabulary() for name, task in self.tasks.items()}
        open_ended = [name for name, words in lists.items() if words is None]
        if len(open_ended) == len(lists):
            return None
        if open_ended:
            listed = [name for name in lists if name not in open_ended]
            raise ValueError(
                f"data.task.tasks: {', '.join(open_ended)} need a tokenizer of text and "
                f"{', '.join(listed)} one of words, which no tiny backbone has at once; remove "
                f"some with data.task.tasks.<name>=null"
            )
        return list(dict.fromkeys(word for words in lists.values() for word in words or []))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give every part the tokenizer."""
        self.tokenizer = tokenizer
        for task in self.tasks.values():
            task.bind(tokenizer)

    def records(self, split: Split) -> list[MixedRecord]:
        """The records of all parts, part after part."""
        return [
            MixedRecord(name, record)
            for name, task in self.tasks.items()
            for record in task.records(split)
        ]

    def prompt(self, record: MixedRecord) -> Prompt:
        """The part's own prompt, with the part's name as its domain and before its uid."""
        made = self.tasks[record.part].prompt(record.record)
        return replace(made, uid=f"{record.part}/{made.uid}", domain=record.part)

    def verify(self, prompt: Prompt, completion: Completion) -> dict[str, float]:
        """The verdict of the prompt's own task."""
        return prompt.task.verify(prompt, completion)

    def demonstrations(self, seed: int, step: int, count: int) -> list[Demonstration]:
        """Equally many of every part that has some; the first parts have one more if need be."""
        able = [name for name, task in self.tasks.items() if task.demonstrations(seed, step, 1)]
        made: list[Demonstration] = []
        for place, name in enumerate(able):
            number = len(range(place, count, len(able)))
            own = self.tasks[name].demonstrations(seed, step, number)
            made += [replace(one, domain=name) for one in own]
        return made
