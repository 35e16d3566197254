"""The devices that a module can be compiled for, and IREE's flags for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOST = "cpu"  # this machine's


@dataclass(frozen=True)
class Device:
    """A device: IREE compiles with `flags`, and `driver` of its runtime executes the module.

    `arch` and `wave`, the wave size in threads, are only set for AMD's GPUs.
    """

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
        """Whether the module reads parameters as 32-bit words.

        IREE's code for Vulkan reads narrower values at wrong places (with the baseline's storage),
        or does not compile (Adreno).
        """
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
    _vulkan("vulkan", "vp_android_baseline_2022"),  # the features of every device
    _vulkan("vulkan:rdna3", "rdna3"),
    _vulkan("vulkan:adreno", "adreno"),
    _vulkan("vulkan:valhall", "valhall"),
    _hip("gfx942", 64),
    _hip("gfx1100", 32),
    _hip("gfx1151", 32),
    _cuda("sm_80"),  # compiled to PTX, which drivers compile for every later chip
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}


def why_not_here(device: Device) -> str | None:
    """Return why this machine can't execute a module for a device, or None if it can."""
    if device.name == HOST:
        return None
    if device.is_cpu:
        return f"it is for another CPU than this machine's: {device.name}"
    import iree.runtime

    if device.name != "vulkan" and device.driver == "vulkan":
        return f"it is unknown whether a Vulkan device here is a {device.name.partition(':')[2]}"
    try:
        devices = iree.runtime.get_driver(device.driver).query_available_devices()
    except (RuntimeError, ValueError) as error:
        return f"IREE finds no {device.driver} device: {str(error).splitlines()[0]}"
    return None if devices else f"IREE finds no {device.driver} device on this machine"
