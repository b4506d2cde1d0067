"""One rank that calls a fused head under ``fully_shard``: ``torchrun head_worker.py <folder>``.

Each case compares with an unsharded, unfused copy on the data of both ranks: the losses, and the
gradients, which ``fully_shard`` averages over ranks. Small models for the other tests are here too.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_modules.backbones.sharding import shard
from lightning_modules.ops import fuse_lm_head, linear_logprob_entropy

VOCABULARY = 41
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
#: Where the parameters live: the name of the layout, and whether head and embedding are tied.
LAYOUTS = {
    "head unit": False, "root": False, "layers and root": False, "litpost": False,
    "tied unit": True, "tied root": True, "tied layers and root": True,
}  # fmt: skip
RESHARD = {"keep": False, "reshard": True}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def tiny(tied: bool = False, *, qwen2: bool = False, seed: int = 0) -> Any:
    """A random model of two layers, the same for the same arguments."""
    torch.manual_seed(seed)
    shape = {k: v for k, v in SHAPE.items() if not (qwen2 and k == "head_dim")}
    if qwen2:
        return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=tied)).train()
    return Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=tied)).train()


def lora(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """Plain LoRA on the head with a B that is not zero; ``options`` of ``LoraConfig`` win."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**(given | options)))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


def tokens(rank: int = 0) -> Tensor:
    """``(3, 8)`` ids, different on each rank."""
    return torch.randint(2, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(rank))


class Policy(nn.Module):
    """A model whose forward calls its head with targets, as a LightningModule would."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states ``(N, L-1, H)`` that predict the next tokens."""
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return base.model(input_ids=ids[:, :-1]).last_hidden_state

    def forward(self, ids: Tensor, *, fused: bool = True, **keywords: Any) -> Any:
        """Log-probs and entropies of ``ids[:, 1:]``; ``fused=False`` goes through the logits."""
        hidden, targets = self.hidden(ids), ids[:, 1:]
        head = self.model.get_output_embeddings()
        if fused:
            return tuple(head(hidden, targets, **keywords)[:2])
        logprobs = head(hidden).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[..., None])[..., 0], entropy


