"""The engine ``vllm`` against Hugging Face and against the trainer's own forward pass."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from datamodules.engines.base import Sampling
from datamodules.engines.hf import HFEngine
from datamodules.engines.vllm import VLLMEngine, close_guests
from datamodules.experience import FinishReason
from lightning_modules.options import LoraOptions
from tests.vllm.parts import (
    GREEDY,
    NEEDS_VLLM,
    build,
    ids_of,
    load,
    prompts,
    shape,
    step,
    trainer_logprobs,
)

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", autouse=True)
def _no_guest_is_left() -> Iterator[None]:
    yield
    close_guests()


def small(**options: Any) -> VLLMEngine:
    """Engines of one model and equal options share the running vLLM, so this is cheap."""
    return VLLMEngine(**{"max_num_seqs": 64, "kv_cache_gib": 0.1} | options)


@pytest.fixture
def policy(folder: Path) -> Any:
    return load(folder)


@pytest.fixture
def engine(policy: Any) -> VLLMEngine:
    engine = small()
    engine.sync(policy, 0)
    return engine


def by_hugging_face(policy: Any, asked: Any, sampling: Sampling = GREEDY) -> Any:
    reference = HFEngine(decoder="generate")
    reference.sync(policy, 0)
    return reference.generate(asked, sampling)


def test_greedy_tokens_equal_hugging_face_before_and_after_a_push(
    engine: VLLMEngine, policy: Any
) -> None:
    asked = prompts()
    before = engine.generate(asked, GREEDY)
    assert ids_of(before) == ids_of(by_hugging_face(policy, asked))
    step(policy)
    expected = ids_of(by_hugging_face(policy, asked))
    assert expected != ids_of(before), "the step must change what is written"
    assert ids_of(engine.generate(asked, GREEDY)) == ids_of(before), "nothing was pushed yet"
    engine.sync(policy, 1)
    after = engine.generate(asked, GREEDY)
    assert ids_of(after) == expected
    assert {c.policy_version for group in before for c in group} == {0}
    assert {c.policy_version for group in after for c in group} == {1}


def test_tied_embeddings(tmp_path: Path) -> None:
    policy = load(build(tmp_path / "tied", shape(tie_embeddings=True)))
    engine = small()
    engine.sync(policy, 0)
    step(policy)
    engine.sync(policy, 1)
    asked = prompts()
    assert ids_of(engine.generate(asked, GREEDY)) == ids_of(by_hugging_face(policy, asked))


def test_adapters_are_merged_on_the_fly(folder: Path) -> None:
    policy = load(folder, LoraOptions(r=4))
    engine = small()
    asked = prompts()
    tokens = []
    for version in range(2):
        engine.sync(policy, version)
        tokens.append(ids_of(engine.generate(asked, GREEDY)))
        assert tokens[-1] == ids_of(by_hugging_face(policy, asked))
        step(policy)
    with policy.adapter_off():
        assert tokens[0] != ids_of(by_hugging_face(policy, asked)), "the adapter does something"
    assert tokens[0] != tokens[1]
    assert any("lora_" in name for name, _ in policy.named_parameters()), "merging left it alone"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_the_trainers(
    temperature: float, engine: VLLMEngine, policy: Any
) -> None:
    asked = prompts()
    sampling = Sampling(temperature=temperature, samples=3, max_new_tokens=24)
    gaps = []
    for prompt, group in zip(asked, engine.generate(asked, sampling), strict=True):
        for completion in group:
            mine = trainer_logprobs(policy, prompt, completion, temperature)
            gaps.append((mine - torch.tensor(completion.logprobs)).abs().max())
    assert max(gaps) < 1e-4
    greedy = engine.generate(asked[:1], GREEDY)[0][0]
    mine = trainer_logprobs(policy, asked[0], greedy)
    assert torch.allclose(mine, torch.tensor(greedy.logprobs), atol=1e-4), "greedy: temperature 1"


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}])
def test_filtered_logprobs_are_those_of_the_distribution_drawn_from(
    filters: dict[str, Any], engine: VLLMEngine, policy: Any
) -> None:
    sampling = Sampling(samples=16, max_new_tokens=4, **filters)
    (prompt,) = prompts((5, 6, 7))
    for completion in engine.generate([prompt], sampling)[0]:
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        with torch.no_grad():
            probs = policy(ids).logits[0, len(prompt.token_ids) - 1 : -1].softmax(-1)
        for row, token, reported in zip(
            probs, completion.token_ids, completion.logprobs, strict=True
        ):
            ordered = sorted(row.tolist(), reverse=True)
            count, mass = 0, 0.0
            while count < filters.get("top_k", 999) and mass < filters.get("top_p", 2.0):
                if count == len(ordered):
                    break
                mass += ordered[count]
                count += 1
            assert float(row[token]) >= ordered[count - 1] - 1e-6, "inside the filter"
            assert reported == pytest.approx(float(row[token].log()) - np.log(mass), abs=1e-4)


def test_seeds_make_tokens_whatever_the_batch(engine: VLLMEngine) -> None:
    asked, sampling = prompts(), Sampling(samples=4, max_new_tokens=20)
    with engine.keyed("one"):
        together = ids_of(engine.generate(asked, sampling))
        backwards = ids_of(engine.generate(asked[::-1], sampling))[::-1]
        alone = [ids_of(engine.generate([prompt], sampling))[0] for prompt in asked]
    assert together == backwards == alone
    assert len(set(together[0])) > 1, "the samples of a prompt differ"
    with engine.keyed("two"):
        assert ids_of(engine.generate(asked, sampling)) != together
    assert engine.key == ""


def test_tokens_are_drawn_with_their_probabilities(engine: VLLMEngine, policy: Any) -> None:
    (prompt,) = prompts((5, 6, 7))
    count = 2000
    with engine.keyed("many"):
        drawn = engine.generate([prompt], Sampling(samples=count, max_new_tokens=1))[0]
    with torch.no_grad():
        probs = policy(torch.tensor([prompt.token_ids])).logits[0, -1].softmax(-1)
    seen = Counter(completion.token_ids[0] for completion in drawn)
    for token, prob in enumerate(probs.tolist()):
        spread = 5 * (prob * (1 - prob) / count) ** 0.5 + 1 / count
        assert abs(seen[token] / count - prob) < spread, f"token {token}"


def test_ends_and_limits(engine: VLLMEngine, policy: Any) -> None:
    short = prompts((5, 6, 7), max_new_tokens=3)
    greedy = engine.generate(short + prompts((8, 9)), GREEDY)
    assert len(greedy[0][0].token_ids) == 3
    assert greedy[0][0].finish_reason is FinishReason.LENGTH
    end = greedy[1][0].token_ids[2]  # a word that is written: make it the only end token
    before = policy.generation_config.eos_token_id
    policy.generation_config.eos_token_id = [end]
    try:
        other = small()
        other.sync(policy, 0)
        (ended,) = other.generate(prompts((8, 9)), GREEDY)[0]
        drawn = other.generate(prompts(), Sampling(samples=40, max_new_tokens=16))
    finally:
        policy.generation_config.eos_token_id = before
    first = greedy[1][0].token_ids.index(end)
    assert ended.token_ids == greedy[1][0].token_ids[: first + 1], "the end token is part of it"
    assert ended.finish_reason is FinishReason.STOP
    assert len(ended.logprobs) == len(ended.token_ids)
    flat = [completion for group in drawn for completion in group]
    assert any(before in completion.token_ids[:-1] for completion in flat), "it ends nothing now"
    for completion in flat:
        is_ended = completion.token_ids[-1] == end
        assert (completion.finish_reason is FinishReason.STOP) == is_ended
        assert end not in completion.token_ids[:-1]
        assert is_ended or len(completion.token_ids) == 16


def test_more_prompt_tokens_than_one_pass_reads(engine: VLLMEngine) -> None:
    """Read in chunks, a seeded sample would end vLLM 0.32 on a CPU."""
    asked = prompts(*([3 + (i * i + k) % 60 for i in range(400)] for k in range(48)))
    sampling = Sampling(samples=1, max_new_tokens=4)
    together = ids_of(engine.generate(asked, sampling))
    assert together[7:9] == ids_of(engine.generate(asked[7:9], sampling))


def test_nothing_to_do(engine: VLLMEngine) -> None:
    assert engine.generate([], GREEDY) == []


def test_a_push_forgets_cached_prefixes(
    engine: VLLMEngine, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts([3 + i % 37 for i in range(400)])  # longer than a block of the cache (128)
    engine.generate(asked, GREEDY)
    step(policy)
    engine.sync(policy, 1)
    fresh = engine.generate(asked, GREEDY)
    assert ids_of(fresh) == ids_of(by_hugging_face(policy, asked))

    step(policy)
    assert engine._guest is not None
    with monkeypatch.context() as patch:
        patch.setattr(engine._guest._llm, "reset_prefix_cache", lambda: True)
        engine.sync(policy, 2)
    stale = engine.generate(asked, GREEDY)[0][0]
    gap = trainer_logprobs(policy, asked[0], stale) - torch.tensor(stale.logprobs)
    assert gap.abs().max() > 1e-2, "without the reset old keys and values are read"


def test_answers_of_other_weights_are_refused(engine: VLLMEngine, policy: Any) -> None:
    assert engine._guest is not None
    engine._guest._llm.update_weight_version("somebody else's")
    with pytest.raises(RuntimeError, match="other weights.*somebody else's"):
        engine.generate(prompts(), GREEDY)
    with pytest.raises(RuntimeError, match="call sync"):
        engine.generate(prompts(), GREEDY)
    engine.sync(policy, 0)
    assert ids_of(engine.generate(prompts(), GREEDY)) == ids_of(by_hugging_face(policy, prompts()))


def test_weights_pushed_by_half_are_nobodys(engine: VLLMEngine, policy: Any) -> None:
    class Broken:
        """Breaks while its weights are read."""

        training = False

        def __getattr__(self, name: str) -> Any:
            return getattr(policy, name)

        def named_weights(self) -> Iterator[Any]:
            weights = policy.named_weights()
            yield next(weights)
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        engine.sync(Broken(), 1)
    assert not engine.is_ready
    with pytest.raises(RuntimeError, match="call sync"):
        engine.generate(prompts(), GREEDY)
    engine.sync(policy, 1)
    assert ids_of(engine.generate(prompts(), GREEDY)) == ids_of(by_hugging_face(policy, prompts()))


def test_pushes_happen_when_they_are_due(policy: Any) -> None:
    engine = small(sync_every=3)
    policy.train()

    def pushed(version: int) -> bool:
        before = engine.num_pushes
        engine.sync(policy, version)
        return engine.num_pushes > before

    assert [pushed(version) for version in (0, 0, 1, 2, 3, 3, 4)] == [
        True, False, False, False, True, False, False,
    ]  # fmt: skip
    assert engine.generate(prompts(), GREEDY)[0][0].policy_version == 3
    policy.eval()
    assert pushed(4), "an evaluation gets the current weights"
    assert not pushed(4)
    step(policy)
    assert pushed(4), "weights that were written between two steps"
    assert pushed(0), "a step back: another run"


def test_engines_take_turns(engine: VLLMEngine, policy: Any, folder: Path) -> None:
    mine = ids_of(engine.generate(prompts(), GREEDY))
    other_policy = load(folder)
    step(other_policy)
    other = small()
    other.sync(other_policy, 7)
    assert other._guest is engine._guest, "one vLLM for both"
    theirs = ids_of(other.generate(prompts(), GREEDY))
    assert theirs != mine
    with pytest.raises(RuntimeError, match="other weights"):
        engine.generate(prompts(), GREEDY)
    engine.sync(policy, 0)
    assert ids_of(engine.generate(prompts(), GREEDY)) == mine
    different = small(max_model_len=64)
    different.sync(policy, 0)
    assert ids_of(different.generate(prompts(), GREEDY)) == mine
    engine.sync(policy, 0)
    assert ids_of(engine.generate(prompts(), GREEDY)) == mine, "started again"


def test_the_trainer_is_left_as_it_was(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    close_guests()

    def house() -> tuple[Any, ...]:
        return (
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            dict(os.environ),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
            dist.is_initialized(),
            torch.is_grad_enabled(),
            policy.training,
        )

    before, engine = house(), small()
    engine.sync(policy, 0)
    assert house() == before
    engine.generate(prompts(), Sampling(samples=2))
    assert house() == before
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        own = dist.distributed_c10d._get_default_group()
        step(policy)
        weights, groups = policy.named_weights, []

        def gathered() -> Iterator[Any]:
            for item in weights():
                groups.append(dist.distributed_c10d._get_default_group())
                yield item

        with monkeypatch.context() as patch:
            patch.setattr(policy, "named_weights", gathered)
            engine.sync(policy, 1)
        assert set(groups) == {own}, "weights are gathered under the trainer's group"
        engine.generate(prompts(), GREEDY)
        engine.close()
        assert dist.distributed_c10d._get_default_group() is own
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
    assert house()[3:] == before[3:]
    engine.sync(policy, 1)
    assert ids_of(engine.generate(prompts(), GREEDY)) == ids_of(by_hugging_face(policy, prompts()))


def test_a_cpu_cannot_sleep_and_says_so(policy: Any) -> None:
    engine = small(sleep_level=1)
    engine.sync(policy, 0)
    with pytest.warns(UserWarning, match=r"engine\.sleep_level=1 has no effect"):
        engine.rest()
    engine.rest()
    assert engine.generate(prompts(), GREEDY)


def test_what_vllm_cannot_run_is_named(tmp_path: Path, policy: Any) -> None:
    narrow = load(build(tmp_path / "narrow", shape(head_dim=16)))
    with pytest.raises(ValueError, match=r"heads of width 16.*backbone\.tiny\.head_dim=32"):
        small().sync(narrow, 0)
    with pytest.raises(ValueError, match=r"engine\.kv_cache_gib"):
        small(kv_cache_gib=1e-5).sync(policy, 0)
    engine = small(max_model_len=8)
    engine.sync(policy, 0)
    (long,) = engine.generate(prompts((5, 6, 7)), GREEDY)[0]
    assert len(long.token_ids) == 5, "what fits"
    assert long.finish_reason is FinishReason.LENGTH
    with pytest.raises(ValueError, match=r"engine\.max_model_len=8.*leaves no room"):
        engine.generate(prompts(range(3, 20)), GREEDY)
