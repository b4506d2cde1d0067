"""The hf engine: the decode loop against ``generate`` and against full forward passes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from datamodules.engines.base import Sampling, sample_seed
from datamodules.engines.decode import choose_tokens, supports_buffered_cache, uniforms
from datamodules.engines.hf import HFEngine
from datamodules.engines.vllm import VLLMEngine
from datamodules.experience import Completion, FinishReason, Prompt
from datamodules.tasks.prefix_audit import PrefixAudit
from lightning_modules.backbones.causal_lm import CausalLM, load_causal_lm
from lightning_modules.options import BackboneOptions, LoraOptions

EOS = [2, 5, 11, 17, 23]  # several end tokens, so that completions end at different steps


def sharpen(policy: CausalLM) -> CausalLM:
    """Weights large enough that the context decides what comes next."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.35 if "lora" not in name else 0.2)
    policy.generation_config.eos_token_id = list(EOS)
    assert supports_buffered_cache(policy.config) is (policy.config.model_type == "qwen3")
    return policy


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> CausalLM:
    return sharpen(load_causal_lm(BackboneOptions(path=str(tiny_folder))))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Seven prompts of mixed lengths, two of them with bounds of their own."""
    task = PrefixAudit()
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, length in enumerate([9, 3, 14, 1, 9, 6, 2]):
        ids = torch.randint(3, 83, (length,), generator=generator).tolist()
        bound = {2: 5, 4: 1}.get(number)
        made.append(Prompt(f"p{number}", tuple(ids), task, max_new_tokens=bound))
    return made


def engine_for(policy: CausalLM, key: str = "key", **options: Any) -> HFEngine:
    engine = HFEngine(**options)
    engine.sync(policy, 7)
    engine.key = key
    return engine


def tokens(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def assert_same(one: list[list[Completion]], other: list[list[Completion]]) -> None:
    """Equal tokens and ends; log-probs up to rounding in the model."""
    assert tokens(one) == tokens(other)
    for mine, theirs in zip(sum(one, []), sum(other, []), strict=True):
        assert mine.finish_reason == theirs.finish_reason
        torch.testing.assert_close(
            torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), atol=2e-5, rtol=0
        )


SAMPLINGS = {
    "plain": Sampling(samples=3, max_new_tokens=12),
    "cool": Sampling(samples=3, max_new_tokens=12, temperature=0.7),
    "hot": Sampling(samples=2, max_new_tokens=12, temperature=1.5),
    "top_p": Sampling(samples=3, max_new_tokens=12, top_p=0.8),
    "top_k": Sampling(samples=3, max_new_tokens=12, top_k=4),
    "both": Sampling(samples=3, max_new_tokens=12, temperature=1.2, top_k=9, top_p=0.9),
    "greedy": Sampling(temperature=0.0, max_new_tokens=12),
    "one_token": Sampling(samples=4, max_new_tokens=1),
}
by_sampling = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)


# --- the hf engine --------------------------------------------------------------------------------


@by_sampling
def test_loop_writes_what_generate_writes(policy, prompts, sampling):
    loop = engine_for(policy).generate(prompts, sampling)
    other = engine_for(policy, decoder="generate").generate(prompts, sampling)
    assert_same(loop, other)
    assert [len(group) for group in loop] == [sampling.samples] * len(prompts)


@by_sampling
def test_loop_on_a_model_with_absolute_positions(prompts, sampling):
    """Here padding must not shift positions; and its cache is the one of transformers."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 83}
    config = GPT2Config(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    policy = sharpen(CausalLM(GPT2LMHeadModel(config)).eval())
    loop = engine_for(policy).generate(prompts, sampling)
    other = engine_for(policy, decoder="generate").generate(prompts, sampling)
    assert_same(loop, other)
    for prompt, group in zip(prompts, loop, strict=True):
        reported, wanted = reported_and_recomputed(policy, prompt, group[0], sampling)
        assert reported == pytest.approx(wanted, abs=1e-4)


@by_sampling
def test_ends_limits_and_reasons(policy, prompts, sampling):
    groups = engine_for(policy).generate(prompts, sampling)
    reasons = Counter()
    for prompt, group in zip(prompts, groups, strict=True):
        limit = min(sampling.max_new_tokens, prompt.max_new_tokens or 99)
        for one in group:
            ids = one.token_ids
            assert 1 <= len(ids) <= limit and len(one.logprobs) == len(ids)
            assert not set(ids[:-1]) & set(EOS)
            ended = ids[-1] in EOS
            assert one.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert ended or len(ids) == limit
            assert one.policy_version == 7
            reasons[one.finish_reason] += 1
    assert reasons[FinishReason.LENGTH]
    if sampling.max_new_tokens > 1:
        assert reasons[FinishReason.STOP], "the scene has no early end"


def reported_and_recomputed(
    policy: CausalLM, prompt: Prompt, one: Completion, sampling: Sampling
) -> tuple[list[float], list[float]]:
    """Log-probs by one full forward pass and plain sorting, in float64."""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt.token_ids + one.token_ids])).logits[0].double()
    recomputed = []
    for place, token in enumerate(one.token_ids):
        row = logits[len(prompt.token_ids) + place - 1] / (sampling.temperature or 1.0)
        probs = row.softmax(-1).tolist()
        order = sorted(range(len(probs)), key=lambda i: -probs[i])
        kept, mass = order[: sampling.top_k or None], 0.0
        total = sum(probs[i] for i in kept)
        nucleus = []
        for i in kept:
            if mass >= sampling.top_p:
                break
            nucleus.append(i)
            mass += probs[i] / total
        assert token in nucleus
        recomputed.append(math.log(probs[token] / sum(probs[i] for i in nucleus)))
    return list(one.logprobs), recomputed


