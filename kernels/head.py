"""The output layer of a language model, fused with the log-probs and losses that training needs.

The fused operation runs inside the head's own ``forward``: there ``fully_shard`` has gathered the
weight, whichever unit owns it, and there a LoRA adapter on the head is seen. Code that reads
``model.lm_head.weight`` instead finds one rank's shard, or trains as if the adapter were frozen.

PEFT layers are recognised by their attributes: this folder imports nothing but PyTorch.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .api import linear_cross_entropy, linear_logprob_entropy
from .regions import CEStats, LogprobEntropy, Region

MODES = ("logprob", "ce", "logits")
#: Packages that fuse the head by replacing the forward of the whole model.
PATCHERS = ("liger_kernel", "verl")


class _Place:
    """Where a head sits in its model: a weak reference that copies follow and pickles drop."""

    def __init__(self, parent: nn.Module | None = None, name: str = "") -> None:
        self.name = name
        self.reference = None if parent is None else weakref.ref(parent)

    def content(self) -> nn.Module | None:
        """The module that is there now."""
        parent = None if self.reference is None else self.reference()
        return None if parent is None else parent._modules.get(self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        parent = None if self.reference is None else self.reference()
        # a copy of the whole model has its parent here; a copy of the head alone has none
        return _Place(None if parent is None else memo.get(id(parent)), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, ()


class FusedLMHead(nn.Linear):
    """An ``nn.Linear`` that also gives log-probs, entropies and losses without its logits.

    Without targets it is ``nn.Linear``: ``generate``, evaluation and export see no difference, and
    the state dict has the same keys. ``fuse_lm_head`` puts it into a model.

    Args:
        in_features: H.
        out_features: V.
        bias: Whether there is a bias.

    Attributes:
        backend: Default of the keyword of the same name in ``forward``.
        workspace_mb: As above.
        vocab_limit: As above.

    Example:
        >>> head = FusedLMHead(4, 8, bias=False)
        >>> head(torch.zeros(2, 4)).shape
        torch.Size([2, 8])
        >>> head(torch.zeros(2, 4), torch.tensor([0, 7])).logprob.shape
        torch.Size([2])
    """

    backend: str = "auto"
    workspace_mb: int | None = None
    vocab_limit: int | None = None
    _place = _Place()

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        mode: str = "logprob",
        region: Region | None = None,
        **keywords: Any,
    ) -> Tensor | LogprobEntropy | tuple[Tensor, CEStats]:
        """Logits, or what ``mode`` says of the targets.

        Args:
            hidden: ``(..., H)``.
            targets: ``(...)`` int64 token ids; None gives logits in every mode.
            mode: ``logprob`` calls ``linear_logprob_entropy``, ``ce`` calls
                ``linear_cross_entropy``, ``logits`` ignores the targets.
            region: Trust region of ``logprob``.
            **keywords: Of the function that is called; ``backend``, ``workspace_mb`` and
                ``vocab_limit`` are the attributes where they are left out.

        Returns:
            Logits ``(..., V)``, or the result of that function.

        Raises:
            ValueError: The mode is unknown, or ``ce`` is given a region.
            TypeError: Keywords although logits were asked for, or a sharded weight.
            RuntimeError: An adapter was put around the head after ``fuse_lm_head``.
        """
        _check_mode(mode)
        if targets is None or mode == "logits":
            extra = sorted(keywords) + ([] if region is None else ["region"])
            if extra:
                raise TypeError(
                    f"plain logits take no {', '.join(extra)}: give targets, and mode='logprob' or "
                    f"mode='ce'"
                )
            return super().forward(hidden)
        self._check_place()
        for name in ("backend", "workspace_mb", "vocab_limit"):
            keywords.setdefault(name, getattr(self, name))
        given = (hidden, self.weight, targets)
        if mode == "logprob":
            found = linear_logprob_entropy(*given, bias=self.bias, region=region, **keywords)
            return LogprobEntropy(*map(_own, found))
        if region is not None:
            raise ValueError("mode='ce' has no region: use mode='logprob'")
        loss = linear_cross_entropy(*given, bias=self.bias, **keywords)
        return _own(loss) if isinstance(loss, Tensor) else (_own(loss[0]), loss[1])

    def _check_place(self) -> None:
        """Refuse an adapter that came later: its own forward would add logits to our result."""
        if torch.compiler.is_compiling():
            return
        now = self._place.content()
        if now is None or isinstance(now, _FusedLora) or now._modules.get("base_layer") is not self:
            return
        raise RuntimeError(
            f"{self._place.name} was wrapped in {type(now).__name__} after fuse_lm_head: call "
            f"fuse_lm_head(model) once more, after the adapters are in place"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = getattr(type(self), "_plain_class", None)
        if plain is None:
            return super().__reduce_ex__(protocol)
        return _blank, (FusedLMHead, plain), self.__dict__


class _FusedLora:
    """Put before the class of a PEFT LoRA layer: targets get the adapter as the ``side`` input.

    The base layer is a ``FusedLMHead`` and is called as a module, so hooks on it run as ever.
    Without targets PEFT's own forward gives the logits.
    """

    def forward(
        self: Any,
        hidden: Tensor,
        targets: Tensor | None = None,
        *args: Any,
        mode: str = "logprob",
        **keywords: Any,
    ) -> Any:
        """As ``FusedLMHead.forward``, with the active adapter."""
        _check_mode(mode)
        if targets is None or mode == "logits":
            return super().forward(hidden, *args, **keywords)  # type: ignore[misc]
        if self.disable_adapters and self.merged:
            self.unmerge()  # as PEFT does: switched off means the base weight alone
        name = None if self.disable_adapters or self.merged else _active_adapter(self)
        if name is not None:
            keywords["side"] = _side(self, name, hidden)
        return self.base_layer(hidden, targets, *args, mode=mode, **keywords)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _blank, (_FusedLora, type(self)._plain_class), self.__dict__


def fuse_lm_head(
    model: Any,
    *,
    backend: str = "auto",
    workspace_mb: int | None = None,
    vocab_limit: int | None = None,
) -> Any:
    """Turn the output layer of a model into a ``FusedLMHead``, in place.

    The module object stays and changes its class, so parameters, weight tying, hooks, dtype and
    state-dict keys are as before. Call it before ``fully_shard``. With PEFT, call it after the
    adapters are in place (once more, if it was called before); a second call only updates the
    settings. LoRA on the head and ``modules_to_save=["lm_head"]`` are both understood.

    Args:
        model: A Hugging Face causal LM, a PEFT model of one, or whatever has
            ``get_output_embeddings()``; its head has a weight ``(V, H)``.
        backend: Default for calls of the head, as in ``linear_logprob_entropy``.
        workspace_mb: As above.
        vocab_limit: As above; at most V.

    Returns:
        The same model.

    Raises:
        TypeError: The model has no output embeddings, or they are no ``nn.Linear``.
        ValueError: LoRA on a head that is tied to the input embeddings, or a bad ``vocab_limit``.
        NotImplementedError: An adapter that is not plain LoRA, several active adapters, or a
            quantised head.
        RuntimeError: The head is sharded already, or another package has patched it.

    Example:
        >>> model = nn.ModuleDict({"lm_head": nn.Linear(4, 8)})
        >>> model.get_output_embeddings = lambda: model["lm_head"]
        >>> type(fuse_lm_head(model)["lm_head"]).__name__
        'FusedLMHead'
    """
    found = getattr(model, "get_output_embeddings", None)
    head = None if found is None else found()
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no output embeddings (get_output_embeddings() gives "
            f"{'no such method' if found is None else head}): give a causal language model"
        )
    parent, name = _find(model, head)
    _refuse_patched(parent, head, name)
    bases = _base_layers(model, head, name)
    for base in bases:
        _check_base(base, name, vocab_limit)
    for base in bases:
        if not isinstance(base, FusedLMHead):
            base.__class__ = _fused_class(FusedLMHead, type(base))
        base.backend, base.workspace_mb, base.vocab_limit = backend, workspace_mb, vocab_limit
        base._place = _Place(parent, name)
    if _is_lora(head) and not isinstance(head, _FusedLora):
        head.__class__ = _fused_class(_FusedLora, type(head))
    return model


def _own(value: Any) -> Any:
    """No view: an in-place operation on one would drop the backward hook of ``fully_shard``."""
    is_plain = value is None or torch.compiler.is_compiling() or not value._is_view()
    return value if is_plain else value.clone()


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: give {', '.join(map(repr, MODES))}")


@cache
def _fused_class(mixin: type, plain: type) -> type:
    """The class of a fused head that was of the class ``plain``."""
    if mixin is FusedLMHead and plain is nn.Linear:
        return FusedLMHead
    own = {"__module__": __name__, "__doc__": mixin.__doc__, "_plain_class": plain}
    return type(f"Fused{plain.__name__}", (mixin, plain), own)


def _blank(mixin: type, plain: type) -> Any:
    """An empty instance, for unpickling classes that no module holds."""
    fused = _fused_class(mixin, plain)
    return fused.__new__(fused)


def _find(model: nn.Module, head: nn.Module) -> tuple[nn.Module | None, str]:
    """The module that holds the head, and under which name."""
    for module in model.modules():
        for name, child in module._modules.items():
            if child is head:
                return module, name
    return None, "lm_head"


def _is_lora(head: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer; AdaLoRA has the same names and one more."""
    names = head._modules.keys() | head._parameters.keys()
    return {"base_layer", "lora_A", "lora_B", "lora_dropout"} <= names and "lora_E" not in names


