"""Compiles the kernels for a GPU that is not there: the launches of the host code are recorded.

The interpreter accepts what the compiler does not (types of loop variables, shapes, layouts), so
the launches of ``triton_backend`` are compiled to machine code by the ``ptxas`` in Triton's wheel.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands in for a kernel: a launch compiles it, specialised as Triton would, and runs nothing.

    Args:
        kernel: The jitted function.
        capability: Compute capability times ten.
        compiled: Takes the result of every launch.
    """

    def __init__(self, kernel: Any, capability: int, compiled: list[Any]) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
            assert len(grid) == 1, "row blocks on another axis than x end at 65535"
            names = list(inspect.signature(self.kernel.fn).parameters)
            bound = dict(zip(names, args, strict=False)) | constants
            assert set(bound) == set(names), set(bound) ^ set(names)
            signature, attributes, fixed = {}, {}, {}
            for index, (name, value) in enumerate((name, bound[name]) for name in names):
                if name.isupper() or (isinstance(value, int) and value == 1):
                    signature[name] = "constexpr"
                    fixed[(index,)] = value
                    continue
                signature[name] = self._type(value)
                is_even = isinstance(value, torch.Tensor) or value % 16 == 0
                if is_even and not isinstance(value, float):
                    attributes[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, fixed, attributes)
            target = GPUTarget("cuda", self.capability, 32)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.compiled.append(compile(source, target=target, options=options))

        return launch

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if abs(value) < 2**31 else "i64"
