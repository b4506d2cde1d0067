"""EmbeddingModule in a real Trainer: exact chunked gradients, measures, attention, learning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from transformers import AutoModel, BertConfig, RobertaConfig

from callbacks.gradient_surgery import GradientSurgery
from datamodules.loader import Rows
from datamodules.pairs import PairSource
from datamodules.tasks.embedding import StsSet
from datamodules.texts import chunk_of
from lightning_modules.backbones.encoder import TextEncoder
from lightning_modules.backbones.tiny import TinyOptions, build_tiny
from lightning_modules.embedding.base import EmbeddingModule
from lightning_modules.functional.contrastive import matryoshka_info_nce
from tests.lightning_modules.embedding.small_module import (
    assert_close,
    encoder,
    fit,
    gap,
    module,
    pairs,
    world,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT without dropout."""
    return encoder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout."""
    return encoder(tmp_path_factory.mktemp("dropping"), dropout=0.3)


#: Rounding in float32 would hide a wrong gradient below 1e-6.
EXACT: dict[str, Any] = {"precision": "64-true"}
CHUNKS: dict[str, dict[str, Any]] = {
    "none kept": {"chunk_size": 3, "keep_chunks": 0},
    "two kept": {"chunk_size": 3, "keep_chunks": 2},
    "all kept": {"chunk_size": 3, "keep_chunks": 99},
    "a budget": {"chunk_size": 3, "cache_budget_mb": 0.6},
    "one item a chunk": {"chunk_size": 1},
}


@pytest.mark.parametrize("way", CHUNKS)
def test_chunked_gradients_are_those_of_one_batch(way: str, plain: Path) -> None:
    options = {"symmetric": True}
    whole = fit(module(plain, **options), pairs(plain), **EXACT)
    found = fit(module(plain, **options, **CHUNKS[way]), pairs(plain), **EXACT)
    assert len(found.steps) == 2
    for one, other in zip(whole.steps, found.steps, strict=True):
        assert_close(one, other, atol=1e-9)
    assert found.logged["train/loss"] == pytest.approx(whole.logged["train/loss"], abs=1e-9)
    chunks = -(-16 // CHUNKS[way]["chunk_size"])  # 8 queries and 8 passages
    kept, again = (found.logged[f"train/chunks_{what}"] for what in ("kept", "recomputed"))
    assert kept + again == chunks
    wanted = {"none kept": 0, "two kept": 2, "all kept": chunks, "one item a chunk": 1}
    assert kept == wanted[way] if way in wanted else 0 < kept < chunks
    assert "train/chunks_kept" not in whole.logged


def test_dropout_is_replayed_in_the_second_encoding(dropping: Path, plain: Path) -> None:
    ways = [{"chunk_size": 3, "keep_chunks": kept} for kept in (99, 2, 0)]
    kept, some, none = (fit(module(dropping, **way), pairs(dropping), **EXACT) for way in ways)
    for other in (some, none):
        for one, two in zip(kept.steps, other.steps, strict=True):
            assert_close(one, two, atol=1e-9)
    without = fit(module(plain, **ways[0]), pairs(plain), **EXACT)
    assert gap(kept.steps[0], without.steps[0]) > 1e-3, "dropout must have been on"
    other = fit(module(dropping, **ways[0]), pairs(dropping), seed=8, **EXACT)
    assert gap(kept.steps[0], other.steps[0]) > 1e-3


def by_hand(folder: Path, window: int) -> dict[str, torch.Tensor]:
    """Gradient of a window of two micro-batches, without a Trainer."""
    alone, data = module(folder), pairs(folder)
    alone.configure_model()
    alone.double()
    source = PairSource(data)
    for number in (2 * window, 2 * window + 1):
        batch = source.batch(0, number)
        items = [*batch.queries, *batch.passages]
        (alone.contrast(alone.encode(chunk_of(items, 0)), batch) / 2).backward()
    return {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["whole", "two kept"])
def test_a_windows_gradient_is_its_own(way: str, plain: Path) -> None:
    still = {"optimizer": {"lr": 0.0}, **CHUNKS.get(way, {})}
    seen = fit(module(plain, **still), pairs(plain), steps=3, **EXACT)
    for window, found in enumerate(seen.steps):
        assert_close(found, by_hand(plain, window), atol=1e-9)


def test_matryoshka_trains_and_measures_every_slice(plain: Path) -> None:
    dims = [32, 8]
    data = pairs(plain, micro_batches=1)
    trained = module(plain, matryoshka_dims=dims, matryoshka_weights=[1.0, 3.0])
    seen = fit(trained, data, steps=1)
    assert {"train/accuracy_8", "train/accuracy_32"} <= seen.logged.keys()
    fresh = module(plain)
    fresh.configure_model()
    fresh.encoding = data.encoding
    batch = next(iter(data.train_dataloader()))
    items = [*batch.queries, *batch.passages]
    with torch.no_grad():
        vectors = fresh.vectors(items, 64, 0)
    expected = matryoshka_info_nce(
        vectors[:8], vectors[8:, None], dims=dims, weights=[1.0, 3.0], temperature=0.1
    )
    loss = float(expected.loss_sum) / 8
    assert seen.logged["train/loss"] == pytest.approx(loss, abs=1e-4)
    assert gap(seen.steps[0], fit(module(plain), data, steps=1).steps[0]) > 1e-3
    with pytest.raises(
        ValueError, match=r"matryoshka_dims=\[64\]: this backbone has vectors of 32"
    ):
        module(plain, matryoshka_dims=[64]).configure_model()


def ndcg_at_10(scores: list[float], answers: set[int]) -> float:
    """By its definition."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])[:10]
    gain = sum(1 / math.log2(rank + 2) for rank, place in enumerate(order) if place in answers)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(answers))))


