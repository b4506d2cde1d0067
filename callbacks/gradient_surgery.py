"""Gradient surgery as a callback: domains whose gradients conflict are disentangled at every step.

Works under automatic optimisation on any module whose micro-batches are of one domain each
(``data.shares`` for rollouts), with ``accumulate_grad_batches`` micro-batches a step:

    on_after_backward         the micro-batch's gradient moves into its domain's buffer
    on_before_optimizer_step  Gram of each unit -> weights -> weighted sum -> ``.grad``

Clipping, the module's own look at the gradient and the step come after. Every rank must train the
same domain in the same micro-batch, as backward passes sum over ranks [the release does not check
this]; it is checked once a step, before anything moves.

    one process   nothing to communicate
    DDP           micro-batches before the last run without gradient sync: their buffers are
                  averaged here; the last one arrives averaged
    FSDP2         every micro-batch arrives averaged, as shards; Grams of shards are summed in one
                  all-reduce

Maths in ``lightning_modules/functional/surgery.py``, units in ``units.py`` beside it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from callbacks.surgery_checks import KEY, check_trainer, domain_of, no_domain
from callbacks.surgery_log import Step, SurgeryLog
from callbacks.surgery_ranks import all_reduce_mean, like, local_part, num_copies
from datamodules.loader import gather_objects
from lightning_modules.functional.choices import check_choice
from lightning_modules.functional.surgery import (
    Method,
    check_torchjd,
    gradvac_weights,
    gram_of,
    pcgrad_weights,
    torchjd_weights,
)
from lightning_modules.functional.units import Granularity, Units, partition


class GradientSurgery(Callback):
    """Replaces the summed gradient by a combination of the domains' gradients.

    Args:
        granularity: What gets weights of its own: ``tensor``, ``module``, ``layer``, ``global``.
        method: ``pcgrad`` (MGS), ``gradvac``, or by torchjd ``cagrad``, ``nash_mtl``,
            ``aligned_mtl``, ``upgrad``; ``none`` sums (naive mixing) and logs the same.
        reduce: ``sum`` of the projected gradients, or their ``mean`` over domains.
        threshold: Of ``pcgrad``: project only where the cosine is below ``-threshold``.
        per_domain_mean: Weigh domains equally, whatever their number of micro-batches.
        norm_floor: Squared norms up to this are not projected on.
        start_step: First step with surgery.
        every_n_steps: Steps from one with surgery to the next; others take the plain sum.
        buffer_dtype: Of the domains' gradients: ``float32`` or ``bfloat16``.
        exclude: Patterns (``*`` stands for anything) of parameter names that keep the plain sum.
        min_unit_size: Smaller tensors share a unit with their neighbour (``tensor`` only).
        gradvac_decay: Of ``gradvac``: weight of the new cosine in its running mean.
        seed: Of the random orders, which are a pure function of (seed, step).
        log_every_n_steps: Steps between scalars.
        full_log: Also a cosine and a weight of every unit.
        image_every_n_steps: Steps between heat maps and histograms; 0 for none.

    Raises:
        ValueError: A value is not allowed, or the method's packages are missing.

    Example:
        >>> GradientSurgery(granularity="module").method
        'pcgrad'
    """

    def __init__(
        self,
        *,
        granularity: Granularity = "tensor",
        method: Method = "pcgrad",
        reduce: Literal["sum", "mean"] = "sum",
        threshold: float = 0.0,
        per_domain_mean: bool = False,
        norm_floor: float = 1e-12,
        start_step: int = 0,
        every_n_steps: int = 1,
        buffer_dtype: Literal["float32", "bfloat16"] = "float32",
        exclude: Sequence[str] = (),
        min_unit_size: int = 16,
        gradvac_decay: float = 0.5,
        seed: int = 0,
        log_every_n_steps: int = 1,
        full_log: bool = False,
        image_every_n_steps: int = 50,
    ) -> None:
        check_choice(f"{KEY}.granularity", granularity, get_args(Granularity))
        check_choice(f"{KEY}.method", method, get_args(Method))
        check_choice(f"{KEY}.reduce", reduce, ("sum", "mean"))
        check_choice(f"{KEY}.buffer_dtype", buffer_dtype, ("float32", "bfloat16"))
        problems = [
            f"{KEY}.{name}={value} must be {bound}"
            for name, value, is_right, bound in (
                ("threshold", threshold, 0 <= threshold < 1, "at least 0 and below 1"),
                ("norm_floor", norm_floor, norm_floor > 0, "above 0"),
                ("start_step", start_step, start_step >= 0, "at least 0"),
                ("every_n_steps", every_n_steps, every_n_steps >= 1, "at least 1"),
                ("min_unit_size", min_unit_size, min_unit_size >= 1, "at least 1"),
                ("gradvac_decay", gradvac_decay, 0 < gradvac_decay <= 1, "above 0, at most 1"),
                ("log_every_n_steps", log_every_n_steps, log_every_n_steps >= 1, "at least 1"),
                ("image_every_n_steps", image_every_n_steps, image_every_n_steps >= 0,
                 "at least 0 (0 for none)"),
            )
            if not is_right
        ]  # fmt: skip
        if problems:
            raise ValueError("; ".join(problems))
        check_torchjd(method)
        self.granularity: Granularity = granularity
        self.method: Method = method
        self.reduce, self.threshold, self.norm_floor = reduce, threshold, norm_floor
        self.per_domain_mean = per_domain_mean
        self.start_step, self.every_n_steps = start_step, every_n_steps
        self.buffer_dtype: torch.dtype = getattr(torch, buffer_dtype)
        self.exclude, self.min_unit_size = tuple(exclude), min_unit_size
        self.gradvac_decay, self.seed = gradvac_decay, seed
        self.reporter = SurgeryLog(log_every_n_steps, full_log, image_every_n_steps)
        self.parameters: list[nn.Parameter] = []
        self.units = Units([], [], [], [])
        #: Newest weights ``(U, K)`` and the names of their domains.
        self.weights: Tensor | None = None
        self.domains: list[str] = []
        self._targets: dict[str, Tensor] = {}  # of gradvac: "a/b" -> (U,)
        self._clear()

    def _clear(self) -> None:
        self._labels: list[str | None] = []
        # (domain, whether it is averaged over ranks already) -> a gradient or None a parameter
        self._buffers: dict[tuple[str, bool], list[Tensor | None]] = {}
        self._seconds = 0.0

    # ------------------------------------------------------------------ start and resume

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the units of the module as it is built and sharded now.

        Raises:
            ValueError: The trainer or ``exclude`` leaves nothing to do surgery on.
        """
        check_trainer(trainer, pl_module)
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                raise ValueError(
                    f"{KEY}.exclude={pattern!r} matches no trainable parameter; names look like "
                    f"{named[0][0]} (* stands for anything)"
                )
        kept = [
            (n, p) for n, p in named if not any(fnmatchcase(n, pattern) for pattern in self.exclude)
        ]
        self.parameters = [parameter for _, parameter in kept]
        self.units = partition(
            [name for name, _ in kept],
            [parameter.numel() for parameter in self.parameters],
            granularity=self.granularity,
            min_elements=self.min_unit_size,
        )
        self._targets = {
            pair: value
            for pair, value in self._targets.items()
            if len(value) == len(self.units.names)
        }
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """Running cosines of ``gradvac``; buffers are empty on step boundaries."""
        return {"targets": dict(self._targets)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._targets = dict(state_dict["targets"])

    # ------------------------------------------------------------------ the window

    def _is_due(self, trainer: Trainer) -> bool:
        since = trainer.global_step - self.start_step
        return since >= 0 and since % self.every_n_steps == 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the micro-batch's domain; what is wrong with it all ranks say together, later."""
        if self._is_due(trainer):
            self._labels.append(domain_of(batch))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the micro-batch's gradient into its domain's buffer."""
        if not self._is_due(trainer) or self._labels[-1] is None:
            return
        began = time.perf_counter()
        wrapper = trainer.strategy.model
        # False inside DDP's no_sync; FSDP2 under Lightning reduces every micro-batch [measured]
        is_averaged = bool(getattr(wrapper, "require_backward_grad_sync", True))
        is_view = bool(getattr(wrapper, "gradient_as_bucket_view", False))
        empty: list[Tensor | None] = [None] * len(self.parameters)
        buffer = self._buffers.setdefault((self._labels[-1], is_averaged), empty)
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            gradient = local_part(parameter.grad)
            parameter.grad = None
            before = buffer[index]
            if before is None:
                buffer[index] = gradient.to(self.buffer_dtype, copy=is_view)
            else:
                before.add_(gradient)
        self._seconds += time.perf_counter() - began

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Combine the domains' gradients, before the module's own hook and clipping.

        Raises:
            ValueError: On every rank: a micro-batch had no domain of its own, or the ranks'
                micro-batches were of different domains.
        """
        if not self._is_due(trainer):
            return
        began = time.perf_counter()
        labels = self._check_labels()
        self._average(labels)
        domains = sorted({domain for domain, _ in self._buffers})
        gradients = [self._buffers[domain, True] for domain in domains]
        if domains:
            gram = self._gram(gradients)
            shares = self._shares(labels, domains)
            scaled = gram * shares[:, None] * shares
            weights = self._weigh(scaled, domains, trainer.global_step)
            used = sum(g.nbytes for buffer in gradients for g in buffer if g is not None)
            self._combine(gradients, weights * shares)
            self.weights, self.domains = weights, domains
            self._seconds += time.perf_counter() - began
            step = Step(scaled, weights, domains, 1e3 * self._seconds, used / 2**20)
            self.reporter.write(trainer, pl_module, self.units, step)
        self._clear()

    # ------------------------------------------------------------------ its parts

    def _check_labels(self) -> list[str]:
        """Domains of the window's micro-batches, the same on every rank."""
        ranks = gather_objects(self._labels)
        if any(label is None for labels in ranks for label in labels):
            number = next(i for labels in ranks for i, x in enumerate(labels) if x is None)
            raise ValueError(no_domain(number))
        if any(labels != ranks[0] for labels in ranks):
            seen = "; ".join(f"rank {rank}: {labels}" for rank, labels in enumerate(ranks))
            raise ValueError(
                f"gradient surgery needs the same domain on every rank in a micro-batch, but this "
                f"window has {seen}. data.shares orders micro-batches so; a loader of your own "
                f"must do it too"
            )
        return [label for label in self._labels if label is not None]

    def _average(self, labels: Sequence[str]) -> None:
        """Make every buffer the mean over ranks, in place (DDP's unsynchronised ones are not)."""
        local = sorted(domain for domain, is_averaged in self._buffers if not is_averaged)
        if local:
            # a parameter that took no part on one rank may have on another
            mine = [[g is None for g in self._buffers[domain, False]] for domain in local]
            absent = [[all(rank) for rank in zip(*one, strict=True)]
                      for one in zip(*gather_objects(mine), strict=True)]  # fmt: skip
            for domain, is_absent in zip(local, absent, strict=True):
                buffer = self._buffers[domain, False]
                for index, parameter in enumerate(self.parameters):
                    if buffer[index] is None and not is_absent[index]:
                        buffer[index] = torch.zeros_like(parameter, dtype=self.buffer_dtype)
                all_reduce_mean([gradient for gradient in buffer if gradient is not None])
        for domain in local:
            buffer = self._buffers.pop((domain, False))
            synced = self._buffers.setdefault((domain, True), buffer)
            if synced is not buffer:
                for index, gradient in enumerate(buffer):
                    other = synced[index]
                    if gradient is not None:
                        synced[index] = gradient if other is None else gradient.add_(other)

    def _gram(self, gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """``(P, K, K)`` float64 dot products a parameter, over all shards, on the CPU."""
        device = self.parameters[0].device
        grams = [
            gram_of([buffer[index] for buffer in gradients]).to(device, torch.float32)
            for index in range(len(self.parameters))
        ]
        total = torch.stack(grams)
        if any(isinstance(parameter, DTensor) for parameter in self.parameters):
            copies = [num_copies(parameter) for parameter in self.parameters]
            total /= total.new_tensor(copies)[:, None, None]
            dist.all_reduce(total)
        return total.to("cpu", torch.float64)

    def _shares(self, labels: Sequence[str], domains: Sequence[str]) -> Tensor:
        """``(K,)`` factors of the domains' gradients: 1, or so that each counts like the others."""
        if not self.per_domain_mean:
            return torch.ones(len(domains), dtype=torch.float64)
        counts = torch.tensor([labels.count(domain) for domain in domains], dtype=torch.float64)
        return len(labels) / (len(domains) * counts)

    def _weigh(self, gram: Tensor, domains: Sequence[str], step: int) -> Tensor:
        """``(U, K)`` weights; of the plain sum for one domain or a gradient that is not finite."""
        units = len(self.units.names)
        of_unit = torch.zeros(units, *gram.shape[1:], dtype=gram.dtype)
        of_unit.index_add_(0, torch.tensor(self.units.unit_of), gram)
        ones = torch.ones(units, len(domains), dtype=gram.dtype)
        # not finite: the module's own check then skips the step, on every rank alike
        if len(domains) == 1 or not bool(gram.isfinite().all()):
            return ones
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        if self.method == "none":
            weights = ones
        elif self.method == "pcgrad":
            weights = pcgrad_weights(
                of_unit,
                generator=generator,
                threshold=self.threshold,
                norm_floor=self.norm_floor,
            )
        elif self.method == "gradvac":
            weights = self._gradvac(of_unit, domains, generator)
        else:
            weights = torchjd_weights(of_unit, self.method)
        return weights / len(domains) if self.reduce == "mean" else weights

    def _gradvac(self, gram: Tensor, domains: Sequence[str], generator: torch.Generator) -> Tensor:
        pairs = [[f"{a}/{b}" for b in domains] for a in domains]
        zero = torch.zeros(len(gram), dtype=torch.float64)
        rows = [torch.stack([self._targets.get(p, zero) for p in row], 1) for row in pairs]
        result = gradvac_weights(
            gram, torch.stack(rows, 1), generator=generator, decay=self.gradvac_decay
        )
        for a, row in enumerate(pairs):
            self._targets |= {p: result.targets[:, a, b].clone() for b, p in enumerate(row)}
        return result.weights

    def _combine(self, gradients: Sequence[list[Tensor | None]], weights: Tensor) -> None:
        """Write the weighted sums into ``.grad``, reusing the first domain's buffer."""
        numbers = weights.tolist()
        for index, parameter in enumerate(self.parameters):
            total = None
            for buffer, weight in zip(gradients, numbers[self.units.unit_of[index]], strict=True):
                gradient = buffer[index]
                if gradient is None:
                    continue
                if total is not None:
                    total.add_(gradient, alpha=weight)
                else:
                    total = gradient if weight == 1.0 else gradient.mul_(weight)
                buffer[index] = None if total is not gradient else gradient
            if total is not None:
                parameter.grad = like(parameter, total.to(parameter.dtype))
