"""Who searches: a task's own scripted agent, or a language model from a folder.

An agent opens into an ``Engine``, so that search episodes, labelling and evaluation know no kind of
agent. Agents that are trained first (``agent=grpo``, ``agent=ppo``) are folders, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

from datamodules.engines.base import Engine, Sampling, sample_seed
from datamodules.engines.hf import HFEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.prepared import fingerprint as folder_fingerprint
from datamodules.tasks.searching import SearchTask
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer


class TaskEngine(Engine):
    """Writes what the task's own agent would write (``SearchTask.act``); it has no weights.

    Args:
        task: Bound to a tokenizer.
    """

    policy_version = 0

    def __init__(self, task: SearchTask) -> None:
        self.task = task
        self._lengths: dict[str, int] = {}  # tokens of the prompt of a question

    def sync(self, policy: Any, version: int) -> None:
        """Nothing: there are no weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The agent's next piece, up to a closing tag; ``sampling`` says how many only."""
        return [
            [self._write(prompt, sample) for sample in range(sampling.samples)]
            for prompt in prompts
        ]

    def _write(self, prompt: Prompt, sample: int) -> Completion:
        question, tokenizer = prompt.record, self.task.tokenizer
        if question.uid not in self._lengths:
            self._lengths[question.uid] = len(self.task.prompt(question).token_ids)
        behind = list(prompt.token_ids[self._lengths[question.uid] :])
        transcript = str(tokenizer.decode(behind)) if behind else ""
        text = self.task.act(question, transcript, sample_seed(self.key, prompt.uid, sample))
        ids = tuple(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))
        return Completion(ids, (0.0,) * len(ids), FinishReason.STOP)


class Agent(ABC):
    """Something that opens into an engine which writes for a search task."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names all that its texts depend on, besides the task."""

    @abstractmethod
    def open(self, task: SearchTask) -> Engine:
        """Bind the task to the agent's tokenizer and give an engine that is ready.

        Args:
            task: Whose questions it will read.

        Raises:
            ValueError: It cannot write for this task.
        """


class ScriptedAgent(Agent):
    """The task's own agent: no language model, no training, the same texts for the same question.

    Example:
        >>> ScriptedAgent().fingerprint
        'scripted'
    """

    fingerprint = "scripted"

    def open(self, task: SearchTask) -> Engine:
        """An engine that asks ``task.act``; the task gets a tokenizer made of its vocabulary.

        Args:
            task: Has a scripted agent.

        Raises:
            ValueError: It has none.
        """
        if type(task).act is SearchTask.act:
            raise ValueError(
                f"agent=scripted: task '{task.name}' has no scripted agent; give agent=folder "
                f"agent.path=<language model>, or agent=grpo"
            )
        words = task.vocabulary()
        task.bind(byte_tokenizer() if words is None else word_tokenizer(words))
        return TaskEngine(task)


class FolderAgent(Agent):
    """A causal language model from a folder or the hub.

    Args:
        path: Folder or hub name.
        engine: Writes; None for the embedded one.
        dtype: Of the weights: ``auto``, ``float32``, ``bfloat16``, ``float16``.

    Raises:
        ValueError: No path.
    """

    def __init__(
        self, *, path: str | None = None, engine: Engine | None = None, dtype: str = "auto"
    ) -> None:
        if not path:
            raise ValueError("agent=folder needs agent.path=<folder or hub name of a causal LM>")
        self.path, self.engine, self.dtype = path, engine or HFEngine(), dtype

    @property
    def fingerprint(self) -> str:
        """Of the folder's files."""
        return f"folder/{folder_fingerprint(self.path)}"

    def open(self, task: SearchTask) -> Engine:
        """Load the model and its tokenizer. See ``Agent.open``."""
        model, tokenizer = load_language_model(self.path, self.dtype)
        task.bind(tokenizer)
        self.engine.sync(model, 0)
        return self.engine


def load_language_model(path: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model (frozen, evaluating, on the GPU where there is one) and tokenizer.

    Args:
        path: Folder or hub name.
        dtype: Of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(path)
