"""Calls of the C++ backend; `csrc/module.cpp` reads the tensors, and declines what does not fit.

Few tokens go through a form that reads the weight once, many through a blocked GEMM; gate, expand
and bias are in both, and there is one rounding. Where the two forms cross is in `tuning`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mogu_kernels import tuning

try:
    from mogu_kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]

    _cpu.bind((Tensor, torch.nn.Parameter))
except (ImportError, AttributeError, ValueError):  # no compiler at install, or another torch
    _cpu: Any = None

_NAMES: dict[torch.dtype, tuning.Dtype] = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"
}  # fmt: skip
Projection = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """Those that were built and that this processor has, best first; empty without the backend."""
    return () if _cpu is None else tuple(_cpu.available())


@functools.cache
def most_tiled(isa: str | None, dtype: torch.dtype) -> int:
    """`tuning.most_tiled` of an instruction set, the best one if None."""
    return tuning.most_tiled(isa or instruction_sets()[0], _NAMES.get(dtype, "f32"))


def project(
    x: Tensor,
    projections: tuple[Projection, ...],
    activation: str | None,
    scaling: float | Sequence[float],
    gate: str,
    routed: Tensor | None,
    return_gates: bool,
    isa: str | None = None,
    most: int | None = None,
) -> tuple[Tensor, Any] | None:
    """Y [M, N] and gates [P, M, E], or None, of one projection or of a gated MLP's two.

    None alone where operands do not fit each other or the kernels; nothing is computed then. A
    projection is (weight, bias, lora_A, lora_B, gate_weight, gate_bias). `isa` forces one of
    `instruction_sets()`, `most` the change-over between the two forms.
    """
    return _cpu.project(
        isa, x, projections, activation, scaling, gate, routed, return_gates,
        torch.get_num_threads(), most_tiled(isa, x.dtype) if most is None else most,
    )  # fmt: skip


def mogu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    scaling: Sequence[float],
    gate: str,
    routed: Tensor | None,
    return_gates: bool,
    **forced: Any,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [M, E] fp32 ([M, 0] unless asked for); operands were checked by `ops`."""
    own = (weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    options = {"routed": routed, "return_gates": return_gates} | forced
    y, gates = _copying(x, (own,), None, scaling, gate, **options)
    return y, gates[0]


def gated_mlp(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: Sequence[float],
    gate: str,
    activation: str,
    routed: Tensor | None,
    return_gates: bool,
    **forced: Any,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [2, M, E] fp32; every list is gate_proj's, up_proj's."""
    lists = (weight, bias or [None, None], lora_A, lora_B, gate_weight, gate_bias)
    options = {"routed": routed, "return_gates": return_gates} | forced
    return _copying(x, tuple(zip(*lists, strict=True)), activation, scaling, gate, **options)


def shrink_gate(
    x: Tensor,
    lora_A: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: Sequence[float],
    gate: str,
    routed: Tensor | None,
    isa: str | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrunk [P, M, E * r], total [P, M] and gates [P, M, E] fp32."""
    x = _rows(x)
    most = most_tiled(isa, x.dtype) if most is None else most
    each = [
        _cpu.shrink(
            isa, x, _rows(A), _rows(_whole(u)), _plain(c), scaling, gate, _plain(routed),
            torch.get_num_threads(), most,
        )
        for A, u, c in zip(lora_A, gate_weight, gate_bias, strict=True)
    ]  # fmt: skip
    if len(each) == 1:
        return each[0][0][None], each[0][1][None], each[0][2][None]
    shrunk, total, gates = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    return shrunk, total, gates


def gated_expand_(
    y: Tensor,
    shrunk: Tensor,
    total: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    isa: str | None = None,
) -> None:
    """Gate and expand y [M, N] in place."""
    rows = _rows(y)
    rest = (_rows(shrunk), _plain(total), _plain(lora_B), _plain(bias))
    _cpu.expand(isa, rows, *rest, torch.get_num_threads())
    if rows.data_ptr() != y.data_ptr():
        y.copy_(rows)


def _copying(
    x: Tensor, projections: Any, *rest: Any, routed: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`project`, with copies of what the kernels do not take as it is."""
    done = project(x, projections, *rest, routed=routed, **options)
    if done is None:
        copies: Any = tuple(
            (_rows(W), _plain(bias), _rows(A), _plain(B), _rows(_whole(u)), _plain(c))
            for W, bias, A, B, u, c in projections
        )
        done = project(_rows(x), copies, *rest, routed=_plain(routed), **options)
    if done is None:
        raise ValueError("the C++ backend does not take these operands: check them with `ops`")
    y, gates = done
    if gates is None:
        gates = y.new_empty(len(projections), len(y), 0, dtype=torch.float32)
    return y, gates


def _whole(gate_weight: Tensor) -> Tensor:
    """[E, K] fp32 of a router that may have been split for tensor cores."""
    return gate_weight.float().sum(0) if gate_weight.ndim == 3 else gate_weight


def _rows(tensor: Tensor) -> Tensor:
    """A plain tensor with a contiguous last axis; copied only if it had another."""
    tensor = _plain(tensor)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _plain(tensor: Any) -> Any:
    """The tensor without the class that it may wear; None stays None."""
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    return tensor.as_subclass(Tensor)
