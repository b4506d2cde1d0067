"""Tokens that end a completion besides the end tokens, as search episodes use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from datamodules.engines.base import Sampling
from datamodules.engines.vllm import VLLMEngine, close_guests
from datamodules.experience import FinishReason
from tests.vllm.parts import NEEDS_VLLM, build, load, prompts

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(max_num_seqs=64, kv_cache_gib=0.1)
    policy = load(build(tmp_path_factory.mktemp("policy")))
    engine.sync(policy, 0)
    yield engine
    close_guests()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_end_a_completion_and_stay_in_it(
    temperature: float, engine: VLLMEngine
) -> None:
    asked = prompts()
    sampling = Sampling(temperature=temperature, samples=3, max_new_tokens=24)
    whole = [one for group in engine.generate(asked, sampling) for one in group]
    count = Counter(token for one in whole for token in set(one.token_ids[:-1]))
    stops = tuple(token for token, _ in count.most_common(2))
    groups = engine.generate(asked, replace(sampling, stop_ids=(*stops, stops[0])))
    stopped = 0
    for before, after in zip(whole, (one for group in groups for one in group), strict=True):
        ends = [n for n, token in enumerate(before.token_ids, start=1) if token in stops]
        assert after.token_ids == before.token_ids[: min([*ends, len(before.token_ids)])]
        assert len(after.logprobs) == len(after.token_ids)
        if ends:
            assert after.finish_reason is FinishReason.STOP
        stopped += bool(ends)
    assert stopped > 3
