"""Block sizes: fit, splits, overrides and the cache of measurements (measured by a stand-in)."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lightning_modules.ops import load_kernels  # noqa: E402

tuning = load_kernels("tuning")
CPU = torch.device("cpu")
GENERATIONS = list(tuning.SHARED_MEMORY)


@pytest.mark.parametrize("capability", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tables_and_candidates_fit_into_shared_memory(capability, dtype):
    base = tuning.shipped("forward", 8192, dtype, capability)
    found = tuning.candidates(base, dtype, capability)
    size = torch.finfo(dtype).bits // 8
    assert found[0] == base and len(found) == len(set(found)) <= 12
    assert all(tuning.shared_bytes(c, size) <= tuning.SHARED_MEMORY[capability] for c in found)


@pytest.mark.parametrize("capability", [(8, 6), (8, 7), (12, 0), (7, 5)])
def test_unknown_generations_get_the_small_tiles(capability):
    assert tuning.generation(capability) == (8, 9)


@pytest.mark.parametrize("rows", [1, 5, 64, 100, 8192])
def test_few_rows_make_small_tiles(rows):
    block = tuning.shipped("forward", rows, torch.bfloat16, (9, 0)).block_m
    assert 16 <= block <= 128 and (block == 128 or block >= rows)


@pytest.mark.parametrize("row_blocks", [1, 3, 64, 256, 5000])
@pytest.mark.parametrize("tiles", [1, 7, 594])
def test_splits_fill_the_processors(row_blocks, tiles):
    splits = tuning.choose_splits(row_blocks, tiles, 132)
    assert 1 <= splits <= tiles
    assert row_blocks * splits >= 4 * 132 or splits == tiles
    # the last round of programs is nearly full where there is a choice
    if tiles == 594 and row_blocks == 64:
        rounds = -(-row_blocks * splits // 132)
        assert row_blocks * tiles / 132 / (rounds * -(-tiles // splits)) > 0.95


def test_an_override_ends_with_its_block():
    before = tuning.get_config("forward", 5, 8, 131, torch.float32, "", CPU)
    with tuning.override(forward={"splits": 7}):
        with tuning.override(backward={"block_m": 16}):
            inside = tuning.get_config("forward", 5, 8, 131, torch.float32, "", CPU)
    assert inside == replace(before, splits=7)
    assert tuning.get_config("forward", 5, 8, 131, torch.float32, "", CPU) == before


def test_interpreted_blocks_hold_the_problem():
    config = tuning.get_config("backward", 37, 33, 131, torch.float32, "", CPU)
    assert (config.block_m, config.block_k, config.block_n) == (64, 64, 256)


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A clock by block width and a home folder; returns the configurations that were measured."""
    seen = []

    def bench(call, **_):
        call()
        return abs(seen[-1].block_n - 128) + seen[-1].stages

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "home" / "cache.json")
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setenv("FUSED_AUTOTUNE", "1")
    return seen


def test_measured_once_and_kept_on_disk(fake_gpu, monkeypatch):
    given = ("forward", 300, 64, 1000, torch.bfloat16, "00", torch.device("cuda"))
    best = tuning.get_config(*given, fake_gpu.append)
    assert best.block_n == 128 and 1 < len(fake_gpu) <= 12
    fake_gpu.clear()
    assert tuning.get_config(*given, fake_gpu.append) == best
    nearby = ("forward", 500, *given[2:])  # the same bucket of rows
    assert tuning.get_config(*nearby, fake_gpu.append) == best
    monkeypatch.setattr(tuning, "_measured", {})  # as a new process
    assert tuning.get_config(*given, fake_gpu.append) == best
    assert not fake_gpu
    tuning.get_config("forward", 600, *given[2:], fake_gpu.append)
    assert fake_gpu


def test_a_broken_cache_is_measured_again(fake_gpu):
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text("{")
    given = ("backward", 300, 64, 1000, torch.float16, "", torch.device("cuda"))
    assert tuning.get_config(*given, fake_gpu.append).block_n == 128


def test_nothing_is_measured_unless_asked(fake_gpu, monkeypatch):
    monkeypatch.delenv("FUSED_AUTOTUNE")
    given = ("forward", 300, 64, 1000, torch.bfloat16, "00", torch.device("cuda"))
    assert tuning.get_config(*given, fake_gpu.append).block_n == 256
    assert not fake_gpu


@pytest.fixture
def other_rank(fake_gpu, monkeypatch):
    """Rank 1 of a job; returns what rank 0 broadcasts and the number of broadcasts so far."""
    sent, calls = [None, {}], []

    def receive(box, src):
        calls.append(src)
        box[:] = sent

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        patch.setattr(torch.distributed, "broadcast_object_list", receive)
        yield sent, calls


@pytest.mark.parametrize("rows", [0, 300])
def test_other_ranks_take_what_rank_0_broadcasts(rows, fake_gpu, other_rank):
    sent, calls = other_rank
    sent[0] = tuning.asdict(tuning.Config(block_n=64))
    rest = (64, 1000, torch.bfloat16, "00", torch.device("cuda"))
    backward = tuning.key_of("backward", 300, *rest)
    sent[1] = {backward: tuning.asdict(tuning.Config(block_n=32))}
    measure = fake_gpu.append if rows else None
    for _ in range(2):
        found = tuning.get_config("forward", rows, *rest, measure, is_collective=True)
        assert found.block_n == 64
    # nobody waits for a kernel that a process without rows never launches
    assert tuning.get_config("backward", 300, *rest, fake_gpu.append).block_n == 32
    assert tuning.get_config("backward", 9000, *rest, fake_gpu.append).block_n == 256
    assert calls == [0] and not fake_gpu