@by_sampling
def test_logprobs_are_those_of_a_full_forward_pass(policy, prompts, sampling):
    groups = engine_for(policy).generate(prompts, sampling)
    spread = []
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            reported, wanted = reported_and_recomputed(policy, prompt, one, sampling)
            assert reported == pytest.approx(wanted, abs=1e-4)
            spread += wanted
    assert min(spread) < -0.5  # the scene holds real choices


def test_greedy_takes_the_most_probable_token(policy, prompts):
    groups = engine_for(policy).generate(prompts, Sampling(temperature=0.0, samples=2))
    for prompt, group in zip(prompts, groups, strict=True):
        assert group[0].token_ids == group[1].token_ids
        ids = torch.tensor([prompt.token_ids + group[0].token_ids])
        with torch.no_grad():
            best = policy(ids).logits[0].argmax(-1)[len(prompt.token_ids) - 1 : -1]
        assert tuple(best.tolist()) == group[0].token_ids


def test_tokens_do_not_depend_on_the_batch(policy, prompts):
    sampling = SAMPLINGS["plain"]
    wanted = engine_for(policy).generate(prompts, sampling)
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = engine_for(policy).generate([prompts[i] for i in order], sampling)
    assert_same(shuffled, [wanted[i] for i in order])
    for index, prompt in enumerate(prompts):
        assert_same(engine_for(policy).generate([prompt], sampling), wanted[index : index + 1])


@pytest.mark.parametrize("max_sequences", [1, 3, 7, 1000])
def test_tokens_do_not_depend_on_max_sequences(policy, prompts, max_sequences):
    sampling = SAMPLINGS["plain"]
    got = engine_for(policy, max_sequences=max_sequences).generate(prompts, sampling)
    assert_same(got, engine_for(policy).generate(prompts, sampling))


def test_keys_and_samples_draw_differently(policy, prompts):
    sampling = Sampling(samples=6, max_new_tokens=8, temperature=1.5)
    first = tokens(engine_for(policy, "a").generate(prompts[:3], sampling))
    assert first == tokens(engine_for(policy, "a").generate(prompts[:3], sampling))
    second = tokens(engine_for(policy, "b").generate(prompts[:3], sampling))
    for mine, theirs in zip(first, second, strict=True):
        assert mine != theirs and len(set(mine)) > 1
    twins = [Prompt(uid, (4, 9, 3), prompts[0].task) for uid in ("one", "two")]
    one, two = tokens(engine_for(policy, "a").generate(twins, sampling))
    assert one != two  # equal prompts with names of their own
    engine = engine_for(policy, "a")
    with pytest.raises(KeyError), engine.keyed("b"):
        assert tokens(engine.generate(prompts[:3], sampling)) == second
        raise KeyError
    assert engine.key == "a"


def test_more_samples_extend_fewer(policy, prompts):
    few = engine_for(policy).generate(prompts, Sampling(samples=8, max_new_tokens=10))
    many = engine_for(policy).generate(prompts, Sampling(samples=15, max_new_tokens=10))
    assert_same([group[:8] for group in many], few)


def test_longer_bound_extends_what_was_cut(policy, prompts):
    short = engine_for(policy).generate(prompts, Sampling(samples=3, max_new_tokens=4))
    long = engine_for(policy).generate(prompts, Sampling(samples=3, max_new_tokens=12))
    for mine, theirs in zip(sum(tokens(short), []), sum(tokens(long), []), strict=True):
        assert theirs[: len(mine)] == mine


@pytest.mark.parametrize("decoder", ["loop", "generate"])
@pytest.mark.parametrize("is_training", [True, False])
def test_mode_and_weights_are_left_as_found(policy, prompts, is_training, decoder):
    policy.train(is_training)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    engine = engine_for(policy, decoder=decoder)
    engine.generate(prompts, SAMPLINGS["plain"])
    assert all(module.training is is_training for module in policy.modules())
    with pytest.raises(IndexError):  # also after an error inside the model
        engine.generate([Prompt("bad", (9999,), prompts[0].task)], SAMPLINGS["plain"])
    assert all(module.training is is_training for module in policy.modules())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_adapters_take_part(tiny_folder, prompts):
    options = BackboneOptions(path=str(tiny_folder))
    policy = sharpen(load_causal_lm(options, LoraOptions(r=4)))
    sampling = SAMPLINGS["plain"]
    loop = engine_for(policy).generate(prompts, sampling)
    assert_same(loop, engine_for(policy, decoder="generate").generate(prompts, sampling))
    with policy.adapter_off():
        assert tokens(engine_for(policy).generate(prompts, sampling)) != tokens(loop)


