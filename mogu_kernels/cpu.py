"""Tensors in, calls of the C++ backend out; `csrc/mogu.h` says what it takes.

Arguments have been checked by `ops`. Few tokens go through a form that reads the weight once, many
through a blocked GEMM; gate, expand and bias are in both, and there is one rounding.
"""

import functools
from typing import Any

import torch
from torch import Tensor

try:
    from mogu_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # installed without a compiler: `eager` serves
    _cpu: Any = None

# tokens up to which reading the weight once is the faster form: where the two crossed, timed with 0
# and 100 here on the machine of bench/results/cpu.md; fp16, not timed, follows fp32
MOST_TILED = {torch.float32: 16, torch.float16: 16, torch.bfloat16: 8}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that were built and that this processor has, best first; empty without the backend."""
    return () if _cpu is None else tuple(_cpu.available())


def mogu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
    return_gates: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [M, E] fp32 ([M, 0] unless asked for).

    `isa` forces one of `instruction_sets()`.
    """
    projection = (weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    y, gates = _run(x, [projection], None, scaling, gate, routed, return_gates, isa)
    return y, gates[0]


def gated_mlp(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: list[float],
    gate: str,
    activation: str,
    routed: Tensor | None,
    return_gates: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [2, M, E] fp32; every list is gate_proj's, up_proj's."""
    lists = (weight, bias or [None, None], lora_A, lora_B, gate_weight, gate_bias)
    projections = list(zip(*lists, strict=True))
    return _run(x, projections, activation, scaling, gate, routed, return_gates, isa)


def _run(x, projections, activation, scaling, gate, routed, return_gates, isa):
    """One call; its outputs are new tensors."""
    (M, K), (weight, _, lora_A, *_) = x.shape, projections[0]
    N, (E, rank, _) = len(weight), lora_A.shape
    y = x.new_empty(M, N)
    gates = x.new_empty(len(projections), M, E if return_gates else 0, dtype=torch.float32)
    if M == 0:
        return y, gates
    x = _rows(x)
    keep = []  # copies live until the call is through
    arguments = [
        _DTYPES[x.dtype],
        _ACTIVATIONS[activation],
        gate == "softmax",
        torch.get_num_threads(),
        MOST_TILED[x.dtype],
        M,
        N,
        K,
        E,
        rank,
        x.data_ptr(),
        x.stride(0),
        *((0, 0) if routed is None else (routed.data_ptr(), routed.stride(0))),
        y.data_ptr(),
        y.stride(0),
        *scaling,
    ]
    for own, (weight, bias, lora_A, lora_B, gate_weight, gate_bias) in zip(
        gates, projections, strict=True
    ):
        if gate_weight.ndim == 3:  # split for tensor cores
            gate_weight = gate_weight.float().sum(0)
        weight, lora_A, gate_weight = _rows(weight), _rows(lora_A), _rows(gate_weight)
        keep += (weight, lora_A, gate_weight)
        arguments += (
            weight.data_ptr(),
            weight.stride(0),
            *((0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))),
            lora_A.data_ptr(),
            *lora_A.stride()[:2],
            lora_B.data_ptr(),
            *lora_B.stride(),
            gate_weight.data_ptr(),
            gate_weight.stride(0),
            gate_bias.data_ptr(),
            gate_bias.stride(0),
            own.data_ptr() if return_gates else 0,
        )
    _cpu.run(isa or instruction_sets()[0], tuple(arguments))
    return y, gates


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis; copied only if it had another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
