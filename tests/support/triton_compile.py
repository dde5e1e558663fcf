"""Compiles Triton kernels for a GPU that need not be there: catches a launch and hands it to the compiler.

`catch_launches` puts stand-ins in the place of a module's kernels; an op then called with CPU tensors computes nothing,
and each of its launches is there to be compiled as the GPU named would have it.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from inferflux.kernels.backends import PACKED_OPS, find_backend
from inferflux.kernels.cases.case import Inputs

# moe uses that op between its own kernels.
ACTIVATION = "inferflux.kernels.triton.activation"
H100 = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]

    def compile(self, target: GPUTarget = H100) -> CompiledKernel:
        options = {name: self.arguments[name] for name in OPTIONS if name in self.arguments}
        values = {name: self.arguments[name] for name in self.kernel.arg_names}
        constexprs = {self.kernel.arg_names[index]: None for index in self.kernel.constexprs}
        constexprs = {name: values[name] for name in constexprs}
        signature = {name: "constexpr" if name in constexprs else _type_of(value) for name, value in values.items()}
        # What the launcher tells the compiler of pointers and strides that are multiples of 16.
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, (name, value) in enumerate(values.items())
            if name not in constexprs and name not in _unspecialised(self.kernel) and _is_aligned(value)
        }
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=aligned)
        return triton.compile(source, target=target, options=options)


class _Caught:
    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, _grid: object) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self._kernel.arg_names, args, strict=False))
            self._launches.append(Launch(self._kernel, named | kwargs))

        return launch


@contextmanager
def catch_launches(module: ModuleType) -> Iterator[list[Launch]]:
    """Inside, launches of the module's kernels are appended to the list and not run."""
    launches: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    try:
        for name, kernel in kernels.items():
            if name.endswith("_kernel"):
                setattr(module, name, _Caught(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def _unspecialised(kernel: JITFunction) -> set[str]:
    return {parameter.name for parameter in kernel.params if parameter.do_not_specialize}


def _is_aligned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launches_of(op: str, calls: list[Inputs]) -> list[Launch]:
    """Returns what Triton's op launches when it is called with these arguments, each time."""
    found = find_backend("triton").find(op)
    module = importlib.import_module(found.__name__ if op in PACKED_OPS else found.__module__)
    with catch_launches(module) as launches, catch_launches(importlib.import_module(ACTIVATION)):
        for positional, keywords in calls:
            if op in PACKED_OPS:
                found.run(found.pack(*positional[:2]), *positional[2:])
            else:
                found(*positional, **keywords)
    assert launches
    return launches
