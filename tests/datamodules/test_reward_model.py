"""The reward model: logits as plain transformers gives them, domains, bad scores, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from datamodules.experience import Completion, FinishReason, Rollouts
from datamodules.rewards import RewardModel, VerifierReward, replace_bad
from datamodules.tasks.chat_prompts import ChatPrompts
from datamodules.tasks.instructions import InstructionFile
from datamodules.tasks.mixture import Mixture
from tests.datamodules.tasks.test_preferences import byte_tokenizer, write

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of one layer with a head of one label, its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    chat = write(tmp_path, [{"prompt": "Why?"}, {"prompt": "How so?"}], "chat.jsonl")
    row = {"prompt": "Do.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rules = write(tmp_path, [row], "if.jsonl")
    task = Mixture(tasks={"chat": ChatPrompts(path=chat), "if": InstructionFile(path=rules)})
    task.bind(byte_tokenizer())
    return task


def rollouts(task: Mixture, texts: list[list[str]], cut: tuple[int, ...] = ()) -> Rollouts:
    prompts = [task.prompt(record) for record in task.records("predict")]
    number = iter(range(100))
    groups = []
    for group in texts:
        made = []
        for text in group:
            ids = tuple(task.tokenizer(text, add_special_tokens=False)["input_ids"])
            reason = FinishReason.LENGTH if next(number) in cut else FinishReason.STOP
            made.append(Completion((*ids, 2), (0.0,) * (len(ids) + 1), reason))
        groups.append(made)
    return Rollouts.from_groups(prompts, groups)


def plain_logit(folder: Path, text: str) -> float:
    """One unpadded sequence through the model itself."""
    model = Qwen3ForSequenceClassification.from_pretrained(folder).eval()
    ids = byte_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


TEXTS = [["Yes.", "<think>long</think> No, never at all."], ["a", "b"], ["x", "x, y"]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_the_logits_of_the_conversation(
    judge: Path, mixture: Mixture, batch_size: int
) -> None:
    reward = RewardModel(path=str(judge), dtype="float32", batch_size=batch_size, device="cpu")
    parts = reward(rollouts(mixture, TEXTS))
    expected = [
        plain_logit(judge, f"[user]{asked}[assistant]{said}")
        for asked, said in (
            ("Why?", "Yes."),
            ("Why?", "No, never at all."),
            ("How so?", "a"),
            ("How so?", "b"),
        )  # fmt: skip
    ]
    assert parts["reward"][:4].tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 4, "the test tells responses apart"
    assert parts["reward"][4:].tolist() == [1.0, 0.0], "rules overwrite"
    assert parts["reward_model"][4:].tolist() == [0.0, 0.0]
    assert parts["reward_nan"].tolist() == [0.0] * 6
    assert all(value.shape == (6,) for value in parts.values())
    assert not any(p.requires_grad for p in reward._model.parameters())


def test_without_a_chat_template_turns_are_written_out(judge: Path, mixture: Mixture) -> None:
    reward = RewardModel(path=str(judge), dtype="float32", device="cpu")
    reward._load()
    reward._tokenizer.chat_template = None
    got = reward.scores([((("user", "Why?"),), "Yes.")])
    assert float(got) == pytest.approx(plain_logit(judge, "user: Why?\nassistant: Yes."), abs=1e-5)


def test_long_conversations_lose_their_beginning(judge: Path) -> None:
    reward = RewardModel(path=str(judge), dtype="float32", device="cpu", max_tokens=6)
    assert float(reward.scores([((("user", "Why?"),), "Yes.")])) == pytest.approx(
        plain_logit(judge, "[user]Why?[assistant]Yes."[-6:]), abs=1e-5
    )


def test_cut_completions(judge: Path, mixture: Mixture) -> None:
    options: dict[str, Any] = {"path": str(judge), "dtype": "float32", "device": "cpu"}
    whole = RewardModel(**options)(rollouts(mixture, TEXTS))["reward"]
    as_is = RewardModel(**options)(rollouts(mixture, TEXTS, cut=(1, 4)))["reward"]
    assert torch.equal(as_is, whole)
    ruled = RewardModel(truncated=-3.0, **options)(rollouts(mixture, TEXTS, cut=(1, 4)))["reward"]
    assert ruled[[1, 4]].tolist() == [-3.0, -3.0]
    assert torch.equal(ruled[[0, 2, 3, 5]], whole[[0, 2, 3, 5]])


def test_bad_scores_are_counted_and_win_nothing(
    judge: Path, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = RewardModel(path=str(judge), dtype="float32", device="cpu")
    bad = torch.tensor([math.nan, 2.0, math.nan, math.inf])
    monkeypatch.setattr(reward, "scores", lambda items: bad)
    parts = reward(rollouts(mixture, TEXTS))
    assert parts["reward"].tolist() == [2.0, 2.0, 0.0, 0.0, 1.0, 0.0]
    assert parts["reward_nan"].tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_replace_bad_takes_the_lowest_of_the_group() -> None:
    scores = torch.tensor([3.0, -math.inf, 1.0, math.nan, 5.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert replace_bad(scores, groups).tolist() == [3.0, 1.0, 1.0, 5.0, 5.0]
    assert math.isnan(scores[3]), "the input is left alone"


def test_refusals(judge: Path, mixture: Mixture, tmp_path: Path) -> None:
    made = rollouts(mixture, TEXTS)
    with pytest.raises(ValueError, match="'chat_prompts' has no verifier.*reward=model"):
        VerifierReward()(made)
    with pytest.raises(ValueError, match=r"reward\.domains has 'if'.*leave it to its verifier"):
        RewardModel(path=str(judge), domains=["chat", "if"])(made)
    with pytest.raises(ValueError, match=r"reward\.domains=\['math'\] leaves out 'chat'"):
        RewardModel(path=str(judge), domains=["math"])(made)
    with pytest.raises(ValueError, match=r"reward\.path=.*could not be loaded"):
        RewardModel(path=str(tmp_path / "nothing"))(made)
    with pytest.raises(ValueError, match=r"reward\.batch_size=0.*reward\.dtype='half'"):
        RewardModel(path="x", batch_size=0, dtype="half")
