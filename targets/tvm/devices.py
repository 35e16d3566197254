"""What a library can be made for: a family of CPUs, or a GPU."""

from __future__ import annotations

from lfmc.targets.tvm.gpus import GPUS, Gpu, missing_for
from lfmc.targets.tvm.kernels.cpus import CPUS, HOST, Cpu, runs_here, this_cpu
from lfmc.targets.tvm.linkers import linker_of, linkers

Device = Cpu | Gpu


def choices() -> tuple[str, ...]:
    """Names of devices; `cpu` is this machine's family."""
    return ("cpu", *(f"cpu:{name}" for name in CPUS), *GPUS)


def find_device(name: str) -> Device:
    """The device of a name; raises `UnsupportedError` where this machine is of no known family."""
    if name in GPUS:
        return GPUS[name]
    _, named, family = name.partition(":")
    return CPUS[family] if named else this_cpu()


def missing_of(device: Device) -> list[str]:
    """What has to be installed here before anything can be compiled for a device."""
    cpu = HOST if isinstance(device, Gpu) else device
    found = missing_for(device) if isinstance(device, Gpu) else []
    machine = cpu.triple.partition("-")[0]
    if linker_of(machine) is None:
        package = f"g++-{machine.replace('_', '-')}-linux-gnu"
        found.append(f"one of {', '.join(linkers(machine))} (Debian: {package})")
    return found


def why_not_here(device: Device) -> str | None:
    """Why this machine can't execute what is made for a device."""
    if isinstance(device, Gpu):
        import tvm

        if tvm.device(device.kind).exist:
            return None
        return f"TVM finds no {device.kind} device on this machine"
    if runs_here(device):
        return None
    return f"this machine is no {device.triple.partition('-')[0]} with {', '.join(device.flags)}"
