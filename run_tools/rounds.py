"""Rounds: a model trained on what the last round's model found, and an agent trained before it.

    for each round:  the agent (``agent_training``), in <run_dir>/agents/<round>
                     the model, in <run_dir>/rounds/<round>; the last one in <run_dir> itself

Every part is a run of its own that goes on where it was killed (``resume=auto``) and is skipped
once it is finished. What a round takes from the one before is ``rounds.carry``: overrides in which
``{previous}`` is that round's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

Run = Callable[[DictConfig], dict[str, Any]]
Compose = Callable[[Sequence[str]], DictConfig]


def last_round(
    config: DictConfig, run: Run, compose: Compose, start_of: Callable[[DictConfig], str]
) -> tuple[DictConfig, dict[str, Any]]:
    """Run all rounds but the last, and every round's agent.

    Args:
        config: Of the whole run; ``run_dir`` is set.
        run: Does what a config says.
        compose: Makes a config of overrides.
        start_of: Folder of the backbone that a config starts from.

    Returns:
        The config of the last round, and the rows ``test/round_<n>/...`` of those before.

    Raises:
        ValueError: A number of rounds below 1.
    """
    count = config.rounds.count
    if count < 1:
        raise ValueError(f"rounds.count={count} must be at least 1")
    rows: dict[str, Any] = {}
    previous: str | None = None
    for number in range(1, count + 1):
        current = _round(config, number, previous)
        if config.agent_training.overrides:
            current.agent.path = f"{config.run_dir}/agents/{number}/export"
            _train_agent(current, number, previous is not None, run, compose, start_of)
        if number == count:
            break
        _place(current, config.run_dir, "rounds", str(number))
        current.callbacks.progress.label = f"round {number}"
        values = run(current)
        rows |= {f"test/round_{number}/{k[5:]}": v for k, v in values.items() if k[:5] == "test/"}
        previous = f"{config.run_dir}/rounds/{number}"
    return current, rows


def _round(config: DictConfig, number: int, previous: str | None) -> DictConfig:
    """The config of one round, which has no further rounds."""
    carried = config.rounds.carry if previous else []
    texts = [str(text).replace("{previous}", str(previous)) for text in carried]
    changed: Any = OmegaConf.merge(config, OmegaConf.from_dotlist(texts))
    with open_dict(changed):
        changed.rounds.count = 1
        changed.rounds.number = number
    return DictConfig(changed)


def _place(config: DictConfig, parent: str, kind: str, run_id: str) -> None:
    """Give a part its own folder, in which it goes on, and no table of its own."""
    with open_dict(config):
        config.output_dir, config.name, config.run_id = parent, kind, run_id
        config.claim = {"name": None, "arm": None}
        config.compare, config.table, config.predictions = [], [], None
        config.resume, config.overwrite = "auto", False
        config.agent_training = {"overrides": []}


def _train_agent(
    config: DictConfig,
    number: int,
    has_previous: bool,
    run: Run,
    compose: Compose,
    start_of: Callable[[DictConfig], str],
) -> None:
    """Train the round's agent, with the round's retriever."""
    own = [f"seed={config.seed}", f"cache_dir={config.cache_dir}", "mode=fit_test"]
    agent = compose([*config.agent_training.overrides, *own])
    with open_dict(agent):
        agent.trainer.num_threads = config.trainer.num_threads
        agent.data.task = OmegaConf.to_container(config.data.task.search, resolve=True)
        agent.data.retriever = OmegaConf.to_container(config.data.retriever, resolve=True)
        agent.data.retriever.path = config.data.retriever.path or start_of(config)
        agent.data.encoding = OmegaConf.to_container(config.data.encoding, resolve=True)
        if has_previous and config.agent_init == "previous":
            agent.backbone.path = f"{config.run_dir}/agents/{number - 1}/export"
        agent.callbacks.progress.label = f"agent {number}"
    _place(agent, config.run_dir, "agents", str(number))
    run(agent)
