"""Number formats, their sizes in bytes, and the formats that a target supports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from lfmc.errors import InputError

FLOAT_NBYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
ExpertUnit = Literal["matrix", "expert", "layer"]

ROW = -1  # as a group size: all columns of a row

_NAME = re.compile(r"int([1-9])-(?:g([1-9]\d*)|row)-(sym|asym)-(\w+)")
_PALETTE = re.compile(r"lut([1-9])-(\w+)")


@dataclass(frozen=True, order=True)
class Format:
    """Unsigned codes of `bits` bits, with one scale (and zero point) per `group` columns of a row.

    A weight is `(code - zero) * scale`. A symmetric format has the zero point `2^(bits - 1)` and
    stores no zero points. A group size of `ROW` means the whole row. A group size of 0 means a
    palette: each row has a table of `2^bits` values instead of scales, a code is an index into the
    table, and there are no zero points. Raises `InputError` for a bit width outside 1..8, any other
    group size below 1, or an unknown scale dtype.
    """

    bits: int
    group: int
    symmetric: bool
    scale_dtype: str

    def __post_init__(self) -> None:
        valid_group = self.group > 0 or self.group == ROW or (self.palette and self.symmetric)
        if not 1 <= self.bits <= 8 or not valid_group or self.scale_dtype not in FLOAT_NBYTES:
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
        """Return the format of a name like `int4-g32-asym-float16` or `lut3-float16`.

        Raises `InputError` for a name that is not of this form.
        """
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
        """The implicit zero point of a symmetric format."""
        return 1 << (self.bits - 1)

    @property
    def palette(self) -> bool:
        """Whether codes are indices into a table of values."""
        return self.group == 0

    def columns_per_group(self, columns: int) -> int:
        """Return the number of columns that share a scale in a row; 0 for a palette."""
        return columns if self.group == ROW else self.group

    def groups_per_row(self, columns: int) -> int:
        """Return the number of groups in a row, or of table values for a palette.

        The last group may be partly padding.
        """
        return 1 << self.bits if self.palette else -(-columns // self.columns_per_group(columns))

    def codes_per_row(self, columns: int) -> int:
        """Return the number of codes in a row, including the padding of its last group."""
        if self.palette:
            return columns
        return self.groups_per_row(columns) * self.columns_per_group(columns)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of the codes, zero points and scales of a matrix `(N, K)`.

        The codes of a row fill whole bytes, and so do its zero points.
        """
        rows, columns = shape
        groups = self.groups_per_row(columns)
        codes = -(-self.codes_per_row(columns) * self.bits // 8)
        zeros = 0 if self.symmetric else -(-groups * self.bits // 8)
        return rows * (codes + zeros + groups * FLOAT_NBYTES[self.scale_dtype])

    def padding_nbytes(self, shape: Sequence[int]) -> int:
        """Return the part of `nbytes` that pads rows of codes and zero points to whole bytes."""
        rows, columns = shape
        counts = [self.codes_per_row(columns)] + [self.groups_per_row(columns)] * (
            not self.symmetric
        )
        widths = [count * self.bits for count in counts]
        return sum(rows * -(-width // 8) - -(-rows * width // 8) for width in widths)


@dataclass(frozen=True, order=True)
class Floats:
    """The format of a tensor stored as floating-point numbers of one dtype."""

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


def unpadded_formats(formats: Sequence[Format], *columns: int) -> tuple[Format, ...]:
    """Return the formats that need no padding in rows of any of the lengths `columns`."""
    return tuple(f for f in formats if all(f.codes_per_row(size) == size for size in columns))


def parse_format(name: str) -> Format | Floats:
    """Return the integer or floating-point format called `name`.

    Raises `InputError` for an unknown name.
    """
    return Floats(name) if name in FLOAT_NBYTES else Format.parse(name)


@dataclass(frozen=True)
class Capabilities:
    """The formats that a target can store, and the bytes of its artifact that are not tensors.

    `merged` lists leaf module names that the target fuses into one matmul, so they share one
    format, such as `("q_proj", "k_proj", "v_proj")`. `expert_unit` is the smallest part of a sparse
    layer that can have its own bit width: "matrix" (an expert's w1 with its w3, and its w2),
    "expert", or "layer". With `expert_layer_shares_group`, all experts of a layer share group size,
    symmetry and scale dtype, and only bit widths differ. `negative_scales` means that the target's
    kernels accept negative scales. `graph_nbytes` is reserved for the graph: everything in an
    artifact that is not a tensor.
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

    def bits(self) -> tuple[int, ...]:
        """Return all bit widths that the target supports for any role, in ascending order."""
        return tuple(sorted({f.bits for f in (*self.linear, *self.embedding, *self.expert)}))

    def formats(self, role: str) -> tuple[Format, ...]:
        """Return the formats for tensors of a role (`plan/roles.py`); none if the role stays float.

        An untied head is a matmul like any other. A tied head is the embedding.
        """
        return {
            "embedding": self.embedding,
            "head": self.linear,
            "linear": self.linear,
            "expert": self.expert,
        }.get(role, ())


_GENERIC_FORMATS = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in (2, 3, 4, 5, 6, 8)
    for group in (32, 64, 128)
    for symmetric in (True, False)
)
# No particular target: all common bit widths, and no graph. For research and benchmarks.
GENERIC = Capabilities(
    _GENERIC_FORMATS,
    _GENERIC_FORMATS,
    _GENERIC_FORMATS,
    tuple(FLOAT_NBYTES),
    negative_scales=True,
)
