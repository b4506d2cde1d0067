"""Batches of contexts: two tokenizers, EOS and padding, slots, hidden tokens, order, long texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from datamodules.contexts import CompressionBatch, ContextDataModule, ContextTrainingSource
from datamodules.tasks.compression import CompressionTask, Context, ContextSet, Probe, Slot
from datamodules.tasks.prior_world import PriorWorld
from datamodules.tasks.text_contexts import TextContexts
from datamodules.tasks.twin_nouns import TwinNouns
from datamodules.word_tokenizer import byte_tokenizer, word_tokenizer
from lightning_modules.backbones.tiny import TinyOptions, build_tiny

SMALL: dict[str, Any] = {"num_train": 640, "num_val": 5, "num_test": 5}
RED = Slot("lamp/colour", "attribute", "red", "blue", ((9, 12),))


class Given(CompressionTask):
    """Texts as they are given."""

    name = "given"

    def __init__(self, *contexts: Context, hidden: Sequence[str] = ()) -> None:
        self.given, self.hidden = list(contexts), list(hidden)

    def contexts(self, split: Any) -> list[Context]:
        return self.given

    def evaluations(self, split: Any) -> list[ContextSet]:
        return [ContextSet("pc", self.given)]

    def read(self, context: Context, text: str) -> dict[str, str | None]:
        return {}

    def hidden_words(self) -> list[str]:
        return self.hidden


def texts(*found: str) -> list[Context]:
    return [Context(f"u{i}", text, where=f"a.txt:{i + 1}") for i, text in enumerate(found)]


def module(
    task: CompressionTask, decoder: Any = None, ranks: tuple[int, int] = (0, 1), **options: Any
) -> ContextDataModule:
    """A bound datamodule; ``ranks`` is what a trainer would say of itself."""
    data = ContextDataModule(task=task, **({"batch_size": 4} | options))
    words = task.vocabulary()
    data.bind(byte_tokenizer() if words is None else word_tokenizer(words), decoder)
    if ranks != (0, 1):
        data.trainer = SimpleNamespace(global_rank=ranks[0], world_size=ranks[1])  # type: ignore
    return data


def batches(data: ContextDataModule, count: int = 100, epoch: int = 0) -> list[CompressionBatch]:
    source = ContextTrainingSource(data)
    return [source.batch(epoch, index) for index in range(min(count, len(source)))]


def digest(found: list[CompressionBatch]) -> str:
    parts = [[b.uids, b.source_ids.tolist(), b.target_ids.tolist()] for b in found]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def test_what_a_batch_holds() -> None:
    task = Given(Context("a", "the lamp red is", (RED,)), *texts("tiny", "x"))
    data = module(task, batch_size=3)
    [batch] = batches(data)
    order = [batch.uids.index(uid) for uid in ("a", "u0", "u1")]
    tokenizer = task.tokenizer
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    lengths = [15, 4, 1]
    assert batch.source_mask.sum(1)[order].tolist() == lengths
    assert batch.target_mask.sum(1)[order].tolist() == [length + 1 for length in lengths]
    assert batch.source_ids.shape == (3, 15) and batch.target_ids.shape == (3, 16)
    for name in ("source_mask", "target_mask", "slot_mask", "hidden"):
        assert getattr(batch, name).dtype == torch.bool
    assert (batch.source_ids[~batch.source_mask] == pad).all()
    assert (batch.target_ids[~batch.target_mask] == pad).all()
    assert ((batch.target_ids == eos).sum(1) == 1).all()
    assert batch.slot_mask[order[0]].nonzero().flatten().tolist() == [9, 10, 11]
    assert batch.slot_mask.sum() == 3 and not batch.hidden.any()
    row = batch.target_ids[order[0]][batch.target_mask[order[0]]].tolist()
    assert tokenizer.decode(row[:-1]) == "the lamp red is" and row[-1] == eos
    assert batch.num_tokens == 20 + 23
    state = batch.state()
    assert state["uids"] == batch.uids and json.dumps(state)
    assert state["targets"][order[1]] == batch.target_ids[order[1], :5].tolist()
    moved = batch.to("meta")
    assert moved.source_ids.is_meta and moved.slot_mask.is_meta and moved.uids == batch.uids


def test_two_tokenizers_find_the_same_slots() -> None:
    task = TwinNouns(**SMALL)
    words = word_tokenizer(task.vocabulary())
    data = ContextDataModule(task=task, batch_size=4)
    with pytest.raises(ValueError, match="cannot encode task 'twin_nouns'"):
        data.bind(words, byte_tokenizer())
    plain = Given(*task.contexts("train")[:8])
    data = ContextDataModule(task=plain, batch_size=4)
    data.bind(words, byte_tokenizer())
    assert plain.tokenizer is words
    contexts = {context.uid: context for context in plain.given}
    for batch in batches(data):
        assert batch.source_ids.shape == (4, 6)
        for uid, ids, slots in zip(batch.uids, batch.target_ids, batch.slot_mask, strict=True):
            values = [slot.value for slot in contexts[uid].slots]
            assert byte_tokenizer().decode(ids[slots]) == "".join(values)


def test_a_slot_covers_tokens_with_a_space_before_them() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<eos>": 0, "the": 1, "\u0120lamp": 2, "\u0120red": 3, "\u0120is": 4}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    data = ContextDataModule(task=Given(Context("a", "the lamp red is", (RED,))), batch_size=1)
    data.bind(tokenizer)
    [batch] = batches(data)
    assert batch.target_ids.tolist() == [[1, 2, 3, 4, 0]]
    assert batch.slot_mask.tolist() == [[False, False, True, False, False]]


def test_padding_is_no_label_where_pad_is_eos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = ContextDataModule(task=Given(*texts("abcd", "a")), batch_size=2)
    data.bind(tokenizer)
    [batch] = batches(data)
    assert (batch.target_ids == tokenizer.eos_token_id).sum() > 2, "padding looks like EOS"
    labels = batch.target_ids.masked_fill(~batch.target_mask, -100)
    assert ((labels == tokenizer.eos_token_id).sum(1) == 1).all()
    assert sorted(batch.source_mask.sum(1).tolist()) == [1, 4]


def test_the_order_is_the_same_for_all_models(tmp_path: Path) -> None:
    found = []
    for width in (16, 32):
        task, folder = TwinNouns(), tmp_path / str(width)
        build_tiny(folder, task.vocabulary(), TinyOptions(hidden_size=width), seed=width)
        data = ContextDataModule(task=task, source_mask=0.5)
        data.prepare(str(folder), tmp_path)
        assert len(ContextTrainingSource(data)) == 1200
        found.append(digest(batches(data)))
    assert found[0] == found[1]
    data = module(TwinNouns(), batch_size=64, source_mask=0.5, seed=1)
    assert digest(batches(data)) != found[0]
    bytes_too = module(Given(*TwinNouns().contexts("train")[:640]), batch_size=64)
    words_too = ContextDataModule(task=Given(*TwinNouns().contexts("train")[:640]))
    words_too.bind(word_tokenizer(TwinNouns().vocabulary()))
    assert [b.uids for b in batches(bytes_too)] == [b.uids for b in batches(words_too)]


def test_epochs_windows_and_ranks() -> None:
    task = TwinNouns(**(SMALL | {"num_train": 43}))
    data = module(task, micro_batches=3, source_mask=0.5)
    whole = batches(data)
    assert len(whole) == 9 and data.window == 3
    uids = [uid for batch in whole for uid in batch.uids]
    assert len(set(uids)) == 36
    assert uids != [uid for batch in batches(data, epoch=1) for uid in batch.uids]
    assert digest(batches(data, epoch=1)) == digest(batches(data, epoch=1))
    parts = [batches(module(task, ranks=(r, 2), micro_batches=3, source_mask=0.5)) for r in (0, 1)]
    for batch, first, second in zip(whole, *parts, strict=True):
        for name in ("source_ids", "hidden"):
            joined = torch.stack([getattr(one, name) for one in (first, second)], 1).flatten(0, 1)
            assert torch.equal(joined, getattr(batch, name)), "ranks do not change what is hidden"
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 processes"):
        ContextTrainingSource(module(task, ranks=(0, 3)))
    with pytest.raises(ValueError, match="43 training texts do not fill one step"):
        ContextTrainingSource(module(task, batch_size=44))


def test_hidden_words_are_hidden_in_the_source_alone() -> None:
    task = TwinNouns(**SMALL)
    data = module(task, batch_size=64, source_mask=0.5)
    mask = task.tokenizer.convert_tokens_to_ids("<mask>")
    colours = set(task.tokenizer.convert_tokens_to_ids(list(task.colours)))
    count = 0
    for batch in batches(data):
        assert torch.equal(batch.hidden, batch.source_ids == mask)
        assert not (batch.target_ids == mask).any()
        assert set(batch.target_ids[:, :-1][batch.hidden].tolist()) <= colours
        clean = torch.where(batch.hidden, batch.target_ids[:, :-1], batch.source_ids)
        assert torch.equal(clean, batch.target_ids[:, :-1])
        count += int(batch.hidden.sum())
    assert 0.46 < count / (2 * 640) < 0.54
    assert not data.evaluation_batch(task.contexts("val")).hidden.any()
    everything = module(task, source_mask=1.0)
    assert all(int(b.hidden.sum()) == 8 for b in batches(everything, 5))
    assert not any(b.hidden.any() for b in batches(module(task), 5))


def test_random_replacements_are_other_values() -> None:
    task = TwinNouns(**SMALL)
    data = module(task, batch_size=64, source_mask=1.0, mask_kind="random")
    colours = task.tokenizer.convert_tokens_to_ids(list(task.colours))
    found = torch.cat([batch.source_ids[batch.hidden] for batch in batches(data)])
    assert set(found.tolist()) == set(colours)
    again = torch.cat([batch.source_ids[batch.hidden] for batch in batches(data)])
    assert torch.equal(found, again)
    with_mask = module(task, batch_size=64, source_mask=0.5)
    with_random = module(task, batch_size=64, source_mask=0.5, mask_kind="random")
    for one, other in zip(batches(with_mask), batches(with_random), strict=True):
        assert torch.equal(one.hidden, other.hidden), "what is hidden does not depend on by what"


def test_any_token_is_hidden_where_no_words_are_named() -> None:
    data = module(Given(*texts(*["some text " * 20] * 8)), source_mask=0.3)
    share = torch.cat([batch.hidden.flatten() for batch in batches(data)]).float().mean()
    assert 0.26 < share < 0.34
    named = module(Given(*texts(*["red reddish red"] * 4), hidden=["red"]), source_mask=1.0)
    [batch] = batches(named)
    assert batch.hidden[0].tolist() == [c in (0, 1, 2, 12, 13, 14) for c in range(15)]


def test_what_hides() -> None:
    task = Given(*texts("abc"))

    def substitutes(**special: str) -> list[int]:
        tokenizer = byte_tokenizer()
        raw = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
        data = ContextDataModule(task=task, source_mask=0.5)
        data.bind(raw)
        return data.encoding._substitutes

    assert substitutes(eos_token="<eos>", mask_token="A") == [byte_tokenizer().get_vocab()["A"]]
    assert substitutes(eos_token="<eos>", unk_token="<unk>") == [1]
    assert substitutes(eos_token="<eos>") == [2]
    with pytest.raises(ValueError, match="tokenizer of the decoder .* has no EOS token"):
        substitutes(unk_token="<unk>")
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    data = ContextDataModule(task=task, source_mask=0.5)
    with pytest.raises(ValueError, match="data.source_mask=0.5: the compressor's tokenizer .* no"):
        data.bind(bare, byte_tokenizer())


@pytest.mark.filterwarnings("ignore:.*texts are cut")
def test_long_texts_are_refused_or_cut() -> None:
    slots = (
        RED,
        Slot("x/number", "number", "nine", None, ((16, 20),)),
        Slot("y", "negation", "no"),
    )
    probes = (Probe("what?", "red", key=RED.key), Probe("how many?", "nine", key="x/number"))
    long = Context("a", "the lamp red is nine", slots, probes, where="f.txt:7")
    task = Given(*texts("short"), long)
    data = module(task, max_tokens=15, batch_size=2)
    with pytest.raises(ValueError, match=r"f.txt:7: the text has 20 tokens, data.max_tokens=15"):
        ContextTrainingSource(data)
    with pytest.raises(ValueError, match=r"f.txt:7: .* data.on_too_long=cut"):
        data.val_dataloader()
    data = module(task, max_tokens=15, batch_size=2, on_too_long="cut")
    [batch] = batches(data)
    assert sorted(batch.target_mask.sum(1).tolist()) == [6, 16]
    assert batch.slot_mask.sum() == 3
    [one] = data.evaluation_sets("val")
    short, cut = one.contexts
    assert short is task.given[0]
    assert (cut.text, cut.slots, cut.probes) == ("the lamp red is", (RED,), probes[:1])
    assert data.counts == {"train/cut": 1, "val/cut": 1}
    with pytest.warns(UserWarning, match="given, test, pc: 1 of 2 texts are cut"):
        data.test_dataloader()
    exact = module(task, max_tokens=20, batch_size=2)
    assert len(batches(exact)) == 1


def test_the_bound_holds_for_both_tokenizers() -> None:
    context = TwinNouns().contexts("train")[0]
    words = word_tokenizer(TwinNouns().vocabulary())
    for tokenizers in ((words, byte_tokenizer()), (byte_tokenizer(), words)):
        data = ContextDataModule(task=Given(context), max_tokens=10)
        data.bind(*tokenizers)
        with pytest.raises(ValueError, match="data.max_tokens=10"):
            data.evaluation_sets("val")
    several = Given(*texts("\U0001f600\U0001f600\U0001f600"))
    with pytest.warns(UserWarning, match="1 of 1 texts are cut"):
        [one] = module(several, max_tokens=9, on_too_long="cut").evaluation_sets("val")
    assert one.contexts[0].text == "\U0001f600" * 2, "no half characters"
    with pytest.raises(ValueError, match="no beginning of the text fits"):
        module(several, max_tokens=2, on_too_long="cut").evaluation_sets("val")


def test_texts_that_cannot_be_compressed() -> None:
    with pytest.raises(ValueError, match=r"a.txt:2: the text '' has no token"):
        ContextTrainingSource(module(Given(*texts("a", ""))))
    with pytest.raises(ValueError, match=r"a.txt:1: the text holds the EOS token '<eos>'"):
        module(Given(*texts("a <eos> b"))).val_dataloader()
    with pytest.raises(ValueError, match="given: there is no training text"):
        ContextTrainingSource(module(Given()))


def test_evaluations_hand_out_whole_sets(tmp_path: Path) -> None:
    data = module(PriorWorld(**SMALL))
    loader = data.val_dataloader()
    for _ in range(2):
        sets = [rows.items[0] for rows in loader]
        assert [one.name for one in sets] == ["pc", "cf", "sw", "neu", "neg"]
    assert all(isinstance(one, ContextSet) and len(one.contexts) == 5 for one in sets)
    assert [rows.counted for rows in data.test_dataloader()] == [[True]] * 5
    batch = data.evaluation_batch(sets[1].contexts)
    assert batch.uids == [context.uid for context in sets[1].contexts]
    assert data.task.tokenizer.unk_token_id not in batch.source_ids
    assert batch.slot_mask.any(1).all()
    assert module(TwinNouns(num_val=0)).val_dataloader() == []
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    file = module(TextContexts(path=str(path), val_fraction=0, test_fraction=0), batch_size=3)
    assert file.val_dataloader() == []
    assert [len(rows.items[0].contexts) for rows in file.predict_dataloader()] == [3]
    assert len(batches(file)) == 1


def test_training_by_a_trainer_resumes_where_it_was() -> None:
    data = module(TwinNouns(**(SMALL | {"num_train": 16})), source_mask=0.5)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, accumulate_grad_batches=1, limit_train_batches=1.0
    )
    loader = data.train_dataloader()
    first = [batch for batch, _ in zip(loader, range(2), strict=False)]
    again = data.train_dataloader()
    again.load_state_dict(loader.state_dict() | {"index": 2})
    rest = list(again)
    assert len(rest) == 2
    assert digest([*first, *rest]) == digest(batches(data))


def test_wrong_options_are_refused_together() -> None:
    with pytest.raises(ValueError) as caught:
        ContextDataModule(
            task=Given(), batch_size=0, micro_batches=0, max_tokens=0, source_mask=2.0,
            on_too_long="skip", mask_kind="blank",  # type: ignore[arg-type]
        )  # fmt: skip
    message = str(caught.value)
    assert "data.batch_size=0 must be at least 1" in message
    assert "data.micro_batches=0 must be at least 1" in message
    assert "data.max_tokens=0 must be at least 1" in message
    assert "data.source_mask=2.0 must be in [0, 1]" in message
    assert "data.on_too_long='skip' must be one of error, cut" in message
    assert "data.mask_kind='blank' must be one of mask, random" in message
    with pytest.raises(ValueError, match="data.max_tokens=-3 must be at least 1"):
        ContextDataModule(task=Given(), max_tokens=-3)


def test_verify_measures_kept_facts() -> None:
    task = TwinNouns(**SMALL)
    module(task)
    context = task.evaluations("val")[1].contexts[0]
    prompt = task.prompt(context)
    assert prompt.token_ids[-1] == task.tokenizer.eos_token_id and prompt.record is context

    def score(text: str) -> dict[str, float]:
        ids = task.tokenizer(text)["input_ids"]
        return task.verify(prompt, SimpleNamespace(token_ids=(*ids, prompt.token_ids[-1])))  # type: ignore[arg-type]

    assert score(context.text) == {"reward": 1.0, "valid": 1.0}
    assert score(" ".join(context.text.split()[:3])) == {"reward": 0.5, "valid": 0.5}
    plain = Given(*texts("abc"))
    module(plain)
    ids = tuple(plain.tokenizer("abc")["input_ids"])
    done = SimpleNamespace(token_ids=ids)
    assert plain.verify(plain.prompt(plain.given[0]), done)["reward"] == 1  # type: ignore[arg-type]
