"""Input that cannot be right is refused with a message that names what to do (card 11.11)."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch import distributed

from lightning_modules.ops import (
    TopK,
    TopP,
    available_backend,
    linear_cross_entropy,
    linear_logprob_entropy,
    load_kernels,
    logprob_entropy_from_logits,
)

HIDDEN, WEIGHT, TARGETS = torch.zeros(3, 8), torch.zeros(20, 8), torch.arange(3)
LOGITS = torch.zeros(3, 20)
SIDE = torch.zeros(3, 4), torch.zeros(20, 4)


def head(hidden=HIDDEN, weight=WEIGHT, targets=TARGETS, **options):
    return linear_logprob_entropy(hidden, weight, targets, **options)


def loss(hidden=HIDDEN, weight=WEIGHT, targets=TARGETS, **options):
    return linear_cross_entropy(hidden, weight, targets, **options)


def logits(given=LOGITS, targets=TARGETS, **options):
    return logprob_entropy_from_logits(given, targets, **options)


HALF, DOUBLE = torch.bfloat16, torch.float64
BAD_HEADS = [
    # dtypes
    (
        dict(hidden=HIDDEN.to(HALF)),
        TypeError,
        r"bfloat16 .*float32: cast one .*hidden\.to",
    ),
    (dict(weight=WEIGHT.to(DOUBLE)), TypeError, "float32 .*float64: cast .*autocast"),
    (dict(hidden=HIDDEN.int(), weight=WEIGHT.int()), TypeError, "int32 is not supported: use one"),
    (dict(targets=TARGETS.int()), TypeError, r"int32: give int64 .*targets\.long\(\)"),
    (dict(targets=TARGETS.float()), TypeError, r"float32: give int64 .*targets\.long\(\)"),
    (dict(side=(SIDE[0].to(HALF), SIDE[1])), TypeError, "cast both to torch.float32"),
    # targets
    (dict(targets=torch.tensor([0, 20, 1])), IndexError, r"target 20 .* ids in \[0, 20\)"),
    (dict(targets=torch.tensor([0, -1, 1])), IndexError, "target -1 .* or ignore_index"),
    (dict(targets=torch.tensor([0, -100, 1]), ignore_index=-1), IndexError, "target -100"),
    (
        dict(targets=torch.tensor([0, 15, 1]), vocab_limit=15),
        IndexError,
        r"target 15 .* 15 tokens .*vocab_limit of 20.* ids in \[0, 15\)",
    ),
    # shapes
    (dict(hidden=torch.zeros(3, 9)), ValueError, r"\(3, 9\) and weight \(20, 8\) .* \(\.\.\., H\)"),
    (dict(weight=torch.zeros(8)), ValueError, r"weight \(8,\) .* \(V, H\)"),
    (dict(hidden=torch.tensor(1.0)), ValueError, r"hidden \(\) .* \(\.\.\., H\)"),
    (dict(targets=torch.arange(4)), ValueError, r"targets \(4,\) .* one id for each of \(3,\)"),
    (dict(targets=TARGETS[:, None]), ValueError, r"targets \(3, 1\) .* one id for each of \(3,\)"),
    (dict(bias=torch.zeros(19)), ValueError, r"bias \(19,\): give \(20,\)"),
    (dict(side=(SIDE[0][:2], SIDE[1])), ValueError, r"side .*: give \(3, 4\), \(20, 4\)"),
    (dict(side=(SIDE[0], SIDE[1].T)), ValueError, r"side .*: give \(3, 20\), \(20, 20\)"),
    # numbers
    (dict(temperature=0.0), ValueError, "temperature=0.0: give a value above 0"),
    (dict(temperature=-1.0), ValueError, "temperature=-1.0: give a value above 0"),
    (dict(temperature=float("nan")), ValueError, "temperature=nan: give a value above 0"),
    (dict(vocab_limit=0), ValueError, "vocab_limit=0: give 1 to 20"),
    (dict(vocab_limit=21), ValueError, "vocab_limit=21: give 1 to 20"),
    (dict(region=TopK(21)), ValueError, r"TopK\(k=21\) .* 20 tokens: give k from 1 to 20"),
    (dict(region=TopK(16), vocab_limit=15), ValueError, r"TopK\(k=16\) .* give k from 1 to 15"),
    (dict(workspace_mb=0), ValueError, "workspace_mb=0: give 1 or more"),
    # back ends
    (dict(backend="cuda"), ValueError, "backend='cuda': give one of auto, triton, torch"),
    (dict(backend="triton"), RuntimeError, "on cpu, its kernels need CUDA. Use backend='torch'"),
    (
        dict(hidden=HIDDEN.double(), weight=WEIGHT.double(), backend="interpret"),
        RuntimeError,
        "float32, bfloat16 or float16; these are torch.float64",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "fragment"), BAD_HEADS)
def test_head(arguments, kind, fragment):
    """Also through the loss, which checks by the same function but knows no regions."""
    calls = [head] if "region" in arguments else [head, loss]
    for call in calls:
        with pytest.raises(kind, match=fragment):
            call(**arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_target_outside_on_every_backend(backend):
    with pytest.raises(IndexError, match=r"target 20 .* ids in \[0, 20\)"):
        head(targets=torch.tensor([0, 20, 1]), backend=backend)


BAD_LOSSES = [
    (dict(label_smoothing=1.0), r"label_smoothing=1.0: give a value in \[0, 1\)"),
    (dict(label_smoothing=-0.1), r"label_smoothing=-0.1: give a value in \[0, 1\)"),
    (dict(z_loss=-1.0), "z_loss=-1.0: give 0 or more"),
    (dict(reduction="avg"), "reduction='avg': give 'mean', 'sum' or 'none'"),
    (dict(token_weights=torch.ones(4)), r"\(4,\), the targets \(3,\): give one weight a token"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_LOSSES)
def test_loss(arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        loss(**arguments)


BAD_LOGITS = [
    (dict(targets=torch.arange(4)), ValueError, r"\(3, 20\) and targets \(4,\) .* shape \(3,\)"),
    (dict(given=torch.tensor(1.0)), ValueError, "logits .*targets"),
    (dict(targets=torch.tensor([0, 20, 1])), IndexError, r"target 20 .* ids in \[0, 20\)"),
    (dict(targets=TARGETS.int()), TypeError, r"int32: give int64 .*targets\.long\(\)"),
    (dict(given=LOGITS.int()), TypeError, "int32 is not supported: use one"),
    (dict(temperature=0.0), ValueError, "temperature=0.0: give a value above 0"),
    (dict(region=TopK(21)), ValueError, r"TopK\(k=21\) .* give k from 1 to 20"),
]


@pytest.mark.parametrize(("arguments", "kind", "fragment"), BAD_LOGITS)
def test_logits(arguments, kind, fragment):
    with pytest.raises(kind, match=fragment):
        logits(**arguments)


BAD_REGIONS = [
    (lambda: TopK(0), r"TopK\(k=0\): k must be at least 1"),
    (lambda: TopK(-3), r"TopK\(k=-3\): k must be at least 1"),
    (lambda: TopK(2, scale="log"), "scale is 'log': give 'log_vocab' or 'none'"),
    (lambda: TopP(0.0), r"TopP\(p=0.0\): p must be inside \(0, 1\)"),
    (lambda: TopP(1.0), r"TopP\(p=1.0\): p must be inside \(0, 1\)"),
    (lambda: TopP(-0.5), r"TopP\(p=-0.5\): p must be inside \(0, 1\)"),
    (lambda: TopP(float("nan")), r"TopP\(p=nan\): p must be inside \(0, 1\)"),
    (lambda: TopP(0.9, scale="log"), "scale is 'log': give 'log_vocab' or 'none'"),
    (lambda: TopP(0.9, max_size=0), r"TopP\(max_size=0\): give 1 or more, or None"),
    (lambda: TopP(0.9, ties="all"), r"TopP\(ties='all'\): give 'index' or 'include'"),
]


@pytest.mark.parametrize(("make", "fragment"), BAD_REGIONS)
def test_regions(make, fragment):
    with pytest.raises(ValueError, match=fragment):
        make()


def test_all_problems_with_shapes_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        head(targets=torch.arange(4), bias=torch.zeros(2), temperature=0.0)
    assert all(word in str(caught.value) for word in ("targets", "bias", "temperature"))


# ----------------------------------------------------------------------------- around the functions


def test_sharded_tensors():
    """A real ``DTensor``: the message leads to the head's own forward."""
    store = distributed.HashStore()
    distributed.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    try:
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(WEIGHT, mesh, [Shard(0)])
        assert isinstance(weight, DTensor)
        for call in (head, loss):
            with pytest.raises(TypeError, match=r"weight is a DTensor.*fuse_lm_head\(model\)"):
                call(weight=weight)
            with pytest.raises(TypeError, match="hidden is a DTensor"):
                call(hidden=distribute_tensor(HIDDEN, mesh, [Shard(0)]))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("call", [head, loss])
