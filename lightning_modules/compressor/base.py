"""CompressorModule: a language model that writes memory, and one that reads the text back from it.

Paper: "When Less is More: The LLM Scaling Paradox in Context Compression", arXiv 2602.09789. Its
body could not be read: the set-up is that of ICAE and 500xCompressor [code], the measurements are
the card's (section 2.1) [our choice].

    H = Enc([x; M]),  Z = P(H at M)                    n tokens become m memory vectors
    L_AE = - mean_t log p_Dec(x_t | Z, a, x_<t)        the decoder rebuilds the text, then EOS

The claim: larger compressors lower L_AE and yet are less faithful, because they recall what is
usual (knowledge overwriting) or rephrase (drift, role flips). So every evaluation also lets the
decoder run freely and asks which facts came back.

    memory_of     texts -> memory                          (segments, forms: ``Pair``)
    token_loss    memory, texts -> loss a label            (``lm_ratio``, ``qa_ratio``)
    penalties     memory, scores -> further losses         (rank and entropy control)
    evaluate      sets of contexts -> fidelity             (``measuring``)

Where we differ: a tiny pair starts from a decoder that was fitted to texts without a prior and
from a compressor that was fitted to the world as a language model (``backbones/tiny_pair``), as the
card's second trial does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.context_encoding import CompressionBatch
from datamodules.engines.base import sample_seed
from datamodules.loader import Rows, gather_objects
from lightning_modules.backbones.export import backbone_files
from lightning_modules.compressor.comparing import compare_sets, rates_of_sets
from lightning_modules.compressor.folders import DecoderOptions, build_pair, export_pair
from lightning_modules.compressor.interventions import (
    erank_shortfall,
    mean_entropy,
    nuclear_norm,
    token_weights,
    whitening,
)
from lightning_modules.compressor.measuring import Measured, measure_set
from lightning_modules.compressor.memory import Memory
from lightning_modules.compressor.options import (
    EntropyControl,
    LossOptions,
    MemoryOptions,
    ProjectorOptions,
    RankControl,
)
from lightning_modules.compressor.pair import Pair, Question, TokenScores
from lightning_modules.compressor.predicting import predict_set
from lightning_modules.compressor.projector import Prompt, continue_bridge, part_problems
from lightning_modules.compressor.sizes import pair_sizes
from lightning_modules.compressor.training import (
    exercise_of,
    mean_of_ranks,
    ratio_problems,
    sum_of_ranks,
)
from lightning_modules.evaluation import EvaluatedModule
from lightning_modules.functional.sums import Metrics
from lightning_modules.functional.uncertainty import by_slot
from lightning_modules.grm.embedders import EncoderEmbedder, build_embedder
from lightning_modules.options import read_options

CONTROLS = ("shuffled", "zero")


class CompressorModule(EvaluatedModule):
    """Trains and measures one compressor-decoder pair.

    Args:
        decoder: ``backbone`` (null: the decoder beside the compressor in its folder), ``train``,
            ``lora``; see ``DecoderOptions``.
        memory: See ``MemoryOptions``.
        projector: See ``ProjectorOptions``.
        rank_control: See ``RankControl``.
        entropy_control: See ``EntropyControl``.
        loss: See ``LossOptions``.
        lm_ratio: Share of the batches that continue a text (its second half from the memory of the
            first) instead of rebuilding it [code: ICAE, 0 by default there].
        qa_ratio: Share of the batches that answer one question a text from its memory [code: ICAE,
            a stage of its own there; the mix is our choice]. Above 0 evaluations ask as well.
        qa_start: Steps before the first such batch.
        controls: Null models that evaluations also measure: ``shuffled`` (another text's memory)
            and ``zero`` (none).
        bridge_parts: Parts of the bridge that start as the backbone's folder has them, such as
            ``projector.up``, and stay so [card, second trial]; [] for none.
        embedder: Of ``semantic_drift_index``: ``hashed``, ``minilm``, a folder or hub name of an
            encoder; None measures none.
        extra_tokens: A decode may be this much longer than its source (card, section 3: 8).
        **kwargs: Of ``BaseModule``.

    Raises:
        ValueError: A value is not allowed.
    """

    def __init__(
        self,
        *,
        decoder: Mapping[str, Any] | None = None,
        memory: Mapping[str, Any] | None = None,
        projector: Mapping[str, Any] | None = None,
        rank_control: Mapping[str, Any] | None = None,
        entropy_control: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        lm_ratio: float = 0.0,
        qa_ratio: float = 0.0,
        qa_start: int = 0,
        controls: Sequence[str] = CONTROLS,
        bridge_parts: Sequence[str] = (),
        embedder: str | None = None,
        extra_tokens: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.decoder_values = dict(decoder or {})
        read_options(DecoderOptions, {**self.decoder_values, "backbone": ""}, "model.decoder")
        self.memory_options = read_options(MemoryOptions, memory, "model.memory")
        self.projector_options = read_options(ProjectorOptions, projector, "model.projector")
        self.rank_control = read_options(RankControl, rank_control, "model.rank_control")
        self.entropy_control = read_options(
            EntropyControl, entropy_control, "model.entropy_control"
        )
        self.loss_options = read_options(LossOptions, loss, "model.loss")
        problems = ratio_problems({"lm_ratio": lm_ratio, "qa_ratio": qa_ratio})
        counts = {"qa_start": qa_start, "extra_tokens": extra_tokens}
        problems += part_problems(bridge_parts, self.memory_options)
        problems += [f"model.{k}={v} must be 0 or more" for k, v in counts.items() if v < 0]
        if odd := [name for name in controls if name not in CONTROLS]:
            problems.append(f"model.controls has {odd[0]!r}; there are {', '.join(CONTROLS)}")
        if embedder == "policy":
            problems.append("model.embedder=policy: give one of hashed, minilm, a folder, null")
        if problems:
            raise ValueError("; ".join(problems))
        self.embedder = None if embedder is None else build_embedder(embedder)
        self.lm_ratio, self.qa_ratio, self.qa_start = lm_ratio, qa_ratio, qa_start
        self.controls = tuple(controls)
        self.bridge_parts, self.extra_tokens = list(bridge_parts), extra_tokens
        #: Set -> what the last evaluation found there, on rank 0 of all rows; figures read it.
        self.outcomes: dict[str, Any] = {}
        self._measured: dict[str, Measured] = {}

    # ------------------------------------------------------------------ building

    def build(self) -> None:
        """Load both models and the bridge between them.

        Raises:
            ValueError: There is no decoder, or the parts do not fit together.
        """
        if isinstance(self.embedder, EncoderEmbedder):
            self.embedder.load()  # a misspelt name is found before anything is trained
        self.policy = build_pair(
            self.backbone_options,
            self.decoder_options(),
            self.memory_options,
            self.projector_options,
            lora=self.lora_options,
            kernel=self.kernel_options,
        )
        continue_bridge(self.policy.bridge, self.backbone_options, self.bridge_parts)

    def configure_model(self) -> None:
        """As usual; a sharded pair gathers its weights in every method that runs them."""
        is_new = self.policy is None
        super().configure_model()
        if is_new and self.device_mesh is not None:
            from torch.distributed.fsdp import register_fsdp_forward_method

            for name in Pair.forward_methods:
                register_fsdp_forward_method(self.policy, name)

    def decoder_options(self) -> DecoderOptions:
        """The decoder's options; without a path of its own it is the one in the pair's folder.

        Raises:
            ValueError: There is none.
        """
        given = {k: v for k, v in self.decoder_values.items() if v is not None}
        own = asdict(self.backbone_options)
        beside = Path(own["path"], "decoder")
        path = given.pop("backbone", None) or (str(beside) if beside.is_dir() else None)
        if path is None:
            raise ValueError(
                f"model.decoder.backbone=null: {own['path']} is no exported pair, so name the "
                f"model that reads the memory, such as model.decoder.backbone={own['path']}"
            )
        is_beside = path == str(beside)
        values = {**own, "path": path, "random_init": own["random_init"] and is_beside}
        values["revision"] = own["revision"] if is_beside or path == own["path"] else None
        return read_options(DecoderOptions, {**given, "backbone": values}, "model.decoder")

    # ------------------------------------------------------------------ training

    def memory_of(self, batch: CompressionBatch, key: str) -> Memory:
        """Memory of the sources of a batch.

        Args:
            batch: On this device.
            key: Of the noise, where there is any: it depends on this and on the texts alone.
        """
        seeds = None
        if self.projector_options.noise:
            seeds = [sample_seed(key, uid, 0) for uid in batch.uids]
        memory: Memory = self.policy.compress(batch.source_ids, batch.source_mask, seeds)
        return memory

    def token_loss(
        self,
        memory: Memory,
        batch: CompressionBatch,
        prompt: Prompt,
        question: Question | None = None,
    ) -> TokenScores:
        """What the decoder says of every label under teacher forcing, ``(B, t)`` each.

        Args:
            memory: Of the batch.
            batch: Its targets.
            prompt: ``ae`` rebuilds, ``lm`` continues, ``qa`` answers.
            question: Ids and mask, for ``qa``.
        """
        control = self.entropy_control
        scores: TokenScores = self.policy.score(
            memory,
            batch.target_ids,
            batch.target_mask,
            prompt=prompt,
            question=question,
            label_smoothing=control.label_smoothing,
            entropy_grad=control.penalty != 0,
        )
        return scores

    def penalties(
        self, memory: Memory, scores: TokenScores, batch: CompressionBatch
    ) -> tuple[Tensor | None, Metrics]:
        """Losses besides that of the labels: on the rank of Z, on the entropy; None for none.

        Those on the rank see the vectors of this rank's micro-batch.

        Args:
            memory: Of the batch, with gradients.
            scores: Of the labels.
            batch: Their texts.
        """
        control = self.rank_control
        metrics: Metrics = {}
        total: Tensor | None = None
        parts: dict[str, tuple[float, Tensor]] = {}
        if control.nuclear or control.whitening or control.erank_floor is not None:
            vectors = memory.stacked("embeds")
            if control.nuclear:
                parts["nuclear_norm"] = control.nuclear, nuclear_norm(vectors)
            if control.whitening:
                parts["whitening"] = control.whitening, whitening(vectors)
            if control.erank_floor is not None:
                shortfall = erank_shortfall(vectors, control.erank_floor)
                parts["erank_shortfall"] = control.erank_weight, shortfall
        if self.entropy_control.penalty:
            entropy = mean_entropy(scores.entropy, batch.target_mask)
            parts["entropy_penalty"] = self.entropy_control.penalty, entropy
        for name, (weight, value) in parts.items():
            total = weight * value if total is None else total + weight * value
            metrics[name] = (float(value.detach()), 1.0)
        return total, metrics

    def training_step(self, batch: CompressionBatch, batch_idx: int) -> Tensor:
        """Compress, rebuild (continue, answer), return the mean loss of the labels of all ranks.

        Args:
            batch: Of this rank.
            batch_idx: Not used.

        Raises:
            ValueError: No label of a continuation is left behind ``model.loss.skip``, or the
                training texts have no questions that could be asked.
        """
        step = self.trainer.global_step
        prompt, batch, question = exercise_of(self, batch, step)
        memory = self.memory_of(batch, f"train/{step}")
        scores = self.token_loss(memory, batch, prompt, question)
        weights = token_weights(
            batch.target_mask,
            batch.slot_mask,
            slot_weight=self.loss_options.slot_weight,
            skip=self.loss_options.skip if prompt == "lm" else 0,
        )
        if prompt == "lm" and not float(sum_of_ranks(weights.sum())):
            raise ValueError(
                f"model.loss.skip={self.loss_options.skip} leaves no label of the continuations of "
                f"step {step} (model.lm_ratio={self.lm_ratio}): lower it, or use longer texts"
            )
        total = torch.where(weights != 0, scores.loss, 0.0).mul(weights).sum()
        loss = mean_of_ranks(total, weights.sum())
        penalty, metrics = self.penalties(memory, scores, batch)
        live = batch.target_mask.bool()
        metrics |= by_slot("ce", -scores.logprob.detach(), live, batch.slot_mask)
        metrics |= by_slot("entropy", scores.entropy.detach(), live, batch.slot_mask)
        metrics["loss"] = (total.detach(), weights.sum())
        metrics["hidden"] = (batch.hidden.sum(), batch.source_mask.sum())
        metrics["short"] = (float(memory.num_short), float(len(batch.uids)))
        if prompt != "ae":
            metrics = {f"{prompt}/{name}": value for name, value in metrics.items()} | {
                "loss": metrics["loss"]
            }
        self.record({f"train/{name}": value for name, value in metrics.items()})
        return loss if penalty is None else loss + penalty

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, batch: Rows, split: str) -> Mapping[str, Metrics]:
        """Fidelity of sets of contexts; ranks share the rows of each.

        Args:
            batch: ``ContextSet`` each.
            split: ``val`` or ``test``.
        """
        found: dict[str, Metrics] = {}
        for one, is_counted in zip(batch.items, batch.counted, strict=True):
            if is_counted:
                measured = measure_set(self, one, split)
                self._measured[one.name] = measured
                found |= {f"{one.name}{arm}": m for arm, m in measured.metrics.items()}
        return found

    def finish_evaluation(self, split: str) -> dict[str, float]:
        """Means over all ranks, what compares sets (gaps, paired tests, ranks), sizes in a test."""
        values = super().finish_evaluation(split)
        if split == "test":
            values |= pair_sizes(self.policy)
        parts = gather_objects(self._measured)
        self._measured = {}
        if not parts[0]:
            return values
        more, self.outcomes = compare_sets(parts, split)
        return values | more

    def composites(self, merged: Metrics) -> dict[str, float]:
        """BLEU of whole sets, and overwriting beyond that of another text's memory.

        Args:
            merged: Tag -> (sum, count) of all ranks.
        """
        return rates_of_sets(merged)

    def predict_step(self, batch: Rows, batch_idx: int) -> list[dict[str, Any]]:
        """This rank's texts of sets as the decoder writes them, see ``predict_set``.

        Args:
            batch: ``ContextSet`` each.
            batch_idx: Not used.
        """
        rows = zip(batch.items, batch.counted, strict=True)
        return [record for one, counts in rows if counts for record in predict_set(self, one)]

    # ------------------------------------------------------------------ checkpoints and export

    def _is_saved(self, name: str) -> bool:
        if self.saves_all or self.lora_options is None or "lora_" in name:
            return True
        is_decoder = name.startswith("policy.decoder.")
        return not name.startswith("policy.compressor.") and not (
            is_decoder and self.policy.is_decoder_frozen
        )

    def _backbone_files(self) -> dict[str, str]:
        if self._files is None and self.policy is not None:
            files = super()._backbone_files()
            own = backbone_files(self.decoder_options().backbone_options.path)
            own["config.json"] = self.policy.decoder.config.to_json_string(use_diff=False)
            files |= {f"decoder/{name}": text for name, text in own.items()}
            self._files = files
        return self._files or {}

    def export(self, folder: str | Path, tokenizer: Any) -> None:
        """Write the pair as one folder, see ``folders.export_pair``; every rank must call it.

        Args:
            folder: Replaced as a whole.
            tokenizer: Of the compressor.
        """
        data: Any = getattr(self._trainer, "datamodule", None)
        target = data.encoding.target_tokenizer if data is not None else tokenizer
        is_writer = self._trainer is None or self.trainer.is_global_zero
        export_pair(
            self.policy, tokenizer, target, folder, info=self.export_info(), is_writer=is_writer
        )

    def after_load(self, data: Any) -> None:
        """Nothing: the pair holds all that it needs."""