@pytest.mark.parametrize("decoder", ["loop", "generate"])
@pytest.mark.parametrize("kind", ["plain", "greedy"])
def test_stop_tokens_end_a_completion_and_stay_in_it(policy, prompts, decoder, kind):
    sampling = SAMPLINGS[kind]
    whole = engine_for(policy).generate(prompts, sampling)
    found = Counter(token for one in sum(whole, []) for token in set(one.token_ids[:-1]))
    stops = tuple(token for token, _ in found.most_common(3))
    stopping = replace(sampling, stop_ids=(*stops, stops[0], EOS[0]))  # named twice: no harm
    engine = engine_for(policy, decoder=decoder)
    cut = engine.generate(prompts, stopping)
    changed = 0
    for before, after in zip(sum(whole, []), sum(cut, []), strict=True):
        ends = [n for n, token in enumerate(before.token_ids, start=1) if token in stops]
        size = min([*ends, len(before.token_ids)])
        changed += size < len(before.token_ids)
        assert after.token_ids == before.token_ids[:size]
        assert after.logprobs == pytest.approx(before.logprobs[:size], abs=2e-5)
        is_stop = bool(ends) or before.finish_reason is FinishReason.STOP
        assert after.finish_reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
    assert changed > 3
    assert_same(engine.generate(prompts, sampling), whole)  # nothing of it is kept


def test_pushed_engines_ask_for_stop_tokens_once(prompts):
    engine = VLLMEngine()
    engine._end_ids, engine._vocabulary = [2, 5], 83
    stopping = Sampling(samples=2, stop_ids=(7, 5, 9, 7, 90))  # no model of 83 words writes 90
    for request in engine.requests(prompts[0], stopping):
        assert request.parameters["stop_token_ids"] == [2, 5, 7, 9]
    (plain,) = engine.requests(prompts[0], Sampling())
    assert plain.parameters["stop_token_ids"] == [2, 5]


def test_no_prompts_give_no_completions(policy):
    assert engine_for(policy).generate([], Sampling()) == []


def test_bad_use_is_refused(prompts):
    engine = HFEngine()
    assert not engine.is_ready
    with pytest.raises(RuntimeError, match="sync"):
        engine.generate(prompts, Sampling())
    with pytest.raises(ValueError, match=r"engine\.max_sequences=0"):
        HFEngine(max_sequences=0)
    with pytest.raises(ValueError, match=r"engine\.decoder='loops'.*'loop' or 'generate'"):
        HFEngine(decoder="loops")
    with pytest.raises(ValueError, match=r"temperature=-1.*samples=0.*top_p=0.*top_k=-1"):
        Sampling(temperature=-1, samples=0, top_p=0, top_k=-1)


# --- the sampler ----------------------------------------------------------------------------------


def test_seeds_are_64_bits_of_key_prompt_and_sample():
    seeds = {sample_seed(k, u, s) for k in "ab" for u in ("p", "q") for s in range(50)}
    assert len(seeds) == 200 and all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed("0/rollout/3", "x", 1) == sample_seed("0/rollout/3", "x", 1)
    rows = uniforms([5, 2**64 - 1, 5], 4)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(uniforms([5], 9)[0, :4], rows[0])
    assert uniforms([], 4).shape == (0, 4)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.7)],
    ids=["plain", "cool", "top_k", "top_p"],
)
def test_frequencies_are_those_of_the_distribution(policy, prompts, sampling):
    """10,000 first tokens of one prompt; every count within five standard deviations."""
    count = 10_000
    prompt = prompts[0]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt.token_ids])).logits[0, -1].double()
    probs = (logits / sampling.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: sampling.top_k or None]
    kept = kept[probs[kept].cumsum(0) - probs[kept] < sampling.top_p]
    wanted = torch.zeros_like(probs)
    wanted[kept] = probs[kept] / probs[kept].sum()
    assert 0.01 < float(wanted.max()) < 0.95

    many = Sampling(sampling.temperature, count, 1, sampling.top_p, sampling.top_k)
    (group,) = engine_for(policy).generate([prompt], many)
    found = Counter(completion.token_ids[0] for completion in group)
    assert set(found) <= set(kept.tolist())
    for token, p in enumerate(wanted.tolist()):
        bound = 5 * math.sqrt(count * p * (1 - p)) + 1
        assert abs(found[token] - count * p) <= bound, f"token {token}: {found[token]}"


def test_sampler_never_takes_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).repeat(4, 1)
    edges = torch.tensor([0.0, 0.25, 0.999999999999, 1.0 - 2**-53], dtype=torch.float64)
    chosen, logprobs = choose_tokens(logits, Sampling(), edges)
    assert chosen.tolist() == [1, 1, 3, 3]
    assert logprobs.isfinite().all()
