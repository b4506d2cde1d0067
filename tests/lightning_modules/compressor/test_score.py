"""Teacher forcing: labels on the text alone, by hand and against full logits."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.compressor.memory import controlled
from lightning_modules.options import LoraOptions
from tests.lightning_modules.compressor.small_pair import EOS, make_pair, source, targets


def by_hand(pair, memory, row, ids, *, prompt=0, question=None):
    """Logits ``(t, V)`` of one row through the plain model, everything laid out by hand."""
    model = pair.decoder.base
    table = model.get_input_embeddings()
    parts = [memory.embeds[row][memory.mask[row]]]
    if prompt is not None:
        parts.append(pair.bridge.prompts[prompt : prompt + 1])
    if question is not None:
        parts.append(table(question))
    before = sum(len(part) for part in parts)
    embeds = torch.cat([*parts, table(ids)])[None]
    return model(inputs_embeds=embeds).logits[0, before - 1 : -1]


@pytest.mark.parametrize("prompt,place", [("ae", 0), ("qa", 1), ("lm", None)])
def test_cross_entropy_is_that_of_a_hand_made_loop(folders, prompt, place):
    pair = make_pair(folders, segment_tokens=4)
    memory = pair.compress(*source([8, 3, 4]))
    ids, mask = targets([5, 7, 2])
    scores = pair.score(memory, ids, mask, prompt=prompt, entropy_grad=True)
    for row, length in enumerate([5, 7, 2]):
        logits = by_hand(pair, memory, row, ids[row, :length], prompt=place)
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(1, ids[row, :length, None])[:, 0]
        torch.testing.assert_close(scores.logprob[row, :length], own, atol=1e-5, rtol=1e-5)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(scores.entropy[row, :length], entropy, atol=1e-5, rtol=1e-5)
        hits = (logits.argmax(-1) == ids[row, :length]).float()
        assert torch.equal(scores.correct[row, :length], hits)
    for values in scores:
        assert not values[~mask].any()
    assert torch.equal(scores.loss, -scores.logprob)


def test_a_question_stands_between_prompt_and_answer(folders):
    pair = make_pair(folders)
    memory = pair.compress(*source([5, 4]))
    question = targets([4, 2], seed=3, left=False)
    ids, mask = targets([2, 3])
    scores = pair.score(memory, ids, mask, prompt="qa", question=(question[0], question[1]))
    for row, (asked, length) in enumerate([(4, 2), (2, 3)]):
        own = question[0][row, :asked]
        logits = by_hand(pair, memory, row, ids[row, :length], prompt=1, question=own)
        expected = logits.log_softmax(-1).gather(1, ids[row, :length, None])[:, 0]
        torch.testing.assert_close(scores.logprob[row, :length], expected, atol=1e-5, rtol=1e-5)


def test_left_padded_targets_score_the_same(folders):
    pair = make_pair(folders)
    memory = pair.compress(*source([5, 4]))
    ids, mask = targets([2, 4])
    right = pair.score(memory, ids, mask).logprob
    left = pair.score(
        memory,
        torch.stack([torch.cat([ids[0, 2:], ids[0, :2]]), ids[1]]),
        torch.stack([torch.cat([mask[0, 2:], mask[0, :2]]), mask[1]]),
    ).logprob
    torch.testing.assert_close(left[0, 2:], right[0, :2])
    torch.testing.assert_close(left[1], right[1])


def test_padding_is_no_label_even_as_eos(folders):
    pair = make_pair(folders)
    memory = pair.compress(*source([5, 4]))
    ids, mask = targets([3, 6])
    assert (ids[0, 3:] == EOS).all()
    first = pair.score(memory, ids, mask).loss.sum()
    ids[0, 3:] = 7
    assert torch.equal(first, pair.score(memory, ids, mask).loss.sum())


def test_smoothing_and_temperature_are_those_of_pytorch(folders):
    pair = make_pair(folders)
    memory = pair.compress(*source([5]))
    ids, mask = targets([4])
    logits = by_hand(pair, memory, 0, ids[0])
    scores = pair.score(memory, ids, mask, label_smoothing=0.2)
    options = {"reduction": "none", "label_smoothing": 0.2}
    expected = torch.nn.functional.cross_entropy(logits, ids[0], **options)
    torch.testing.assert_close(scores.loss[0], expected, atol=1e-5, rtol=1e-5)
    plain = pair.score(memory, ids, mask)
    torch.testing.assert_close(scores.logprob, plain.logprob)
    warm = pair.score(memory, ids, mask, temperature=2.0)
    expected = torch.nn.functional.cross_entropy(logits / 2, ids[0], reduction="none")
    torch.testing.assert_close(warm.loss[0], expected, atol=1e-5, rtol=1e-5)


def test_logits_at_slots(folders):
    pair = make_pair(folders)
    memory = pair.compress(*source([5, 4]))
    ids, mask = targets([3, 5])
    where = torch.zeros_like(mask)
    where[0, 1] = where[1, 0] = where[1, 4] = True
    logits = pair.logits(memory, ids, mask, where)
    own = logits.log_softmax(-1).gather(1, ids[where][:, None])[:, 0]
    torch.testing.assert_close(own, pair.score(memory, ids, mask).logprob[where])


def test_the_loss_reaches_the_pair_but_not_a_frozen_decoder(folders):
    pair = make_pair(folders)
    assert pair.train().training and not pair.decoder.training
    memory, scores = pair(*source([5, 4]), *targets([5, 4]))
    scores.loss.sum().backward()
    assert all(p.grad is None for p in pair.decoder.parameters())
    without = [n for n, p in pair.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # DDP would wait for them
    assert pair.bridge.tokens.grad.abs().sum() > 0
    assert pair.bridge.prompts.grad[0].abs().sum() > 0 and not pair.bridge.prompts.grad[1:].any()


def test_decoders_that_learn(folders):
    pair = make_pair(folders, train="full")
    assert pair.train().decoder.training
    _, scores = pair(*source([5, 4]), *targets([5, 4]))
    scores.loss.sum().backward()
    assert all(p.grad is not None for p in pair.decoder.parameters())


def test_entropy_has_a_gradient_only_where_asked(folders):
    pair = make_pair(folders)
    ids, mask = targets([4])
    memory = pair.compress(*source([5]))
    assert not pair.score(memory, ids, mask).entropy.requires_grad
    entropy = pair.score(memory, ids, mask, entropy_grad=True).entropy
    (gradient,) = torch.autograd.grad(entropy.sum(), memory.embeds, retain_graph=True)
    logprobs = by_hand(pair, memory, 0, ids[0]).log_softmax(-1)
    plain = -(logprobs.exp() * logprobs).sum()
    (expected,) = torch.autograd.grad(plain, memory.embeds)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_zero_and_shuffled_memory_change_what_is_read(folders):
    pair = make_pair(folders).eval()
    memory = pair.compress(*source([5, 4]))
    ids, mask = targets([4, 4])
    own = pair.score(memory, ids, mask).logprob
    other = pair.score(controlled(memory, "shuffled"), ids, mask).logprob
    assert (own - other).abs().max() > 1e-3
    both = pair.score(memory.zero(), ids[[0, 0]], mask).logprob
    torch.testing.assert_close(both[0], both[1])


def test_learns_by_heart_what_fits_into_the_memory(folders):
    """The lossless limit (card, section 10): as many memory vectors as tokens, a few texts."""
    pair = make_pair(folders, tokens=4, train="full")
    ids, mask = source([4] * 8)
    answer = torch.cat([ids, torch.full((8, 1), EOS)], 1)
    optimizer = torch.optim.AdamW([p for p in pair.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        _, scores = pair(ids, mask, answer, torch.ones_like(answer))
        optimizer.zero_grad()
        scores.loss.mean().backward()
        optimizer.step()
    memory = pair.eval().compress(ids, mask)
    assert pair.score(memory, answer, torch.ones_like(answer)).correct.all()
    shuffled = pair.score(controlled(memory, "shuffled"), answer, torch.ones_like(answer))
    assert not shuffled.correct[:, 0].any()  # later tokens give the text away


def test_lora_decoder_trains_its_adapters_alone(folders):
    from lightning_modules.backbones.causal_lm import load_causal_lm
    from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
    from lightning_modules.compressor.pair import Pair
    from lightning_modules.options import BackboneOptions

    pair = Pair(
        load_causal_lm(BackboneOptions(str(folders / "compressor"))),
        load_causal_lm(BackboneOptions(str(folders / "decoder")), LoraOptions(r=2)),
        MemoryOptions(tokens=2),
        ProjectorOptions(),
        "lora",
    )
    _, scores = pair(*source([5, 4]), *targets([5, 4]))
    scores.loss.sum().backward()
    got = [n for n, p in pair.decoder.named_parameters() if p.grad is not None]
    assert got and all("lora_" in name for name in got)