def test_evaluation_is_ndcg_by_its_definition(plain: Path) -> None:
    task = world(num_val=30)
    data = pairs(plain, task, eval_batch_size=7)
    trained = module(plain, matryoshka_dims=[32, 8])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False,
                      use_distributed_sampler=False)  # fmt: skip
    trainer.validate(trained, datamodule=data, verbose=False)
    found = trained.results
    means: dict[str, list[float]] = {}
    for one in task.evaluations("val"):
        queries, corpus = trained.embed(one.queries, "query"), trained.embed(one.corpus)
        assert torch.allclose(queries.norm(dim=1), torch.ones(len(queries)), atol=1e-5)
        for dim, suffix in ((32, ""), (8, "_dim_8")):
            q, c = (F.normalize(x[:, :dim], dim=1) for x in (queries, corpus))
            values = [
                ndcg_at_10(row.tolist(), set(right))
                for row, right in zip(q @ c.T, one.relevant, strict=True)
            ]
            expected = sum(values) / len(values)
            tag = f"ndcg_at_10{suffix}"
            assert found[f"val/{one.name}/{tag}"] == pytest.approx(expected, abs=1e-5)
            means.setdefault(f"val/{one.group}/{tag}", []).append(expected)
            means.setdefault(f"val/{tag}", []).append(expected)
    assert {tag.split("/")[1] for tag in means if tag.count("/") == 2} == {"in_domain", "ood"}
    for tag, each in means.items():
        assert found[tag] == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert 0.0 < found["val/ndcg_at_10"] < 1.0


def test_scored_pairs_and_fillers_are_measured(plain: Path) -> None:
    task = world()
    data = pairs(plain, task)
    trained = module(plain, matryoshka_dims=[8])
    Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            use_distributed_sampler=False).validate(trained, datamodule=data)  # fmt: skip
    texts = [row.query for row in task.pairs("train")[0].rows[:6]]
    one = StsSet("sts", texts[:3], texts[3:], [0.0, 1.0, 2.0], group="all")
    vectors = trained.embed(texts, "query")
    cosines = (vectors[:3] * vectors[3:]).sum(1)
    order = cosines.argsort().argsort().float()
    spearman = float(torch.corrcoef(torch.stack([order, torch.arange(3.0)]))[0, 1])
    found = trained.evaluate(Rows([one, one], [True, False]), "val")
    assert set(found) == {"", "all", "sts"}
    assert found["sts"]["spearman"] == (pytest.approx(spearman, abs=1e-6), 1.0)
    assert {"pearson", "spearman_dim_8", "pearson_dim_8"} <= found["sts"].keys()


def test_embedding_keeps_mode_and_order(plain: Path, dropping: Path) -> None:
    trained = module(dropping)
    trained.configure_model()
    trained.encoding = pairs(dropping).encoding
    texts = ["d0c1a", "d0c2a d0c3b n01 n02", "n05 d1c1b", "d0c1a"]
    assert trained.policy.training
    vectors = trained.embed(texts, batch_size=2)
    assert trained.policy.training, "training goes on as before"
    assert torch.equal(vectors[0], vectors[3]), "no dropout"
    assert torch.allclose(torch.stack([trained.embed([t])[0] for t in texts]), vectors, atol=1e-6)
    assert trained.embed([]).shape == (0, 32)
    raw = module(plain, normalize=False)
    raw.configure_model()
    raw.encoding = trained.encoding
    lengths = raw.embed(texts).norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(4), atol=1e-2)


@pytest.mark.parametrize(("kind", "room"), [("bert", 16), ("roberta", 16)])
def test_more_tokens_than_positions_are_refused(kind: str, room: int) -> None:
    """RoBERTa's table has two places before the first token's."""
    common: dict[str, Any] = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8,
    }  # fmt: skip
    config: Any = (
        BertConfig(**common, max_position_embeddings=room)
        if kind == "bert"
        else RobertaConfig(**common, max_position_embeddings=room + 2, pad_token_id=1)
    )
    read = TextEncoder(AutoModel.from_config(config))
    assert read.most_tokens == room
    full = torch.ones(1, room, dtype=torch.bool)
    assert read(torch.full((1, room), 3), full, full).shape == (1, 8)
    more = torch.ones(1, room + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="a text of 17 tokens, .* 16: lower data.encoding.max_que"):
        read(torch.full((1, room + 1), 3), more, more)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with the world's words."""
    folder = tmp_path_factory.mktemp("decoder")
    shape = TinyOptions(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
    )
    build_tiny(folder, world().vocabulary(), shape, seed=0)
    return folder


