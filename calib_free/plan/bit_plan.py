"""The bit plan: one row a stored tensor, readable, editable and replayed to the bit."""

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
FITTED = "fitted"  # the grid of tensors that were trained: their parts are stored, not made anew


@dataclass(frozen=True)
class PlanRow:
    """How one tensor is stored.

    `format` is a name that `parse_format` reads, `grid` one of `GRIDS` (`grid/grid_search.py`;
    "none" for floats), or "fitted": then `digest` is the SHA-256 of the stored parts
    (`fitted_tensors.py`), for codes and floats alike. `error` predicts the squared error of
    the stored weights over the weights' energy, columns weighted as in the clip search; `alpha` is
    the tail exponent that AlphaQ used, where it did. `importance` has a letter for each column,
    what an error in it costs
    (`lfmc.calib_free.grid.importance`); None leaves that to the norm that feeds the matrix.
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

    `limit_nbytes` is the budget it was made under, `graph_nbytes` what it leaves for the graph, or,
    in a bundle, what the graph took;
    `predicted_kl` is the KL(fp32 || quantized) that the method expects, in nats per token, where
    it has an expectation. `fitted` gives the parts of rows with a digest; it is no part of the
    JSON, but of the folder that `save` writes beside it.
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

    @property
    def nbytes(self) -> int:
        """Bytes of all rows and of the graph."""
        return sum(row.nbytes for row in self.rows) + self.graph_nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_params

    @property
    def fitted_names(self) -> frozenset[str]:
        """Tensors whose parts are stored, not made anew."""
        return frozenset(row.name for row in self.rows if row.digest is not None)

    @cached_property
    def _by_name(self) -> dict[str, PlanRow]:
        return {row.name: row for row in self.rows}

    def row(self, name: str) -> PlanRow:
        """The row of a tensor; raises `InputError` where the plan has none."""
        if name not in self._by_name:
            raise InputError(f"the plan has no row for tensor '{name}'", where="rows")
        return self._by_name[name]

    def to_json(self) -> str:
        """JSON with one row a line, in checkpoint order: made to be read, compared and edited."""
        names = [f.name for f in fields(self) if f.name not in ("rows", "fitted")]
        head = {name: getattr(self, name) for name in names}
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        rows = ",\n".join("  " + json.dumps(asdict(row)) for row in self.rows)
        return "{\n" + ",\n".join(lines) + ',\n "rows": [\n' + rows + "\n ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> BitPlan:
        """The plan of `to_json`; raises `InputError` naming the key or the row that is wrong."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError("the plan is not JSON", got=error) from error
        if not isinstance(raw, dict) or raw.get("version") != VERSION:
            got = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(
                "this is no bit plan of this version", where="version", expected=VERSION, got=got
            )
        rows = raw.get("rows")
        if not isinstance(rows, list):
            raise InputError("the plan has no rows", where="rows", expected="a list")
        read = [_read(PlanRow, row, f"rows[{i}]") for i, row in enumerate(rows)]
        return cls(**{**_read_fields(cls, raw, "the plan"), "rows": tuple(read)})

    def save(self, path: Path) -> None:
        """Write the JSON, and the fitted tensors, where it has any, into `NAME.fitted/` beside it.

        Raises `InputError` where that can't be written.
        """
        try:
            if self.fitted:
                folder = fitted_folder(path)
                folder.mkdir(exist_ok=True)
                for stale in folder.glob("*.safetensors"):
                    stale.unlink()
                save_fitted(folder / "fitted.safetensors", self.fitted)
            path.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise InputError("the plan can't be written", where=path, got=error) from error

    @classmethod
    def load(cls, path: Path) -> BitPlan:
        """The plan that `save` wrote; raises `InputError` where a part of it can't be read."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("the plan can't be read", where=path, got=error) from error
        plan = cls.from_json(text)
        if not plan.fitted_names:
            return plan
        return replace(plan, fitted=FittedFolder(fitted_folder(path)))


def fitted_folder(path: Path) -> Path:
    """Where the fitted tensors of the plan in file `path` lie."""
    return path.with_name(path.stem + ".fitted")


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "tuple[int, ...]": (list,),
    "tuple[PlanRow, ...]": (list,),
}


def _read(kind: type[PlanRow], raw: object, where: str) -> PlanRow:
    if not isinstance(raw, dict):
        raise InputError("a row of the plan is not an object", where=where, got=raw)
    values = _read_fields(kind, raw, f"{where}, {raw.get('name')}")
    if not all(isinstance(size, int) for size in values["shape"]):
        raise InputError("'shape' is not a list of integers", where=where, got=values["shape"])
    return kind(**{**values, "shape": tuple(values["shape"])})


def _read_fields(kind: type, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Exactly the fields of dataclass `kind` from `raw`, each of its declared type."""
    wanted = {f.name: str(f.type) for f in fields(kind) if f.name != "fitted"}
    if set(raw) != set(wanted):
        raise InputError(
            "the plan has missing or unknown keys",
            where=where,
            expected=", ".join(wanted),
            got=", ".join(map(str, raw)),
        )
    for key, declared in wanted.items():
        if not isinstance(raw[key], _KINDS[declared]) or isinstance(raw[key], bool):
            raise InputError(f"'{key}' has the wrong type", where=where, got=repr(raw[key]))
    return dict(raw)
