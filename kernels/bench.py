"""Time, memory and error of the fused head beside others: ``python kernels/bench.py --help``.

Prints a Markdown table and writes it as CSV. Every provider gets the same inputs, forward and
backward, in turn; one that is not installed, fails or runs out of memory is listed as such.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
PACKAGE = "litpost_kernels"


def neighbour(name: str) -> ModuleType:
    """Load another file of this folder, whichever way this one was started.

    ``kernels`` is also a package of Hugging Face, so the folder has a name of its own.
    """
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        package.__spec__ = ModuleSpec(PACKAGE, None, is_package=True)
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    # other packages must not find our `ops` or `head` in place of their own
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != FOLDER]

    # PyTorch's profiler, which reads the memory of a CPU, talks on every use
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch  # noqa: E402

inputs_of, measure = neighbour("bench_inputs"), neighbour("bench_measure")
providers_of, reports = neighbour("bench_providers"), neighbour("bench_report")

PAIRS = ((1024, 151936), (1536, 151936), (2560, 151936), (3584, 152064), (4096, 151936))
PRESETS = {
    "main": [
        inputs_of.Size(rows, hidden, vocabulary)
        for rows in (2048, 8192, 32768)
        for hidden, vocabulary in (*PAIRS, (4096, 128256))
    ],
    "small": [inputs_of.Size(2048, 1024, 32768)],
    "cpu": [inputs_of.Size(2048, 512, 32768), inputs_of.Size(4096, 128, 300)],
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Contender:
    """A provider on one set of inputs.

    Args:
        provider: What runs.
        inputs: Shared by all; nothing is written to them but gradients.
        watch: Times it.
    """

    def __init__(self, provider: Any, inputs: Any, watch: Any) -> None:
        self.provider, self.inputs, self.watch = provider, inputs, watch
        self.status, self.times, self.peak = "", [], 0
        self.errors: dict[str, float] = {}
        self.function: Any = None
        self.attempt(self.prepare)

    def attempt(self, function: Any, *arguments: Any) -> None:
        """Call a function unless something failed before; note what fails."""
        if self.status:
            return
        try:
            function(*arguments)
        except providers_of.Unavailable as error:
            self.status = f"skipped: {error}"
        except NotImplementedError as error:  # releases differ in what they know
            self.status = f"skipped: {providers_of.first_line(error)}"
        except Exception as error:  # of whichever package
            is_memory = measure.is_out_of_memory(error)
            failure = f"failed: {providers_of.first_line(error)}"
            self.status = "out of memory" if is_memory else failure
        if self.status:
            self.clear()
            self.function = None
            if self.inputs.hidden.is_cuda:
                torch.cuda.empty_cache()

    def prepare(self) -> None:
        """Find the function."""
        if self.provider.needs_cuda and not self.inputs.hidden.is_cuda:
            raise providers_of.Unavailable("needs CUDA")
        self.function = self.provider.build()

    def leaves(self) -> list[Any]:
        """Tensors that get a gradient here."""
        found = [self.inputs.hidden]
        if self.provider.trains_weight:
            found.append(self.inputs.weight)
        return found + list(self.inputs.lora if self.provider.is_lora else ())

    def clear(self) -> None:
        """Forget gradients and let those tensors have one that need one."""
        for leaf in self.inputs.leaves():
            leaf.grad = None
            leaf.requires_grad_(False)

    def forward(self) -> Any:
        """The provider's outputs."""
        return self.function(self.inputs)

    def backward(self, found: Any) -> None:
        """Gradients of the comparable loss."""
        pairs = zip(found[:3], self.inputs.upstream, strict=True)
        sums = [(value * grad).sum() for value, grad in pairs if value is not None]
        (found.total if found.total is not None else sum(sums)).backward()

    def run(self) -> Any:
        """One timed run."""
        self.clear()
        for leaf in self.leaves():
            leaf.requires_grad_()
        return self.watch.run(self.forward, self.backward)

    def time(self, is_kept: bool) -> None:
        """One run, kept or for warming up."""
        found = self.run()
        self.clear()
        if is_kept:
            self.times.append(found)

    def weigh(self) -> None:
        """Peak memory of forward and backward, gradients included."""
        self.clear()
        device = self.inputs.hidden.device.type
        self.peak = measure.peak_bytes(self.run, device)
        self.clear()

    def compare(self, exact: Any) -> None:
        """Errors against float64 on some rows."""
        self.clear()
        for leaf in self.leaves():
            leaf.requires_grad_()
        found = self.forward()
        self.backward(found)
        grad = self.inputs.hidden.grad[exact.rows].double()
        self.clear()
        values = found
        if self.provider.build_values is not None:
            with torch.no_grad():
                values = self.provider.build_values()(self.inputs)
        self.errors["hidden_grad_error"] = float(
            (grad - exact.hidden_grad).norm() / exact.hidden_grad.norm()
        )
        for name in ("logprob", "entropy"):
            value = getattr(values, name)
            if value is not None:
                off = value.detach()[exact.rows].double() - getattr(exact, name)
                self.errors[f"{name}_error"] = float(off.abs().max())

    def row(self, rate: float) -> dict[str, Any]:
        """Numbers of the table, for a device whose matrix products reach ``rate``."""
        row: dict[str, Any] = {
            "provider": self.provider.name,
            "computes": self.provider.computes,
            "status": self.status or "ok",
        }
        if self.status:
            return row
        for part in reports.PARTS:
            points = measure.spread([getattr(times, part) for times in self.times])
            row |= {f"{part}_ms_{name}": value for name, value in points._asdict().items()}
        n, h = self.inputs.hidden.shape
        product = 2.0 * n * h * self.inputs.weight.shape[0]
        for part, count in (("forward", 1), ("both", self.provider.num_products)):
            seconds = row[f"{part}_ms_median"] / 1e3
            if self.inputs.hidden.is_cuda:
                row[f"{part}_of_floor"] = count * product / measure.ASSUMED_RATE / seconds
            row[f"{part}_of_product"] = count * product / rate / seconds
        return row | {"peak_mib": self.peak / measure.MIB} | self.errors


