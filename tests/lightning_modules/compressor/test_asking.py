"""Questions: what is trained on them, a pair that answers, answers that are always usual."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from datamodules.context_encoding import CompressionBatch
from datamodules.engines.base import sample_seed
from datamodules.tasks.compression import Context, ContextSet, Probe, Slot
from datamodules.tasks.twin_nouns import TwinNouns
from lightning_modules.compressor.asking import answer_metrics, answer_questions
from lightning_modules.compressor.base import CompressorModule
from lightning_modules.compressor.measuring import measure_set
from lightning_modules.compressor.training import ask, exercise_of
from lightning_modules.functional.sums import means
from tests.lightning_modules.compressor.small_pair import overfit


class Learnt(TwinNouns):
    """Eight training texts, all as usual; twins against the prior, and with the names exchanged."""

    def evaluations(self, split: str) -> list[ContextSet]:  # type: ignore[override]
        found = [ContextSet("pc", list(self.contexts("train")))]
        for name, usual, order in (("cf", 0.0, 1.0), ("sw", 1.0, 0.0)):
            rates = {"train": (1.0, 1.0), name: (usual, order)}
            found.append(ContextSet(name, [self._twin(i, *rates[name]) for i in range(8)]))
        return found

    def _twin(self, index: int, usual: float, order: float) -> Context:
        uid = f"{self.name}/{self.seed}/train/{index}"
        plan = Random(uid)
        plan.random()
        return self._write(f"{uid}/twin", plan, Random("values"), usual, order)


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompressorModule, dict[str, Any]]:
    """A pair that was trained on nothing but questions about eight texts, and its test."""
    folder = tmp_path_factory.mktemp("answering")
    task = Learnt(
        num_first=3, num_second=3, num_colours=4, num_held_out=0, facts=2, relations=1,
        num_names=4, num_verbs=8, relation_rate=1.0, num_train=8,
    )  # fmt: skip
    module = overfit(
        task, folder, 120, qa_ratio=1.0, extra_tokens=2, memory={"tokens": 8},
        controls=["shuffled"],
    )  # fmt: skip
    return module.eval(), module.results


def batch_of(module: Any, name: str) -> tuple[ContextSet, CompressionBatch]:
    data = module.trainer.datamodule
    one = next(one for one in data.evaluation_sets("test") if one.name == name)
    return one, data.evaluation_batch(one.contexts)


# ---------------------------------------------------------------------- training


def test_the_loss_is_the_mean_over_answers_and_their_eos(answering: Any) -> None:
    module, _ = answering
    _, batch = batch_of(module, "cf")
    batch.probes = [own if i % 3 else () for i, own in enumerate(batch.probes)]
    step, tokenizer = module.trainer.global_step, module.trainer.datamodule.task.tokenizer
    loss = module.training_step(batch, 0)
    total = count = 0.0
    for i, uid in enumerate(batch.uids):  # one text at a time, and no batch mates
        if not batch.probes[i]:
            continue
        probe = batch.probes[i][sample_seed(f"qa/{step}", uid, 0) % len(batch.probes[i])]
        question, answer = (
            torch.tensor([tokenizer(text)["input_ids"]]) for text in (probe.question, probe.answer)
        )
        labels = torch.cat([answer, torch.tensor([[tokenizer.eos_token_id]])], 1)
        pair = module.policy
        with torch.no_grad():
            memory = pair.compress(batch.source_ids[[i]], batch.source_mask[[i]])
            table = pair.decoder.base.get_input_embeddings()
            parts = [memory.embeds, pair.bridge.prompt("qa", 1), table(question), table(answer)]
            logits = pair.decoder.base(inputs_embeds=torch.cat(parts, 1)).logits[0]
        logprobs = logits[-labels.shape[1] :].log_softmax(-1)
        total -= float(logprobs.gather(1, labels.T).sum())
        count += labels.shape[1]
    assert count == 2 * 5, "each of five answers is a word and EOS"
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)


def test_metrics_of_answers_are_apart(answering: Any) -> None:
    module, _ = answering
    _, batch = batch_of(module, "pc")
    module._window = {}
    module.training_step(batch, 0)
    assert module._window["train/qa/ce_slot"][1] == module._window["train/qa/ce_rest"][1] == 8
    assert "train/ce" not in module._window and module._window["train/loss"][1] == 16


def test_a_step_does_the_same_on_all_ranks_and_after_a_resume(answering: Any) -> None:
    module, _ = answering
    _, batch = batch_of(module, "pc")
    half = replace(
        batch,
        **{
            name: getattr(batch, name)[1::2]
            for name in ("source_ids", "source_mask", "target_ids", "target_mask", "hidden",
                         "slot_mask")
        },
        uids=batch.uids[1::2],
        probes=batch.probes[1::2],
    )  # fmt: skip
    module.lm_ratio, module.qa_ratio = 0.25, 0.25
    try:
        steps = range(300)
        kinds = [exercise_of(module, batch, step).prompt for step in steps]
        assert kinds == [exercise_of(module, half, step).prompt for step in steps]
        assert all(60 < kinds.count(kind) < 90 for kind in ("lm", "qa"))
        module.qa_start = 40
        later = [exercise_of(module, batch, step).prompt for step in steps]
        assert later[40:] == kinds[40:] and "qa" in kinds[:40]
        assert later[:40] == ["ae" if kind == "qa" else kind for kind in kinds[:40]]
        module.qa_start, module.qa_ratio = 0, 0.0
        alone = [exercise_of(module, batch, step).prompt for step in steps]
        assert alone == ["ae" if kind == "qa" else kind for kind in kinds]
        module.qa_ratio, step = 0.25, kinds.index("qa")
        whole, part = (exercise_of(module, one, step) for one in (batch, half))
        assert torch.equal(whole.question[0][1::2], part.question[0])  # type: ignore[index]
        assert torch.equal(whole.batch.target_ids[1::2], part.batch.target_ids)
        assert torch.equal(whole.batch.source_ids, batch.source_ids)
    finally:
        module.lm_ratio, module.qa_ratio, module.qa_start = 0.0, 1.0, 0


def test_texts_without_questions(answering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = answering
    _, batch = batch_of(module, "pc")
    tokenizer = module.trainer.datamodule.task.tokenizer
    none = replace(batch, probes=[()] * 8)
    assert exercise_of(module, none, 0).prompt == "ae", "rebuilt, as other texts have questions"
    by_hand = replace(batch, probes=[])
    assert ask(by_hand, tokenizer, "k").batch.target_mask.shape == (8, 0)
    # a rank without questions beside one with some: no label, but all gradients
    monkeypatch.setattr(
        "lightning_modules.compressor.training.sum_of_ranks", lambda _: torch.tensor(4.0)
    )
    asked = exercise_of(module, none, 0)
    assert asked.prompt == "qa" and not asked.batch.target_mask.any()
    module.zero_grad()
    loss = module.training_step(none, 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    module.zero_grad()


def test_texts_that_never_ask_are_refused(answering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = answering
    _, batch = batch_of(module, "pc")
    data = module.trainer.datamodule
    mute = [replace(context, probes=()) for context in data.training_contexts()]
    monkeypatch.setattr(data, "training_contexts", lambda: mute)
    with pytest.raises(ValueError, match=r"model.qa_ratio=1.0 needs questions, .*qa_ratio=0, or"):
        exercise_of(module, replace(batch, probes=[()] * 8), 0)


def test_bad_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.qa_ratio=-0.5 must be in \[0, 1\]"):
        CompressorModule(backbone="x", qa_ratio=-0.5)
    with pytest.raises(ValueError, match=r"lm_ratio=0.6 plus model.qa_ratio=0.5 must be at most 1"):
        CompressorModule(backbone="x", lm_ratio=0.6, qa_ratio=0.5)
    with pytest.raises(ValueError, match=r"model.qa_start=-1 must be 0 or more"):
        CompressorModule(backbone="x", qa_start=-1)
    CompressorModule(backbone="x", lm_ratio=0.7, qa_ratio=0.3)


# ---------------------------------------------------------------------- evaluation


def test_a_pair_that_learnt_answers_answers(answering: Any) -> None:
    _, found = answering
    for tag in ("fact_fidelity", "fact_fidelity_agree", "relation/fact_fidelity"):
        assert found[f"test/pc/qa/{tag}"] == 1
    assert found["test/pc/qa/role_flip"] == found["test/pc/qa/slot_lost"] == 0
    assert found["test/pc/fact_fidelity"] < 0.5, "nobody taught it to rebuild"
    assert found["test/pc/shuffled/qa/fact_fidelity"] < 1
    assert 0 <= found["test/cf/qa/knowledge_overwriting"] <= 1


def test_a_memory_of_what_is_usual_overwrites_everything(answering: Any) -> None:
    """The memory of the usual twin says the prior whatever the text says: KO = 1, or RF = 1."""
    module, _ = answering
    _, usual = batch_of(module, "pc")
    for name, overwritten, flipped in (("cf", 1.0, 0.0), ("sw", 0.0, 1.0)):
        one, _ = batch_of(module, name)
        memory = module.memory_of(usual, "k")
        answers = answer_questions(module, one, memory, one.contexts)
        assert [len(own) for own in answers] == [3] * 8
        found = means(answer_metrics(each for own in answers for each in own))
        assert found["qa/fact_fidelity"] == 1 - overwritten
        assert found.get("qa/knowledge_overwriting", 0.0) == overwritten
        assert found["qa/relation/fact_fidelity"] == 1 - flipped
        assert found["qa/role_flip"] == found.get("qa/relation/knowledge_overwriting", 0) == flipped


def test_answers_do_not_depend_on_batches_or_on_the_steps_of_other_ranks(answering: Any) -> None:
    module, _ = answering
    data = module.trainer.datamodule
    one, batch = batch_of(module, "cf")
    found = []
    for size in (2, 8):
        data.eval_batch_size = size
        found.append(measure_set(module, one, "test").metrics)
    data.eval_batch_size = 3
    assert found[0].keys() == found[1].keys() == {"", "/shuffled"}
    for arm in found[0]:
        for name in (name for name in found[0][arm] if name.startswith("qa/")):
            assert [float(v) for v in found[0][arm][name]] == [
                float(v) for v in found[1][arm][name]
            ]
    asked: list[int] = []

    def longest(value: int, device: Any) -> int:
        asked.append(value)
        return 9

    memory = module.memory_of(batch, "k")
    own = answer_questions(module, one, memory, one.contexts)
    assert answer_questions(module, one, memory, one.contexts, steps_of=longest) == own
    assert asked == [4, 4, 4], "a word, EOS and two more, three times"


def test_uneven_questions_are_asked_of_those_that_have_them(answering: Any) -> None:
    module, _ = answering
    one, batch = batch_of(module, "pc")
    rows = [replace(row, probes=row.probes[: i % 4]) for i, row in enumerate(one.contexts)]
    memory = module.memory_of(batch, "k")
    found = answer_questions(module, ContextSet("pc", one.contexts), memory, rows)
    whole = answer_questions(module, one, memory, one.contexts)
    assert [len(own) for own in found] == [0, 1, 2, 3] * 2
    for own, all_of_it, row in zip(found, whole, rows, strict=True):
        assert [(p, said) for _, p, said in own] == [(p, s) for _, p, s in all_of_it][: len(own)]
        assert all(context is row for context, _, _ in own)


def test_kinds_of_answers_by_hand() -> None:
    slots = (
        Slot("door/colour", "attribute", "red", "blue"),
        Slot("hit/relation", "relation", "ann hit bob", "ann hit bob"),
        Slot("hit/negation", "negation", "yes", "no"),
        Slot("box/number", "number", "three", "four"),
    )
    context = Context("u", "x", slots)
    probes = [
        Probe("what", "red", "blue", key="door/colour"),
        Probe("who", "ann", "ann", "drift", "hit/relation"),
        Probe("did", "no", "yes", "drift", "hit/negation"),
        Probe("how many", "three", "four", key="box/number"),
        Probe("no slot", "paris", "rome", key="city"),
    ]
    said = {
        "right": ["red", "ann", "no", "three", "paris"],
        "usual": ["blue", "ann", "yes", "four", "rome"],
        "flipped": ["green", "bob", "yes", "five", None],
        "lost": [None, "eve", "maybe", "many", "oslo"],
    }
    found = {
        name: means(answer_metrics((context, p, s) for p, s in zip(probes, own, strict=True)))
        for name, own in said.items()
    }
    rates = ("fact_fidelity", "knowledge_overwriting", "negation/knowledge_overwriting",
             "role_flip", "negation_flip", "number_flip", "slot_lost")  # fmt: skip
    assert {n: [v[f"qa/{rate}"] for rate in rates] for n, v in found.items()} == {
        "right": [1, 0, 0, 0, 0, 0, 0],
        "usual": [0, 1, 1, 0, 1, 1, 0],
        "flipped": [0, 0, 1, 1, 1, 1, 0.5],
        "lost": [0, 0, 0, 0, 0, 0, 0.5],
    }
    assert found["usual"]["qa/relation/fact_fidelity"] == 1
    assert answer_metrics([]) == {}