def loss_of(found: tuple[Tensor, Tensor]) -> Tensor:
    """Something that both results have a gradient through."""
    return -(found[0] * torch.linspace(0.5, 1.5, found[0].shape[1])).mean() - 0.3 * found[1].mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, gathered where they are sharded."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()}


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference."""
    return float((found.detach().float() - wanted.detach().float()).abs().max())


def wrap(policy: Policy, layout: str, reshard: bool, mesh: DeviceMesh, **options: Any) -> None:
    """``fully_shard`` in one of the layouts; ``reshard`` is that of the unit of the head."""
    model = policy.model
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    options = {"mesh": mesh} | options
    if layout == "litpost":
        holder = nn.Module()
        holder.policy = policy
        return shard(holder, ("policy",), mesh)
    if "layers" in layout:
        for layer in base.model.layers:
            fully_shard(layer, **options)
    if layout == "head unit":
        fully_shard(base.lm_head, reshard_after_forward=reshard, **options)
    if layout == "tied unit":
        fully_shard(
            [base.model.embed_tokens, base.lm_head], reshard_after_forward=reshard, **options
        )
    fully_shard(policy, reshard_after_forward=reshard, **options)


def compare(policy: Policy, plain: Policy, rank: int, world: int) -> dict[str, float]:
    """Gaps between a sharded, fused policy and a plain one that sees all data."""
    found = policy(tokens(rank))
    loss_of(found).backward()
    mine = gradients(policy)
    for other in range(world):
        wanted = plain(tokens(other), fused=False)
        (loss_of(wanted) / world).backward()
        if other == rank:
            gaps = {"logprob": gap(found[0], wanted[0]), "entropy": gap(found[1], wanted[1])}
    expected = gradients(plain)
    assert mine.keys() == expected.keys(), mine.keys() ^ expected.keys()
    heads = [name for name in mine if "lm_head" in name or "embed_tokens" in name]
    assert heads and all(float(mine[name].abs().max()) > 1e-4 for name in heads), heads
    return gaps | {f"grad of {name}": gap(mine[name], expected[name]) for name in mine}


def sharded(
    make: Callable[[], Any], layout: str, reshard: bool, mesh: DeviceMesh, **options: Any
) -> tuple[Policy, Policy]:
    """The fused and sharded policy, and the plain one."""
    model = make()
    plain = Policy(copy.deepcopy(model))
    policy = Policy(fuse_lm_head(model))
    wrap(policy, layout, reshard, mesh, **options)
    assert all(hasattr(p, "full_tensor") for p in policy.parameters())
    return policy, plain


def read_after_model(layout: str, tied: bool, mesh: DeviceMesh) -> str:
    """What reading the weight after the model returned leads to."""
    policy, _ = sharded(lambda: tiny(tied), layout, True, mesh)
    hidden, head = torch.zeros(2, 16), policy.model.get_output_embeddings()
    policy(tokens())
    try:
        linear_logprob_entropy(hidden, head.weight, torch.tensor([3, 4]))
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def forward_without_gathering(mesh: DeviceMesh) -> str:
    """The head of a wrapped root, called outside the root's forward: nothing gathers its weight."""
    policy, _ = sharded(tiny, "root", True, mesh)
    try:
        policy.model.lm_head(torch.zeros(2, 16), torch.tensor([3, 4]))
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def adapter_by_itself(mesh: DeviceMesh) -> str:
    """``lora_B`` as a unit of its own: its weight is read, so no hook of it runs."""
    model = fuse_lm_head(lora(tiny()))
    fully_shard(model.get_output_embeddings().lora_B["default"], mesh=mesh)
    policy = Policy(model)
    fully_shard(policy, mesh=mesh)
    try:
        policy(tokens())
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def late(mesh: DeviceMesh) -> str:
    """``fuse_lm_head`` after ``fully_shard``."""
    model = tiny()
    wrap(Policy(model), "head unit", True, mesh)
    try:
        fuse_lm_head(model)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def settings_after(mesh: DeviceMesh) -> str:
    """A second call on a sharded head only updates its settings."""
    policy, _ = sharded(tiny, "head unit", True, mesh)
    return str(fuse_lm_head(policy.model, workspace_mb=3).lm_head.workspace_mb)


def cases(rank: int, world: int, mesh: DeviceMesh) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of cases and how to run them."""
    for layout, tied in LAYOUTS.items():
        for word, reshard in RESHARD.items():
            yield (
                f"{layout}, {word}",
                lambda layout=layout, tied=tied, reshard=reshard: compare(
                    *sharded(lambda: tiny(tied), layout, reshard, mesh), rank, world
                ),
            )
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    kinds: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "lora": (lambda: lora(tiny()), {}),
        "modules_to_save": (lambda: lora(tiny(), **saved), {}),
        "bfloat16": (tiny, {"mp_policy": BFLOAT16}),
    }
    for kind, (make, options) in kinds.items():
        for layout in ("head unit", "root", "layers and root"):
            yield (
                f"{kind}, {layout}",
                lambda make=make, layout=layout, options=options: compare(
                    *sharded(make, layout, True, mesh, **options), rank, world
                ),
            )
    yield "read, head unit", lambda: read_after_model("head unit", False, mesh)
    yield "read, tied unit", lambda: read_after_model("tied unit", True, mesh)
    yield "read, root", lambda: read_after_model("root", False, mesh)
    yield "forward, not gathered", lambda: forward_without_gathering(mesh)
    yield "lora_B unit", lambda: adapter_by_itself(mesh)
    yield "late", lambda: late(mesh)
    yield "settings", lambda: settings_after(mesh)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, run in cases(rank, world, init_device_mesh("cpu", (world,))):
        try:
            found[name] = run()
        except Exception:  # ranks fail alike; the test that wants this case shows the text
            found[name] = traceback.format_exc()
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in decode_worker.py: torch's threads may abort the interpreter's end


if __name__ == "__main__":
    main()
