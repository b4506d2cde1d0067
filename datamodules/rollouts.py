"""Rollouts as a data stream: prompts -> engine -> scored experience -> mini-batches.

When a batch is asked for and none is pending, prompts are drawn and the module is asked through its
hooks: ``rollout``, ``score``, ``annotate``, ``advantages``. The experience is then cut:

    one rollout = passes x mini_batches optimizer steps, each of a window of micro-batches

so mini-batch j of a rollout is trained j optimizer steps after it was sampled (policy lag j).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.collecting import Clock, mean_over_ranks, without_bad_rewards
from datamodules.engines.base import Engine
from datamodules.experience import Experience, Prompt, Rollouts
from datamodules.loader import Loader, RowSource, Source, check_window, gather_objects
from datamodules.rewards import RewardFunction, VerifierReward
from datamodules.stages import counts_at, read_stages
from datamodules.tasks.base import Task


class RolloutDataModule(LightningDataModule):
    """Owns the prompts, the engine, the reward and the mini-batching.

    Args:
        task: Records, prompt template, verifier.
        engine: Writes completions.
        reward: Scores rollouts; None takes each task's verifier.
        prompts_per_rollout: Prompts a draw over all ranks: a number for the mixture as it comes,
            or a number for each domain.
        stages: Sequential training, e.g. ``[{rollouts: 20, domains: [math]}, ...]``: a stage draws
            its domains only, as many prompts in all as the mixture; the last one goes on.
        mini_batches: Optimizer steps a pass over one rollout.
        passes: Passes over one rollout (PPO epochs).
        micro_batches: Micro-batches an optimizer step (gradient accumulation).
        shares: Micro-batches of one domain each, by domain, e.g. ``{pref: 4, refl: 1}``; replaces
            ``micro_batches``. None mixes domains.
        eval_batch_size: Records a validation or test batch on one rank.
        path: File of the records where the task reads one; for messages only.
        seed: Of the draws and of sampling.
        keep_rollouts: Keep the last ``Rollouts`` object for callbacks.

    Raises:
        ValueError: Counts below 1, shares of unknown domains, fewer prompts than ranks.
    """

    def __init__(
        self,
        *,
        task: Task,
        engine: Engine,
        reward: RewardFunction | None = None,
        prompts_per_rollout: int | Mapping[str, int] = 8,
        stages: Sequence[Mapping[str, Any]] | None = None,
        mini_batches: int = 1,
        passes: int = 1,
        micro_batches: int = 1,
        shares: Mapping[str, int] | None = None,
        eval_batch_size: int = 64,
        path: str | None = None,
        seed: int = 0,
        keep_rollouts: bool = True,
    ) -> None:
        super().__init__()
        counts = {"mini_batches": mini_batches, "passes": passes, "micro_batches": micro_batches}
        counts["eval_batch_size"] = eval_batch_size
        problems = [f"data.{k}={v} must be at least 1" for k, v in counts.items() if v < 1]
        problems += [
            f"data.shares.{k}={v} must be at least 1" for k, v in (shares or {}).items() if v < 1
        ]
        if problems:
            raise ValueError("; ".join(problems))
        self.task, self.engine = task, engine
        self.reward: RewardFunction = reward or VerifierReward()
        self.prompts_per_rollout = (
            dict(prompts_per_rollout)
            if isinstance(prompts_per_rollout, Mapping)
            else {"": prompts_per_rollout}
        )
        self.stages = read_stages(stages or [], self.prompts_per_rollout)
        self.mini_batches, self.passes = mini_batches, passes
        self.shares = dict(shares) if shares else None
        for number, stage in enumerate(self.stages):
            if missing := sorted(set(self.shares or {}) - set(stage.counts)):
                raise ValueError(
                    f"data.stages[{number}] draws no {', '.join(missing)}, of which data.shares "
                    f"wants micro-batches in every step: give data.shares=null with data.stages"
                )
        self.window = sum(self.shares.values()) if self.shares else micro_batches
        self.eval_batch_size, self.path, self.seed = eval_batch_size, path, seed
        self.keep_rollouts = keep_rollouts
        #: Whether a tokenizer may bring code of its own; ``train.py`` sets it for the whole run.
        self.trust_remote_code = False
        self.last_rollouts: Rollouts | None = None
        self.seconds: dict[str, float] = {}
        self._pools: dict[str, list[Prompt]] | None = None
        self._rounded: set[str] = set()  # keys that were warned about

    def prepare(
        self,
        backbone: str,
        cache_dir: str | Path,
        task_settings: Any = None,
        for_training: bool = True,
    ) -> None:
        """Make what training needs besides the task itself. Called once before the Trainer.

        Args:
            backbone: Folder or hub name of the untrained model; its tokenizer is bound.
            cache_dir: Where prepared folders live.
            task_settings: Plain values that identify the task.
            for_training: False binds the tokenizer only.
        """
        trust = self.trust_remote_code
        self.bind(AutoTokenizer.from_pretrained(backbone, trust_remote_code=trust))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the task its tokenizer.

        Raises:
            ValueError: It cannot encode the task.
        """
        self.task.bind(tokenizer)

    def train_prompts(self) -> list[Prompt]:
        """All training prompts."""
        return [self.task.prompt(record) for record in self.task.records("train")]

    def pools(self) -> dict[str, list[Prompt]]:
        """Training prompts by key of ``prompts_per_rollout``; keys with a count of 0 are left out.

        Raises:
            ValueError: No prompts, or a domain of ``prompts_per_rollout`` that has none.
        """
        if self._pools is None:
            prompts = self.train_prompts()
            pools: dict[str, list[Prompt]] = {}
            for domain, count in self.prompts_per_rollout.items():
                chosen = [p for p in prompts if domain in ("", p.domain)]
                if count and not chosen:
                    known = sorted({p.domain for p in prompts})
                    raise ValueError(
                        f"data.prompts_per_rollout.{domain}={count}, but there are no such "
                        f"training prompts; domains with prompts: {', '.join(known) or 'none'}"
                    )
                if count > len(chosen):
                    key = f"data.prompts_per_rollout{'.' + domain if domain else ''}"
                    rank_zero_warn(
                        f"{key}={count}, but there are only {len(chosen)} such training prompts: "
                        f"each rollout takes them all"
                    )
                if count:
                    pools[domain] = chosen
            if not pools:
                raise ValueError("data.prompts_per_rollout asks for no prompts at all")
            self._pools = pools
        return self._pools

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and number of ranks of the attached trainer (0, 1 without one)."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def draw_counts(self, index: int = 0) -> dict[str, int]:
        """Prompts of draw ``index`` over all ranks, by key of ``prompts_per_rollout``.

        Every rank draws equally many, so that ranks run equally many forward passes: a count is
        rounded up to a multiple of the ranks, or down to what the pool holds.

        Raises:
            ValueError: Fewer prompts than ranks.
        """
        _, world = self.ranks
        counts = {}
        asked_for = counts_at(self.stages, index, self.prompts_per_rollout)
        for domain, pool in self.pools().items():
            if domain not in asked_for:
                continue
            key = f"data.prompts_per_rollout{'.' + domain if domain else ''}"
            asked = asked_for[domain]
            if len(pool) < world:
                raise ValueError(
                    f"{key}={asked}: {len(pool)} training prompts cannot be shared among {world} "
                    f"processes: give more prompts or fewer trainer.devices"
                )
            wanted = -(-asked // world) * world
            counts[domain] = min(wanted, len(pool) // world * world)
            reason = f"{world} processes draw equally many prompts"
            if asked > len(pool):  # where there are no stages, ``pools`` has said so
                reason = f"there are only {len(pool)} such training prompts" if self.stages else ""
            if counts[domain] != asked and reason and key not in self._rounded:
                self._rounded.add(key)
                rank_zero_warn(f"{key}={asked} is taken as {counts[domain]}: {reason}")
        return counts

    @property
    def prompts_per_record(self) -> int:
        """Prompts of a drawn record."""
        return 1

    def draw(self, index: int) -> list[Prompt]:
        """Prompts of rollout ``index`` on this rank: a pure function of (seed, index, rank).

        Within one cycle over a pool no prompt comes twice.
        """
        rank, world = self.ranks
        drawn: list[Prompt] = []
        pools = self.pools()
        for domain, count in self.draw_counts(index).items():
            pool = pools[domain]
            per_cycle = len(pool) // count
            generator = torch.Generator()
            generator.manual_seed((self.seed * 1_000_003 + index // per_cycle) % 2**63)
            order = torch.randperm(len(pool), generator=generator).tolist()
            first = index % per_cycle * count
            drawn += [pool[i] for i in order[first : first + count]][rank::world]
        return drawn

    def rollouts_per_epoch(self) -> int:
        """Draws until the smallest pool has been seen once; with stages, all of theirs."""
        if self.stages:
            return sum(stage.rollouts for stage in self.stages)
        counts = self.draw_counts()
        return min(len(pool) // counts[domain] for domain, pool in self.pools().items())

    def collect(self, index: int) -> Rollouts:
        """Sample and score rollout ``index`` with the attached module's hooks."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        clock = Clock()
        prompts = self.draw(index)
        self.engine.sync(module.policy, module.global_step)
        clock.lap("sync")
        with torch.no_grad(), self.engine.keyed(f"{self.seed}/rollout/{index}"):
            rollouts = module.rollout(prompts, self.engine)
        clock.lap("rollout")
        rollouts.index, rollouts.num_updates = index, self.mini_batches * self.passes
        parts = module.score(rollouts, self.reward)
        rollouts.reward, rollouts.parts = parts["reward"], parts
        metrics = without_bad_rewards(rollouts)
        clock.lap("score")
        with torch.no_grad():
            rollouts.annotations(module.annotate(rollouts))
        rollouts.advantages, more = module.advantages(rollouts)
        self.engine.rest()
        clock.lap("annotate")
        module.record(metrics | more)
        module.record(module.rollout_metrics(rollouts))
        self.seconds = clock.laps
        self.last_rollouts = rollouts if self.keep_rollouts else None
        return rollouts

    def cut(self, rollouts: Rollouts) -> list[Experience]:
        """Micro-batches of one rollout in the order in which they are trained.

        Raises:
            ValueError: Fewer rollouts (of a domain) than micro-batches, or a domain that
                ``shares`` leaves out.
        """
        full = rollouts.batch()
        rank, _ = self.ranks
        pieces: list[Experience] = []
        for number in range(self.passes):
            generator = torch.Generator()
            key = (self.seed * 1_000_003 + rollouts.index) * 101 + number * 7919 + rank
            generator.manual_seed(key % 2**63)
            pieces += [full.select(rows) for rows in self._partition(full, generator)]
        for start in range(0, len(pieces), self.window):
            window = pieces[start : start + self.window]
            tokens = float(sum(piece.mask.sum() for piece in window))
            sequences = float(sum(piece.mask.any(1).sum() for piece in window))
            tokens, sequences = mean_over_ranks([tokens, sequences])
            for piece in window:
                piece.window_tokens, piece.window_sequences = tokens, sequences
                piece.window_size = self.window
        return pieces

    def _partition(self, full: Experience, generator: torch.Generator) -> list[Tensor]:
        shares = self.shares or {"": self.window}
        left_out = sorted(set(full.domain_names) - set(shares)) if self.shares else []
        if left_out:
            raise ValueError(
                f"data.shares names no micro-batches for {', '.join(left_out)}, so its rollouts "
                f"would never be trained: add data.shares.{left_out[0]} or draw none of it "
                f"(data.prompts_per_rollout.{left_out[0]}=0)"
            )
        by_domain: list[list[Tensor]] = []
        for domain, share in shares.items():
            rows = torch.arange(len(full))
            if domain:
                known = domain in full.domain_names
                wanted = full.domain_names.index(domain) if known else -1
                rows = rows[full.domains == wanted]
            parts = self.mini_batches * share
            if len(rows) < parts:
                raise ValueError(
                    f"data.shares{'.' + domain if domain else ''}: {len(rows)} rollouts cannot "
                    f"fill {parts} micro-batches; draw more (data.prompts_per_rollout) or ask for "
                    f"fewer (data.mini_batches, data.micro_batches, data.shares)"
                )
            if parts * self.passes > 1:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            by_domain.append(list(rows.tensor_split(parts)))
        ordered = []
        for step in range(self.mini_batches):
            for (_, share), parts_of in zip(shares.items(), by_domain, strict=True):
                ordered += parts_of[step * share : (step + 1) * share]
        return ordered

    def train_dataloader(self) -> Loader:
        """The sized, stateful loader of micro-batches."""
        loader = Loader(RolloutSource(self))
        check_window(self.trainer, loader)
        return loader

    def _rows(self, split: Any) -> Loader | list[Any]:
        records = self.task.records(split)
        if not records:
            return []
        rank, world = self.ranks
        size = self.eval_batch_size
        rows = RowSource(records, batch_size=size, rank=rank, world_size=world)
        return Loader(rows, restarts=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Records of the validation split in batches of ``Rows``."""
        return self._rows("val")

    def test_dataloader(self) -> Loader | list[Any]:
        """Records of the test split in batches of ``Rows``."""
        return self._rows("test")

    def predict_dataloader(self) -> Loader | list[Any]:
        """Records to judge in batches of ``Rows``."""
        return self._rows("predict")


class RolloutSource(Source):
    """Micro-batches of rollouts; collects a new rollout when none is pending."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data
        self.window = data.window
        self.next_rollout = 0
        self.pending: list[Experience] = []

    def __len__(self) -> int:
        data = self.data
        return data.rollouts_per_epoch() * data.passes * data.mini_batches * data.window

    def batch(self, epoch: int, index: int) -> Experience:
        """The next pending micro-batch."""
        if not self.pending:
            self.pending = self.data.cut(self.data.collect(self.next_rollout))
            self.next_rollout += 1
        return self.pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """Number of the next rollout and the mini-batches not trained yet, of every rank."""
        pending = [piece.state() for piece in self.pending]
        return {"next_rollout": self.next_rollout, "pending": gather_objects(pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with this rank's pending mini-batches, then with the next rollout.

        Other ranks would cut the open rollout otherwise: on another number of them what is pending
        is dropped and the next rollout comes at once.
        """
        self.next_rollout = int(state["next_rollout"])
        rank, world = self.data.ranks
        mine = state["pending"][rank] if len(state["pending"]) == world else []
        self.pending = [Experience(**piece) for piece in mine]
