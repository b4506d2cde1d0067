"""Free-running decoding: that of a loop without cache, whatever the batch mates."""

from __future__ import annotations

import time

import pytest
import torch

from lightning_modules.backbones.causal_lm import load_causal_lm
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.compressor.decoding import greedy_decode
from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.compressor.pair import Pair
from lightning_modules.options import BackboneOptions
from tests.lightning_modules.compressor.small_pair import EOS, make_pair, source, targets

LENGTHS = [9, 3, 4, 6]


def without_cache(pair, memory, steps, ends, banned=(), **options):
    """Each row alone, every token from scratch through ``logits``."""
    texts = []
    for row in range(len(memory)):
        own, ids = memory.select(torch.tensor([row])), []
        for _ in range(steps):
            asked = torch.tensor([[*ids, 0]])
            where = torch.zeros_like(asked)
            where[0, -1] = 1
            mine = {k: (v[0][row : row + 1], v[1][row : row + 1]) for k, v in options.items()}
            logits = pair.logits(own, asked, torch.ones_like(asked), where, **mine)[0]
            logits[list(banned)] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] in ends:
                break
        texts.append(ids[:-1] if ids[-1] in ends else ids)
    return texts


@pytest.mark.parametrize("form,decoder", [("embeds", "decoder"), ("kv", "compressor")])
@pytest.mark.parametrize("most", [None, 4])
@torch.no_grad()
def test_tokens_are_those_of_a_loop_without_cache(folders, form, decoder, most):
    pair = make_pair(folders, form=form, decoder=decoder, segment_tokens=most).eval()
    memory = pair.compress(*source(LENGTHS))
    free = greedy_decode(pair, memory, 12, eos_ids=[])
    assert free.texts() == without_cache(pair, memory, 12, [])
    ends = {int(free.token_ids[0, 4]), int(free.token_ids[1, 0])}  # so that rows end early
    ended = greedy_decode(pair, memory, 12, eos_ids=sorted(ends))
    assert ended.texts() == without_cache(pair, memory, 12, ends)
    assert ended.is_finished[1] and int(ended.lengths[1]) == 1
    assert not ended.token_ids[1, 1:].any()


@torch.no_grad()
def test_questions_and_forbidden_tokens(folders):
    pair = make_pair(folders, segment_tokens=4).eval()
    memory = pair.compress(*source(LENGTHS))
    asked = targets([2, 5, 3, 1], seed=4)
    question = (asked[0], asked[1])
    first = greedy_decode(pair, memory, 6, eos_ids=[EOS], prompt="ae", question=question)
    assert first.texts() == without_cache(pair, memory, 6, [EOS], question=question)
    banned = sorted(set(first.token_ids.flatten().tolist()))
    second = greedy_decode(
        pair, memory, 6, eos_ids=[EOS], prompt="ae", question=question, forbidden=banned
    )
    assert not set(second.token_ids[second.token_ids > 0].tolist()) & set(banned)
    assert second.texts() == without_cache(pair, memory, 6, [EOS], banned, question=question)


@torch.no_grad()
def test_log_probs_are_those_of_teacher_forcing(folders):
    pair = make_pair(folders).eval()
    memory = pair.compress(*source(LENGTHS))
    found = greedy_decode(pair, memory, [5, 6, 7, 8], eos_ids=[])
    assert found.lengths.tolist() == [5, 6, 7, 8] and not found.is_finished.any()
    mask = torch.arange(8) < found.lengths[:, None]
    scores = pair.score(memory, found.token_ids, mask)
    torch.testing.assert_close(found.logprobs, scores.logprob, atol=1e-5, rtol=1e-5)
    assert scores.correct[mask].all()


@torch.no_grad()
def test_sampling_depends_on_the_seed_of_a_row_alone(folders):
    pair = make_pair(folders).eval()
    memory = pair.compress(*source(LENGTHS))
    options = {"eos_ids": [EOS], "temperature": 1.0}
    first = greedy_decode(pair, memory, 6, seeds=[1, 2, 3, 4], **options)
    alone = memory.select(torch.tensor([2]))
    assert greedy_decode(pair, alone, 6, seeds=[3], **options).texts() == [first.texts()[2]]
    assert greedy_decode(pair, memory, 6, seeds=[5, 6, 7, 8], **options).texts() != first.texts()
    with pytest.raises(ValueError, match="temperature=1.0 needs one seed for each of the 4 texts"):
        greedy_decode(pair, memory, 6, **options)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        greedy_decode(pair, memory, 0, eos_ids=[EOS])


@torch.no_grad()
def test_every_rank_makes_as_many_steps(folders):
    pair = make_pair(folders).eval()
    memory = pair.compress(*source(LENGTHS))
    steps = []
    advance = pair.advance
    pair.advance = lambda *args: (steps.append(1), advance(*args))[1]
    plain = greedy_decode(pair, memory, 4, eos_ids=[])
    assert len(steps) == 3
    steps.clear()
    longer = greedy_decode(pair, memory, 4, eos_ids=[], fixed_steps=9)
    assert len(steps) == 8 and longer.texts() == plain.texts()
    steps.clear()
    answers = iter([True] * 6 + [False])
    other = greedy_decode(pair, memory, 4, eos_ids=[], any_rank=lambda _: next(answers))
    assert len(steps) == 6 and other.texts() == plain.texts()
    with pytest.raises(ValueError, match="fixed_steps=3 is less than max_new_tokens=4"):
        greedy_decode(pair, memory, 4, eos_ids=[], fixed_steps=3)


@pytest.mark.slow
@torch.no_grad()
def test_512_items_of_32_tokens_take_seconds(tmp_path):
    build_tiny(tmp_path, [f"w{i}" for i in range(120)], TinyOptions(num_layers=2), seed=0)
    model = load_causal_lm(BackboneOptions(str(tmp_path)))
    pair = Pair(
        model,
        load_causal_lm(BackboneOptions(str(tmp_path))),
        MemoryOptions(tokens=2),
        ProjectorOptions(),
    )
    memory = pair.eval().compress(*source([12] * 512))
    start = time.perf_counter()
    found = greedy_decode(pair, memory, 32, eos_ids=[])
    assert time.perf_counter() - start < 20
    assert found.lengths.tolist() == [32] * 512
