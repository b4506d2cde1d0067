"""A causal language model whose head is fused with the log-probs that training needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from datamodules.engines.decode import supports_buffered_cache
from lightning_modules.backbones.export import stream_weights
from lightning_modules.backbones.loading import add_lora, load_pretrained
from lightning_modules.backbones.sharding import gathered
from lightning_modules.backbones.shared_prompts import shared_hidden
from lightning_modules.ops import LogprobEntropy, TopK, TopP, fuse_lm_head
from lightning_modules.options import BackboneOptions, KernelOptions, LoraOptions


class Completions(NamedTuple):
    """Which tokens of a right-padded batch are completions.

    Args:
        prompt_lengths: ``(N,)``.
        mask: ``(N, T)`` True on completion tokens; column 0 is the first after the prompt.
        groups: ``(N,)`` equal for rows of one prompt, or None to share nothing.
    """

    prompt_lengths: Tensor
    mask: Tensor
    groups: Tensor | None


class CausalLM(nn.Module):
    """Wraps a Hugging Face causal LM, or a PEFT model of one.

    Called without ``targets`` it is that model (decoding, engines). Called with ``targets`` it
    returns their log-probs without ever keeping logits. Both go through ``forward``, so sharded
    parameters are gathered by the hooks of ``fully_shard`` either way.

    Args:
        model: The model to wrap; its head is replaced by a ``FusedLMHead`` of the same parameters.
        kernel: Options of that head; None for its defaults.

    Raises:
        NotImplementedError: Adapters on the head of a kind that the fused head cannot follow.
    """

    def __init__(self, model: Any, kernel: KernelOptions | None = None) -> None:
        super().__init__()
        self.model = model
        options = kernel or KernelOptions()
        fuse_lm_head(self.base, backend=options.backend, workspace_mb=options.workspace_mb)

    @property
    def base(self) -> Any:
        """The Hugging Face model itself, adapters or not."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.model, "peft_config")

    @property
    def config(self) -> Any:
        """Configuration of the Hugging Face model."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """Generation defaults of the Hugging Face model."""
        return getattr(self.base, "generation_config", None)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside the block the model is its own frozen reference.

        Raises:
            ValueError: There is no adapter to switch off.
        """
        if not self.has_adapter:
            raise ValueError("there is no adapter to switch off: use lora=default")
        with self.model.disable_adapter():
            yield

    @contextmanager
    def gathered(self) -> Iterator[bool]:
        """Inside the block a sharded policy is whole on every rank, where that fits."""
        with gathered(self) as is_whole:
            yield is_whole

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under their Hugging Face names, one at a time; see ``stream_weights``."""
        return stream_weights(self)

    def generate(self, **kwargs: Any) -> Tensor:
        """Hugging Face's ``generate``."""
        return self.base.generate(**kwargs)

    @property
    def can_share_prompts(self) -> bool:
        """Whether a prompt may be read once for all its completions; see ``completion_hidden``."""
        return _can_share_prompts(self.base, self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        completions: Completions | None = None,
        temperature: float = 1.0,
        with_entropy: bool = True,
        entropy_grad: bool = False,
        region: TopK | TopP | None = None,
        output: Literal["tokens", "hidden", "both"] = "tokens",
        **kwargs: Any,
    ) -> Any:
        """Logits as usual, or log-probs of completion tokens.

        Args:
            input_ids: ``(N, L)``; with ``completions`` its prompts and completions, right-padded.
            attention_mask: ``(N, L)`` or None; not needed with ``completions``.
            completions: Which tokens to score; None runs the model as it is.
            temperature: Of the softmax.
            with_entropy: Also the entropy at those positions.
            entropy_grad: Whether gradients flow through it.
            region: Also the entropy of this trust region of the vocabulary, always with gradients.
            output: What of the K completion tokens: what the head says of them, the hidden states
                ``(K, H)`` that predict them (row by row), or both.
            **kwargs: Of the model itself.

        Returns:
            The model's output, or ``LogprobEntropy`` with fields ``(N, T)``, zero off the mask, or
            hidden states, or the pair of both.
        """
        if completions is None:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = completions.mask
        hidden = completion_hidden(self.base.base_model, self.config, input_ids, completions)
        if output == "hidden":
            return hidden
        rows, places = mask.nonzero(as_tuple=True)
        head = self.base.get_output_embeddings()
        flat = head(  # inside its forward, where fully_shard has gathered the weight
            hidden,
            input_ids[rows, completions.prompt_lengths[rows] + places],
            region=region,
            temperature=temperature,
            with_entropy=with_entropy,
            entropy_grad=entropy_grad,
        )
        tokens = LogprobEntropy(*(None if value is None else spread(value, mask) for value in flat))
        return (tokens, hidden) if output == "both" else tokens


