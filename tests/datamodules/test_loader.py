"""The loader of every family: position, windows, ranks, and an exact resume inside Lightning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from callbacks.rng_state import RngState
from callbacks.step_checkpoint import StepCheckpoint
from datamodules.loader import Loader, Rows, RowSource, Source, check_window


def counted(batches: Iterable[Rows]) -> list[int]:
    return [
        row
        for batch in batches
        for row, counts in zip(batch.items, batch.counted, strict=True)
        if counts
    ]


# --- the loader -----------------------------------------------------------------------------------


class Numbers(Source):
    """Hands out (epoch, index); keeps a state of its own."""

    def __init__(self, length: int, window: int = 1) -> None:
        self.length, self.window, self.made = length, window, 0

    def __len__(self) -> int:
        return self.length

    def batch(self, epoch: int, index: int) -> tuple[int, int]:
        self.made += 1
        return epoch, index

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: Any) -> None:
        self.made = state["made"]


def test_loader_is_sized_and_counts_epochs():
    loader = Loader(Numbers(3))
    assert len(loader) == 3
    assert list(loader) == [(0, 0), (0, 1), (0, 2)]
    assert list(loader) == [(1, 0), (1, 1), (1, 2)]


def test_position_is_moved_before_the_batch_is_handed_out():
    """Lightning leaves the generator standing at a yield: nothing may be due behind it."""
    loader = Loader(Numbers(3))
    iterator = iter(loader)
    positions = []
    for _ in range(3):
        next(iterator)
        positions.append((loader.epoch, loader.index))
    assert positions == [(0, 1), (0, 2), (0, 3)]  # the generator was never run past its last item
    assert next(iter(loader)) == (1, 0)


def test_batches_are_made_only_when_asked_for():
    loader = Loader(Numbers(5))
    iterator = iter(loader)
    assert loader.source.made == 0
    next(iterator)
    next(iterator)
    assert loader.source.made == 2


@pytest.mark.parametrize("taken", range(1, 9))
def test_state_goes_on_where_it_was_taken(taken):
    """Anywhere: in mid-epoch, at the end of an epoch (4 and 8) and after its first batch."""

    def stream(loader: Loader) -> Iterable[tuple[int, int]]:
        while True:
            yield from loader

    unbroken = stream(Loader(Numbers(4)))
    wanted = [next(unbroken) for _ in range(12)]

    loader = Loader(Numbers(4))
    first = stream(loader)
    seen = [next(first) for _ in range(taken)]
    state = loader.state_dict()
    [next(first) for _ in range(2)]  # what a killed run still did does not change its checkpoint

    resumed = Loader(Numbers(4))
    resumed.load_state_dict(state)
    assert resumed.source.made == taken
    rest = stream(resumed)
    assert seen + [next(rest) for _ in range(12 - taken)] == wanted


@pytest.mark.parametrize(("length", "window"), [(5, 2), (4, 3), (3, 4), (4, 0), (4, -1)])
def test_length_that_is_no_multiple_of_the_window_is_refused(length, window):
    with pytest.raises(ValueError, match=f"{length} micro-batches.*window of {window}"):
        Loader(Numbers(length, window))


def test_going_on_inside_another_window_is_refused():
    """A run that goes on with other micro-batches would step on half a window."""
    state = {"epoch": 0, "index": 6, "source": {"made": 6}}
    for window in (1, 2, 3):
        Loader(Numbers(12, window)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"micro-batch 6 .*window of 4: give data\.micro_batches"):
        Loader(Numbers(12, 4)).load_state_dict(state)


# --- rows -----------------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_and_epochs_reshuffle():
    rows = list(range(100, 140))
    loader = Loader(RowSource(rows, batch_size=8, seed=3))
    first, second = (counted(loader) for _ in range(2))
    assert sorted(first) == sorted(second) == rows
    assert first != rows and first != second
    again = Loader(RowSource(rows, batch_size=8, seed=3))
    assert [counted(again) for _ in range(2)] == [first, second]
    other = Loader(RowSource(rows, batch_size=8, seed=4))
    assert counted(other) not in (first, second)


def test_batch_is_a_function_of_epoch_and_index():
    source = RowSource(range(30), batch_size=4, seed=1)
    later = source.batch(2, 5)
    for index in range(3):
        source.batch(0, index)
    assert source.batch(2, 5) == later == RowSource(range(30), batch_size=4, seed=1).batch(2, 5)


def test_without_a_seed_the_order_is_that_of_the_file():
    loader = Loader(RowSource("abcdefg", batch_size=3))
    for _ in range(2):
        assert "".join(counted(loader)) == "abcdefg"


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("count", "window"), [(24, 1), (29, 1), (29, 2), (49, 3)])
def test_ranks_see_disjoint_rows_that_cover_everything(count, window, seed, drop_last):
    options = {"batch_size": 4, "world_size": 2, "seed": seed, "window": window}
    ranks = [RowSource(range(count), rank=r, drop_last=drop_last, **options) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    for epoch in (0, 1):
        seen = [
            counted(source.batch(epoch, index) for index in range(len(source))) for source in ranks
        ]
        assert not set(seen[0]) & set(seen[1])
        everything = seen[0] + seen[1]
        assert len(everything) == len(set(everything))
        whole = count // (8 * window) * 8 * window
        assert len(everything) == (whole if drop_last else count)


def test_last_batch_is_filled_with_rows_that_do_not_count():
    source = RowSource(range(10), batch_size=4)
    last = source.batch(0, len(source) - 1)
    assert len(source) == 3
    assert last.items[:2] == [8, 9] and last.counted == [True, True, False, False]
    assert len(last.items) == 4 and set(last.items) <= set(range(10))
    assert last.to("cpu") is last


def test_more_places_than_rows_are_filled_on_every_rank():
    batches = [RowSource([5], batch_size=2, rank=r, world_size=3).batch(0, 0) for r in range(3)]
    assert [batch.items for batch in batches] == [[5, 5]] * 3
    assert [sum(batch.counted) for batch in batches] == [1, 0, 0]


@pytest.mark.parametrize(
    ("count", "drop_last", "batches"),
    [(24, True, 6), (31, True, 6), (24, False, 6), (25, False, 8), (31, False, 8)],
)
def test_windows_are_whole(count, drop_last, batches):
    source = RowSource(range(count), batch_size=4, window=2, drop_last=drop_last)
    assert len(source) == batches
    loader = Loader(source)
    seen = counted(loader)
    assert len(seen) == len(set(seen)) == (batches * 4 if drop_last else count)


@pytest.mark.parametrize(("count", "options"), [(0, {}), (7, {"window": 2, "drop_last": True})])
def test_rows_that_fill_no_window_are_refused(count, options):
    with pytest.raises(ValueError, match=rf"{count} rows do not fill one window.*data\.batch_size"):
        RowSource(range(count), batch_size=4, **options)


# --- Trainer flags --------------------------------------------------------------------------------


def trainer_with(**flags: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False, **flags
    )


@pytest.mark.parametrize(
    ("limit", "named"), [(5, 4), (0.5, 4), (3, 2), (1, 2), (11, 10), (0.99, 10), (7, 6)]
)
def test_limit_that_cuts_a_window_names_one_that_works(limit, named):
    loader = Loader(Numbers(12 if limit != 0.5 else 10, window=2))
    trainer = trainer_with(accumulate_grad_batches=2, limit_train_batches=limit)
    with pytest.raises(ValueError, match=r"no multiple of the window of 2") as error:
        check_window(trainer, loader)
    assert f"use trainer.limit_train_batches={named}" in str(error.value)
    works = trainer_with(accumulate_grad_batches=2, limit_train_batches=named)
    check_window(works, loader)


@pytest.mark.parametrize("limit", [1.0, 0.5, 2, 6, 12, 13, 1000])
def test_limit_of_whole_windows_is_accepted(limit):
    trainer = trainer_with(accumulate_grad_batches=2, limit_train_batches=limit)
    check_window(trainer, Loader(Numbers(12, window=2)))


@pytest.mark.parametrize(("accumulate", "window"), [(1, 2), (2, 1), (4, 2), (3, 4)])
def test_other_accumulation_than_the_window_is_refused(accumulate, window):
    trainer = trainer_with(accumulate_grad_batches=accumulate)
    message = rf"accumulate_grad_batches={accumulate} must equal the window of {window} "
    with pytest.raises(ValueError, match=message):
        check_window(trainer, Loader(Numbers(12, window=window)))


# --- inside Lightning: an interrupted run equals an unbroken one ----------------------------------


class Toy(LightningModule):
    """Least squares with dropout and momentum, so that every kind of state matters."""

    def __init__(self, rows: list[int], fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.rows, self.fail_at = rows, fail_at
        self.seen: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Rows, batch_idx: int) -> Tensor:
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise MemoryError("killed")
        self.seen.append((self.global_step, list(batch.items)))
        rows = torch.tensor(batch.items, dtype=torch.float32)[:, None]
        inputs = torch.sin(rows * torch.arange(1.0, 5.0))
        return (self.net(inputs) - torch.cos(rows)).square().mean()

    def validation_step(self, batch: Rows, batch_idx: int) -> None:
        self.validated.append(self.global_step)

    def val_dataloader(self) -> Loader:
        return Loader(RowSource(self.rows, batch_size=20))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Loader:
        source = RowSource(self.rows, batch_size=3, seed=5, window=2, drop_last=True)
        loader = Loader(source)
        check_window(self.trainer, loader)
        return loader


STEPS = 8  # 20 rows in windows of 2 x 3 make 3 steps an epoch that use 18 rows


def fit(
    folder: Path, steps: int, *, fail_at: int | None = None, resume: bool = False, **flags: Any
) -> Toy:
    module = Toy(list(range(20)), fail_at)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            RngState(),
            StepCheckpoint(folder=str(folder), every_seconds=None, every_n_steps=1),
        ],
        **{"limit_val_batches": 0} | flags,
    )
    torch.manual_seed(7)  # a fresh process is seeded alike; a resumed one takes the saved state
    path = str(folder / "last.ckpt") if resume else None
    if fail_at is None:
        trainer.fit(module, ckpt_path=path, weights_only=True)
    else:
        with pytest.raises(MemoryError):
            trainer.fit(module, ckpt_path=path, weights_only=True)
    return module


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Toy:
    return fit(tmp_path_factory.mktemp("unbroken"), STEPS)


def assert_equal_bits(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name


def test_unbroken_run_reshuffles_and_covers_each_epoch(unbroken):
    assert len(unbroken.seen) == 2 * STEPS
    assert [step for step, _ in unbroken.seen] == [i // 2 for i in range(2 * STEPS)]
    epochs = [sum((rows for _, rows in unbroken.seen[e : e + 6]), []) for e in (0, 6)]
    assert all(len(set(epoch)) == 18 for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_run_stopped_at_a_step_resumes_bit_for_bit(unbroken, tmp_path, stop):
    """Steps 3 and 6 end an epoch, the others lie inside one."""
    before = fit(tmp_path, stop)
    after = fit(tmp_path, STEPS, resume=True)
    assert len(before.seen) == 2 * stop
    assert before.seen + after.seen == unbroken.seen
    assert_equal_bits(after.net, unbroken.net)


@pytest.mark.parametrize("batches", [2, 3, 5, 6, 7, 9, 12, 15])
def test_run_killed_inside_a_window_resumes_bit_for_bit(unbroken, tmp_path, batches):
    """The checkpoint is the one of the last whole step; an even count is the end of a window."""
    before = fit(tmp_path, STEPS, fail_at=batches)
    after = fit(tmp_path, STEPS, resume=True)
    assert before.seen[: batches // 2 * 2] + after.seen == unbroken.seen
    assert_equal_bits(after.net, unbroken.net)


@pytest.mark.parametrize("every", [2, 4, 6])
@pytest.mark.parametrize("batches", [4, 6, 7, 8, 12, 13])
def test_killed_run_with_validations_resumes_with_each_once(unbroken, tmp_path, batches, every):
    """Validations after every step, every second, and at the end of each epoch."""
    flags = {"limit_val_batches": 1, "val_check_interval": every, "check_val_every_n_epoch": None}
    flags["num_sanity_val_steps"] = 0
    before = fit(tmp_path, STEPS, fail_at=batches, **flags)
    after = fit(tmp_path, STEPS, resume=True, **flags)
    assert before.seen[: batches // 2 * 2] + after.seen == unbroken.seen
    assert before.validated + after.validated == list(range(every // 2, STEPS + 1, every // 2))
    assert_equal_bits(after.net, unbroken.net)


def test_limit_of_whole_windows_cuts_no_window_and_loses_no_row(unbroken, tmp_path):
    module = fit(tmp_path, STEPS, limit_train_batches=4)
    assert [step for step, _ in module.seen] == [i // 2 for i in range(2 * STEPS)]
    assert [rows for _, rows in module.seen] == [rows for _, rows in unbroken.seen]


def test_limit_that_cuts_a_window_stops_before_the_first_step(tmp_path):
    module = Toy(list(range(20)))
    trainer = trainer_with(accumulate_grad_batches=2, limit_train_batches=3, max_steps=2)
    with pytest.raises(ValueError, match="limit_train_batches=3 leaves 3 of 6"):
        trainer.fit(module)
    assert module.seen == []


def test_a_loader_that_restarts_begins_anew_after_a_cut() -> None:
    rows = RowSource(list(range(6)), batch_size=2)
    going, anew = Loader(rows), Loader(rows, restarts=True)
    for loader in (going, anew):
        assert next(iter(loader)).items == [0, 1]
    assert next(iter(going)).items == [2, 3]
    assert next(iter(anew)).items == [0, 1]
    assert [batch.items for batch in anew] == [[0, 1], [2, 3], [4, 5]]