def bench_one(size: Any, kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all providers for one size and one kind of input."""
    watch = measure.Stopwatch(args.device, args.clock)
    inputs = inputs_of.make_inputs(size, kind, DTYPES[args.dtype], args.device)
    rate = measure.product_rate(inputs.hidden, inputs.weight, watch, args.repeats)
    contenders = [Contender(provider, inputs, watch) for provider in args.providers]
    entropy = float(inputs_of.exact(inputs).entropy.mean())
    known: dict[Any, Any] = {}
    for contender in contenders:
        own = contender.provider
        key = (own.is_sum, own.has_entropy_gradient, own.region, own.is_lora)
        if key not in known and not contender.status:
            known[key] = inputs_of.exact(inputs, *key)
        contender.attempt(contender.compare, known.get(key))
        contender.attempt(contender.weigh)
    del known
    for number in range(args.warmup + args.repeats):
        for contender in contenders:
            contender.attempt(contender.time, number >= args.warmup)
    shared = {
        **{"input": kind, "entropy_nats": entropy, "dtype": args.dtype, "device": args.device},
        **size._asdict(),
        "product_tflops": rate / 1e12,
    }
    return [contender.row(rate) | shared for contender in contenders]


# ------------------------------------------------------------------------------------ command line


def _size(text: str) -> Any:
    try:
        size = inputs_of.Size(*map(int, text.split(",")))
    except (TypeError, ValueError):
        size = None
    if size is None or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give N,H,V, such as 2048,512,32768")
    return size


def _provider(name: str) -> Any:
    known = {provider.name: provider for provider in providers_of.PROVIDERS}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise argparse.ArgumentTypeError(
        f"unknown provider {name!r}: did you mean {near[0]!r}? There are {', '.join(known)}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what depends on the device."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="sizes; main on CUDA, cpu elsewhere")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--sizes", nargs="+", type=_size, metavar="N,H,V", help="in place of the preset's")
    add("--providers", nargs="+", type=_provider, metavar="NAME", help="default: all")
    add("--inputs", nargs="+", choices=inputs_of.KINDS, default=list(inputs_of.KINDS))
    add("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--repeats", type=int, help="timed runs; default: 50 on CUDA, 5 on a CPU")
    add("--warmup", type=int, help="runs before; default: 10 on CUDA, 2 on a CPU")
    add("--threads", type=int, help="of a CPU")
    add("--clock", choices=("wall", "process"), default="wall", help="on a CPU")
    add("--output", type=Path, default=Path("outputs/bench"), help="folder of bench.csv, bench.md")
    add("--step", action="store_true", help="time a step of a 0.6B policy instead (CUDA)")
    args = parser.parse_args(arguments)
    has_cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_cuda and args.preset != "cpu" else "cpu")
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu --preset cpu")
    is_cuda = args.device == "cuda"
    args.preset = args.preset or ("main" if is_cuda else "cpu")
    args.dtype = args.dtype or ("bfloat16" if is_cuda else "float32")
    args.repeats = args.repeats or (50 if is_cuda else 5)
    args.warmup = (10 if is_cuda else 2) if args.warmup is None else args.warmup
    args.sizes = args.sizes or PRESETS[args.preset]
    args.providers = args.providers or list(providers_of.PROVIDERS)
    if args.step and not is_cuda:
        parser.error("--step needs a CUDA device")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 if one of our own providers failed."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.step:
        print("\n".join(neighbour("bench_step").report(args.repeats)))
        return 0
    measure.check_meter(args.device)
    lines, every = reports.header(args), []
    args.output.mkdir(parents=True, exist_ok=True)
    print("\n".join(lines), flush=True)
    closings = []
    with open(args.output / "bench.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reports.COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for size in args.sizes:
            for kind in args.inputs:
                rows = bench_one(size, kind, args)
                every += rows
                writer.writerows(rows)
                file.flush()
                part = reports.table(rows)
                lines += part
                print("\n".join(part), flush=True)
                closings.append(reports.closing(rows))
    ending = ["", *filter(None, closings)]
    print("\n".join(ending))
    text = "\n".join([*lines, *ending]) + "\n"
    (args.output / "bench.md").write_text(text, encoding="utf-8")
    ours = {provider.name for provider in args.providers if provider.is_ours}
    return int(any(r["provider"] in ours and r["status"].startswith("failed") for r in every))


if __name__ == "__main__":
    raise SystemExit(main())