def _alternative(what: str, name: str) -> str:
    return (
        f"{what}; the fused head cannot compute it. Train the whole head instead: take {name} out "
        f'of target_modules and give modules_to_save=["{name}"]'
    )


def _base_layers(model: Any, head: nn.Module, name: str) -> list[Any]:
    """The linear layers to fuse: the head, the one inside LoRA, or every copy of PEFT's wrapper."""
    parts = head._modules
    if _is_lora(head):
        _active_adapter(head, name)
        base = parts["base_layer"]
        if base is not None and getattr(base, "weight", None) is _embedding_weight(model):
            raise ValueError(
                _alternative(f"LoRA on {name}, whose weight is tied to the embedding's", name)
            )
        return [base]
    if {"original_module", "modules_to_save"} <= parts.keys():
        copies: Any = parts["modules_to_save"]
        return [parts["original_module"], *copies.values()]
    if "base_layer" in parts or "original_module" in parts:
        raise NotImplementedError(
            _alternative(f"{name} is wrapped in {type(head).__name__}, which is not LoRA", name)
        )
    return [head]


def _embedding_weight(model: Any) -> Any:
    """Weight of the input embeddings without adapters; itself a new object where there is none."""
    found = getattr(model, "get_input_embeddings", None)
    module = None if found is None else found()
    while isinstance(module, nn.Module):
        inner = module._modules.get("base_layer", module._modules.get("original_module"))
        if inner is None:
            return module._parameters.get("weight", object())
        module = inner
    return object()


