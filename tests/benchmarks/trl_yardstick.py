"""The yardstick: TRL's GRPOTrainer on the work that ``tests.benchmarks.policy_step`` measures.

A random 4-layer, width-160 Qwen3 over 98 tokens, 8 prompts of 16 tokens x 8 samples of at most 48
new tokens, no reference model, one optimizer step a rollout, float32 on the CPU. Checkpointing,
logging and TRL's default gradient checkpointing are off, so that only the step is timed.

Needs the extra ``bench``. Run it alone, or beside our benchmark to compare the two::

    python tests/benchmarks/trl_yardstick.py --steps 8 --threads 2

It prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NUM_PROMPTS, NUM_SAMPLES = 8, 8
PROMPT_TOKENS, NEW_TOKENS = 16, 48
VOCABULARY = ["<pad>", "<eos>"] + [f"w{index}" for index in range(96)]


def make_tokenizer():
    """Word-level tokenizer over ``VOCABULARY``, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model():
    """Random Qwen3 of about 1.3M parameters, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=40,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).float()


def make_prompts(count: int) -> list[dict[str, str]]:
    """``count`` prompts of exactly ``PROMPT_TOKENS`` words."""
    import random

    rng = random.Random(0)
    words = VOCABULARY[2:]
    return [{"prompt": " ".join(rng.choices(words, k=PROMPT_TOKENS))} for _ in range(count)]


def even_share(completion_ids, **_):
    """Trivial reward: the share of even token ids in each completion."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def make_trainer(*, steps: int, output_dir: str):
    """GRPOTrainer that records seconds and tokens of every step in ``trainer.records``."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        records: list[dict[str, float]]

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            start = time.perf_counter()
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self.records[-1]["generation"] = time.perf_counter() - start
            self.records[-1]["completions"] = len(completion_ids)
            self.records[-1]["prompt_tokens"] = sum(len(ids) for ids in prompt_ids)
            self.records[-1]["tokens"] = sum(len(ids) for ids in completion_ids)
            return completion_ids, logprobs

        def _generate_and_score_completions(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate_and_score_completions(*args, **kwargs)
            self.records[-1]["rollout"] = time.perf_counter() - start
            return out

    class StepClock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            trainer.records.append({"start": time.perf_counter()})

        def on_step_end(self, args, state, control, **kwargs):
            record = trainer.records[-1]
            record["step"] = time.perf_counter() - record.pop("start")

    batch = NUM_PROMPTS * NUM_SAMPLES
    config = GRPOConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        num_generations=NUM_SAMPLES,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = TimedTrainer(
        model=make_model(),
        reward_funcs=even_share,
        args=config,
        train_dataset=Dataset.from_list(make_prompts(steps * NUM_PROMPTS)),
        processing_class=make_tokenizer(),
        callbacks=[StepClock()],
    )
    trainer.remove_callback(PrinterCallback)  # it would print a second line
    trainer.records = []
    return trainer


def summarise(records: list[dict[str, float]], *, warmup: int) -> dict[str, float]:
    """Median seconds of the steps after ``warmup`` and tokens per second over the same steps."""
    kept = records[warmup:]
    seconds = {key: statistics.median(r[key] for r in kept) for key in ("step", "generation")}
    rollout = statistics.median(r["rollout"] for r in kept)
    return {
        "seconds_per_step": round(seconds["step"], 4),
        "seconds_generation": round(seconds["generation"], 4),
        "seconds_score": round(rollout - seconds["generation"], 4),
        "seconds_train": round(statistics.median(r["step"] - r["rollout"] for r in kept), 4),
        "seconds_per_step_min": round(min(r["step"] for r in kept), 4),
        "seconds_per_step_max": round(max(r["step"] for r in kept), 4),
        "tokens_per_second": round(sum(r["tokens"] for r in kept) / sum(r["step"] for r in kept)),
        "tokens_per_step": round(statistics.mean(r["tokens"] for r in kept)),
    }


def main() -> None:
    """Run the yardstick and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    import torch
    import transformers

    try:
        import trl
    except ModuleNotFoundError:
        parser.error("trl is not installed; try: pip install -e '.[bench]'")
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(steps=options.warmup + options.steps, output_dir=folder)
        trainer.train()
    for record in trainer.records:  # the work must be the work that we compare with
        assert record["completions"] == NUM_PROMPTS * NUM_SAMPLES
        assert record["prompt_tokens"] == NUM_PROMPTS * NUM_SAMPLES * PROMPT_TOKENS
    line = {
        "what": "trl_grpo",
        **summarise(trainer.records, warmup=options.warmup),
        "steps": options.steps,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "threads": torch.get_num_threads(),
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
