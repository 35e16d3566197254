"""Write a package to disk, load its program, and read its constants back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.calib_free.grid.packed_tensor import pack_bits
from lfmc.errors import InputError, first_line
from lfmc.machine.quiet import quiet
from lfmc.targets.base import StoredTensor
from lfmc.targets.coreml.library import coremltools
from lfmc.targets.coreml.names import DECODE, identifier
from lfmc.targets.coreml.shared_constants import share_constants
from lfmc.version import __version__

PACKAGE = "model.mlpackage"
PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights"
PARTS = {"codes": ("data", "indices"), "scales": ("scale", "lut"), "zeros": ("offset",)}


@dataclass(frozen=True)
class About:
    """What Xcode shows about a model: a line of text, who made it, and its license."""

    description: str
    author: str
    license: str


def write_package(
    functions: Mapping[str, Any],
    folder: Path,
    about: About | None = None,
    descriptions: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
    named_constants: Collection[str] = (),
) -> list[str]:
    """Save functions as one ML program, and return the written files, relative to `folder`.

    Xcode shows `about` with the model. `descriptions` describe inputs, outputs and
    states by name. Constants in `named_constants` keep their name, to be read back. No pass of
    coremltools runs that could fold, merge or requantize a constant.
    """
    ct = coremltools()
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Program

    program = Program()
    for name, function in functions.items():
        program.add_function(name, function)
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    with quiet():
        model = mil_convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            compute_units=ct.ComputeUnit.ALL,
            specification_version=ct.target.iOS18.value,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    spec = model.get_spec()
    for function in spec.mlProgram.functions.values():
        share_constants(function.block_specializations[function.opset], named_constants)
    for function in spec.description.functions:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = descriptions.get(feature.name, "")
    if about is not None:
        spec.description.metadata.shortDescription = about.description
        spec.description.metadata.author = about.author
        spec.description.metadata.license = about.license
    spec.description.metadata.versionString = __version__
    spec.description.metadata.userDefined.update(metadata)
    path = folder / PACKAGE
    with quiet():
        ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True).save(str(path))
    return sorted(str(p.relative_to(folder)) for p in path.rglob("*") if p.is_file())


def load_program(folder: Path) -> Any:
    """Load the program of a package, with its constants, by coremltools."""
    path = folder / PACKAGE
    if not (path / PROGRAM).is_file():
        raise InputError("there is no Core ML package", where=path)
    return _load(path, (path / PROGRAM).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load(path: Path, stamp: int) -> Any:
    """Load a package; `stamp` is the mtime of its program; reading weights changes theirs."""
    ct = coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    try:
        with quiet():
            spec = ct.utils.load_spec(str(path))
            program = load(spec, spec.specificationVersion, str(path / WEIGHTS))
    except Exception as error:  # the library does not wrap the errors of its parsers
        raise InputError(
            "coremltools can't read the package", where=path, got=first_line(error)
        ) from error
    program.default_function_name = spec.description.defaultFunctionName
    program.metadata = dict(spec.description.metadata.userDefined)
    # A compressed matrix contains its parts: they have no names of their own in the file.
    program.constants = {
        op.name: op for op in program.functions[DECODE].operations if op.op_type.startswith("const")
    }
    return program


def read_constant(folder: Path, stored: StoredTensor) -> Tensor:
    """Read a constant from disk, in the layout of the parts of `PackedTensor`.

    Codes and zero points are returned as bit streams of unsigned integers, even if the file stores
    them signed.
    """
    program = load_program(folder)
    owner = stored.name
    if stored.part != "values":
        owner = owner.removesuffix(f".{stored.part}")
    op = program.constants.get(identifier(owner))
    if op is None:
        raise InputError(f"the package has no constant '{stored.name}'", where=folder / PACKAGE)
    if stored.part == "values":
        return torch.from_numpy(np.ascontiguousarray(op.outputs[0].val))
    key = next(key for key in PARTS[stored.part] if op.inputs.get(key) is not None)
    var = op.inputs[key]
    value = torch.from_numpy(np.ascontiguousarray(var.val))
    if key == "lut":
        return value.squeeze(-1).squeeze(-2)  # one table per row
    if key == "scale":
        return value
    signed, bits = integer_type(var)
    codes = value.short() + (1 << (bits - 1) if signed else 0)
    return pack_bits(codes.to(torch.uint8), bits)


def integer_type(var: Any) -> tuple[bool, int]:
    """Return whether the integers of a variable are signed, and their bits (4 for int4)."""
    from coremltools.converters.mil.mil import types

    kind = types.builtin_to_string(var.dtype)
    return kind.startswith("int"), int(kind.removeprefix("u").removeprefix("int"))
