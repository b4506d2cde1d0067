"""``kernels/bench.py`` from the command line, at a tiny size on a CPU."""

import csv
import sys

import pytest
import torch

from lightning_modules.ops import load_kernels
from tests.runs import REPO, call, environment

BENCH = str(REPO / "kernels" / "bench.py")
QUICK = ["--device", "cpu", "--repeats", "2", "--warmup", "0", "--threads", "1"]
PEERS = ("liger", "liger_scaled", "cce", "cce_exact", "verl", "trl")

bench = load_kernels("bench")
measure = load_kernels("bench_measure")
inputs = load_kernels("bench_inputs")
providers = load_kernels("bench_providers")


def run(*arguments, cwd):
    return call(sys.executable, BENCH, *arguments, cwd=cwd, env=environment())


def read(folder):
    with open(folder / "bench.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_help_from_any_folder(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for option in ("--preset", "--sizes", "--providers", "--repeats", "--output", "--step"):
        assert option in result.stdout


def test_csv_has_every_provider(tmp_path, capsys):
    names = [p.name for p in providers.PROVIDERS if p.name != "compile"]  # takes a compiler
    size = ["--sizes", "96,32,500", "--output", str(tmp_path)]
    assert bench.main([*QUICK, *size, "--providers", *names]) == 0
    rows = read(tmp_path)
    assert list(rows[0]) == list(load_kernels("bench_report").COLUMNS)
    assert [(row["provider"], row["input"]) for row in rows] == [
        (name, kind) for kind in inputs.KINDS for name in names
    ]
    printed = capsys.readouterr().out
    assert printed.count(" of eager, time ") == 2
    for row in rows:
        if row["provider"] in PEERS and row["status"] != "ok":
            assert row["status"].startswith("skipped: ")
            assert f"- {row['provider']}: {row['status']}" in printed
            continue
        assert row["status"] == "ok", row
        assert float(row["both_ms_median"]) > 0 and float(row["peak_mib"]) > 0
        if row["provider"].startswith(("ours", "eager")):
            assert float(row["logprob_error"]) < 1e-4
            assert float(row["hidden_grad_error"]) < 1e-4
            assert row["provider"].endswith("_nll") or float(row["entropy_error"]) < 1e-4
    assert (tmp_path / "bench.md").read_text(encoding="utf-8") == printed


@pytest.mark.slow
def test_a_script_beside_the_tests_writes_where_it_is_told(tmp_path):
    arguments = [*QUICK, "--sizes", "96,32,500", "--inputs", "trained", "--output", "found"]
    result = run(*arguments, "--providers", "eager", "compile", "ours", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["provider"] for row in read(tmp_path / "found")] == ["eager", "compile", "ours"]
    assert list(tmp_path.iterdir()) == [tmp_path / "found"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--providers", "eagr"], "did you mean 'eager'"),
        (["--providers", "ours_top_p"], "did you mean 'ours_topp'"),
        (["--sizes", "12,13"], "give N,H,V"),
        (["--sizes", "0,1,2"], "give N,H,V"),
    ],
)
def test_bad_arguments_are_refused(arguments, wanted, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert wanted in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_without_one(capsys):
    for arguments in (["--device", "cuda"], ["--step"]):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs_have_the_entropy_they_should(kind):
    made = inputs.make_inputs(inputs.Size(64, 64, 4000), kind, torch.float32, "cpu")
    entropy = float(inputs.exact(made).entropy.mean())
    assert 1.0 < entropy < 2.0 if kind == "trained" else entropy > 7.0


def test_the_memory_meter_reads_what_is_allocated():
    measure.check_meter("cpu")


def test_out_of_memory_is_listed_and_others_go_on(tmp_path, monkeypatch):
    def build():
        def function(given):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried too much")

        return function

    large = providers.Provider("large", "nothing", build)
    monkeypatch.setattr(providers, "PROVIDERS", (large, *providers.PROVIDERS))
    size = ["--sizes", "32,16,100", "--inputs", "random", "--output", str(tmp_path)]
    assert bench.main([*QUICK, *size, "--providers", "large", "ours"]) == 0
    assert [row["status"] for row in read(tmp_path)] == ["out of memory", "ok"]


def test_arguments_by_name_follow_the_function():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, unknown, factor, shift=1.0):
            assert unknown is None
            return hidden * factor + shift

    found = providers.apply_by_name(Scale, factor=3.0, other=5.0)(hidden=torch.ones(2))
    assert found.tolist() == [4.0, 4.0]


@pytest.mark.slow
def test_a_step_with_both_heads():
    pytest.importorskip("transformers")
    step = load_kernels("bench_step")
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"dtype": torch.float32, "shape": shape, "samples": 2, "tokens": 16}
    lines = step.report(2, "cpu", **options)
    assert lines[-1].startswith("memory ") and lines[-1].endswith(" of eager")
    policy = step.Policy("cpu", **options)
    torch.testing.assert_close(policy.loss(policy.plain), policy.loss(policy.fused))
