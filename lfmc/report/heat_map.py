"""Heat maps of bits per weight, as data. All pages use the same colour scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lfmc.report.plan_facts import TensorFacts
from lfmc.report.tensor_labels import GROUPS

LOWEST, HIGHEST, STEP = 2.0, 9.0, 0.25  # bits per weight: the scale of all pages
SHADES = round((HIGHEST - LOWEST) / STEP) + 1
# ColorBrewer's YlGnBu, from few bits to many, and its reverse for dark pages.
LIGHT = ("#fff9d0", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#172a6b")
DARK = ("#15245c", "#225ea8", "#1d91c0", "#41b6c4", "#7fcdbb", "#c7e9b4", "#fff9d0")
_LAYER_LABELS = {"conv": "conv", "full_attention": "attention", "sliding_attention": "sliding"}
FLOAT = -1  # the shade of floating-point tensors


@dataclass(frozen=True)
class Cell:
    """A cell's position in pixels, its shade (an index, or `FLOAT`), and indices of its tensors."""

    x: int
    y: int
    shade: int
    text: str
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class HeatMap:
    """Cells of `cell_size` (width, height) pixels, with row labels left and column labels above.

    `left` and `top` are the pixels that the labels need.
    """

    title: str
    cell_size: tuple[int, int]
    left: int
    top: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    slanted: bool

    @property
    def width(self) -> int:
        return self.left + self.cell_size[0] * len(self.columns) + (40 if self.slanted else 4)

    @property
    def height(self) -> int:
        return self.top + self.cell_size[1] * len(self.rows) + 4


def shade(bits_per_weight: float) -> int:
    """Return the index of a colour, or `FLOAT` for a value above the scale."""
    if bits_per_weight > HIGHEST + STEP:
        return FLOAT
    return min(max(round((bits_per_weight - LOWEST) / STEP), 0), SHADES - 1)


def colours(stops: Sequence[str]) -> list[tuple[str, str]]:
    """Return a fill colour and a text colour per shade, interpolated between the stops."""
    pairs = []
    for index in range(SHADES):
        position = index / (SHADES - 1) * (len(stops) - 1)
        low = min(int(position), len(stops) - 2)
        first, second = (_rgb(stops[low + i]) for i in (0, 1))
        mixed = [round(a + (b - a) * (position - low)) for a, b in zip(first, second, strict=True)]
        text = "#fff" if _luminance(mixed) < 0.36 else "#111"
        pairs.append(("#" + "".join(f"{v:02x}" for v in mixed), text))
    return pairs


def layer_map(tensors: Sequence[TensorFacts], layer_types: Sequence[str]) -> HeatMap:
    """Return a map with a row per layer and a column per kind of matrix, ordered as `GROUPS`.

    Matrices outside the layers (embedding, head) have rows of their own, in the first column.
    """
    matrices = [(i, t) for i, t in enumerate(tensors) if t.quantizable]
    in_layers = sorted(
        (t for _, t in matrices if t.place.layer is not None), key=lambda t: GROUPS.index(t.group)
    )
    columns = list(dict.fromkeys(t.place.kind for t in in_layers))
    outside = list(dict.fromkeys(t.place.kind for _, t in matrices if t.place.layer is None))
    rows = [*outside, *(f"{n} {_LAYER_LABELS[kind]}" for n, kind in enumerate(layer_types))]
    tensors_by_cell: dict[tuple[int, int], list[tuple[int, TensorFacts]]] = {}
    for index, tensor in matrices:
        layer = tensor.place.layer
        if layer is None:
            key = (outside.index(tensor.place.kind), 0)
        else:
            key = (len(outside) + layer, columns.index(tensor.place.kind))
        tensors_by_cell.setdefault(key, []).append((index, tensor))
    size, left, top = (46, 24), 96, 96
    cells = tuple(_cell(key, t, size, left, top, True) for key, t in tensors_by_cell.items())
    title = "bits per weight, scales included, by layer and kind of matrix"
    labels = tuple(c.replace("feed_forward.", "ffn.").replace("self_attn.", "") for c in columns)
    return HeatMap(title, size, left, top, tuple(rows), labels, cells, True)


def expert_map(tensors: Sequence[TensorFacts]) -> HeatMap | None:
    """Return a map with a row per sparse layer and a column per expert, or None without experts.

    A cell is the mean over an expert's matrices.
    """
    experts = [(i, t) for i, t in enumerate(tensors) if t.place.expert is not None]
    layers = sorted({t.place.layer for _, t in experts if t.place.layer is not None})
    if not layers:
        return None
    count = 1 + max(t.place.expert or 0 for _, t in experts)
    tensors_by_cell: dict[tuple[int, int], list[tuple[int, TensorFacts]]] = {}
    for index, tensor in experts:
        key = (layers.index(tensor.place.layer or 0), tensor.place.expert or 0)
        tensors_by_cell.setdefault(key, []).append((index, tensor))
    has_text = count <= 16
    size, left, top = ((38, 24) if has_text else (20, 20)), 68, 22
    cells = tuple(_cell(key, t, size, left, top, has_text) for key, t in tensors_by_cell.items())
    title = "bits per weight, scales included, by sparse layer and expert"
    stride = 1 if count <= 32 else 4
    columns = tuple(str(n) if n % stride == 0 else "" for n in range(count))
    return HeatMap(
        title, size, left, top, tuple(f"layer {n}" for n in layers), columns, cells, False
    )


def _cell(
    key: tuple[int, int],
    indexed_tensors: Iterable[tuple[int, TensorFacts]],
    size: tuple[int, int],
    left: int,
    top: int,
    has_text: bool,
) -> Cell:
    row, column = key
    indices, tensors = zip(*indexed_tensors, strict=True)
    bits = 8 * sum(t.row.nbytes for t in tensors) / sum(t.numel for t in tensors)
    text = f"{bits:.1f}" if has_text else ""
    x, y = left + column * size[0], top + row * size[1]
    return Cell(x, y, shade(bits), text, tuple(indices))


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _luminance(rgb: Sequence[int]) -> float:
    """Return the relative luminance of WCAG 2, from 0 to 1."""
    linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
