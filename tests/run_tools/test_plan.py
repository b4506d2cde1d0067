"""The numbers of ``mode=plan``: counts by hand, parts that add up, machines, advice, seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import instantiate
from torch import nn
from transformers import AutoConfig, AutoTokenizer

import train
from datamodules.demonstrations import DemonstrationDataModule
from datamodules.engines.hf import HFEngine
from datamodules.rollouts import RolloutDataModule
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.sharding import ShardingOptions
from lightning_modules.policy_rl.grpo import GRPO
from lightning_modules.sft import SFT
from run_tools import plan as planning
from run_tools.plan_memory import GIB, PARTS, Counts, Layout, Machine, Part
from run_tools.plan_options import PlanOptions
from run_tools.plan_prompts import prompt_lengths
from run_tools.plan_steps import Numbers, Peak, Request
from run_tools.plan_table import advice, memory_rows, verdicts
from run_tools.plan_time import Work, flops, seconds, waves
from tests.benchmarks.plan_memory import config_of
from tests.runs import SHORT

Make = Callable[..., planning.Plan]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture(scope="module")
def make(compose: Callable[..., Any], folder: Path) -> Make:
    """The plan of a config on the tiny folder, as ``train.run_plan`` makes it."""
    made: dict[tuple[str, ...], planning.Plan] = {}

    def plan_of(*overrides: str) -> planning.Plan:
        if overrides not in made:
            own = ["backbone=hf", f"backbone.path={folder}", "backbone.dtype=float32"]
            own += ["backbone.gradient_checkpointing=false", "model.share_prompts=false"]
            config = compose("model=grpo", *SHORT, *own, *overrides, smoke=False)
            data = instantiate(config.data, _convert_="all")
            values = train.plain(config)
            backbone = {k: v for k, v in values["backbone"].items() if k not in train.TINY_KEYS}
            made[overrides] = planning.plan(train.build_module(config, backbone), data, values)
        return made[overrides]

    return plan_of


def column(found: planning.Plan, gpus: int) -> planning.Column:
    return next(c for c in found.columns if c.machine.gpus == gpus)


# --- counts ---------------------------------------------------------------------------------------


def by_hand(folder: Path) -> tuple[int, int, int]:
    """Parameters of the tiny Qwen3 outside of its layers, of a layer, and of its head."""
    shape: Any = AutoConfig.from_pretrained(folder)
    width, inner, size = shape.hidden_size, shape.intermediate_size, shape.head_dim
    heads, kv = shape.num_attention_heads * size, shape.num_key_value_heads * size
    layer = width * (heads + 2 * kv) + heads * width + 3 * width * inner + 2 * size + 2 * width
    return 2 * shape.vocab_size * width + width, layer, shape.vocab_size * width


def test_counts_are_those_of_the_architecture(make: Make, folder: Path) -> None:
    root, layer, head = by_hand(folder)
    found = make("plan.gpus=[]")
    counts, parts = found.counts, found.columns[0].phases.training
    assert (counts.parameters, counts.trainable, counts.head) == (root + 2 * layer,) * 2 + (head,)
    assert not counts.is_tied
    assert parts["weights"] == 4 * (root + 2 * layer)
    num_tensors = 3 + 2 * 11
    assert counts.optimizer == 8 * counts.parameters + 4 * num_tensors  # moments; step counters
    assert counts.optimizer_class == "AdamW"
    assert found.columns[0].phases.rollout["gradients"] == 4 * counts.parameters
    assert counts.reference == 0


def test_a_reference_is_counted_once_and_not_trained(make: Make, folder: Path) -> None:
    root, layer, _ = by_hand(folder)
    found = make("plan.gpus=[]", "model.kl_coef=0.1")
    assert found.counts.reference == root + 2 * layer
    assert found.counts.parameters == found.counts.trainable == root + 2 * layer
    assert found.columns[0].phases.training["reference"] == 4 * (root + 2 * layer)
    assert (
        found.columns[0].flops["annotate"] > 0 == make("plan.gpus=[]").columns[0].flops["annotate"]
    )


def test_lora_trains_its_adapters_alone(make: Make, folder: Path) -> None:
    shape: Any = AutoConfig.from_pretrained(folder)
    width, inner = shape.hidden_size, shape.intermediate_size
    sides = 4 * (width + width) + 3 * (width + inner)  # q k v o, gate up down
    found = make("plan.gpus=[]", "lora=default", "lora.r=4", "model.kl_coef=0.1")
    root, layer, _ = by_hand(folder)
    assert found.counts.trainable == 2 * 4 * sides
    assert found.counts.parameters == root + 2 * layer + 2 * 4 * sides
    assert found.counts.reference == 0  # the adapter switched off is the reference
    assert found.columns[0].phases.rollout["gradients"] == 4 * found.counts.trainable
    assert found.columns[0].flops["annotate"] > 0


def test_the_state_follows_precision_and_optimizer(make: Make) -> None:
    exact, half = make("plan.gpus=[]"), make("plan.gpus=[]", "trainer.precision=bf16-true")
    for part in ("weights", "gradients", "optimizer"):
        one = exact.columns[0].phases.rollout[part]
        assert half.columns[0].phases.rollout[part] == pytest.approx(one / 2, rel=0.02)
    mixed = make("plan.gpus=[]", "trainer.precision=bf16-mixed").columns[0].phases
    assert mixed.rollout["weights"] == exact.columns[0].phases.rollout["weights"]
    assert mixed.training["activations"] < exact.columns[0].phases.training["activations"]
    plain = make("plan.gpus=[]", "optimizer.class_path=torch.optim.SGD")
    assert (plain.counts.optimizer, plain.counts.optimizer_class) == (0.0, "SGD")


class WithCritic(GRPO):
    """A method with a part of its own, which nobody has told the plan about."""

    trainable_parts = ("policy", "critic")

    def build(self) -> None:
        super().build()
        self.critic = nn.Linear(32, 1000)


def test_a_later_method_is_covered(folder: Path) -> None:
    task = PrefixAudit(length=2, num_train=8)
    config = config_of()
    options = {"samples_per_prompt": 2, "max_new_tokens": 8}
    parts = []
    for cls in (GRPO, WithCritic):
        data = _rollouts(task)
        parts.append(planning.plan(cls(backbone=str(folder), **options), data, config))
    assert parts[1].counts.parameters - parts[0].counts.parameters == 33_000
    assert parts[1].counts.optimizer - parts[0].counts.optimizer == 8 * 33_000 + 2 * 4


def _rollouts(task: Any) -> Any:
    return RolloutDataModule(task=task, engine=HFEngine(), prompts_per_rollout=2)


def test_data_without_rollouts(folder: Path) -> None:
    task = PrefixAudit(length=2, num_train=8)
    task.bind(AutoTokenizer.from_pretrained(folder))
    data = DemonstrationDataModule(task, steps=2, batch_size=4, seed=0)
    found = planning.plan(SFT(backbone=str(folder)), data, config_of()).columns[0]
    assert found.step.rows == 4
    assert found.phases.training["activations"] > 0
    assert found.phases.rollout["kv_cache"] == 0
    assert found.fitting_tokens is None


# --- parts, machines ------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("trainer=fsdp", "data.micro_batches=2")])
def test_parts_add_up(make: Make, more: tuple[str, ...]) -> None:
    found = make(*more)
    assert [c.machine.gpus for c in found.columns][1:] == [8, 64]
    for one in found.columns:
        assert not one.problem
        sums = [sum(parts.values()) for parts in one.phases.by_name.values()]
        assert all(set(parts) == set(PARTS) for parts in one.phases.by_name.values())
        assert all(v >= 0 for parts in one.phases.by_name.values() for v in parts.values())
        assert one.phases.peak == max(sums)
        shown = dict(memory_rows(one, 0.0, 2**10))
        names = [label for label in PARTS.values() if label in shown]
        for number, total in enumerate(sums):
            cells = [float(shown[name][number].replace(",", "") or 0) for name in names]
            assert sum(cells) == pytest.approx(total / 2**10, abs=0.01 * len(names))


def test_sharding_divides_the_state_and_gathers_layers(make: Make, folder: Path) -> None:
    root, layer, head = by_hand(folder)
    whole, found = make(), make("trainer=fsdp")
    for gpus in (8, 64):
        shares, full = column(found, gpus).phases, column(whole, gpus).phases
        for part in ("weights", "gradients", "optimizer"):
            assert shares.rollout[part] == pytest.approx(full.rollout[part] / gpus)
        assert shares.annotate["gathered"] == 4 * (root + 3 * layer)
        everything = root + 2 * layer
        assert shares.rollout["gathered"] == 4 * max(everything + layer, 2 * root)
        assert full.rollout["gathered"] == full.rollout["gradients"]  # DDP's buckets
    never = make("trainer=fsdp", "trainer.strategy.unshard_for_rollout=never")
    assert column(never, 8).phases.rollout["gathered"] == 4 * (root + 3 * layer)
    part = Part(total=0, numel=root + 2 * layer, layers=2, layer=layer, layer_trained=layer)
    part.root, part.root_trained = root, root
    counts = Counts(0, 0, head, False, 0, [part])
    half = ShardingOptions(param_dtype="bfloat16", reduce_dtype="float32")
    layout = Layout(counts, Machine("", 8, 0.0), half, 2, None)
    early = 2 * (root + 2 * layer) + 2 * layer + 4 * layer + 2 * head
    assert layout.gathered("early") == early
    assert layout.gathered("late") == max(early, 6 * root + 4 * layer)


def test_offloaded_state_lies_on_the_host(make: Make) -> None:
    here = column(make("trainer=fsdp", "trainer.strategy.cpu_offload=true"), 8)
    assert here.phases.host > 0
    assert not any(here.phases.training[part] for part in ("weights", "gradients", "optimizer"))
    assert here.phases.training["gathered"] > 0


def test_more_gpus_do_less_each(make: Make) -> None:
    found = make("trainer=fsdp", "data.prompts_per_rollout=64")
    few, many = column(found, 8), column(found, 64)
    assert (few.step.prompts, many.step.prompts) == (8, 1)
    assert (few.step.sequences, many.step.sequences) == (64, 8)
    assert many.phases.peak < few.phases.peak
    assert many.seconds["training"] == pytest.approx(few.seconds["training"] / 8, rel=0.02)
    rounded = make("data.prompts_per_rollout=12")
    assert column(rounded, 64).step.prompts == 1
    assert any("is taken as 64 on 64 GPUs" in note for note in rounded.notes)


def test_gradients_that_lie_elsewhere_hide_no_activations(make: Make) -> None:
    """A shard's activations are looked for where they are most, not where gradients are."""
    sharded = make("trainer=fsdp", "plan.gpus=[8]", "data.prompts_per_rollout=8")
    alone = make("plan.gpus=[1]", "data.prompts_per_rollout=1", "data.micro_batches=1")
    numbers, other = column(sharded, 8).step.numbers, alone.columns[1].step.numbers
    assert numbers.kept == other.kept
    assert numbers.early.total >= numbers.kept
    assert numbers.early.parts["gradients"] == numbers.late.parts["gradients"] == 0
    assert other.late.parts["gradients"] > 0


