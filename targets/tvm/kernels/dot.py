"""Int8 dot products of four columns in every 32-bit lane, by the instructions of a CPU.

A step adds `codes . x` of unsigned codes and signed activations to a sum. Without VNNI, sums are
16 bits wide, two a lane, and are widened before they can overflow: |x| <= 127, so a step adds at
most `2 * 127 * (2^bits - 1)` to each. Codes of 8 bits are too large for that and multiplied as
16-bit numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from lfmc.targets.tvm.kernels.builder import Expr, cast, wide
from lfmc.targets.tvm.kernels.cpus import Cpu


@dataclass(frozen=True)
class Products:
    """Sums over columns for one width; vectors are of `cpu.lanes` words."""

    cpu: Cpu
    bits: int

    @property
    def narrow(self) -> bool:
        """Whether steps add to 16-bit sums."""
        return self.cpu.dot == "pmaddubsw" and self.bits < 8

    @property
    def run(self) -> int:
        """Steps before a sum has to be widened."""
        if not self.narrow:
            return 8
        return min(8, 32767 // (2 * 127 * ((1 << self.bits) - 1)))

    @property
    def sums(self) -> str:
        """The dtype of a vector of sums."""
        return f"int16x{2 * self.cpu.lanes}" if self.narrow else f"int32x{self.cpu.lanes}"

    def step(self, sums: Expr, codes: Expr, x: Expr) -> Expr:
        """`sums + codes . x` for words `codes` uint32 and one int32 `x` of four activations."""
        lanes = self.cpu.lanes
        spread = wide(x, lanes=lanes)
        bytes_ = f"x{4 * lanes}"
        if self.cpu.dot == "sdot":
            codes, spread = (tirx.reinterpret("int8" + bytes_, v) for v in (codes, spread))
            if self.bits == 8:
                codes = codes ^ wide(-128, "int8", 4 * lanes)  # see `offset`
            return _call(self.sums, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, codes, spread)
        u8, s8 = (
            tirx.reinterpret("uint8" + bytes_, codes),
            tirx.reinterpret("int8" + bytes_, spread),
        )
        if self.cpu.dot == "vpdpbusd":
            return _call(self.sums, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums, u8, s8)
        if self.narrow:
            return sums + _call(self.sums, MADDUBS[lanes], u8, s8)
        eight = wide(8, "int16", 2 * lanes)
        codes = tirx.reinterpret(f"uint16x{2 * lanes}", codes)
        x = tirx.reinterpret(f"int16x{2 * lanes}", spread)
        low, high = codes & wide(255, "uint16", 2 * lanes), codes >> cast(eight, "uint16")
        for part, own in ((low, (x << eight) >> eight), (high, x >> eight)):
            part = tirx.reinterpret(f"int16x{2 * lanes}", part)
            sums = sums + _call(self.sums, MADD[lanes], part, own)
        return sums

    def widen(self, total: Expr, sums: Expr) -> Expr:
        """`total` int32 plus narrow sums."""
        ones = wide(1, "int16", 2 * self.cpu.lanes)
        dtype = f"int32x{self.cpu.lanes}"
        return total + _call(dtype, MADD[self.cpu.lanes], sums, ones)

    @property
    def offset(self) -> int:
        """What is subtracted from codes before they are multiplied."""
        return 128 if self.bits == 8 and self.cpu.dot == "sdot" else 0


MADDUBS = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}
MADD = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}


def _call(dtype: str, name: str, *args: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(dtype, name, *args)
