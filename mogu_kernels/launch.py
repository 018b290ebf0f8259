"""Tensors in, kernel launches out: the only file that knows both torch and the kernels.

Arguments have been checked by `ops`; outputs are given. An empty output launches nothing.
"""

# pyright: reportCallIssue=false
# (num_warps and num_stages are keywords of Triton's own)

import torch
from torch import Tensor

from mogu_kernels.kernels.fused import fused_kernel
from mogu_kernels.kernels.gated_linear import gated_linear_kernel
from mogu_kernels.kernels.shrink_gate import shrink_gate_kernel
from mogu_kernels.router import split_gate_weight
from mogu_kernels.tuning import WIDEST_FUSED_RANK, TileConfig, shrink_config, tile_config

WIDEST_CHUNK = 64  # rank columns that one dot of an epilogue, or one program of the shrink, takes


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
    config: TileConfig | None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [M, E] fp32 ([M, 0] unless asked for), in one launch or two."""
    M, N, E, rank = len(x), len(weight), lora_A.shape[0], lora_A.shape[1]
    y = _empty(M, N, dtype=x.dtype, device=x.device)
    gates = _empty(M, E if return_gates else 0, dtype=torch.float32, device=x.device)
    tiles = config or tile_config(M, E * rank, x.element_size())
    router = (gate_weight, gate_bias, scaling, gate, routed, gates)
    if y.numel() == 0:
        pass
    elif tiles.kernel == "fused":
        _fused(x, weight, bias, lora_A, lora_B, *router, y, tiles)
    else:
        shrunk = _empty(M, E * rank, dtype=x.dtype, device=x.device)
        total = _empty(M, dtype=torch.float32, device=x.device)
        _shrink_gate(x, lora_A, *router, shrunk, total)
        _gated_linear(x, weight, bias, shrunk, total, lora_B, y, tiles)
    return y, gates


def _fused(
    x, weight, bias, lora_A, lora_B, gate_weight, gate_bias, scaling, gate, routed, gates, y, tiles
):
    (M, K), N, rank_columns = x.shape, len(weight), lora_A.shape[0] * lora_A.shape[1]
    if rank_columns > WIDEST_FUSED_RANK:
        raise ValueError(
            f"{rank_columns} rank columns do not fit the one-launch kernel, which holds "
            f"{WIDEST_FUSED_RANK}: take a two_launch config"
        )
    grid = (_tiles(M, tiles.BLOCK_M) * _tiles(N, tiles.BLOCK_N),)
    _run(
        fused_kernel,
        grid,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        lora_B_ptr=lora_B,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_be=lora_B.stride(0),
        stride_bn=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        RANK_COLUMNS=_power_of_two(rank_columns),
        HAS_BIAS=bias is not None,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_K=tiles.BLOCK_K,
        GROUP_M=tiles.GROUP_M,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_router_arguments(x, lora_A, gate_weight, gate_bias, scaling, gate, routed, gates),
    )


def _shrink_gate(x, lora_A, gate_weight, gate_bias, scaling, gate, routed, gates, shrunk, total):
    M, K = x.shape
    tiles = shrink_config(M)
    rank_columns = min(_power_of_two(shrunk.shape[1]), WIDEST_CHUNK)
    _run(
        shrink_gate_kernel,
        (_tiles(M, tiles.BLOCK_M), _tiles(shrunk.shape[1], rank_columns)),
        x_ptr=x,
        shrunk_ptr=shrunk,
        total_ptr=total,
        M=M,
        K=K,
        stride_sm=shrunk.stride(0),
        stride_sr=shrunk.stride(1),
        stride_total=total.stride(0),
        RANK_COLUMNS=rank_columns,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_K=tiles.BLOCK_K,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **_router_arguments(x, lora_A, gate_weight, gate_bias, scaling, gate, routed, gates),
    )


def _gated_linear(x, weight, bias, shrunk, total, lora_B, y, tiles):
    (M, K), N = x.shape, len(weight)
    E, _, rank = lora_B.shape
    _run(
        gated_linear_kernel,
        (_tiles(M, tiles.BLOCK_M) * _tiles(N, tiles.BLOCK_N),),
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        shrunk_ptr=shrunk,
        total_ptr=total,
        lora_B_ptr=lora_B,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        stride_sm=shrunk.stride(0),
        stride_sr=shrunk.stride(1),
        stride_total=total.stride(0),
        stride_be=lora_B.stride(0),
        stride_bn=lora_B.stride(1),
        stride_br=lora_B.stride(2),
        stride_ym=y.stride(0),
        stride_yn=y.stride(1),
        E=E,
        RANK=rank,
        HAS_BIAS=bias is not None,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_K=tiles.BLOCK_K,
        BLOCK_R=min(_power_of_two(E * rank), WIDEST_CHUNK),
        GROUP_M=tiles.GROUP_M,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _router_arguments(x, lora_A, gate_weight, gate_bias, scaling, gate, routed, gates):
    """What every kernel with routers in it takes, by keyword."""
    terms = _terms(gate_weight, x.dtype)
    return {
        "lora_A_ptr": lora_A,
        "gate_weight_ptr": terms,
        "gate_bias_ptr": gate_bias,
        "routed_ptr": routed,
        "gates_ptr": gates,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_ae": lora_A.stride(0),
        "stride_ar": lora_A.stride(1),
        "stride_ak": lora_A.stride(2),
        "stride_ut": terms.stride(0),
        "stride_ue": terms.stride(1),
        "stride_uk": terms.stride(2),
        "stride_c": gate_bias.stride(0),
        "stride_routed": 0 if routed is None else routed.stride(0),
        "stride_gm": gates.stride(0),
        "stride_ge": gates.stride(1),
        "E": lora_A.shape[0],
        "RANK": lora_A.shape[1],
        "TERMS": len(terms),
        "SCALING": tuple(scaling),
        "SOFTMAX": gate == "softmax",
        "HAS_ROUTED": routed is not None,
        "STORE_GATES": gates.numel() > 0,
    }


def _terms(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gate_weight as [TERMS, E, K] in the dtype of the dots."""
    if gate_weight.ndim == 3:
        return gate_weight
    return (
        gate_weight[None] if gate_weight.dtype == dtype else split_gate_weight(gate_weight, dtype)
    )


def _run(kernel, grid: tuple[int, ...], **arguments) -> None:
    """The one place that launches, so that the static gate can compile the very same call."""
    kernel[grid](**arguments)


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace comes from here, so that a test can put it between red zones."""
    return torch.empty(shape, dtype=dtype, device=device)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_two(columns: int) -> int:
    """Columns of a dot that hold `columns`: a power of two, at least 16."""
    return max(16, 1 << (columns - 1).bit_length())
