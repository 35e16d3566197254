"""Heat maps of bits per weight, as data: a cell for each place, coloured by one fixed scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lfmc.report.plan_facts import TensorFacts
from lfmc.report.tensor_labels import GROUPS

LOWEST, HIGHEST, STEP = 2.0, 9.0, 0.25  # bits per weight: one scale for every page
SHADES = round((HIGHEST - LOWEST) / STEP) + 1
# ColorBrewer's YlGnBu, few bits to many, and its mirror for dark pages.
LIGHT = ("#fff9d0", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#172a6b")
DARK = ("#15245c", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#fff9d0")
_LAYERS = {"conv": "conv", "full_attention": "attention", "sliding_attention": "sliding"}
FLOAT = -1  # the shade of what stays floating point


@dataclass(frozen=True)
class Cell:
    """One place: its pixels, its shade (an index, or `FLOAT`), and the tensors in it."""

    x: int
    y: int
    shade: int
    text: str
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class HeatMap:
    """Cells of `cell` (width, height) pixels, right of row labels and below column labels."""

    title: str
    cell: tuple[int, int]
    left: int
    top: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    slanted: bool

    @property
    def width(self) -> int:
        return self.left + self.cell[0] * len(self.columns) + (40 if self.slanted else 4)

    @property
    def height(self) -> int:
        return self.top + self.cell[1] * len(self.rows) + 4


def shade(bits_per_weight: float) -> int:
    """The index of a colour; `FLOAT` from above the scale."""
    if bits_per_weight > HIGHEST + STEP:
        return FLOAT
    return min(max(round((bits_per_weight - LOWEST) / STEP), 0), SHADES - 1)


def colours(stops: Sequence[str]) -> list[tuple[str, str]]:
    """A fill and a text colour for each shade, between the stops in equal steps."""
    found = []
    for index in range(SHADES):
        at = index / (SHADES - 1) * (len(stops) - 1)
        low = min(int(at), len(stops) - 2)
        first, second = (_rgb(stops[low + i]) for i in (0, 1))
        mixed = [round(a + (b - a) * (at - low)) for a, b in zip(first, second, strict=True)]
        text = "#fff" if _luminance(mixed) < 0.36 else "#111"
        found.append(("#" + "".join(f"{v:02x}" for v in mixed), text))
    return found


def layer_map(tensors: Sequence[TensorFacts], layer_types: Sequence[str]) -> HeatMap:
    """Layers (and what is outside of them) by kind of matrix, kinds in the order of `GROUPS`."""
    matrices = [(i, t) for i, t in enumerate(tensors) if t.quantizable]
    inside = sorted(
        (t for _, t in matrices if t.place.layer is not None), key=lambda t: GROUPS.index(t.group)
    )
    columns = list(dict.fromkeys(t.place.kind for t in inside))
    outside = list(dict.fromkeys(t.place.kind for _, t in matrices if t.place.layer is None))
    rows = [*outside, *(f"{n} {_LAYERS[kind]}" for n, kind in enumerate(layer_types))]
    found: dict[tuple[int, int], list[tuple[int, TensorFacts]]] = {}
    for index, tensor in matrices:
        layer = tensor.place.layer
        if layer is None:
            key = (outside.index(tensor.place.kind), 0)
        else:
            key = (len(outside) + layer, columns.index(tensor.place.kind))
        found.setdefault(key, []).append((index, tensor))
    size, left, top = (46, 24), 96, 96
    cells = tuple(_cell(at, own, size, left, top, True) for at, own in found.items())
    title = "bits per weight, scales included, by layer and kind of matrix"
    short = tuple(c.replace("feed_forward.", "ffn.").replace("self_attn.", "") for c in columns)
    return HeatMap(title, size, left, top, tuple(rows), short, cells, True)


def expert_map(tensors: Sequence[TensorFacts]) -> HeatMap | None:
    """Sparse layers by expert, all matrices of an expert together; None where there are none."""
    experts = [(i, t) for i, t in enumerate(tensors) if t.place.expert is not None]
    layers = sorted({t.place.layer for _, t in experts if t.place.layer is not None})
    if not layers:
        return None
    count = 1 + max(t.place.expert or 0 for _, t in experts)
    found: dict[tuple[int, int], list[tuple[int, TensorFacts]]] = {}
    for index, tensor in experts:
        key = (layers.index(tensor.place.layer or 0), tensor.place.expert or 0)
        found.setdefault(key, []).append((index, tensor))
    size, left, top = ((38, 24) if count <= 16 else (20, 20)), 68, 22
    cells = tuple(_cell(at, own, size, left, top, count <= 16) for at, own in found.items())
    title = "bits per weight, scales included, by sparse layer and expert"
    stride = 1 if count <= 32 else 4
    columns = tuple(str(n) if n % stride == 0 else "" for n in range(count))
    return HeatMap(
        title, size, left, top, tuple(f"layer {n}" for n in layers), columns, cells, False
    )


def _cell(
    at: tuple[int, int],
    own: Iterable[tuple[int, TensorFacts]],
    size: tuple[int, int],
    left: int,
    top: int,
    written: bool,
) -> Cell:
    indices, tensors = zip(*own, strict=True)
    bits = 8 * sum(t.row.nbytes for t in tensors) / sum(t.numel for t in tensors)
    text = f"{bits:.1f}" if written else ""
    x, y = left + at[1] * size[0], top + at[0] * size[1]
    return Cell(x, y, shade(bits), text, tuple(indices))


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(rgb: Sequence[int]) -> float:
    """Relative luminance of WCAG 2, from 0 to 1."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
