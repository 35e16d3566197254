"""Devices that a library can be compiled for: a family of CPUs, or a GPU."""

from __future__ import annotations

from lfmc.targets.tvm.gpus import GPUS, Gpu, missing_gpu_tools
from lfmc.targets.tvm.kernels.cpus import CPUS, HOST, Cpu, runs_here, this_cpu
from lfmc.targets.tvm.linkers import find_linker, linkers

Device = Cpu | Gpu


def device_choices() -> tuple[str, ...]:
    """Return the names of devices; `cpu` is the family of this machine."""
    return ("cpu", *(f"cpu:{name}" for name in CPUS), *GPUS)


def find_device(name: str) -> Device:
    """Return the device of a name. Raises `UnsupportedError` if this machine's CPU belongs to no
    family."""
    if name in GPUS:
        return GPUS[name]
    _, separator, family = name.partition(":")
    return CPUS[family] if separator else this_cpu()


def missing_device_tools(device: Device) -> list[str]:
    """Return the tools that this machine lacks to compile for a device."""
    cpu = HOST if isinstance(device, Gpu) else device
    missing = missing_gpu_tools(device) if isinstance(device, Gpu) else []
    machine = cpu.triple.partition("-")[0]
    if find_linker(machine) is None:
        package = f"g++-{machine.replace('_', '-')}-linux-gnu"
        missing.append(f"one of {', '.join(linkers(machine))} (Debian: {package})")
    return missing


def reason_not_executable(device: Device) -> str | None:
    """Return why this machine can't execute a library for a device, or None if it can."""
    if isinstance(device, Gpu):
        import tvm

        if tvm.device(device.kind).exist:
            return None
        return f"TVM finds no {device.kind} device on this machine"
    if runs_here(device):
        return None
    return f"this machine is no {device.triple.partition('-')[0]} with {', '.join(device.flags)}"
