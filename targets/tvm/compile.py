"""From a Relax module to a shared library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule, relax
from tvm.support import cc

from lfmc.errors import UnsupportedError
from lfmc.targets.tvm.gpus import Gpu, bitcode_of
from lfmc.targets.tvm.kernels.cpus import HOST, Cpu
from lfmc.targets.tvm.linkers import linker_of

LENGTH = "T"  # of the tokens of a call, as functions have it
CHECK = "check"  # a function that only looks at what it is given
HALF_DEMAND = re.compile(r"#ifdef cl_khr_fp16\n.*?#error[^\n]*\n#endif\n", re.DOTALL)
INPUTS = 2  # parameters of a function before its states: tokens and start


def compile_library(module: IRModule, device: Cpu | Gpu, chunk: int, path: Path) -> None:
    """Compile for a device and link; raises `UnsupportedError` where nothing links for it."""
    cpu = device if isinstance(device, Cpu) else HOST
    if isinstance(device, Gpu):
        _prepare(device)
    # Kernels without asserts are a third as large; nothing but this module's functions calls them.
    with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": True}):
        made = tvm.compile(module, target_of(device), relax_pipeline=_pipeline(chunk))
    linker = linker_of(cpu.triple.partition("-")[0])
    if linker is None:
        raise UnsupportedError("there is no compiler to link the library with", got=cpu.triple)
    link = cc.cross_compiler(linker, get_target_triple=lambda: cpu.triple)
    made.export_library(str(path), fcompile=link, options=["-shared", "-s"])


def target_of(device: Cpu | Gpu) -> Any:
    """TVM's target of a device."""
    if isinstance(device, Cpu):
        spec: dict[str, Any] = {
            "mtriple": device.triple,
            "mcpu": device.mcpu,
            "mattr": list(device.mattr),
        }
        return tvm.target.Target({"kind": "llvm", **spec})
    spec = {"kind": device.kind, "host": target_of(HOST)}
    if device.kind == "rocm":
        spec |= {"mcpu": device.arch, "thread_warp_size": device.wave}
    elif device.kind == "cuda":
        spec |= {"arch": device.arch}
    return tvm.target.Target(spec)


def _prepare(gpu: Gpu) -> None:
    """Have TVM link the right device libraries: its own choice is for waves of 64 threads, which
    AMD's consumer GPUs have not. And have it ask no OpenCL device for a type that is not used."""
    if gpu.kind == "opencl":
        tvm_ffi.register_global_func("tvm_callback_opencl_postproc", _without_demand, override=True)
    if gpu.kind == "rocm":
        import tvm.support.rocm  # registers the function that is replaced here

        paths = [str(path) for path in bitcode_of(gpu)]
        tvm_ffi.register_global_func(
            "tvm_callback_rocm_bitcode_path", lambda: tvm.runtime.convert(paths), override=True
        )


def _without_demand(code: str, _: Any) -> str:
    """OpenCL code that does not fail where there is no float16: it has pointers to it only."""
    made = HALF_DEMAND.sub("", code)
    if "#error" in made:
        raise ValueError("TVM's OpenCL code makes a demand that lfmc does not know")
    return made


def _pipeline(chunk: int) -> Any:
    """What TVM does with a module of kernels: nothing is fused or scheduled any more. Memory is
    planned for calls of up to `chunk` tokens."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            _bounded(chunk),
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.CanonicalizeBindings(),
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            _without_checks(),
            passes.AttachGlobalSymbol(),
        ]
    )


def _bounded(chunk: int) -> Any:
    """Tell the planner of memory how many tokens there may be."""

    def run(module: IRModule, _: Any) -> IRModule:
        bound = {"tir_var_upper_bound": {LENGTH: chunk}}
        for name, function in module.functions.items():
            if isinstance(function, relax.Function):
                module[name] = function.with_attrs(bound)
        return module

    return tvm.transform.module_pass(run, opt_level=0)


def _without_checks() -> Any:
    """Take out checks of states and parameters, whose shapes are numbers: two for each of some
    hundreds, at every token. `CHECK` keeps them, for a host to call when it has loaded them."""

    def run(module: IRModule, _: Any) -> IRModule:
        for name, function in module.functions.items():
            if isinstance(function, relax.Function) and name.name_hint != CHECK:
                module[name] = _unchecked(function)
        return module

    return tvm.transform.module_pass(run, opt_level=0)


def _unchecked(function: Any) -> Any:
    held = set(function.params[INPUTS:])
    body = function.body
    blocks = [
        relax.BindingBlock([own for own in block.bindings if not _checks(own, held)])
        for block in body.blocks
    ]
    made = relax.SeqExpr(blocks, body.body)
    return relax.Function(function.params, made, function.ret_ty, function.is_pure, function.attrs)


def _checks(binding: Any, held: set[Any]) -> bool:
    call = binding.value
    return (
        isinstance(call, relax.Call)
        and isinstance(call.op, relax.ExternFunc)
        and call.op.global_symbol in ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
        and call.args[0] in held
    )
