"""What a module can be compiled for, and what IREE is told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST = "cpu"  # this machine's


@dataclass(frozen=True)
class Device:
    """`driver` of IREE's runtime executes what is compiled with `flags`. `arch` and `wave`, how
    many threads go together, are of AMD's GPUs."""

    name: str
    driver: str
    flags: tuple[str, ...]
    arch: str = ""
    wave: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.driver == "local-task"

    @property
    def words(self) -> bool:
        """Whether parameters are read as 32-bit words: IREE's code for Vulkan reads narrower ones
        at wrong places (of the baseline's storage), or does not compile (Adreno's)."""
        return self.driver == "vulkan"


def _cpu(name: str, *flags: str) -> Device:
    common = (
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-stack-allocation-limit=65536",
        "--iree-llvmcpu-debug-symbols=false",
    )
    return Device(name, "local-task", (*common, *flags))


def _vulkan(name: str, target: str) -> Device:
    flags = ("--iree-hal-target-device=vulkan", f"--iree-vulkan-target={target}")
    return Device(name, "vulkan", flags)


def _hip(arch: str, wave: int) -> Device:
    flags = ("--iree-hal-target-device=hip", f"--iree-rocm-target={arch}")
    return Device(f"hip:{arch}", "hip", flags, arch, wave)


def _cuda(arch: str) -> Device:
    flags = ("--iree-hal-target-device=cuda", f"--iree-cuda-target={arch}")
    return Device("cuda", "cuda", flags)


_ALL = (
    _cpu(HOST, "--iree-llvmcpu-target-cpu=host"),
    _cpu(
        "cpu:aarch64",
        "--iree-llvmcpu-target-triple=aarch64-linux-android34",
        "--iree-llvmcpu-target-cpu-features=+neon,+dotprod",
    ),
    _vulkan("vulkan", "vp_android_baseline_2022"),  # what every device has
    _vulkan("vulkan:rdna3", "rdna3"),
    _vulkan("vulkan:adreno", "adreno"),
    _vulkan("vulkan:valhall", "valhall"),
    _hip("gfx942", 64),
    _hip("gfx1100", 32),
    _hip("gfx1151", 32),
    _cuda("sm_80"),  # as PTX, which drivers compile for every later chip
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}


def why_not_here(device: Device) -> str | None:
    """Why this machine can't execute what is compiled for a device, where that is so."""
    if device.name == HOST:
        return None
    if device.is_cpu:
        return f"it is for another CPU than this machine's: {device.name}"
    import iree.runtime

    if device.name != "vulkan" and device.driver == "vulkan":
        return f"whether a Vulkan device is a {device.name.partition(':')[2]} can't be told"
    try:
        found = iree.runtime.get_driver(device.driver).query_available_devices()
    except (RuntimeError, ValueError) as error:
        return f"IREE finds no {device.driver} device: {str(error).splitlines()[0]}"
    return None if found else f"IREE finds no {device.driver} device on this machine"
