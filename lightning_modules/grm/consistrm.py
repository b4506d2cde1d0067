"""ConsistRM: a judge that labels its own training pairs.

Paper: "ConsistRM", arXiv 2604.07484 (ACL 2026); code: yuliangCarmelo/ConsistRM. We read the
abstract [paper], summaries of the body [summary] and the code [code].

At a visit of a pair K judgements are sampled. Signs: -1 slot 1, +1 slot 2, unparsed ones left out.

    label  = sgn(mean of the votes + mean of the memory)        memory: earlier labels of this pair
    answer = +1 where the verdict is the label, -1 where not, 0 for all where the label is 0
    critique = 0.1 for the half of the judgements with answer +1 whose texts are most like each
               other's (mean cosine)
    reward = -5 if it does not parse, else answer + critique

and GRPO on that reward. No label of the data is read: ``data.labels=hidden`` keeps them out of
prompts, and they are used for logging only.

Neither summary nor code looks at both orders of a pair, and a judge that prefers slot 1 then labels
its own bias [measured: it ends at slot 1 always, while its reward rises to 1]. Our
``symmetrise=pooled`` [our choice, default of the runnable configuration] puts both orders into one
draw, keeps one memory a pair and takes one vote over both, those of the second order negated:

    online = (sum y - sum y') / (n + n')

A vote for the slot, whatever it holds, cancels. ``symmetrise=off`` is the published method.

Hooks overridden: ``target_labels`` (pseudo-labels), ``critique_reward``, ``score`` (format bonus,
names of parts). Baselines are values of ``labels``: ``gold`` (RFT), ``majority`` (TTRL),
``memory_only``, ``frozen`` (the votes that began the memory, never added to).

Where we differ [our choice]: ties of similarity share the bonus; the critique without the verdict
is embedded (``critique_text=full`` is the code's); where the embedder fails there is no bonus and a
warning; the memory begins with the backbone's own votes of this task (``data.prior_votes``).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.experience import Rollouts
from datamodules.rewards import RewardFunction
from datamodules.self_training import SelfTrainingDataModule
from datamodules.tasks.base import Pair, Verdict
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.consistency import (
    Eviction,
    LabelRule,
    Tally,
    mean_similarity,
    pseudo_label,
    sign_of,
    slot_of,
    tally,
    top_share_bonus,
    vote_metrics,
)
from lightning_modules.functional.sums import Metrics, masked_sum_count
from lightning_modules.grm.base import GenerativeRewardModule
from lightning_modules.grm.critiques import CONFIDENCES, alike, confidence_scores, mean_states
from lightning_modules.grm.embedders import EncoderEmbedder, build_embedder
from lightning_modules.grm.label_memory import LabelMemory

LABELS = ("consist", "majority", "memory_only", "frozen", "gold")
SIGNALS = ("semantic", *CONFIDENCES, "none")
COLLAPSED, WATCHED = 0.9, 5  # share of one slot, over this many rollouts


class ConsistRM(GenerativeRewardModule):
    """Consistency-aware self-training.

    Args:
        labels: ``consist`` [paper], ``majority`` (of this visit), ``memory_only``, ``frozen`` or
            ``gold`` (needs ``data.labels=given``).
        symmetrise: ``off`` [paper], ``memory`` (one memory for both orders), or ``pooled`` (one
            vote over both orders, too; needs ``data.pair_order=both``).
        label_rule: See ``functional.consistency.pseudo_label``.
        label_threshold: No label below it.
        memory_size: Labels a pair [code: 20].
        memory_evict: What a full memory forgets, see ``functional.consistency.remember``.
        memory_decay: Weight of a label of age one; 1 counts all alike [paper].
        critique_signal: ``semantic`` [paper]; ``confidence_tail`` (mean log-prob of the last 64
            tokens) and ``confidence_lowest`` (of the lowest tenth) [code, switched off there];
            ``none``.
        critique_bonus: Its reward [paper: 0.1].
        critique_share: Share of the right judgements that get it [code: 0.5].
        critique_text: What embedders of text read: ``critique`` (without the verdict) or ``full``
            [code].
        embedder: ``policy`` (mean hidden state of the policy over the completion), ``hashed``,
            ``minilm``, or a folder or hub name [paper: Qwen/Qwen3-Embedding-4B].
        format_bonus: Added to every judgement that parses [code: 0.1; paper: 0].
        verdict_reward: As in ``GenerativeRewardModule``; ``invalid`` is -5 [summary] (code: -3).
        **kwargs: Of ``GenerativeRewardModule``.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        *,
        labels: str = "consist",
        symmetrise: Literal["off", "memory", "pooled"] | Literal[False] = "pooled",
        label_rule: LabelRule = "sum_sign",
        label_threshold: float = 0.0,
        memory_size: int = 20,
        memory_evict: Eviction = "farthest",
        memory_decay: float = 1.0,
        critique_signal: str = "semantic",
        critique_bonus: float = 0.1,
        critique_share: float = 0.5,
        critique_text: Literal["critique", "full"] = "critique",
        embedder: str = "policy",
        format_bonus: float = 0.0,
        verdict_reward: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(verdict_reward={"invalid": -5.0} | dict(verdict_reward or {}), **kwargs)
        check_choice("model.labels", labels, LABELS)
        symmetrise = "off" if symmetrise is False else symmetrise  # how YAML reads a bare off
        check_choice("model.symmetrise", symmetrise, ("off", "memory", "pooled"))
        check_choice("model.critique_signal", critique_signal, SIGNALS)
        check_choice("model.critique_text", critique_text, ("critique", "full"))
        pseudo_label((0, 0), rule=label_rule, threshold=label_threshold)  # refuses bad values
        if not 0 < critique_share <= 1:
            raise ValueError(f"model.critique_share={critique_share} must be in (0, 1]")
        self.labels, self.symmetrise = labels, symmetrise
        self.label_rule, self.label_threshold = label_rule, label_threshold
        self.critique_signal, self.critique_text = critique_signal, critique_text
        self.critique_bonus, self.critique_share = critique_bonus, critique_share
        self.format_bonus = format_bonus
        self.embedder = build_embedder(embedder)
        self.memory = LabelMemory(
            size=memory_size,
            evict=memory_evict,
            decay=memory_decay,
            is_frozen=labels in ("frozen", "gold"),
        )
        self._pseudo_metrics: Metrics = {}
        self._first_slots: deque[float] = deque(maxlen=WATCHED)
        self._has_warned = False

    # ------------------------------------------------------------------ memory

    def on_fit_start(self) -> None:
        """Begin the memory with the backbone's votes, where no checkpoint brought one.

        Raises:
            ValueError: The data do not fit ``labels`` or ``symmetrise``.
        """
        super().on_fit_start()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SelfTrainingDataModule):
            raise ValueError(
                f"model=consistrm needs pairs that come unlabelled and in both orders: set "
                f"data._target_=datamodules.self_training.SelfTrainingDataModule, not "
                f"{type(data).__name__}"
            )
        if self.labels == "gold" and data.labels != "given":
            raise ValueError("model.labels=gold learns from labels: give data.labels=given")
        if self.labels in ("frozen", "memory_only") and not data.prior_votes:
            raise ValueError(
                f"model.labels={self.labels} begins with prior votes: give data.prior_votes=8"
            )
        if self.symmetrise != "off" and data.pair_order != "both":
            raise ValueError(
                f"model.symmetrise={self.symmetrise} compares both orders of a pair: give "
                f"data.pair_order=both"
            )
        if not len(self.memory):
            for uid, swapped, slots in data.prior():
                key, flip = self._key(uid, swapped)
                self.memory.begin([(key, [flip * sign_of(slot) for slot in slots if slot])])
        if isinstance(self.embedder, EncoderEmbedder):
            self.embedder.load()  # a misspelt name is no ablation

    def _key(self, uid: str, swapped: bool) -> tuple[str, int]:
        """Where an order of a pair is remembered, and the factor from its slots to those there."""
        if self.symmetrise == "off":
            return f"{uid}/{'21' if swapped else '12'}", 1
        return uid, -1 if swapped else 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the memory."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["label_memory"] = self.memory.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the memory back."""
        super().on_load_checkpoint(checkpoint)
        if "label_memory" in checkpoint:
            self.memory.load(checkpoint["label_memory"])

    # ------------------------------------------------------------------ hooks

    def target_labels(
        self, rollouts: Rollouts, verdicts: Sequence[Verdict]
    ) -> Sequence[int | None]:
        """Pseudo-labels in the slots of each prompt; adds them to the memory, once a visit.

        ``info`` keeps ``pair`` (where the pair is remembered).
        """
        groups = rollouts.groups.tolist()
        pairs: list[Pair] = [prompt.record for prompt in rollouts.prompts]
        places = [self._key(pair.uid, pair.swapped) for pair in pairs]
        # without pooling each order casts a vote of its own, even where the memory is shared
        urns = [
            key if self.symmetrise == "pooled" else f"{key}#{group}"
            for (key, _), group in zip(places, groups, strict=True)
        ]
        votes: dict[str, list[int]] = {}
        for urn, (_, flip), verdict in zip(urns, places, verdicts, strict=True):
            votes.setdefault(urn, []).append(flip * sign_of(verdict.winner))
        tallies = {urn: tally(cast) for urn, cast in votes.items()}
        online = [tallies[urn] for urn in urns]
        memory = [self.memory.tally(key) for key, _ in places]
        labels = [self._label(*both) for both in zip(online, memory, strict=True)]
        if self.labels == "gold":
            golds = [sign_of(prompt.label) for prompt in rollouts.prompts]
            labels = [flip * gold for (_, flip), gold in zip(places, golds, strict=True)]
        rollouts.info["pair"] = [key for key, _ in places]
        self._visit(rollouts, labels, online, memory)
        return [slot_of(flip * label) for (_, flip), label in zip(places, labels, strict=True)]

    def _label(self, online: Tally, memory: Tally) -> int:
        """The pseudo-label of one vote, in the data's order."""
        if self.labels == "majority":
            memory = (0, 0)
        elif self.labels in ("memory_only", "frozen"):
            online = (0, 0)
        return pseudo_label(online, memory, rule=self.label_rule, threshold=self.label_threshold)

    def critique_reward(self, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Tensor | None:
        """``critique_bonus`` for the judgements that agree best with others of the same answer."""
        if self.critique_signal == "none" or self.critique_bonus == 0:
            return None
        info = rollouts.info
        is_right = torch.tensor(
            [w is not None and w == t for w, t in zip(info["winner"], info["target"], strict=True)]
        )
        subgroups = torch.where(is_right, rollouts.groups, -1)
        if self.critique_signal == "semantic":
            scores, sizes = self._similarity(rollouts, verdicts, subgroups)
        else:
            scores = confidence_scores(rollouts, self.critique_signal)
            sizes = mean_similarity(torch.zeros(len(rollouts), 1), subgroups)[1]
        bonus = top_share_bonus(
            scores, subgroups, share=self.critique_share, bonus=self.critique_bonus
        )
        known = [value if math.isfinite(value) else None for value in scores.tolist()]
        info |= {"critique_score": known, "critique_peers": sizes.tolist()}
        return bonus

    def _similarity(
        self, rollouts: Rollouts, verdicts: Sequence[Verdict], subgroups: Tensor
    ) -> tuple[Tensor, Tensor]:
        try:
            embeddings = self.embed_critiques(rollouts, verdicts)
        except (RuntimeError, ValueError, OSError) as error:
            if self.embedder is None:
                raise  # the policy itself: nothing would be trained either
            warnings.warn(  # of any rank: the others' embedders may work
                f"no critique bonus in rollout {rollouts.index}: {error}", stacklevel=2
            )
            embeddings = torch.full((len(rollouts), 1), torch.nan)
        scores, sizes = mean_similarity(embeddings, subgroups)
        return alike(scores, rollouts, subgroups), sizes

    def embed_critiques(self, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Tensor:
        """One vector a completion ``(N, D)``, on the CPU.

        Every rank embeds all of its rows, so that sharded policies are gathered equally often.
        """
        if self.embedder is None:
            return mean_states(self, rollouts)
        if self.critique_text == "critique":
            return self.embedder([verdict.analysis for verdict in verdicts])
        pairs = zip(rollouts.prompts, rollouts.completions, strict=True)
        return self.embedder([prompt.task.render(one.token_ids) for prompt, one in pairs])

    def score(self, rollouts: Rollouts, reward: RewardFunction) -> dict[str, Tensor]:
        """Reward of each judgement; ``agreement`` is with the pseudo-label, not with the truth."""
        parts = super().score(rollouts, reward)
        if self.format_bonus:
            parts["reward"] = parts["reward"] + self.format_bonus * (1 - parts["invalid"])
        if self.labels != "gold":
            parts["agreement"] = parts.pop("accuracy")
        return parts

    # ------------------------------------------------------------------ what is logged

    def _visit(
        self,
        rollouts: Rollouts,
        labels: Sequence[int],
        online: Sequence[Tally],
        memory: Sequence[Tally],
    ) -> None:
        """Log the labels of this draw, once a pair, then remember them on every rank."""
        keys = rollouts.info["pair"]
        first: dict[int, int] = {}  # row of each prompt
        for row, group in enumerate(rollouts.groups.tolist()):
            first.setdefault(group, row)
        of_pair: dict[str, list[int]] = {}  # the first row of each order that was judged
        for row in first.values():
            of_pair.setdefault(keys[row], []).append(row)
        rows = [own[0] for own in of_pair.values()]
        # orders that voted apart: the label of their sum, 0 where they contradict each other
        total = {key: sum(labels[row] for row in own) for key, own in of_pair.items()}
        label = {key: (value > 0) - (value < 0) for key, value in total.items()}
        votes = [[part[row] for row in rows] for part in (online, memory)]
        metrics = vote_metrics(list(label.values()), *votes)
        before = [(label[key], self.memory.last(key)) for key in of_pair]
        flips = [new != old for new, old in before if old is not None]
        metrics["flip_rate"] = masked_sum_count(torch.tensor(flips))
        metrics |= self._against_gold(rollouts, labels, list(first.values()))
        self._pseudo_metrics = {f"pseudo/{name}": value for name, value in metrics.items()}
        # a pair without any vote leaves no trace
        visited = {
            key: label[key] for key, own in of_pair.items() if any(online[row][1] for row in own)
        }
        self.memory.visit(visited, rollouts.index)

    def _against_gold(
        self, rollouts: Rollouts, labels: Sequence[int], rows: Sequence[int]
    ) -> Metrics:
        """How many decided labels are right, where the data know: for logging, never for reward."""
        data = getattr(self._trainer, "datamodule", None)
        hidden = getattr(data, "hidden_labels", {})
        right = []
        for row in rows:
            pair: Pair = rollouts.prompts[row].record
            gold = sign_of(hidden.get(pair.uid))
            # without a common memory the label is in the slots of this order
            gold = -gold if self.symmetrise == "off" and pair.swapped else gold
            if gold and labels[row]:
                right.append(labels[row] == gold)
        return {"accuracy": masked_sum_count(torch.tensor(right))}

    def rollout_metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        """Those of the family, of labels and critiques; warns of a collapse to one slot."""
        metrics = super().rollout_metrics(rollouts) | self._pseudo_metrics
        peers = torch.tensor(rollouts.info.get("critique_peers", []))
        if len(peers):
            known = [torch.nan if x is None else x for x in rollouts.info["critique_score"]]
            scores = torch.tensor(known)
            bonus = rollouts.parts["critique_reward"]
            length = torch.tensor([float(len(c.token_ids)) for c in rollouts.completions])
            got = bonus > 0
            metrics |= {
                "critique/similarity": masked_sum_count(scores, (peers > 1) & scores.isfinite()),
                "critique/peers": masked_sum_count(peers.float(), peers > 0),
                "critique/bonus_length": masked_sum_count(length, got),
                "critique/no_bonus_length": masked_sum_count(length, (peers > 1) & ~got),
            }
        total, count = metrics["rollout/first_slot_rate"]
        if count:
            self._watch(float(total) / float(count))
        return metrics

    def _watch(self, first_slot_rate: float) -> None:
        """Warn once where the last rollouts name one slot only: reward looks perfect then."""
        if self.labels == "gold":
            return
        self._first_slots.append(first_slot_rate)
        mean = sum(self._first_slots) / len(self._first_slots)
        if self._has_warned or len(self._first_slots) < WATCHED or 1 - COLLAPSED < mean < COLLAPSED:
            return
        self._has_warned = True
        advice = "; model.symmetrise=pooled data.pair_order=both takes that away"
        advice = "" if self.symmetrise == "pooled" else advice
        rank_zero_warn(
            f"{max(mean, 1 - mean):.0%} of the verdicts of the last {WATCHED} rollouts name slot "
            f"{1 if mean > 0.5 else 2}: the judge labels its own bias, and its rising reward says "
            f"nothing{advice}"
        )
