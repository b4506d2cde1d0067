"""A judge from the folder that its training exported: frozen, on its own engine, ready to compare.

``litpost.json`` of the folder names the module, its inference and its task; nothing else is run. A
name outside of this library's judges and tasks is refused: a folder may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from datamodules.engines.base import Engine
from datamodules.engines.hf import HFEngine
from datamodules.engines.vllm import VLLMEngine
from datamodules.engines.vllm_server import VLLMServerEngine
from datamodules.tasks.base import JudgeTask, Pair, Task
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.candidates import Comparison

MODULES, TASKS = "lightning_modules.grm.", "datamodules.tasks."


class PairJudge(Protocol):
    """Compares responses."""

    def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        """One comparison a pair, of the order as it is.

        Args:
            pairs: Their uids depend on their content alone.
            task: The task whose completions are compared.
        """


class TaskJudge:
    """The procedural judge of the task itself (``task.compare``), for miniature worlds."""

    def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        """See ``PairJudge``.

        Raises:
            ValueError: The task has no judge of its own.
        """
        judge = getattr(task, "compare", None)
        if judge is None:
            raise ValueError(
                f"task '{task.name}' has no judge of its own: use reward=judge "
                f"reward.path=<folder of an exported judge>"
            )
        margins = [float(judge(pair)) for pair in pairs]
        return [
            Comparison.of(1 if m > 0 else 2, 1.0 if m > 0 else -1.0) if m else Comparison(None, 0.0)
            for m in margins
        ]


class ExportedJudge:
    """A generative reward model from its exported folder.

    Args:
        path: Folder with ``litpost.json``.
        inference: Of the module; None takes the exported one.
        num_votes: Samples a comparison, where the inference votes; None takes the exported number.
        task: Task that writes prompts and reads verdicts; None takes the exported one.
        engine: Writes the judgements; None uses the embedded one. vLLM only as a server.
        device: ``cpu``, ``cuda`` ...; None for the accelerator of this process where there is one.
        dtype: Of its parameters.
        options: Further options of the module, such as ``criteria_mode``.

    Raises:
        ValueError: The folder is no exported judge, or the engine cannot serve two models.
    """

    def __init__(
        self,
        path: str,
        *,
        inference: str | None = None,
        num_votes: int | None = None,
        task: JudgeTask | None = None,
        engine: Engine | None = None,
        device: str | None = None,
        dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.info = read_info(path)
        given = {"inference": inference, "num_votes": num_votes}
        self.options = {k: v for k, v in given.items() if v is not None} | dict(options or {})
        self.engine = engine or HFEngine()
        if isinstance(self.engine, VLLMEngine):
            raise ValueError(
                "reward.engine: vLLM in the trainer's process has room for one model, the policy: "
                "give the judge datamodules.engines.vllm_server.VLLMServerEngine, or null"
            )
        if isinstance(self.engine, VLLMServerEngine):
            self.engine.purpose = "judge"
        self.device, self.dtype = device, dtype
        self._task = task
        self._module: Any = None

    @torch.no_grad()
    def compare(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        """See ``PairJudge``; one batch of generations."""
        module = self._load()
        assert self._task is not None
        return module.compare(pairs, engine=self.engine, task=self._task)

    def _load(self) -> GenerativeRewardModule:
        if self._module is not None:
            return self._module
        cls = _named(self.info["module"], MODULES, GenerativeRewardModule, self.path)
        try:
            if self._task is None:
                made = dict(self.info["task"])
                name = made.pop("_target_", "")
                # its training file is not read: the judge gets pairs, not records
                made |= {key: "cut" for key in ("on_too_long",) if key in made}
                self._task = _named(name, TASKS, JudgeTask, self.path)(**made)
            options = {**self.info["options"], **self.options}
            module = cls(backbone={"path": self.path, "dtype": self.dtype}, **options)
        except TypeError as error:
            raise ValueError(
                f"reward.path={self.path!r} does not fit this version of the library ({error})"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
            self._task.bind(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"reward.path={self.path!r}: its tokenizer does not fit its task ({error}); the "
                f"folder must hold the tokenizer that the judge was trained with"
            ) from error
        module.configure_model()
        place = self.device
        if place is None and torch.cuda.is_available():
            place = f"cuda:{torch.cuda.current_device()}"
        self._module = module.requires_grad_(False).eval().to(place or "cpu")
        return self._module


def read_info(path: str) -> dict[str, Any]:
    """What ``litpost.json`` says of a judge: ``module``, ``options``, ``task``.

    Raises:
        ValueError: There is no such file, or it is of something else.
    """
    if not path:
        raise ValueError("reward.path is not set: name the export folder of a trained judge")
    file = Path(path, "litpost.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward.path={path!r} is no folder of an exported judge ({error}): it is the folder "
            f"export/ of a run such as `python train.py model=ac_genrm`"
        ) from error
    judge = values.get("judge") if isinstance(values, dict) else None
    if not isinstance(judge, dict) or not {"module", "options", "task"} <= judge.keys():
        name = values.get("module", "something") if isinstance(values, dict) else "something"
        raise ValueError(
            f"reward.path={path!r} was exported by {name}, which is no judge; model=reflectrm, "
            f"consistrm and ac_genrm are"
        )
    return judge


def _named(name: Any, prefix: str, kind: type, path: str) -> Any:
    """The class of a dotted name below ``prefix``, of a kind; no other one is called."""
    module, _, attribute = str(name).rpartition(".")
    found: Any = None
    if str(name).startswith(prefix) and attribute.isidentifier():
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(
            f"reward.path={path!r} asks for {name!r}, which is no {kind.__name__} below "
            f"{prefix[:-1]}: its litpost.json is not trusted with it"
        )
    return found
