"""Int8 dot products of four columns in every 32-bit lane, with the int8 instructions of a CPU.

A step adds `codes . x` of unsigned codes and signed activations to a sum. Without VNNI, sums have
16 bits, two to a lane, and are widened before they can overflow: |x| <= 127, so a step adds at most
`2 * 127 * (2^bits - 1)` to each sum. Codes of 8 bits are too large for 16-bit sums and are
multiplied as 16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from lfmc.targets.tvm.kernels.builder import Expr, broadcast, cast
from lfmc.targets.tvm.kernels.cpus import Cpu


@dataclass(frozen=True)
class Int8Dot:
    """Dot products of codes of one width; vectors have `cpu.lanes` words."""

    cpu: Cpu
    bits: int

    @property
    def int16_sums(self) -> bool:
        """Whether steps add to 16-bit sums."""
        return self.cpu.dot == "pmaddubsw" and self.bits < 8

    @property
    def steps_before_widening(self) -> int:
        """The number of steps before a sum must be widened."""
        if not self.int16_sums:
            return 8
        return min(8, 32767 // (2 * 127 * ((1 << self.bits) - 1)))

    @property
    def sum_dtype(self) -> str:
        """The dtype of a vector of sums."""
        return f"int16x{2 * self.cpu.lanes}" if self.int16_sums else f"int32x{self.cpu.lanes}"

    def step(self, sums: Expr, codes: Expr, x: Expr) -> Expr:
        """Return `sums + codes . x`; `codes` are words uint32, `x` is one int32 of four
        activations."""
        lanes = self.cpu.lanes
        words = broadcast(x, lanes=lanes)
        bytes_ = f"x{4 * lanes}"
        if self.cpu.dot == "sdot":
            codes, words = (tirx.reinterpret("int8" + bytes_, v) for v in (codes, words))
            if self.bits == 8:
                codes = codes ^ broadcast(-128, "int8", 4 * lanes)  # see `code_offset`
            return _call(self.sum_dtype, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, codes, words)
        u8, s8 = (
            tirx.reinterpret("uint8" + bytes_, codes),
            tirx.reinterpret("int8" + bytes_, words),
        )
        if self.cpu.dot == "vpdpbusd":
            return _call(self.sum_dtype, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums, u8, s8)
        if self.int16_sums:
            return sums + _call(self.sum_dtype, MADDUBS[lanes], u8, s8)
        eight = broadcast(8, "int16", 2 * lanes)
        codes = tirx.reinterpret(f"uint16x{2 * lanes}", codes)
        x = tirx.reinterpret(f"int16x{2 * lanes}", words)
        low, high = codes & broadcast(255, "uint16", 2 * lanes), codes >> cast(eight, "uint16")
        for part, activations in ((low, (x << eight) >> eight), (high, x >> eight)):
            part = tirx.reinterpret(f"int16x{2 * lanes}", part)
            sums = sums + _call(self.sum_dtype, MADD[lanes], part, activations)
        return sums

    def widen(self, total: Expr, sums: Expr) -> Expr:
        """Return `total` int32 plus 16-bit sums."""
        ones = broadcast(1, "int16", 2 * self.cpu.lanes)
        dtype = f"int32x{self.cpu.lanes}"
        return total + _call(dtype, MADD[self.cpu.lanes], sums, ones)

    @property
    def code_offset(self) -> int:
        """The number that is subtracted from codes before the product."""
        return 128 if self.bits == 8 and self.cpu.dot == "sdot" else 0


MADDUBS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


def _call(dtype: str, name: str, *args: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *args)