def test_recomputing_keeps_less(make: Make) -> None:
    kept = column(make("trainer=fsdp"), 8)
    again = column(make("trainer=fsdp", "trainer.strategy.activation_checkpointing=true"), 8)
    assert again.step.numbers.kept < 0.3 * kept.step.numbers.kept
    assert again.flops["training"] > 1.15 * kept.flops["training"]


def test_shards_share_no_prompts(make: Make) -> None:
    """As ``CausalLM.can_share_prompts`` says: sharing saves work without sharding only."""
    alone, shards = (
        [make(*more, "plan.gpus=[8]", f"model.share_prompts={share}") for share in (True, False)]
        for more in ((), ("trainer=fsdp",))
    )
    assert column(alone[0], 8).flops["training"] < 0.9 * column(alone[1], 8).flops["training"]
    assert column(shards[0], 8).flops["training"] == column(shards[1], 8).flops["training"]


@pytest.mark.slow
def test_tokens_that_fit_do_fit(make: Make) -> None:
    size = 0.5
    options = [f"plan.gpu_memory_gib={size}", "plan.reserve_gib=0", "plan.gpus=[1]"]
    fitting = column_of_gpus(make(*options)).fitting_tokens
    found = make("data.prompts_per_rollout=24", *options)
    step = column_of_gpus(found).step
    rows = fitting // (step.tokens // step.rows)
    prompts = rows // 8
    for factor, fits in ((0.9, True), (1.2, False)):
        count = int(factor * prompts)
        tried = make(f"data.prompts_per_rollout={count}", "engine.max_cached_tokens=1024", *options)
        training = sum(column_of_gpus(tried).phases.training.values())
        assert (training <= size * GIB) is fits


