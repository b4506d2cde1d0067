"""One step of any method on a model without memory: the method's own hooks, metered.

Stand-ins for the engine and the Trainer let ``rollout``, ``score``, ``annotate``, ``advantages``
and ``training_step`` run as they are, so a new method is covered without a word here. Prompts are
as long as the longest of the task, completions as long as they may be.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from datamodules.engines.base import Engine, Sampling
from datamodules.engines.decode import _Loop, choose_tokens, supports_buffered_cache
from datamodules.experience import Candidates, Completion, FinishReason, Prompt, Rollouts
from lightning_modules.backbones.sharding import decoder_layers
from lightning_modules.policy_rl.base import PolicyModule
from run_tools.plan_meter import Meter, Peak


@dataclass(frozen=True)
class Request:
    """What an engine was asked for at once.

    Args:
        prompts: The prompts.
        limits: Most new tokens of each.
        samples: Completions of each.
    """

    prompts: tuple[Prompt, ...]
    limits: tuple[int, ...]
    samples: int


class StandInEngine(Engine):
    """Answers with completions as long as they may be, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.policy_version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.samples`` full-length completions a prompt."""
        bound = sampling.max_new_tokens
        limits = tuple(min(bound, prompt.max_new_tokens or bound) for prompt in prompts)
        self.requests.append(Request(tuple(prompts), limits, sampling.samples))
        return [
            [
                Completion(
                    (1,) * limit,
                    (-1.0,) * limit,
                    FinishReason.LENGTH,
                    candidates=_candidates(limit, sampling.candidates),
                )
            ]
            * sampling.samples
            for limit in limits
        ]

    def sync(self, policy: Any, version: int) -> None:
        """Nothing to take."""


def _candidates(length: int, count: int) -> Candidates | None:
    """Equally probable ones, so that every place is as good to branch at."""
    if not count:
        return None
    ids = torch.arange(count).expand(length, count)
    return Candidates(ids, torch.full((length, count), -math.log(count)))


class StandInTrainer(SimpleNamespace):
    """What modules and datamodules ask of a Trainer."""

    def __init__(self, module: Any, data: Any, world_size: int, max_steps: int) -> None:
        super().__init__(
            lightning_module=module,
            datamodule=data,
            world_size=world_size,
            global_rank=0,
            global_step=0,
            max_steps=max_steps,
            estimated_stepping_batches=max_steps,
            is_global_zero=True,
            training=True,
            sanity_checking=False,
            loggers=[],
            callbacks=[],
            default_root_dir=".",
            current_epoch=0,
            strategy=SimpleNamespace(options=None),
        )


@dataclass
class Numbers:
    """What was measured, as numbers that grow linearly with the layers.

    Args:
        forward: Peak of a training forward pass.
        early: Peak of the first half of the backward pass.
        late: Of the second half.
        annotate: Peak of the passes without gradient on a rollout.
        prefill: Peak of reading the prompts.
        repeat: Peak of repeating their cache for every sample.
        decode: Peak of choosing tokens and of the last decoding step.
        train_flops: Of one micro-batch, forward and backward.
        annotate_flops: Of a whole rollout on one GPU.
        prefill_flops: Of one chunk of the engine.
        decode_flops: Of one decoding step of that chunk at its full length.
        decode_ops: Operations of that step, each about one kernel launch.
        kept: Bytes alive between forward and backward pass.
    """

    forward: Peak = field(default_factory=Peak)
    early: Peak = field(default_factory=Peak)
    late: Peak = field(default_factory=Peak)
    annotate: Peak = field(default_factory=Peak)
    prefill: Peak = field(default_factory=Peak)
    repeat: Peak = field(default_factory=Peak)
    decode: Peak = field(default_factory=Peak)
    train_flops: float = 0.0
    annotate_flops: float = 0.0
    prefill_flops: float = 0.0
    decode_flops: float = 0.0
    decode_ops: float = 0.0
    kept: float = 0.0

    def towards(self, other: Numbers, factor: float) -> Numbers:
        """``self + factor * (self - other)``, nothing below zero."""

        def line(one: float, two: float) -> float:
            return max(0.0, one + factor * (one - two))

        values: dict[str, Any] = {}
        for item in fields(self):
            one, two = getattr(self, item.name), getattr(other, item.name)
            if isinstance(one, Peak):
                values[item.name] = Peak({k: line(v, two.parts[k]) for k, v in one.parts.items()})
            else:
                values[item.name] = line(one, two)
        return Numbers(**values)


def parts_of(module: Any) -> list[nn.Module]:
    """The module's direct children that hold parameters."""
    return [part for part in module.children() if next(part.parameters(), None) is not None]