def test_shared_vocabulary_without_ranks(call):
    """A process group that is none fails by name; a nucleus over ranks is refused."""
    if call is head:
        with pytest.raises(NotImplementedError, match="TopP with process_group: .* use TopK"):
            call(region=TopP(0.9), process_group=object())
    with pytest.raises(NotImplementedError, match="'reference' with process_group: use 'torch'"):
        call(backend="reference", process_group=object())


def test_environment_decides_where_auto_was_asked_for(monkeypatch):
    case = (torch.randn(3, 8, dtype=HALF), torch.randn(20, 8, dtype=HALF), TARGETS)
    rounded = linear_logprob_entropy(*case, backend="reference").logprob
    exact = linear_logprob_entropy(*case, backend="torch").logprob
    assert not torch.equal(rounded, exact)
    for name, wanted in (("reference", rounded), ("torch", exact), ("auto", exact)):
        monkeypatch.setenv("FUSED_KERNELS", name)
        assert torch.equal(linear_logprob_entropy(*case).logprob, wanted)
        assert torch.equal(linear_logprob_entropy(*case, backend="torch").logprob, exact)


@pytest.mark.parametrize("value", ["cuda", "Torch", ""])
def test_wrong_environment(monkeypatch, value):
    monkeypatch.setenv("FUSED_KERNELS", value)
    with pytest.raises(ValueError, match=f"FUSED_KERNELS='{value}': give one of auto, triton"):
        head()
    head(backend="torch")


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5", ""])
def test_wrong_workspace_in_the_environment(monkeypatch, value):
    monkeypatch.setenv("FUSED_WORKSPACE_MB", value)
    with pytest.raises(ValueError, match="FUSED_WORKSPACE_MB=.*: give a whole number, 1 or more"):
        head()
    head(workspace_mb=1)


def test_workspace_of_the_environment(monkeypatch):
    workspace = load_kernels("dispatch").workspace_bytes
    assert workspace(None, HIDDEN) == 64 * 2**20
    assert workspace(3, HIDDEN) == 3 * 2**20
    monkeypatch.setenv("FUSED_WORKSPACE_MB", "7")
    assert workspace(None, HIDDEN) == 7 * 2**20
    assert workspace(3, HIDDEN) == 3 * 2**20


def test_available_backend_of_a_cpu():
    assert available_backend("cpu") == available_backend(torch.device("cpu")) == "torch"
    assert available_backend("meta") == "torch"


def test_regions_survive_their_text_form():
    regions = load_kernels("regions")
    for region in (
        *(None, TopK(1), TopK(7, "none", True), TopP(0.1 + 0.2), TopP(1 - 1e-16)),
        TopP(1e-300, "none", 256, "include", True),
    ):
        assert regions.unpack_region(regions.pack_region(region)) == region