def column_of_gpus(found: planning.Plan) -> planning.Column:
    return found.columns[1]


def test_what_does_not_fit_says_what_to_change(make: Make) -> None:
    small = ["plan.gpu_memory_gib=0.02", "plan.reserve_gib=0", "plan.gpus=[8]"]
    config: dict[str, Any] = {
        "backbone": {"gradient_checkpointing": False},
        "data": {"micro_batches": 1},
        "engine": {"max_cached_tokens": 64},
        "model": {"annotate_batch_size": 8},
        "lora": {"enabled": False},
        "trainer": {"strategy": "auto"},
    }
    found = make("data.prompts_per_rollout=512", "data.task.num_train=512", *small)
    one = column(found, 8)
    assert not one.fits
    text = " ".join(verdicts(found, config))
    assert "8 x H100: does not fit" in text
    assert advice(one, config)[0] == "backbone.gradient_checkpointing=true"
    assert "data.micro_batches=2 or more" in text
    config["trainer"]["strategy"] = {"activation_checkpointing": False}
    assert advice(one, config)[0] == "trainer.strategy.activation_checkpointing=true"
    one.phases.training["gradients"] += 3 * one.phases.peak
    order = advice(one, config)
    assert order[:2] == ["trainer.strategy.cpu_offload=true", "lora=default"]
    one.phases.rollout["kv_cache"] = 2 * one.phases.peak
    assert advice(one, config) == ["engine.max_cached_tokens=32 or less"]


