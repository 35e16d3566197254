"""The bit plan: one row per stored tensor, readable, editable and bit-exact in replay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lfmc.calib_free.plan.fitted_tensors import FittedFolder, Parts, save_fitted
from lfmc.errors import InputError

VERSION = 2
FITTED = "fitted"  # the grid of trained tensors: their parts are stored, not recomputed


@dataclass(frozen=True)
class PlanRow:
    """How one tensor is stored.

    `format` is a name that `parse_format` reads. `grid` is one of `GRIDS` (`grid/grid_search.py`),
    "none" for floats, or "fitted": then `digest` is the SHA-256 of the stored parts
    (`fitted_tensors.py`), for codes and for floats. `error` predicts the squared error of the
    stored weights over the weights' energy, with columns weighted as in the clip search. `alpha` is
    the tail exponent if AlphaQ used one. `importance` has one letter for each column, the cost of
    an error in that column (`lfmc.calib_free.grid.importance`); if it is None, the gain of the norm
    before the matrix is used.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    format: str
    grid: str
    nbytes: int
    reason: str
    error: float
    alpha: float | None = None
    importance: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class BitPlan:
    """How every tensor of one checkpoint is stored for one target.

    `limit_nbytes` is the budget of the plan. `graph_nbytes` is the reserve for the graph, or, in a
    bundle, the size of the graph. `predicted_kl` is the KL(fp32 || quantized) that the method
    predicts, in nats per token, or None if it makes no prediction. `fitted` maps the names of rows
    with a digest to their parts. The JSON does not contain these parts: `save` writes them into a
    folder next to it.
    """

    version: int
    fingerprint: str
    target: str
    method: str
    effort: str
    seed: int
    limit_nbytes: int | None
    graph_nbytes: int
    num_params: int
    predicted_kl: float | None
    rows: tuple[PlanRow, ...]
    fitted: Mapping[str, Parts] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        """One line: a plan has hundreds of rows."""
        size = f"{self.bits_per_weight:.3f} bits per weight, {self.nbytes:,} bytes"
        return f"<BitPlan {self.method} for {self.target}: {len(self.rows)} rows, {size}>"

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and of the graph."""
        return sum(row.nbytes for row in self.rows) + self.graph_nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_params

    @property
    def fitted_names(self) -> frozenset[str]:
        """Names of tensors whose parts are stored, not recomputed."""
        return frozenset(row.name for row in self.rows if row.digest is not None)

    @cached_property
    def _by_name(self) -> dict[str, PlanRow]:
        return {row.name: row for row in self.rows}

    def row(self, name: str) -> PlanRow:
        """Return the row of a tensor; raises `InputError` if the plan has no such row."""
        if name not in self._by_name:
            raise InputError(f"the plan has no row for tensor '{name}'", where="rows")
        return self._by_name[name]

    def to_json(self) -> str:
        """Return JSON with one row per line, in checkpoint order, for reading, diffs and edits."""
        names = [f.name for f in fields(self) if f.name not in ("rows", "fitted")]
        head = {name: getattr(self, name) for name in names}
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        return "{\n" + ",\n".join(lines) + ',\n "rows": [\n' + rows + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> BitPlan:
        """Parse the JSON of `to_json`; raises `InputError` that names the wrong key or row."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError("the plan is not JSON", got=error) from error
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            got = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(
                "this is not a bit plan of this version", where="version", expected=VERSION, got=got
            )
        rows = raw.get("rows")
        if not isinstance(rows, list):
            raise InputError("the plan has no rows", where="rows", expected="a list")
        plan_rows = [_read_row(PlanRow, row, f"rows[{i}]") for i, row in enumerate(rows)]
        return cls(**{**_read_fields(cls, raw, "the plan"), "rows": tuple(plan_rows)})

    def save(self, path: Path) -> None:
        """Write the JSON, and any fitted tensors into the folder `NAME.fitted/` next to it.

        Raises `InputError` if a file can't be written.
        """
        try:
            if self.fitted:
                folder = fitted_folder(path)
                folder.mkdir(exist_ok=True)
                for file in folder.glob("*.safetensors"):
                    file.unlink()
                save_fitted(folder / "fitted.safetensors", self.fitted)
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise InputError("the plan can't be written", where=path, got=error) from error

    @classmethod
    def load(cls, path: Path) -> BitPlan:
        """Read a plan that `save` wrote; raises `InputError` if a part of it can't be read."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("the plan can't be read", where=path, got=error) from error
        plan = cls.from_json(text)
        if not plan.fitted_names:
            return plan
        return replace(plan, fitted=FittedFolder(fitted_folder(path)))


def fitted_folder(path: Path) -> Path:
    """Return the folder of fitted tensors that belongs to the plan file `path`."""
    return path.with_name(path.stem + ".fitted")


_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "tuple[int, ...]": (list,),
    "tuple[PlanRow, ...]": (list,),
}


def _read_row(row_type: type[PlanRow], raw: object, where: str) -> PlanRow:
    if not isinstance(raw, dict):
        raise InputError("a row of the plan is not an object", where=where, got=raw)
    values = _read_fields(row_type, raw, f"{where}, {raw.get('name')}")
    if not all(isinstance(size, int) for size in values["shape"]):
        raise InputError("'shape' is not a list of integers", where=where, got=values["shape"])
    return row_type(**{**values, "shape": tuple(values["shape"])})


def _read_fields(kind: type, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of dataclass `kind` from `raw`, checked by name and declared type."""
    types = {f.name: str(f.type) for f in fields(kind) if f.name != "fitted"}
    if set(raw) != set(types):
        raise InputError(
            "the plan has missing or unknown keys",
            where=where,
            expected=", ".join(types),
            got=", ".join(map(str, raw)),
        )
    for key, type_name in types.items():
        if not isinstance(raw[key], _JSON_TYPES[type_name]) or isinstance(raw[key], bool):
            raise InputError(f"'{key}' has the wrong type", where=where, got=repr(raw[key]))
    return dict(raw)
