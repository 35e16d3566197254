"""MIL operators in torch, as the documentation of Core ML describes them.

Products and reductions of float16 values are computed in float32; the interpreter rounds results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lfmc.errors import UnsupportedError

# The result dtypes of `cast`. Float16 is float32 here; the interpreter rounds all results.
DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def _wide(x: Any) -> Any:
    """Return float16 as float32, and any other value unchanged."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x


def _ints(x: Any) -> list[int]:
    return [int(i) for i in (x.flatten().tolist() if isinstance(x, Tensor) else x)]


def _number(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) else x


def _unsupported(variant: str) -> UnsupportedError:
    """Return the error for a variant of an operator that lfmc never emits."""
    return UnsupportedError(
        "the interpreter does not support this variant of an operator",
        got=variant,
        todo="run the package on a Mac",
    )


def _binary(function: Callable[[Any, Any], Tensor]) -> Callable[..., Tensor]:
    def run(x: Any, y: Any) -> Tensor:
        return function(torch.as_tensor(_wide(x)), torch.as_tensor(_wide(y)))

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(_wide(x))


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(DTYPES[dtype])


def _rsqrt(x: Tensor, epsilon: Any = 1e-12) -> Tensor:
    return torch.rsqrt(_wide(x) + _number(epsilon))


def _softmax(x: Tensor, axis: Any = -1) -> Tensor:
    return torch.softmax(_wide(x), _number(axis))


def _reduce(name: str) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Any = None, keep_dims: Any = False) -> Tensor:
        dims = list(range(x.dim())) if axes is None else _ints(axes)
        result: Tensor = getattr(torch, name)(_wide(x), dims, keepdim=bool(_number(keep_dims)))
        return result

    return run


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(_wide(x), _wide(weight), _wide(bias))


def _matmul(x: Tensor, y: Tensor, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    x = _wide(x.transpose(-1, -2) if _number(transpose_x) else x)
    return torch.matmul(x, _wide(y.transpose(-1, -2) if _number(transpose_y) else y))


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Any = (1,),
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = (1,),
    groups: Any = 1,
) -> Tensor:
    if pad_type != "valid" or x.dim() != 3:
        raise _unsupported(f"conv with padding '{pad_type}' in {x.dim() - 2} dims")
    return F.conv1d(
        _wide(x),
        _wide(weight),
        _wide(bias),
        stride=_ints(strides),
        dilation=_ints(dilations),
        groups=int(_number(groups)),
    )


def _gather(
    x: Tensor, indices: Tensor, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> Tensor:
    if _number(batch_dims):
        raise _unsupported("gather with batch dims")
    axis = int(_number(axis)) % x.dim()
    indices = torch.as_tensor(indices).long()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    slices = x.index_select(axis, indices.flatten())
    return slices.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: Any = 0, validate_indices: Any = False
) -> Tensor:
    return torch.gather(x, int(_number(axis)), indices.long())


def _topk(
    x: Tensor,
    k: Any,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: Any = "int32",
) -> list[Tensor]:
    largest = not _number(ascending)
    values, indices = torch.topk(_wide(x), int(_number(k)), int(_number(axis)), largest)
    return [values, indices]


def _one_hot(
    indices: Tensor, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0
) -> Tensor:
    if int(_number(axis)) != -1:
        raise _unsupported("one_hot along another axis than the last")
    one_hot = F.one_hot(indices.long(), int(_number(one_hot_vector_size)))
    on, off = torch.as_tensor(_number(on_value)), torch.as_tensor(_number(off_value))
    return torch.where(one_hot.bool(), on, off)


def _expand_dims(x: Tensor, axes: Any) -> Tensor:
    rank = x.dim() + len(_ints(axes))
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Any = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    for axis in sorted((axis % x.dim() for axis in _ints(axes)), reverse=True):
        x = x.squeeze(axis)
    return x


