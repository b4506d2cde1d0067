"""Kinds of projectors, their size at the start, and noise that belongs to a row."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.compressor.options import MemoryOptions, ProjectorOptions
from lightning_modules.compressor.projector import Bridge, Projector, mean_rms, rms_normalised

HIDDEN = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind,extra", [("linear", {}), ("mlp", {}), ("low_rank", {"rank": 4})])
def test_vectors_start_as_large_as_the_decoders_embeddings(kind, extra):
    table = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)) * 0.02
    options = ProjectorOptions(kind=kind, **extra)
    bridge = Bridge(torch.randn(40, 8), table, MemoryOptions(tokens=2), options)
    size = bridge(HIDDEN * 100).square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, mean_rms(table)), rtol=1e-3, atol=0)
    assert bridge.tokens.shape == (2, 8) and bridge.prompts.shape == (3, 12)


def test_identity_needs_equal_widths():
    options = ProjectorOptions(kind="identity", match_scale=False)
    assert torch.equal(Projector(8, 8, options)(HIDDEN), HIDDEN)
    with pytest.raises(
        ValueError, match="kind='identity' needs equal widths.* 8 and the decoder 9"
    ):
        Projector(8, 9, options)


def test_low_rank_normalises_then_adds_noise_then_goes_up():
    options = ProjectorOptions(kind="low_rank", rank=4, match_scale=False, noise=0.1)
    projector = Projector(8, 12, options)
    narrow = rms_normalised(projector.down(HIDDEN))
    torch.testing.assert_close(narrow.square().mean(-1), torch.ones(3, 2))
    torch.testing.assert_close(projector.eval()(HIDDEN), projector.up(narrow))
    projector.train()
    projector.up = torch.nn.Identity()
    noise = projector(HIDDEN, [1, 2, 3]) - narrow
    assert 0.05 < noise.std() < 0.2
    values = Projector(8, 12, options)(HIDDEN, [1, 2, 3]).flatten(0, 1)
    assert torch.linalg.matrix_rank(values - values.mean(0)) == 4


def test_noise_belongs_to_its_row_and_not_to_the_batch():
    projector = Projector(8, 12, ProjectorOptions(noise=0.5), scale=2.0)
    together = projector(HIDDEN, [5, 6, 7])
    torch.testing.assert_close(projector(HIDDEN[2:], [7])[0], together[2])
    torch.testing.assert_close(together, projector(HIDDEN, [5, 6, 7]))
    assert not torch.equal(together, projector(HIDDEN, [6, 6, 7]))
    projector.options.noise = 0.0
    plain = projector(HIDDEN)
    assert 0.6 < (together - plain).std() < 1.4  # 0.5 in units of the scale


def test_noise_needs_seeds_and_ends_with_training_unless_asked():
    hidden = HIDDEN
    projector = Projector(8, 12, ProjectorOptions(noise=0.5))
    with pytest.raises(ValueError, match="model.projector.noise=0.5 needs one noise seed for each"):
        projector(hidden, [1])
    assert torch.equal(projector.eval()(hidden), projector(hidden, [1, 2, 3]))
    loud = Projector(8, 12, ProjectorOptions(noise=0.5, noise_in_eval=True)).eval()
    assert not torch.equal(loud(hidden, [1, 2, 3]), loud(hidden, [2, 2, 3]))


def test_the_seed_alone_decides_how_a_bridge_starts():
    tables = torch.randn(40, 8), torch.randn(50, 12)

    def make(seed):
        return Bridge(*tables, MemoryOptions(tokens=2, seed=seed), ProjectorOptions()).state_dict()

    state = torch.get_rng_state()
    first = make(0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(9)
    second, third = make(0), make(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tokens"], third["tokens"])
    assert not torch.equal(first["projector.up.weight"], third["projector.up.weight"])


def test_prompts():
    tables = torch.randn(40, 8), torch.randn(50, 12)
    plain = Bridge(*tables, MemoryOptions(), ProjectorOptions())
    assert torch.equal(plain.prompt("qa", 4), plain.prompts[1].expand(4, 1, 12))
    assert plain.prompt("lm", 4).shape == (4, 0, 12)
    with_one = Bridge(*tables, MemoryOptions(continuation_prompt=True), ProjectorOptions())
    assert torch.equal(with_one.prompt("lm", 1)[0, 0], with_one.prompts[2])
    with pytest.raises(ValueError, match="prompt='x': give one of ae, qa, lm"):
        plain.prompt("x", 1)