def cut_layers(module: Any, count: int) -> None:
    """Keep the first ``count`` decoder layers of every part, in place."""
    for part in parts_of(module):
        layers = decoder_layers(part)
        for holder in part.modules():
            if isinstance(holder, nn.ModuleList) and layers and holder[0] is layers[0]:
                del holder[count:]
        config: Any = getattr(part, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name, value in list(vars(text).items()) if text is not None else []:
            if isinstance(value, list) and len(value) == len(layers):
                setattr(text, name, value[:count])
        if text is not None and hasattr(text, "num_hidden_layers"):
            text.num_hidden_layers = count


def make_rollouts(module: Any, data: Any, prompts: Sequence[Prompt]) -> tuple[Any, list[Request]]:
    """Rollouts of stand-in completions, scored, and what the engine was asked for.

    A rollout that looks at weights (trees) is planned as flat samples of as many completions, an
    upper bound of its tokens; so is one that needs records whose file is not at hand.
    """
    engine = StandInEngine()
    rollout = partial(PolicyModule.rollout, module) if module.reads_weights else module.rollout
    try:
        rollouts: Rollouts = rollout(list(prompts), engine)
    except (DataDependentOutputException, AttributeError) as error:
        if isinstance(error, AttributeError) and prompts[0].record is not None:
            raise
        engine = StandInEngine()
        rollouts = PolicyModule.rollout(module, list(prompts), engine)
    rollouts.num_updates = data.mini_batches * data.passes
    rollouts.reward = torch.zeros(len(rollouts))
    with contextlib.suppress(Exception):  # meaningless completions may have no score
        parts = module.score(rollouts, lambda these: {"reward": torch.zeros(len(these))})
        rollouts.reward, rollouts.parts = parts["reward"], parts
    return rollouts, engine.requests


def micro_batches(module: Any, data: Any, rollouts: Rollouts) -> list[Any]:
    """The datamodule's micro-batches of a rollout.

    Raises:
        ValueError: There are too few rollouts to fill them.
    """
    rollouts.advantages = torch.zeros(len(rollouts))
    with contextlib.suppress(Exception):  # rewards that are all equal may have no advantage
        rollouts.advantages = module.advantages(rollouts)[0]
    return list(data.cut(rollouts))


def first_rows(rollouts: Rollouts, count: int) -> Rollouts:
    """The first ``count`` rollouts."""
    return Rollouts(
        prompts=rollouts.prompts[:count],
        completions=rollouts.completions[:count],
        groups=rollouts.groups[:count],
        num_updates=rollouts.num_updates,
        reward=None if rollouts.reward is None else rollouts.reward[:count],
        parts={name: value[:count] for name, value in rollouts.parts.items()},
    )


def meter_for(module: Any, is_cuda: bool) -> Meter:
    """A meter that leaves out all that the module holds already."""
    meter = Meter(module.kernel_options, is_cuda)
    held = [*module.parameters(), *module.buffers()]
    meter.leave_out([*held, *(p.grad for p in module.parameters() if p.grad is not None)])
    return meter


def measure_training(
    module: Any,
    batch: Any,
    numbers: Numbers,
    *,
    is_cuda: bool,
    autocast: Any,
    accumulates: bool = False,
    with_gradients: bool = True,
) -> None:
    """Meter forward and backward of one micro-batch into ``numbers``.

    Args:
        module: Without data (``take_data_away``).
        batch: A micro-batch of real tensors.
        numbers: Written to.
        is_cuda: Whether the head would run on a GPU.
        autocast: Dtype of mixed precision, or None.
        accumulates: Gradients of earlier micro-batches are there already.
        with_gradients: Count those of this one as they come; False where they lie elsewhere.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if accumulates else None
    module.train()
    meter = meter_for(module, is_cuda)
    with meter:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = module.training_step(batch, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        middle = meter.mark()
        meter.label_living("activations")
        loss.backward()
        meter.label([p.grad for p in trained], "gradients")
    numbers.kept = meter.peak(middle, middle + 1).total
    half = (middle + meter.mark()) // 2
    numbers.forward = meter.peak(0, middle)
    without = "" if with_gradients else "gradients"
    numbers.early = meter.peak(middle, half, without)
    numbers.late = meter.peak(half, None, without)
    numbers.train_flops = meter.flops
    for parameter in trained:
        parameter.grad = None
    module._window, module._summaries, module._last_batch = {}, {}, None


def measure_annotate(
    module: Any, rollouts: Rollouts, numbers: Numbers, *, is_cuda: bool, autocast: Any
) -> dict[str, Tensor | None]:
    """Meter ``annotate`` on as many rollouts as one of its passes takes.

    Returns:
        What it gave, repeated for the other rollouts by zeros.
    """
    size = min(len(rollouts), int(getattr(module, "annotate_batch_size", len(rollouts))))
    meter = meter_for(module, is_cuda)
    with meter, torch.no_grad():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            found = module.annotate(first_rows(rollouts, size))
    numbers.annotate = meter.peak()
    numbers.annotate_flops = meter.flops * len(rollouts) / max(1, size)
    return {
        name: None if value is None else torch.zeros(len(rollouts), *value.shape[1:])
        for name, value in found.items()
    }


def is_local(engine: Any) -> bool:
    """Whether the engine decodes on the device that trains: with the policy itself, or beside it.

    An engine that all ranks share has devices of its own.
    """
    if getattr(engine, "is_shared", False):
        return False
    return hasattr(engine, "_chunks") or hasattr(engine, "gpu_memory_utilization")


def largest_chunk(engine: Any, request: Request) -> Request:
    """What the engine decodes at once of a request."""
    numbers = list(range(len(request.prompts)))
    if hasattr(engine, "_chunks"):
        chunks = engine._chunks(request.prompts, list(request.limits), request.samples)
    else:
        size = max(1, getattr(engine, "max_num_seqs", len(numbers)) // request.samples)
        chunks = [numbers[:size]]
    parts = [
        Request(
            tuple(request.prompts[i] for i in chunk),
            tuple(request.limits[i] for i in chunk),
            request.samples,
        )
        for chunk in chunks
    ]
    return max(parts, key=cached_tokens, default=request)


def cached_tokens(request: Request) -> int:
    """Tokens in the cache when all of a request is decoded at once."""
    if not request.prompts:
        return 0
    longest = max(len(prompt.token_ids) for prompt in request.prompts)
    return len(request.prompts) * request.samples * (longest + max(request.limits))


def measure_decoding(
    module: Any, request: Request, numbers: Numbers, *, is_cuda: bool, is_padded: bool
) -> None:
    """Meter the embedded engine: reading the prompts, and the last decoding step.

    Args:
        module: Without data.
        request: Decoded at once.
        numbers: Written to.
        is_cuda: Whether it would run on a GPU.
        is_padded: Prompts are of unlike length. A mask costs a copy of a layer's keys and values
            for every query head [read off transformers' sdpa path].
    """
    policy = module.policy
    policy.eval()
    prompts = [list(prompt.token_ids) for prompt in request.prompts]
    if is_padded and len(prompts) > 1:
        prompts[0] = prompts[0][1:] or prompts[0]
    buffered = supports_buffered_cache(policy.config)
    room = max(request.limits)
    meter = meter_for(module, is_cuda)
    rows = torch.arange(len(prompts)).repeat_interleave(request.samples)
    sampling = Sampling(samples=request.samples, max_new_tokens=room)
    with meter, torch.no_grad():
        loop: Any = _Loop(policy, prompts, sampling, room, 0, torch.device("cpu"), buffered)
        # as ``loop.start``, which is cut here: each stretch grows linearly with the layers
        logits = loop._forward(loop.ids, 0, loop.length)
        _label_cache(meter, loop)
        read = meter.mark()
        loop._select(rows)
        logits = logits.index_select(0, rows)
        _label_cache(meter, loop)
        repeated = meter.mark()
        numbers.prefill_flops = meter.flops
        point = torch.zeros(len(rows), dtype=torch.float64)
        choose_tokens(logits[loop.live], sampling, point)
        if buffered and room > 2:  # the last step sees the longest sequences
            for layer in loop.cache.layers:
                layer.used += room - 2
            loop.length += room - 2
        flops, ops = meter.flops, meter.num_ops
        logits = loop.advance(torch.zeros(len(rows), dtype=torch.long), rows >= 0)
        _label_cache(meter, loop)
        numbers.decode_flops, numbers.decode_ops = meter.flops - flops, meter.num_ops - ops
        choose_tokens(logits[loop.live], sampling, point)
    numbers.prefill, numbers.repeat = meter.peak(0, read), meter.peak(read, repeated)
    numbers.decode = meter.peak(repeated)
    policy.train()


def _label_cache(meter: Meter, loop: Any) -> None:
    for layer in loop.cache.layers:
        meter.label([layer.keys, layer.values], "kv_cache")


@contextlib.contextmanager
def attached(module: Any, data: Any, world_size: int, max_steps: int = 1) -> Iterator[None]:
    """Inside the block module and data see a stand-in for their Trainer."""
    trainer: Any = StandInTrainer(module, data, world_size, max_steps)
    module._trainer, before = trainer, getattr(data, "trainer", None)
    data.trainer = trainer
    try:
        yield
    finally:
        module._trainer, data.trainer = None, before