def _reshape(x: Tensor, shape: Any) -> Tensor:
    """Reshape `x`; a size of 0 copies the dim, and -1 infers it."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))])


def _transpose(x: Tensor, perm: Any) -> Tensor:
    return x.permute(_ints(perm))


def _split(
    x: Tensor, axis: Any, split_sizes: Any = None, num_splits: Any = None
) -> Sequence[Tensor]:
    axis = int(_number(axis))
    if split_sizes is None:
        split_sizes = [x.shape[axis] // int(_number(num_splits))] * int(_number(num_splits))
    return torch.split(x, _ints(split_sizes), axis)


def _concat(values: list[Any], axis: Any, interleave: Any = False) -> Tensor:
    if _number(interleave):
        raise _unsupported("interleaved concat")
    return torch.cat([torch.as_tensor(value) for value in values], int(_number(axis)))


def _slice_by_size(x: Tensor, begin: Any, size: Any) -> Tensor:
    """Return a slice; a size of -1 extends it to the end of the dim."""
    for dim, (start, count) in enumerate(zip(_ints(begin), _ints(size), strict=True)):
        start %= x.shape[dim]
        x = x.narrow(dim, start, x.shape[dim] - start if count == -1 else count)
    return x


def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    """Return a copy of `x` with `update` written to a slice."""
    rank = x.dim()
    if squeeze_mask is not None and any(_ints(squeeze_mask)):
        raise _unsupported("slice_update that squeezes")
    from_start = [False] * rank if begin_mask is None else _ints(begin_mask)
    to_end = [False] * rank if end_mask is None else _ints(end_mask)
    steps = [1] * rank if stride is None else _ints(stride)
    where = tuple(
        slice(None if open_start else b, None if open_end else e, step)
        for b, e, step, open_start, open_end in zip(
            _ints(begin), _ints(end), steps, from_start, to_end, strict=True
        )
    )
    if x[where].shape != update.shape:
        raise IndexError(f"an update of {list(update.shape)} for {list(x[where].shape)}")
    result = x.clone()
    result[where] = update
    return result


def _range(start: Any, end: Any, step: Any) -> Tensor:
    return torch.arange(*(int(_number(x)) for x in (start, end, step)), dtype=torch.int32)


def _read_state(input: Any) -> Tensor:
    return input.state[input.name]  # type: ignore[no-any-return]


def _update_state(state: Any, value: Tensor) -> Tensor:
    state.state[state.name] = value
    return value


def blockwise_shift_scale(data: Any, scale: Any, offset: Any = None) -> Tensor:
    """Return `(data - offset) * scale`, float32; each element of `scale` applies to a block."""
    wide = torch.from_numpy(np.asarray(data).astype(np.float32))

    def spread(value: Any) -> Tensor:
        blocks = torch.from_numpy(np.asarray(value).astype(np.float32))
        for dim in range(wide.dim()):
            blocks = blocks.repeat_interleave(wide.shape[dim] // blocks.shape[dim], dim)
        return blocks

    shifted = wide if offset is None else wide - spread(offset)
    return shifted * spread(scale)


def lut_to_dense(indices: Any, lut: Any, vector_axis: Any = None) -> Tensor:
    """Replace each index by its entry in the table of its block: `lut` `[blocks..., 2^n, 1]`."""
    if vector_axis is not None or lut.shape[-1] != 1:
        raise _unsupported("tables of vectors")
    codes = np.asarray(indices).astype(np.int64)
    grid = np.indices(codes.shape, sparse=True)
    blocks = lut.shape[: codes.ndim]
    block_index = tuple(grid[i] * blocks[i] // codes.shape[i] for i in range(codes.ndim))
    where = (*block_index, codes, 0)
    return torch.from_numpy(np.asarray(lut)[where])


CONSTEXPR: dict[str, Callable[..., Tensor]] = {
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
}

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": _binary(torch.add),
    "cast": _cast,
    "concat": _concat,
    "conv": _conv,
    "coreml_update_state": _update_state,
    "expand_dims": _expand_dims,
    "floor_div": _binary(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "greater": _binary(torch.gt),
    "identity": lambda x: x,
    "less_equal": _binary(torch.le),
    "linear": _linear,
    "logical_or": _binary(torch.logical_or),
    "matmul": _matmul,
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "one_hot": _one_hot,
    "range_1d": _range,
    "read_state": _read_state,
    "real_div": _binary(torch.div),
    "reduce_mean": _reduce("mean"),
    "reduce_sum": _reduce("sum"),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "softmax": _softmax,
    "split": _split,
    "squeeze": _squeeze,
    "sub": _binary(torch.sub),
    "topk": _topk,
    "transpose": _transpose,
}