def _refuse_patched(parent: nn.Module | None, head: nn.Module, name: str) -> None:
    """Refuse a head that another package has fused: two at once compute a wrong loss.

    Raises:
        RuntimeError: Names the function that was put in.
    """
    for module in head.modules():
        if "forward" in vars(module):
            _raise_patched(f"the forward of {name} ({type(module).__name__})", module.forward)
    function = getattr(parent, "forward", None)
    if (getattr(function, "__module__", None) or "").split(".")[0] in PATCHERS:
        _raise_patched(f"the forward of {type(parent).__name__}", function)


def _raise_patched(what: str, function: Any) -> None:
    function = getattr(function, "func", function)  # accelerate's hooks are partial objects
    label = getattr(function, "__qualname__", type(function).__name__)
    raise RuntimeError(
        f"{what} is already replaced by {getattr(function, '__module__', '?')}.{label}: undo that "
        f"patch, or keep it and leave out fuse_lm_head"
    )


def _check_base(base: Any, name: str, vocab_limit: int | None) -> None:
    """Refuse what is no plain linear layer of floating-point weights on this rank."""
    if not isinstance(base, nn.Linear):
        raise TypeError(f"{name} is {type(base).__name__}: the fused head takes an nn.Linear")
    if vocab_limit is not None and not 1 <= vocab_limit <= base.out_features:
        raise ValueError(f"vocab_limit={vocab_limit}: give 1 to {base.out_features}")
    if isinstance(base, FusedLMHead):
        return
    weight = base.weight
    if type(weight).__name__ == "DTensor":
        raise RuntimeError(
            f"{name}.weight is a DTensor already: call fuse_lm_head before fully_shard"
        )
    # a quantised weight is a tensor of integers, or of a class of its own that says it is floating
    is_plain = type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
    if not is_plain or type(base).forward is not nn.Linear.forward:
        what = f"{name} is {type(base).__name__} with a {type(weight).__name__} of {weight.dtype}"
        raise NotImplementedError(_alternative(f"{what}, quantised or with its own forward", name))


def _active_adapter(layer: Any, name: str = "lm_head") -> str | None:
    """The one active adapter that the layer has.

    Raises:
        NotImplementedError: There are several, or it is more than ``B @ A``.
    """
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise NotImplementedError(
            f"{_alternative(f'{name} has several active adapters ({active})', name)}, or activate "
            f"one (set_adapter)"
        )
    adapter = active[0]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    is_dora = getattr(layer, "use_dora", {}).get(adapter, False)
    if is_dora or adapter in getattr(layer, "lora_magnitude_vector", ()):
        raise NotImplementedError(_alternative(f"{name} has DoRA ({adapter})", name))
    if variant is not None:
        kind = type(variant).__name__
        raise NotImplementedError(_alternative(f"{name} has {kind} ({adapter})", name))
    if layer.lora_B[adapter].bias is not None:
        raise NotImplementedError(_alternative(f"{name} has a LoRA bias ({adapter})", name))
    return adapter


def _side(layer: Any, adapter: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``(X2 (..., r), B (V, r))``, whose product the adapter adds to the logits."""
    first, second = layer.lora_A[adapter], layer.lora_B[adapter].weight
    if type(second).__name__ == "DTensor":
        raise TypeError(
            "lora_B.weight of the head is a DTensor, one rank's shard: shard the head or the "
            "model around it, not lora_B by itself, and call the head inside model.forward"
        )
    dropped = layer.lora_dropout[adapter](hidden.to(first.weight.dtype))
    reduced = first(dropped) * layer.scaling[adapter]
    if torch.is_autocast_enabled(hidden.device.type):
        return reduced, second  # cast with everything else
    # PEFT keeps adapters in float32 beside a bfloat16 base; these two are small
    return reduced.to(hidden.dtype), second.to(hidden.dtype)