@pytest.mark.parametrize("attention", ["own", "bidirectional"])
def test_a_decoder_sees_what_comes_later_if_asked(attention: Any, decoder: Path) -> None:
    built = module(decoder, attention=attention)
    built.configure_model()
    policy = built.policy.eval()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7], [3, 4, 5, 7]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])
    with torch.no_grad():
        hidden = policy.model(**policy.inputs(ids, mask)).last_hidden_state
    changed = float((hidden[0, 0] - hidden[1, 0]).abs().max())
    assert (changed > 1e-3) == (attention == "bidirectional"), changed
    assert (attention == "own") == torch.allclose(hidden[1, 0], hidden[2, 0], atol=1e-6)
    seen = fit(built, pairs(decoder), steps=1)
    assert all(bool(value.isfinite().all()) for value in seen.steps[0].values())


@pytest.mark.parametrize("chunks", [{}, {"chunk_size": 3, "keep_chunks": 1}])
def test_gradient_surgery_takes_data_sets_as_domains(chunks: dict[str, Any], plain: Path) -> None:
    still = {"optimizer": {"lr": 0.0}, **chunks}
    ways = {}
    for method in ("none", "pcgrad"):
        surgery = GradientSurgery(method=method, image_every_n_steps=0)  # type: ignore[arg-type]
        ways[method] = fit(module(plain, **still), pairs(plain), surgery, steps=4, **EXACT)
    bare = fit(module(plain, **still), pairs(plain), steps=4, **EXACT)
    two = [number for number, names in enumerate(bare.domains) if len(set(names)) == 2]
    one = [number for number, names in enumerate(bare.domains) if len(set(names)) == 1]
    assert two and one, bare.domains
    for number in range(4):
        assert_close(bare.steps[number], ways["none"].steps[number])
    for number in one:
        assert_close(bare.steps[number], ways["pcgrad"].steps[number])
    assert max(gap(bare.steps[n], ways["pcgrad"].steps[n]) for n in two) > 1e-4
    assert "surgery/cos_global/domain_0_domain_1" in ways["pcgrad"].logged


def test_learns_to_retrieve(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "backbone")
    task = world(num_train=256, num_val=40)
    data = pairs(folder, task, batch_size=16, micro_batches=1)
    trained = module(folder, optimizer={"lr": 3e-3})
    still = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    Trainer(**still, enable_progress_bar=False, enable_model_summary=False).validate(
        trained, datamodule=data, verbose=False
    )
    start = trained.results["val/in_domain/ndcg_at_10"]
    fit(trained, data, steps=60, limit_val_batches=1.0, val_check_interval=60,
        check_val_every_n_epoch=None)  # fmt: skip
    end = trained.results["val/in_domain/ndcg_at_10"]
    assert end > start + 0.2, (start, end)
    assert trained.results["train/accuracy"] > 0.3, "one of sixteen by chance"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "model.temperature=0.0 must be above 0"),
        ({"chunk_size": 0}, "model.chunk_size=0 must be at least 1"),
        ({"keep_chunks": 2}, "cache_budget_mb and model.keep_chunks need model.chunk_size"),
        ({"chunk_size": 2, "keep_chunks": -1}, "model.keep_chunks=-1 must be 0 or more"),
        (
            {"chunk_size": 2, "keep_chunks": 1, "cache_budget_mb": 1.0},
            "give model.cache_budget_mb or model.keep_chunks, not both",
        ),
        ({"attention": "bidirectionl"}, "did you mean 'bidirectional'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, plain: Path) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingModule(backbone=str(plain), **options)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_and_validates(precision: str, plain: Path) -> None:
    trained = module(plain, chunk_size=6)
    data = pairs(plain)
    seen = fit(trained, data, precision=precision, limit_val_batches=1.0, val_check_interval=2,
               check_val_every_n_epoch=None)  # fmt: skip
    assert all(bool(value.isfinite().all()) for value in seen.steps[1].values())
    one = data.task.evaluations("val")[0]
    scores = trained.embed(one.queries, "query") @ trained.embed(one.corpus).T
    found = [ndcg_at_10(row.tolist(), set(r)) for row, r in zip(scores, one.relevant, strict=True)]
    expected = pytest.approx(sum(found) / len(found), abs=1e-5)
    assert trained.results[f"val/{one.name}/ndcg_at_10"] == expected, "measured in float32"
    exact = fit(module(plain), pairs(plain))
    assert seen.logged["train/loss"] == pytest.approx(exact.logged["train/loss"], rel=0.05)
