"""vLLM's candidates are those of the trainer's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datamodules.engines.base import Sampling
from datamodules.engines.tree import grow_trees
from datamodules.engines.vllm import VLLMEngine, close_guests
from datamodules.engines.vllm_server import VLLMServerEngine, close_servers
from datamodules.experience import Candidates
from lightning_modules.functional.branching import candidate_entropy
from tests.vllm.parts import NEEDS_VLLM, build, load, prompts

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(max_num_seqs=64, kv_cache_gib=0.1)
    policy = load(build(tmp_path_factory.mktemp("policy")))
    engine.sync(policy, 0)
    engine.policy = policy  # type: ignore[attr-defined]
    yield engine
    close_guests()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidates(engine: VLLMEngine, temperature: float) -> None:
    sampling = Sampling(samples=4, max_new_tokens=12, temperature=temperature, candidates=6)
    given = prompts()
    outside = 0
    for prompt, group in zip(given, engine.generate(given, sampling), strict=True):
        for one in group:
            ids = torch.tensor([prompt.token_ids + one.token_ids])
            with torch.no_grad():
                logits = engine.policy(ids).logits[0, len(prompt.token_ids) - 1 : -1]  # type: ignore[attr-defined]
            values = (logits.float() / temperature).log_softmax(-1).topk(6).values
            assert one.candidates is not None
            assert one.candidates.ids.shape == (len(one.token_ids), 6)
            assert torch.allclose(one.candidates.logprobs, values, atol=2e-3)
            chosen = torch.tensor(one.token_ids)[:, None]
            outside += int((one.candidates.ids != chosen).all(1).sum())
    assert outside > 10, "sampled tokens that are no candidates must have come up"


def test_a_tree(engine: VLLMEngine) -> None:
    def score(candidates: Candidates) -> torch.Tensor:
        return candidate_entropy(candidates.logprobs)

    sampling = Sampling(max_new_tokens=12, candidates=6)
    given = prompts()
    trees = grow_trees(given, engine, sampling, num_chains=5, epsilon=0.2, score=score, min_gap=1)
    again = grow_trees(given, engine, sampling, num_chains=5, epsilon=0.2, score=score, min_gap=1)
    assert torch.equal(trees.branch_pos, again.branch_pos)
    assert trees.rollouts.completions == again.rollouts.completions
    assert int((trees.parent >= 0).sum()) > 8
    for tree in range(len(given)):
        chains = trees.rollouts.completions[5 * tree : 5 * tree + 5]
        for chain, (parent, k) in enumerate(
            zip(trees.parent[tree].tolist(), trees.branch_pos[tree].tolist(), strict=True)
        ):
            if parent >= 0:
                assert chains[chain].token_ids[:k] == chains[parent].token_ids[:k]


def test_a_server_reports_them_too(tmp_path: Path) -> None:
    """Where the sampled token is no candidate, the server leaves out the last one for it."""
    policy = load(build(tmp_path))
    engine = VLLMServerEngine(kv_cache_gib=0.1, max_num_seqs=32, log=str(tmp_path / "log"))
    try:
        engine.sync(policy, 0)
        (prompt,) = prompts((5, 6, 7))
        (group,) = engine.generate([prompt], Sampling(samples=4, max_new_tokens=6, candidates=6))
    finally:
        close_servers()
    for one in group:
        with torch.no_grad():
            logits = policy(torch.tensor([prompt.token_ids + one.token_ids])).logits[0, 2:-1]
        logprobs = logits.float().log_softmax(-1)
        assert one.candidates is not None
        assert one.candidates.ids.shape == (len(one.token_ids), 6)
        own = logprobs.gather(1, one.candidates.ids)
        assert torch.allclose(one.candidates.logprobs, own, atol=2e-3)
        best = logprobs.topk(5).values
        assert torch.allclose(one.candidates.logprobs[:, :5], best, atol=2e-3)
