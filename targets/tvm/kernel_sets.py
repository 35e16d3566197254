"""The kernels of a program by name: for CPUs, and for GPUs."""

from __future__ import annotations

from types import SimpleNamespace

from lfmc.targets.tvm.kernels import (
    attention,
    elementwise,
    embedding,
    float_linear,
    gated_short_conv,
    linear,
    moe,
    rms_norm,
    round_rows,
    routing,
    swiglu,
)
from lfmc.targets.tvm.kernels.gpu import attention as gpu_attention
from lfmc.targets.tvm.kernels.gpu import linear as gpu_linear
from lfmc.targets.tvm.kernels.gpu import moe as gpu_moe
from lfmc.targets.tvm.kernels.gpu import pointwise
from lfmc.targets.tvm.kernels.gpu import rms_norm as gpu_rms_norm

CPU = SimpleNamespace(
    add_rms_norm=rms_norm.add_rms_norm,
    angles=attention.angles,
    attend=attention.attend,
    binary=elementwise.binary,
    columns_of=elementwise.columns_of,
    combine=routing.combine,
    down=moe.down,
    embedding=embedding.embedding,
    embedding_nbits=embedding.embedding_nbits,
    float_linear=float_linear.float_linear,
    gate_up=moe.gate_up,
    gated_short_conv=gated_short_conv.gated_short_conv,
    group=routing.group,
    last_of=elementwise.last_of,
    linear=linear.linear,
    nothing=elementwise.nothing,
    rms_norm=rms_norm.rms_norm,
    round_rows=round_rows.round_rows,
    route=routing.route,
    sigmoids=elementwise.sigmoids,
    swiglu=swiglu.swiglu,
    write_heads=attention.write_heads,
)
# GPU kernels do not round activations.
GPU = SimpleNamespace(
    add_rms_norm=gpu_rms_norm.add_rms_norm,
    angles=pointwise.angles,
    attend=gpu_attention.attend,
    binary=pointwise.binary,
    columns_of=pointwise.columns_of,
    combine=pointwise.combine,
    down=gpu_moe.down,
    embedding=pointwise.embedding,
    embedding_nbits=pointwise.embedding_nbits,
    float_linear=gpu_linear.float_linear,
    gate_up=gpu_moe.gate_up,
    gated_short_conv=pointwise.gated_short_conv,
    group=gpu_moe.group,
    last_of=pointwise.last_of,
    linear=gpu_linear.linear,
    nothing=elementwise.nothing,
    rms_norm=gpu_rms_norm.rms_norm,
    route=gpu_moe.route,
    sigmoids=pointwise.sigmoids,
    swiglu=pointwise.swiglu,
    write_heads=gpu_attention.write_heads,
)
