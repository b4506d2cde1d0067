"""``reward=judge``: a judge of pairs as the reward of any policy.

Completions of a prompt are compared with each other (``functional/comparisons.py``), each
comparison in a random order [our choice: a position bias then is noise, not signal], all of a
rollout in one batch. Verdicts are kept by content, so nothing is judged twice.

What a completion says is what its task makes of it: ``conversation`` where there is one (chats,
and texts without their plan), else prompt and completion as text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.engines.base import sample_seed
from datamodules.experience import Completion, FinishReason, Prompt, Rollouts
from datamodules.rewards import VerifierReward
from datamodules.tasks.base import Pair, Task
from datamodules.tasks.chat_prompts import answer_part
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.comparisons import Scheme, matches, relative_rewards
from lightning_modules.grm.candidates import Comparison
from lightning_modules.grm.exported import PairJudge

Shown = tuple[str, str, str, int]  # question, both texts in the order shown, whose task


class ComparisonReward:
    """Rewards in [-1, 1] from comparisons within each group.

    Parts besides ``reward``, each a mean over a completion's comparisons: ``judge/tie``,
    ``judge/unparsed``, ``judge/first_slot`` (verdicts for slot 1; 0.5 in random orders is no bias),
    ``judge/longer`` (verdicts for the longer text), ``judge/flip`` (orders that disagree, with
    ``both_orders``), ``judge/tokens``, newly written for this completion (what this process
    remembers costs none, so a resumed run writes some again), and ``judge/empty``, 1 for a
    completion without text: it loses against any text unread, and ties with another [our choice].

    Args:
        judge: Compares.
        path: Folder of the judge, for messages only.
        scheme: ``bootstrap`` [summary: UniCreative], ``random_opponent`` or ``round_robin``.
        both_orders: Judge both orders; their mean is the outcome [our choice: off, it costs twice].
        show_plan: Let the judge read a text's plan, or thinking, too [paper: off].
        read_truncated: Let it read completions that were cut off; without they count as empty.
        cache_size: Comparisons that are kept; 0 for none.
        seed: Of opponents and orders.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        judge: PairJudge,
        *,
        path: str | None = None,
        scheme: Scheme = "bootstrap",
        both_orders: bool = False,
        show_plan: bool = False,
        read_truncated: bool = False,
        cache_size: int = 100_000,
        seed: int = 0,
    ) -> None:
        check_choice("reward.scheme", scheme, ("bootstrap", "random_opponent", "round_robin"))
        if cache_size < 0:
            raise ValueError(f"reward.cache_size={cache_size} must be 0 (none) or more")
        self.judge, self.scheme, self.both_orders = judge, scheme, both_orders
        self.show_plan, self.cache_size, self.seed = show_plan, cache_size, seed
        self.read_truncated, self.path = read_truncated, path
        self._cache: OrderedDict[Shown, Comparison] = OrderedDict()

    def evaluation(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """What the tasks' verifiers say: one greedy text has nobody to be compared with."""
        return VerifierReward(truncated=None).verified(rollouts)

    def __call__(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Compare, and give every completion its reward and parts, each ``(N,)``.

        Raises:
            ValueError: No group has two completions.
        """
        if len(rollouts) and len(rollouts.groups.unique()) == len(rollouts):
            raise ValueError(
                "this reward compares the completions of a prompt with each other, and there is "
                "one only: model.samples_per_prompt must be at least 2"
            )
        rows = list(zip(rollouts.prompts, rollouts.completions, strict=True))
        texts = [self.read(prompt, completion) for prompt, completion in rows]
        groups = rollouts.groups.tolist()
        place = _places(groups)

        def uniform(purpose: str, row: int, other: int = 0) -> float:
            key = f"{self.seed}/{rollouts.index}/{purpose}/{place[other]}"
            return sample_seed(key, rollouts.prompts[row].uid, place[row]) / 2**64

        met = matches(groups, self.scheme, partial(uniform, "opponent"))
        found = self.compare(
            [
                (pair_of_texts(texts[one], texts[other]), uniform("order", one, other) < 0.5)
                for one, other in met
            ],
            [rollouts.prompts[one].task for one, _ in met],
        )
        sums = _Sums(len(rows))
        for (one, other), comparison in zip(met, found, strict=True):
            sums.add((one, other), comparison, _longer_won(comparison, texts[one], texts[other]))
        reward = relative_rewards(met, [c.outcome for c in found], len(rows), self.scheme)
        empty = torch.tensor([float(not text.strip()) for _, text in texts])
        return {"reward": reward, "judge/empty": empty} | sums.means()

    def read(self, prompt: Prompt, completion: Completion) -> tuple[str, str]:
        """Question and response as texts."""
        task: Any = prompt.task
        decode = partial(task.tokenizer.decode, skip_special_tokens=True)
        is_read = self.read_truncated or completion.finish_reason is FinishReason.STOP
        if not hasattr(task, "conversation"):
            text = str(decode(list(completion.token_ids))) if is_read else ""
            return str(decode(list(prompt.token_ids))), text
        chat, content = task.conversation(prompt, completion)
        turns = [f"{role}: {turn}" for role, turn in chat]
        question = str(chat[0][1]) if len(chat) == 1 else "\n".join(turns)
        if not is_read:
            return question, ""
        if self.show_plan:
            return question, str(decode(list(completion.token_ids)))
        return question, answer_part(str(content), strict=True)

    def compare(
        self,
        pairs: Sequence[tuple[Pair, bool]],
        tasks: Sequence[Task],
        *,
        both_orders: bool | None = None,
    ) -> list[Comparison]:
        """Outcomes for the first text of every pair, whichever slot it was shown in.

        Args:
            pairs: A pair, first text in slot 1, and whether to show it swapped.
            tasks: Whose completions each pair compares.
            both_orders: None as configured.
        """
        both = self.both_orders if both_orders is None else both_orders
        shown: list[tuple[int, Pair]] = []
        for number, (pair, is_swapped) in enumerate(pairs):
            orders = (False, True) if both else (is_swapped,)
            shown += [(number, pair.swap() if order else pair) for order in orders]
        verdicts = self._verdicts(
            [pair for _, pair in shown], [tasks[number] for number, _ in shown]
        )
        by_pair: list[list[Comparison]] = [[] for _ in pairs]
        for (number, pair), verdict in zip(shown, verdicts, strict=True):
            by_pair[number].append(verdict.swap() if pair.swapped else verdict)
        return [_merged(orders) for orders in by_pair]

    def _asked(self, pairs: Sequence[Pair], task: Task) -> list[Comparison]:
        try:
            return self.judge.compare(pairs, task)
        except ValueError as error:
            if self.path is None:
                raise
            raise ValueError(
                f"the judge of reward.path={self.path!r} cannot compare texts of task "
                f"'{task.name}': {error}"
            ) from error

    def _verdicts(self, pairs: Sequence[Pair], tasks: Sequence[Task]) -> list[Comparison]:
        """Of the cache, of trivial pairs at once, of the judge in one batch a task."""
        keys = [
            (pair.question, *pair.responses, id(task))
            for pair, task in zip(pairs, tasks, strict=True)
        ]
        known: dict[Shown, Comparison] = {}
        asked: dict[Shown, tuple[Pair, Task]] = {}
        for key, pair, task in zip(keys, pairs, tasks, strict=True):
            first, second = (text.strip() for text in pair.responses)
            if key in self._cache:
                self._cache.move_to_end(key)
                known[key] = self._cache[key].again()
            elif first and second and first != second:
                asked[key] = (pair, task)
            else:
                known[key] = Comparison.unread(bool(first), bool(second))
        for task in {id(task): task for task in tasks}.values():
            own = {key: pair for key, (pair, of) in asked.items() if of is task}
            if own or dist.is_initialized():  # a shared engine is called by all ranks or by none
                answers = self._asked(list(own.values()), task)
                known |= (fresh := dict(zip(own, answers, strict=True)))
                self._cache.update(fresh)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        found = []
        for key in keys:
            found.append(known[key])
            known[key] = known[key].again()  # written once, whoever asks twice
        return found


class _Sums:
    """Parts of the rewards, summed over each row's comparisons."""

    def __init__(self, rows: int) -> None:
        names = ("tie", "unparsed", "first_slot", "longer", "flip", "tokens")
        self.sums = {name: torch.zeros(rows) for name in names}
        self.count = torch.zeros(rows)

    def add(self, rows: tuple[int, int], comparison: Comparison, longer: float) -> None:
        for row in rows:
            self.count[row] += 1
            for name, total in self.sums.items():
                value = longer if name == "longer" else float(getattr(comparison, name))
                total[row] += value / 2 if name == "tokens" else value

    def means(self) -> dict[str, Tensor]:
        size = self.count.clamp(min=1)
        return {
            f"judge/{name}": total if name == "tokens" else total / size
            for name, total in self.sums.items()
        }


def _longer_won(comparison: Comparison, one: tuple[str, str], other: tuple[str, str]) -> float:
    """1 where the longer text won, 0 where the shorter one; 0.5 where neither did."""
    gap = len(one[1]) - len(other[1])
    if comparison.winner is None or gap == 0:
        return 0.5
    return float((gap > 0) == (comparison.winner == 1))


def _merged(orders: Sequence[Comparison]) -> Comparison:
    """Both orders of a pair as one: a verdict where they agree, the mean outcome."""
    if len(orders) == 1:
        return orders[0]
    first, second = orders
    winner = first.winner if first.winner == second.winner else None
    return Comparison(
        winner,
        (first.outcome + second.outcome) / 2,
        is_parsed=first.is_parsed and second.is_parsed,
        first_slot=(first.first_slot + second.first_slot) / 2,
        flip=float(first.is_parsed and second.is_parsed and first.winner != second.winner),
        tokens=first.tokens + second.tokens,
    )


def pair_of_texts(one: tuple[str, str], other: tuple[str, str]) -> Pair:
    """A comparison of two ``(question, response)``; its uid depends on their content alone."""
    digest = hashlib.blake2b("\0".join((*one, other[1])).encode("utf-8", "replace"))
    return Pair(digest.hexdigest()[:32], one[0], (one[1], other[1]))


def _places(groups: Sequence[int]) -> list[int]:
    """Number of each row within its group."""
    seen: dict[int, int] = {}
    places = []
    for group in groups:
        places.append(seen.get(group, 0))
        seen[group] = places[-1] + 1
    return places