def test_too_few_rollouts_for_the_micro_batches(make: Make) -> None:
    found = make("data.prompts_per_rollout=1", "data.micro_batches=16")
    assert "cannot fill 16 micro-batches" in found.columns[0].problem
    assert any("cannot run: " in line for line in verdicts(found, {}))


def test_an_engine_of_its_own_reserves_memory() -> None:
    part = Part(total=400, numel=100, trained=400, layers=1, layer=50, layer_trained=50, root=50)
    counts = Counts(100, 100, 10, False, 0, [part])
    machine = Machine("", 1, 1000.0)
    beside: Any = SimpleNamespace(gpu_memory_utilization=0.4, kv_cache_gib=None, sleep_level=None)
    layout = Layout(counts, machine, None, 2, beside)
    assert layout.reserved(training=True) == layout.reserved(training=False) == 400
    beside.sleep_level = 1
    assert (layout.reserved(training=True), layout.reserved(training=False)) == (0, 400)
    beside.kv_cache_gib = 1.0
    assert layout.reserved(training=False) == GIB + 200
    beside.is_shared = True  # a server has devices of its own
    assert layout.reserved(training=False) == 0
    beside.is_shared = False
    numbers = Numbers(decode=Peak({"kv_cache": 9.0}))
    assert planning.phases(layout, numbers).rollout["kv_cache"] == 0


# --- time -----------------------------------------------------------------------------------------

RATE: dict[str, Any] = {
    "gpus": [1], "gpu_memory_gib": 1.0, "reserve_gib": 0.0, "peak_tflops": 1.0,
    "bandwidth_tbs": 1.0, "mfu": 0.5, "bandwidth_share": 0.5, "launch_us": 0.0,
    "prompt_tokens": None, "completion_tokens": None, "output": None,
}  # fmt: skip


def _work(**options: Any) -> Work:
    prompt: Any = SimpleNamespace(token_ids=(1,) * 10)
    request = Request((prompt, prompt), (10, 10), 4)
    return Work(request=request, waves=waves([request, request], request), **options)


def test_seconds_by_hand() -> None:
    cache = Peak({"kv_cache": 2e9})
    numbers = Numbers(decode=cache, train_flops=3e12, prefill_flops=1e12, annotate_flops=2e12)
    work = _work(updates=2, window=4)
    assert work.waves == 2
    found = seconds(numbers, work, 1e9, PlanOptions(**RATE))
    assert found["training"] == 4 * 3e12 / 0.5e12
    assert found["prefill"] == 2 * 1e12 / 0.5e12 / 2
    assert found["annotate"] == 2e12 / 0.5e12 / 2
    step = (1e9 + 2e9 * (10 + 5) / 20) / 0.5e12  # at half of the completion
    assert found["decode"] == pytest.approx(2 * 10 * step / 2)
    numbers.decode_ops = 1000.0
    slow = PlanOptions(**RATE | {"launch_us": 100.0})
    assert seconds(numbers, work, 1e9, slow)["decode"] == pytest.approx(2 * 10 * 0.1 / 2)
    short = PlanOptions(**RATE | {"completion_tokens": 5})
    assert seconds(numbers, work, 1e9, short)["training"] == pytest.approx(found["training"] * 0.75)
    assert flops(numbers, work)["training"] == 12e12


def test_training_flops_are_six_a_parameter_and_token(make: Make, folder: Path) -> None:
    found = make("plan.gpus=[]")
    one = found.columns[0]
    root, layer, head = by_hand(folder)
    tokens = one.step.tokens
    completion = one.step.rows * one.step.completion
    least = 6 * 2 * layer * tokens + 8 * head * completion  # the head recomputes its logits
    assert least < one.flops["training"] < 1.1 * least
    assert root > head


def test_lengths_are_measured_given_or_bounded() -> None:
    task = PrefixAudit(length=2, num_train=8)
    data: Any = SimpleNamespace(task=task)
    with pytest.raises(ValueError, match=r"plan\.prompt_tokens=null.*nothing.*give plan\.prompt"):
        prompt_lengths(data, None, "nothing", 0)
    given = prompt_lengths(data, 77, "nothing", 0)[""]
    assert (given.longest, given.mean, given.source) == (77, 77.0, "plan.prompt_tokens")
    task.max_prompt_tokens = 55  # type: ignore[attr-defined]
    assert prompt_lengths(data, None, "nothing", 0)[""].longest == 55
