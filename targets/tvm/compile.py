"""Compile a Relax module to a shared library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule, relax
from tvm.support import cc

from lfmc.errors import UnsupportedError
from lfmc.targets.tvm.gpus import Gpu, bitcode_paths
from lfmc.targets.tvm.kernels.cpus import HOST, Cpu
from lfmc.targets.tvm.linkers import find_linker

LENGTH = "T"  # the TIR variable of the number of tokens of a call
CHECK = "check"  # the function that only checks its inputs
FLOAT16_REQUIREMENT = re.compile(r"#ifdef cl_khr_fp16\n.*?#error[^\n]*\n#endif\n", re.DOTALL)
INPUT_COUNT = 2  # inputs of a function before its states: tokens and start


def compile_library(module: IRModule, device: Cpu | Gpu, chunk: int, path: Path) -> None:
    """Compile a module for a device and link the library. Raises `UnsupportedError` if no linker
    for the device is installed."""
    cpu = device if isinstance(device, Cpu) else HOST
    if isinstance(device, Gpu):
        _register_callbacks(device)
    # Kernels without asserts are a third as large; only functions of this module call kernels.
    with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
        executable = tvm.compile(module, tvm_target(device), relax_pipeline=_pipeline(chunk))
    linker = find_linker(cpu.triple.partition("-")[0])
    if linker is None:
        raise UnsupportedError("there is no compiler to link the library with", got=cpu.triple)
    link = cc.cross_compiler(linker, get_target_triple=lambda: cpu.triple)
    executable.export_library(str(path), fcompile=link, options=["-shared", "-s"])


def tvm_target(device: Cpu | Gpu) -> Any:
    """Return TVM's target of a device."""
    if isinstance(device, Cpu):
        spec: dict[str, Any] = {
            "mtriple": device.triple,
            "mcpu": device.mcpu,
            "mattr": list(device.mattr),
        }
        return tvm.target.Target({"kind": "llvm", **spec})
    spec = {"kind": device.kind, "host": tvm_target(HOST)}
    if device.kind == "rocm":
        spec |= {"mcpu": device.arch, "thread_warp_size": device.wave}
    elif device.kind == "cuda":
        spec |= {"arch": device.arch}
    return tvm.target.Target(spec)


def _register_callbacks(gpu: Gpu) -> None:
    """Replace two callbacks of TVM: the choice of AMD's device libraries, because TVM's choice is
    for waves of 64 threads, which AMD's consumer GPUs lack; and the check of OpenCL code for
    float16, because the code needs no float16 arithmetic."""
    if gpu.kind == "opencl":
        tvm_ffi.register_global_func(
            "tvm_callback_opencl_postproc", _remove_float16_requirement, override=True
        )
    if gpu.kind == "rocm":
        import tvm.support.rocm  # registers the function that is replaced here

        paths = [str(path) for path in bitcode_paths(gpu)]
        tvm_ffi.register_global_func(
            "tvm_callback_rocm_bitcode_path", lambda: tvm.runtime.convert(paths), override=True
        )


def _remove_float16_requirement(code: str, _: Any) -> str:
    """Remove the `#error` of OpenCL code for devices without float16: the code has only pointers to
    float16."""
    source = FLOAT16_REQUIREMENT.sub("", code)
    if "#error" in source:
        raise ValueError("TVM's OpenCL code has an #error directive that lfmc does not know")
    return source


def _pipeline(chunk: int) -> Any:
    """Return TVM's passes for a module of kernels, without fusion and scheduling. Memory is planned
    for calls of up to `chunk` tokens."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            _bound_length(chunk),
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.CanonicalizeBindings(),
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            _remove_checks(),
            passes.AttachGlobalSymbol(),
        ]
    )


def _bound_length(chunk: int) -> Any:
    """Return a pass that sets the largest number of tokens for the memory planner."""

    def run(module: IRModule, _: Any) -> IRModule:
        bound = {"tir_var_upper_bound": {LENGTH: chunk}}
        for name, function in module.functions.items():
            if isinstance(function, relax.Function):
                module[name] = function.with_attrs(bound)
        return module

    return tvm.transform.module_pass(run, opt_level=0)


def _remove_checks() -> Any:
    """Return a pass that removes the checks of states and parameters, whose shapes are constants:
    two checks for each of some hundred inputs, at every token. `CHECK` keeps its checks; a host
    calls `CHECK` once after loading."""

    def run(module: IRModule, _: Any) -> IRModule:
        for name, function in module.functions.items():
            if isinstance(function, relax.Function) and name.name_hint != CHECK:
                module[name] = _remove_input_checks(function)
        return module

    return tvm.transform.module_pass(run, opt_level=0)


def _remove_input_checks(function: Any) -> Any:
    inputs = set(function.params[INPUT_COUNT:])
    body = function.body
    blocks = [
        relax.BindingBlock(
            [binding for binding in block.bindings if not _is_check(binding, inputs)]
        )
        for block in body.blocks
    ]
    new_body = relax.SeqExpr(blocks, body.body)
    return relax.Function(
        function.params, new_body, function.ret_ty, function.is_pure, function.attrs
    )


def _is_check(binding: Any, inputs: set[Any]) -> bool:
    """Return whether a binding checks one of `inputs`."""
    call = binding.value
    return (
        isinstance(call, relax.Call)
        and isinstance(call.op, relax.ExternFunc)
        and call.op.global_symbol in ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
        and call.args[0] in inputs
    )
