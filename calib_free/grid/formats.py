"""Number formats, what they cost in bytes, and what a target can store."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from lfmc.errors import InputError

FLOAT_NBYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
ExpertUnit = Literal["matrix", "expert", "layer"]

ROW = -1  # as a group: all columns of a row

_NAME = re.compile(r"int([1-9])-(?:g([1-9]\d*)|row)-(sym|asym)-(\w+)")
_PALETTE = re.compile(r"lut([1-9])-(\w+)")


@dataclass(frozen=True, order=True)
class Format:
    """Unsigned codes of `bits`, one scale (and zero point) for every `group` columns of a row.

    A weight is `(code - zero) * scale`; a symmetric format has the zero point `2^(bits - 1)` and
    stores none. A group of `ROW` is a whole row. A group of 0 makes it a palette: a row has a table
    of `2^bits` values in place of scales, a code picks one, and there are no zero points. Raises
    `InputError` for a width outside 1..8, another group below 1 or a scale dtype that does not
    exist.
    """

    bits: int
    group: int
    symmetric: bool
    scale_dtype: str

    def __post_init__(self) -> None:
        sensible = self.group > 0 or self.group == ROW or (self.palette and self.symmetric)
        if not 1 <= self.bits <= 8 or not sensible or self.scale_dtype not in FLOAT_NBYTES:
            raise InputError(
                "there is no such number format",
                expected=f"1 to 8 bits, a group of 1 or more, scales in {', '.join(FLOAT_NBYTES)}",
                got=f"{self.bits} bits, group {self.group}, scales in {self.scale_dtype}",
            )

    @property
    def name(self) -> str:
        if self.palette:
            return f"lut{self.bits}-{self.scale_dtype}"
        kind = "sym" if self.symmetric else "asym"
        group = "row" if self.group == ROW else f"g{self.group}"
        return f"int{self.bits}-{group}-{kind}-{self.scale_dtype}"

    @classmethod
    def parse(cls, name: str) -> Format:
        """The format of a name like `int4-g32-asym-float16` or `lut3-float16`; raises `InputError`
        for another."""
        if palette := _PALETTE.fullmatch(name):
            return cls(int(palette[1]), 0, True, palette[2])
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(
                "a number format can't be read",
                expected="int4-g32-asym-float16 or lut3-float16",
                got=repr(name),
            )
        bits, group, kind, scale_dtype = match.groups()
        return cls(int(bits), int(group or ROW), kind == "sym", scale_dtype)

    @property
    def zero_point(self) -> int:
        """The zero point that a symmetric format implies."""
        return 1 << (self.bits - 1)

    @property
    def palette(self) -> bool:
        """Codes pick values from a table."""
        return self.group == 0

    def span(self, columns: int) -> int:
        """Columns of a row of so many that share a scale; 0 for a palette."""
        return columns if self.group == ROW else self.group

    def groups(self, columns: int) -> int:
        """Groups of a row, of which the last may be partly padding; values of a palette's table."""
        return 1 << self.bits if self.palette else -(-columns // self.span(columns))

    def codes(self, columns: int) -> int:
        """Codes of a row, with those that pad its last group."""
        return columns if self.palette else self.groups(columns) * self.span(columns)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a matrix `(N, K)`: codes and zero points fill whole bytes a row, and scales."""
        rows, columns = shape
        groups = self.groups(columns)
        codes = -(-self.codes(columns) * self.bits // 8)
        zeros = 0 if self.symmetric else -(-groups * self.bits // 8)
        return rows * (codes + zeros + groups * FLOAT_NBYTES[self.scale_dtype])

    def padding(self, shape: Sequence[int]) -> int:
        """How much of `nbytes` only fills rows of codes and zero points up to whole bytes."""
        rows, columns = shape
        counts = [self.codes(columns)] + [self.groups(columns)] * (not self.symmetric)
        widths = [count * self.bits for count in counts]
        return sum(rows * -(-width // 8) - -(-rows * width // 8) for width in widths)


@dataclass(frozen=True, order=True)
class Floats:
    """A tensor stored as floating-point numbers of one dtype."""

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_NBYTES:
            raise InputError(
                "there is no such number format",
                expected=", ".join(FLOAT_NBYTES),
                got=repr(self.dtype),
            )

    @property
    def name(self) -> str:
        return self.dtype

    def nbytes(self, shape: Sequence[int]) -> int:
        return prod(shape) * FLOAT_NBYTES[self.dtype]


def unpadded(formats: Sequence[Format], *columns: int) -> tuple[Format, ...]:
    """Those of which no group is partly padding, on rows of any of these lengths."""
    return tuple(f for f in formats if all(f.codes(size) == size for size in columns))


def parse_format(name: str) -> Format | Floats:
    """The format that `name` stands for, integer or floating point; raises `InputError`."""
    return Floats(name) if name in FLOAT_NBYTES else Format.parse(name)


@dataclass(frozen=True)
class Capabilities:
    """What a target can store, and the bytes of its artifact that are no tensors.

    `merged` lists leaf module names that the target fuses into one matmul, so they share one
    format, such as `("q_proj", "k_proj", "v_proj")`. `expert_unit` is the finest part of a sparse
    layer with a width of its own: "matrix" (an expert's w1 with its w3, and its w2), "expert", or
    "layer". With `expert_layer_shares_group` all experts of a layer share group, symmetry and
    scale dtype, and only widths differ. `negative_scales`: the target's kernels accept them.
    `graph_nbytes` are to be kept free for what an artifact holds besides tensors, its graph.
    `embedding_copies` is 2 where a tied embedding is stored once to look up and once to multiply.
    """

    linear: tuple[Format, ...]
    embedding: tuple[Format, ...]
    expert: tuple[Format, ...]
    floats: tuple[str, ...]
    merged: tuple[tuple[str, ...], ...] = ()
    expert_unit: ExpertUnit = "matrix"
    expert_layer_shares_group: bool = False
    negative_scales: bool = False
    graph_nbytes: int = 0
    embedding_copies: int = 1

    def copies(self, role: str) -> int:
        """How often an artifact holds a tensor of a role."""
        return self.embedding_copies if role == "embedding" else 1

    def bits(self) -> tuple[int, ...]:
        """Every width that some kind of tensor can have, narrowest first."""
        return tuple(sorted({f.bits for f in (*self.linear, *self.embedding, *self.expert)}))

    def formats(self, role: str) -> tuple[Format, ...]:
        """Formats for tensors of a role (`plan/roles.py`); none for roles that stay float.

        A head with weights of its own is a matmul like any other; a tied one is the embedding.
        """
        return {
            "embedding": self.embedding,
            "head": self.linear,
            "linear": self.linear,
            "expert": self.expert,
        }.get(role, ())


_EVERY = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
    for symmetric in (True, False)
)
# No target in particular: every width that makes sense, no graph. For research and benchmarks.
GENERIC = Capabilities(_EVERY, _EVERY, _EVERY, tuple(FLOAT_NBYTES), negative_scales=True)
