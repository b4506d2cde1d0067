"""What the tests of the prefix-audit task share."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from datamodules.experience import Completion, FinishReason
from datamodules.tasks.prefix_audit import PrefixAudit

SPECIAL = ["<pad>", "<unk>", "<eos>"]
EOS = 2


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + words)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def make_task(**options: object) -> PrefixAudit:
    task = PrefixAudit(**options)
    task.bind(make_tokenizer(task.vocabulary()))
    return task


def written(
    task: PrefixAudit, text: str, finish: FinishReason = FinishReason.STOP, eos: bool = True
) -> Completion:
    ids = tuple(task.tokenizer.convert_tokens_to_ids(text.split())) + (EOS,) * eos
    return Completion(ids, (0.0,) * len(ids), finish)