def completion_hidden(
    body: Any, config: Any, input_ids: Tensor, completions: Completions
) -> Tensor:
    """Hidden states ``(K, H)`` that predict the K completion tokens, row by row.

    A prompt is read once for all its completions (``completions.groups``) where that is possible:
    it takes a cache of plain full-attention layers; activation checkpointing and sharding run the
    ordinary way. Causal attention never looks at padding on the right, so no mask is needed.

    Args:
        body: The decoder without its head.
        config: Its configuration.
        input_ids: ``(N, L)`` prompts and completions, right-padded.
        completions: Which tokens.
    """
    mask, groups = completions.mask, completions.groups
    is_shared = groups is not None and len(torch.unique(groups)) < len(groups)
    if groups is not None and is_shared and _can_share_prompts(body, config):
        return shared_hidden(body, config, input_ids, completions.prompt_lengths, mask, groups)
    rows, places = mask.nonzero(as_tuple=True)
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[rows, completions.prompt_lengths[rows] + places - 1]


def _can_share_prompts(body: Any, config: Any) -> bool:
    is_checkpointing = bool(getattr(body, "is_gradient_checkpointing", False))
    is_sharded = any(hasattr(p, "full_tensor") for p in body.parameters())
    return supports_buffered_cache(config) and not is_checkpointing and not is_sharded


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values ``(K,)`` of the K tokens of a mask ``(N, T)``, laid out as the mask, 0 elsewhere."""
    places = mask.nonzero(as_tuple=True)
    return values.new_zeros(mask.shape).index_put(places, values)


def completion_logprobs(
    policy: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    mask: Tensor,
    *,
    groups: Tensor | None = None,
    **options: Any,
) -> LogprobEntropy:
    """Log-probs of completion tokens in the layout of ``Experience``.

    Args:
        policy: A ``CausalLM``.
        input_ids: ``(N, L)`` prompt then completion, padded on the right.
        prompt_lengths: ``(N,)``.
        mask: ``(N, T)`` True on completion tokens.
        groups: ``(N,)`` equal for rows of one prompt: each prompt is then read once, which is the
            same result (to rounding) for a fraction of the tokens. None reads every row whole.
        **options: Of ``CausalLM.forward``.

    Returns:
        Fields ``(N, T)``, zero where the mask is.
    """
    return policy(input_ids, completions=Completions(prompt_lengths, mask, groups), **options)


def load_causal_lm(
    options: BackboneOptions,
    lora: LoraOptions | None = None,
    *,
    kernel: KernelOptions | None = None,
) -> CausalLM:
    """Load a folder or hub name, put adapters on it where asked, fuse its head.

    Raises:
        ValueError: The folder is missing or is no causal LM, or LoRA on a head that shares its
            weight with the embedding.
    """
    model = load_pretrained(AutoModelForCausalLM, options, "a causal LM")
    if lora is not None:
        model = _add_lora(model, lora)
    return CausalLM(model, kernel).train()  # transformers loads in eval mode


def _add_lora(model: Any, lora: LoraOptions) -> Any:
    targets = lora.target_modules
    names_head = not isinstance(targets, str) and any("lm_head" in name for name in targets)
    if names_head and model.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "lora.target_modules names the head (lm_head), whose weight is the embedding's in this "
            "model; leave it out"
        )
    return add_lora(model, lora, "CAUSAL_LM")
