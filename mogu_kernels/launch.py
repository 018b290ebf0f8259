"""Tensors in, kernel launches out: the only file that knows both torch and the kernels.

Arguments have been checked by `ops`. An empty output launches nothing.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mogu_kernels.kernels.backward_gates import backward_gates_kernel
from mogu_kernels.kernels.backward_input import backward_input_kernel
from mogu_kernels.kernels.backward_weights import backward_weights_kernel
from mogu_kernels.kernels.fused import fused_kernel
from mogu_kernels.kernels.gated_expand import gated_expand_kernel
from mogu_kernels.kernels.gated_linear import gated_linear_kernel
from mogu_kernels.kernels.gated_mlp import gated_mlp_kernel
from mogu_kernels.kernels.one_launch import one_launch_kernel
from mogu_kernels.kernels.persistent_linear import persistent_linear_kernel
from mogu_kernels.kernels.shrink_gate import shrink_gate_kernel
from mogu_kernels.router import split_gate_weight
from mogu_kernels.tuning import (
    WIDEST_FUSED_RANK,
    Dtype,
    Layout,
    Target,
    TileConfig,
    backward_config,
    shrink_config,
    tile_config,
)

# rank columns that one dot of an epilogue, or one program of the shrink, takes
WIDEST_CHUNK = {torch.float64: 16, torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
EXPAND_TILE = (64, 128)  # rows and columns of y that one program of `gated_expand_` owns
SLOPES_TILE = (16, 64)  # tokens of a program of the backward's first launch, its step over N
SUM_TILE = (32, 64)  # tokens that a program of the backward's sums takes at a time, its columns
DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f32",  # the backward in the interpreter, for gradcheck
}


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
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [M, E] fp32 ([M, 0] unless asked for), in one launch or two.

    Into `ranks`, contiguous [M, E * r] in fp32, goes A_e x, which `mogu_linear_backward` reads.
    """
    E, rank, _ = lora_A.shape
    tiles = config or choose_tiles("mogu_linear", x, len(weight), E * rank, weight, lora_B)
    if ranks is not None and tiles.kernel == "fused" and E * rank > 64:  # taller ones spill
        tiles = dataclasses.replace(tiles, BLOCK_M=min(tiles.BLOCK_M, 64))
    if tiles.kernel == "two_launch" and (ranks is not None or not tiles.one_launch):
        experts = ([lora_A], [gate_weight], [gate_bias], scaling, gate, routed)
        shrunk, total, gates = shrink_gate(x, *experts, return_gates, tiles.pdl, ranks)
        return gated_linear(x, weight, bias, shrunk[0], total[0], lora_B, tiles), gates[0]
    M, N = len(x), len(weight)
    y = _empty(M, N, dtype=x.dtype, device=x.device)
    gates = _empty(M, E if return_gates else 0, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, gates
    terms = _terms(gate_weight, x.dtype)
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "lora_A_ptr": lora_A,
        "lora_B_ptr": lora_B,
        "gate_weight_ptr": terms,
        "gate_bias_ptr": gate_bias,
        "routed_ptr": routed,
        "y_ptr": y,
        "gates_ptr": gates,
        "M": M,
        "N": N,
        "K": x.shape[1],
        "stride_routed": 0 if routed is None else routed.stride(0),
        "TERMS": len(terms),
        "SCALING": tuple(scaling),
        "SOFTMAX": gate == "softmax",
        "HAS_BIAS": bias is not None,
        "HAS_ROUTED": routed is not None,
        "STORE_GATES": return_gates,
        **_strides(gates, "gm", "ge"),
        **_strides(terms, "ut", "ue", "uk"),
        **_strides(gate_bias, "c"),
        **_strides(lora_A, "ae", "ar", "ak"),
        **_base(x, weight, bias, lora_B, y),
        **_tile_arguments(tiles),
    }
    if tiles.one_launch:
        _one_launch(arguments, tiles, E * rank)
        return y, gates
    if E * rank > WIDEST_FUSED_RANK:
        raise ValueError(
            f"{E * rank} rank columns do not fit the one-launch kernel, which holds "
            f"{WIDEST_FUSED_RANK}: take a two_launch config"
        )
    _run(
        fused_kernel,
        (_tiles(M, tiles.BLOCK_M) * _tiles(N, tiles.BLOCK_N),),
        ranks_ptr=ranks,
        RANK_COLUMNS=_power_of_two(E * rank),
        STORE_RANKS=ranks is not None,
        **arguments,
    )
    return y, gates


def mogu_linear_backward(
    grad_y: Tensor | None,
    grad_gates: Tensor | None,
    gates: Tensor,
    ranks: Tensor,
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
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of x .. gate_bias that `wanted` asks for, in at most three launches.

    Those of weight and bias, which only a trained base needs, are a matmul and a sum of PyTorch.
    """
    operands = (x, weight, bias, lora_A, lora_B, gate_weight, gate_bias)
    if len(x) == 0:
        pairs = zip(operands, wanted, strict=True)
        return [None if t is None or not want else torch.zeros_like(t) for t, want in pairs]
    M, N, (E, rank, K) = len(x), len(weight), lora_A.shape
    want_x, want_weight, want_bias, want_a, want_b, want_u, want_c = wanted
    want_routers, sigmoid = want_u or want_c, gate == "sigmoid"
    grad_y = x.new_zeros(M, N) if grad_y is None else grad_y
    narrow, wide = (functools.partial(_empty, dtype=t.dtype, device=t.device) for t in (x, gates))
    layout = _layout(x, grad_y, weight)

    # what is narrow: the ranks' gradients, and the gates' without the base's share
    common = {
        "M": M,
        "N": N,
        "E": E,
        "RANK": rank,
        "SOFTMAX": not sigmoid,
        "BLOCK_R": _chunk(E * rank, x.dtype),
        "gates_ptr": gates,
        "grad_y_ptr": grad_y,
        **_strides(gates, "gm", "ge"),
        **_strides(grad_y, "ym", "yn"),
    }
    mask = {
        "routed_ptr": routed,
        "stride_routed": 0 if routed is None else routed.stride(0),
        "HAS_ROUTED": routed is not None,
    }
    found = {
        "grad_ranks_ptr": narrow(M, E * rank),
        "gated_ranks_ptr": narrow(M, E * rank),
        "total_ptr": wide(M),
        "slopes_ptr": wide(M, E),
    }
    _run(
        backward_gates_kernel,
        (_tiles(M, SLOPES_TILE[0]),),
        bias_ptr=bias,
        lora_B_ptr=lora_B,
        ranks_ptr=ranks,
        grad_gates_ptr=grad_gates,
        stride_bias=0 if bias is None else bias.stride(0),
        stride_dgm=0 if grad_gates is None else grad_gates.stride(0),
        stride_dge=0 if grad_gates is None else grad_gates.stride(1),
        **_strides(lora_B, "be", "bn", "br"),
        **_strides(ranks, "rm", "rr"),
        SCALING=tuple(scaling),
        HAS_BIAS=bias is not None,
        HAS_GRAD_GATES=grad_gates is not None,
        BLOCK_M=SLOPES_TILE[0],
        BLOCK_K=SLOPES_TILE[1],
        num_warps=4,
        num_stages=3,
        **mask,
        **found,
        **common,
    )

    # the base GEMM turned round: grad_x, and the base's share
    total, gated_ranks = found.pop("total_ptr"), found.pop("gated_ranks_ptr")
    tiles = backward_config(M, DTYPES[x.dtype], target(x.device), layout)
    shares = wide(_tiles(K, tiles.BLOCK_N) if sigmoid else 0, M)
    grad_x = narrow(M, K) if want_x else None
    routers = _terms(gate_weight, x.dtype)
    found |= {
        "x_ptr": x,
        "gate_weight_ptr": routers,
        "shares_ptr": shares,
        "grad_x_ptr": grad_x,
        "K": K,
        "stride_dxm": K,
        "stride_dxk": 1,
        "TERMS": len(routers),
        **_strides(x, "xm", "xk"),
        **_strides(routers, "ut", "ue", "uk"),
    }
    if want_x or (want_routers and sigmoid):
        _run(
            backward_input_kernel,
            (_tiles(M, tiles.BLOCK_M) * _tiles(K, tiles.BLOCK_N),),
            weight_ptr=weight,
            lora_A_ptr=lora_A,
            total_ptr=total,
            STORE_X=want_x,
            **_strides(weight, "wn", "wk"),
            **_strides(lora_A, "ae", "ar", "ak"),
            **_tile_arguments(tiles),
            **found,
            **common,
        )

    # sums over tokens, and grad_x's term from sigmoid routers
    grad_A = narrow(E, rank, K) if want_a else None
    grad_B = narrow(N, E, rank).permute(1, 0, 2) if want_b else None
    grad_u, grad_c = (wide(E, K), wide(E)) if want_routers else (None, None)
    if want_a or want_b or want_routers or (want_x and sigmoid):
        _run(
            backward_weights_kernel,
            (_tiles(max(K, N), SUM_TILE[1]), 2 * _tiles(E * rank, common["BLOCK_R"]) + 1),
            gated_ranks_ptr=gated_ranks,
            grad_A_ptr=grad_A,
            grad_B_ptr=grad_B,
            grad_u_ptr=grad_u,
            grad_c_ptr=grad_c,
            **_strides(lora_A if grad_A is None else grad_A, "ae", "ar", "ak"),
            **_strides(lora_B if grad_B is None else grad_B, "be", "bn", "br"),
            SHARES=len(shares),
            WANT_X=want_x,
            WANT_A=want_a,
            WANT_B=want_b,
            WANT_ROUTERS=want_routers,
            BLOCK_M=16 if layout == "odd" else SUM_TILE[0],
            BLOCK_N=SUM_TILE[1],
            num_warps=4,
            num_stages=2,
            **mask,
            **found,
            **common,
        )

    gated_dy = (total[:, None] * grad_y).to(x.dtype) if want_weight or want_bias else grad_y
    if grad_u is not None and gate_weight.ndim == 3:  # the two parts are added up
        grad_u = torch.stack([grad_u.to(gate_weight.dtype)] * 2)
    return [
        grad_x,
        gated_dy.T @ x if want_weight else None,
        gated_dy.sum(0) if want_bias else None,
        grad_A,
        grad_B,
        grad_u if want_u else None,
        grad_c if want_c else None,
    ]


def _one_launch(arguments, tiles, rank_columns):
    """The flag form: shrink programs first, one flag a row block."""
    x, M = arguments["x_ptr"], arguments["M"]
    shrunk = _empty(M, rank_columns, dtype=x.dtype, device=x.device)
    total = _empty(M, dtype=torch.float32, device=x.device)
    chunk = _chunk(rank_columns, x.dtype)
    row_blocks = _tiles(M, tiles.BLOCK_M)
    shrinkers = row_blocks * _tiles(rank_columns, chunk)
    _run(
        one_launch_kernel,
        (shrinkers + row_blocks * _tiles(arguments["N"], tiles.BLOCK_N),),
        shrunk_ptr=shrunk,
        total_ptr=total,
        flags_ptr=_flags(x.device, row_blocks),
        RANK_COLUMNS=chunk,
        BLOCK_R=chunk,
        **_strides(shrunk, "sm", "sr"),
        **_strides(total, "total"),
        **arguments,
    )


def shrink_gate(
    x: Tensor,
    lora_A: list[Tensor],
    gate_weight: list[Tensor],
    gate_bias: list[Tensor],
    scaling: list[float],
    gate: str,
    routed: Tensor | None,
    return_gates: bool,
    pdl: bool = False,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shrunk [P, M, E * r], total [P, M] and gates [P, M, E] of P projections, in one launch.

    Into `ranks`, contiguous [M, E * r] in fp32, goes A_e x of a single projection.
    """
    (M, K), P, (E, rank, _) = x.shape, len(lora_A), lora_A[0].shape
    shrunk = _empty(P, M, E * rank, dtype=x.dtype, device=x.device)
    total = _empty(P, M, dtype=torch.float32, device=x.device)
    gates = _empty(P, M, E if return_gates else 0, dtype=torch.float32, device=x.device)
    if M == 0:
        return shrunk, total, gates
    lora_A = _alike(lora_A)
    gate_bias = _alike(gate_bias)
    terms = _alike([_terms(weight, x.dtype) for weight in gate_weight])
    tiles = shrink_config(M, DTYPES[x.dtype], target(x.device), _layout(x, lora_A[0][0]))
    chunk = _chunk(E * rank, x.dtype)
    _run(
        shrink_gate_kernel,
        (_tiles(M, tiles.BLOCK_M), _tiles(E * rank, chunk), P),
        x_ptr=x,
        lora_A_ptr=tuple(lora_A),
        gate_weight_ptr=tuple(terms),
        gate_bias_ptr=tuple(gate_bias),
        routed_ptr=routed,
        shrunk_ptr=shrunk,
        total_ptr=total,
        gates_ptr=gates,
        ranks_ptr=ranks,
        M=M,
        K=K,
        **_strides(x, "xm", "xk"),
        **_strides(lora_A[0], "ae", "ar", "ak"),
        **_strides(terms[0], "ut", "ue", "uk"),
        **_strides(gate_bias[0], "c"),
        stride_routed=0 if routed is None else routed.stride(0),
        **_strides(shrunk, "sp", "sm", "sr"),
        **_strides(total, "tp", "total"),
        **_strides(gates, "gp", "gm", "ge"),
        PROJECTIONS=P,
        E=E,
        RANK=rank,
        RANK_COLUMNS=chunk,
        TERMS=len(terms[0]),
        SCALING=tuple(scaling),
        SOFTMAX=gate == "softmax",
        HAS_ROUTED=routed is not None,
        STORE_GATES=return_gates,
        STORE_RANKS=ranks is not None,
        BLOCK_M=tiles.BLOCK_M,
        BLOCK_K=tiles.BLOCK_K,
        PDL=pdl,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return shrunk, total, gates


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrunk: Tensor,
    total: Tensor,
    lora_B: Tensor,
    tiles: TileConfig | None,
) -> Tensor:
    """Y [M, N] from what `shrink_gate` made of x: the second launch of two."""
    M, N, rank_columns = len(x), len(weight), shrunk.shape[1]
    y = _empty(M, N, dtype=x.dtype, device=x.device)
    tiles = tiles or choose_tiles("mogu_linear", x, N, rank_columns, weight, lora_B)
    if y.numel() == 0:
        return y
    grid = _tiles(M, tiles.BLOCK_M) * _tiles(N, tiles.BLOCK_N)
    chunk = _chunk(rank_columns, x.dtype)
    arguments = {
        "bias_ptr": bias,
        "total_ptr": total,
        "M": M,
        "N": N,
        "K": x.shape[1],
        "HAS_BIAS": bias is not None,
        "BLOCK_R": chunk,
        "PDL": tiles.pdl,
        **_strides(total, "total"),
        **_tile_arguments(tiles),
    }
    side_by_side = _side_by_side(lora_B)
    if tiles.descriptors and all(map(_describable, (x, weight, shrunk, side_by_side, y))):
        blocks = {
            "x_desc": (x, [tiles.BLOCK_M, tiles.BLOCK_K]),
            "weight_desc": (weight, [tiles.BLOCK_N, tiles.BLOCK_K]),
            "shrunk_desc": (shrunk, [tiles.BLOCK_M, chunk]),
            "lora_B_desc": (side_by_side, [tiles.BLOCK_N, chunk]),
            "y_desc": (y, [tiles.BLOCK_M, tiles.BLOCK_N]),
        }
        _run(
            persistent_linear_kernel,
            (min(grid, _multiprocessors(x.device)),),
            RANK_COLUMNS=rank_columns,
            stride_bias=0 if bias is None else bias.stride(0),
            **{name: TensorDescriptor.from_tensor(*block) for name, block in blocks.items()},
            **arguments,
        )
    else:
        _run(
            gated_linear_kernel,
            (grid,),
            x_ptr=x,
            weight_ptr=weight,
            shrunk_ptr=shrunk,
            lora_B_ptr=lora_B,
            y_ptr=y,
            **_strides(shrunk, "sm", "sr"),
            **_base(x, weight, bias, lora_B, y),
            **arguments,
        )
    return y


def gated_expand_(
    y: Tensor, shrunk: Tensor, total: Tensor, lora_B: Tensor, bias: Tensor | None
) -> None:
    """Gate and expand y [M, N] in place, in one launch."""
    (M, N), (E, _, rank) = y.shape, lora_B.shape
    if y.numel() == 0:
        return
    _run(
        gated_expand_kernel,
        (_tiles(M, EXPAND_TILE[0]), _tiles(N, EXPAND_TILE[1])),
        y_ptr=y,
        bias_ptr=bias,
        shrunk_ptr=shrunk,
        total_ptr=total,
        lora_B_ptr=lora_B,
        M=M,
        N=N,
        **_strides(y, "ym", "yn"),
        stride_bias=0 if bias is None else bias.stride(0),
        **_strides(shrunk, "sm", "sr"),
        **_strides(total, "total"),
        **_strides(lora_B, "be", "bn", "br"),
        E=E,
        RANK=rank,
        HAS_BIAS=bias is not None,
        BLOCK_M=EXPAND_TILE[0],
        BLOCK_N=EXPAND_TILE[1],
        BLOCK_R=_chunk(E * rank, y.dtype),
        num_warps=4,
    )


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
    config: TileConfig | None,
) -> tuple[Tensor, Tensor]:
    """Y [M, N] and gates [2, M, E] fp32, in two launches; every list is gate_proj's, up_proj's."""
    M, N, (E, rank, _) = len(x), len(weight[0]), lora_A[0].shape
    tiles = config or choose_tiles("gated_mlp", x, N, E * rank, weight[0], lora_B[0])
    shrunk, total, gates = shrink_gate(
        x, lora_A, gate_weight, gate_bias, scaling, gate, routed, return_gates, tiles.pdl
    )
    y = _empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, gates
    weight, lora_B = _alike(weight), _alike(lora_B)
    biases = _alike(bias) if bias else [None, None]
    _run(
        gated_mlp_kernel,
        (_tiles(M, tiles.BLOCK_M) * _tiles(N, tiles.BLOCK_N),),
        x_ptr=x,
        weight_0_ptr=weight[0],
        weight_1_ptr=weight[1],
        bias_0_ptr=biases[0],
        bias_1_ptr=biases[1],
        shrunk_ptr=shrunk,
        total_ptr=total,
        lora_B_0_ptr=lora_B[0],
        lora_B_1_ptr=lora_B[1],
        y_ptr=y,
        M=M,
        N=N,
        K=x.shape[1],
        **_strides(shrunk, "sj", "sm", "sr"),
        **_strides(total, "tj", "total"),
        **_base(x, weight[0], biases[0], lora_B[0], y),
        HAS_BIAS=bool(bias),
        ACTIVATION=activation,
        BLOCK_R=_chunk(E * rank, x.dtype),
        PDL=tiles.pdl,
        **_tile_arguments(tiles),
    )
    return y, gates


def choose_tiles(
    op,
    x: Tensor,
    N: int,
    rank_columns: int,
    weight: Tensor | None = None,
    lora_B: Tensor | None = None,
) -> TileConfig:
    """The tiles of an op on x for N out_features; operands that are not given lie well."""
    matrices = [x] if weight is None else [x, weight]
    unit = 16 // x.element_size()
    stacked = lora_B is not None and _side_by_side(lora_B) is None
    layout = _layout(*matrices)
    if layout == "described" and (stacked or N % unit or rank_columns % unit):
        layout = "aligned"
    return tile_config(
        op,
        len(x),
        N,
        x.shape[1],
        rank_columns,
        DTYPES[x.dtype],
        target(x.device),
        _device_name(x.device),
        layout,
    )


def _layout(*matrices: Tensor) -> Layout:
    """How well the loads of some matrices go: by descriptor, 16 bytes at a time, or neither."""
    if all(map(_describable, matrices)):
        return "described"
    aligned = all(_describable(m) or _describable(m.T) for m in matrices)
    return "aligned" if aligned else "odd"


@functools.cache
def target(device: torch.device) -> Target:
    """The family whose tiles fit a device; the interpreter on a CPU takes any."""
    if device.type != "cuda":
        return "ampere"
    if torch.version.hip:
        return "cdna"
    major, _ = torch.cuda.get_device_capability(device)
    return "ampere" if major < 9 else "hopper" if major == 9 else "blackwell"


@functools.cache
def _device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Programs that a GPU runs at once, one each; two in the interpreter, so that they loop."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _base(x, weight, bias, lora_B, y):
    """What every kernel with the base GEMM in it takes beside the pointers."""
    E, _, rank = lora_B.shape
    return {
        **_strides(x, "xm", "xk"),
        **_strides(weight, "wn", "wk"),
        "stride_bias": 0 if bias is None else bias.stride(0),
        **_strides(lora_B, "be", "bn", "br"),
        **_strides(y, "ym", "yn"),
        "E": E,
        "RANK": rank,
    }


def _tile_arguments(tiles: TileConfig):
    options = {"launch_pdl": True} if tiles.pdl else {}
    return {
        "BLOCK_M": tiles.BLOCK_M,
        "BLOCK_N": tiles.BLOCK_N,
        "BLOCK_K": tiles.BLOCK_K,
        "GROUP_M": tiles.GROUP_M,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **options,
    }


def _strides(tensor: Tensor, *names: str) -> dict[str, int]:
    return {f"stride_{name}": stride for name, stride in zip(names, tensor.stride(), strict=True)}


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with the same strides; they are copied only if they had others."""
    if len({tensor.stride() for tensor in tensors}) == 1:
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def _side_by_side(lora_B: Tensor) -> Tensor | None:
    """lora_B [E, N, r] as [N, E * r] without a copy: possible where it lies so, as in a module."""
    E, N, rank = lora_B.shape
    if lora_B.stride() != (rank, E * rank, 1):
        return None
    return lora_B.permute(1, 0, 2).view(N, E * rank)


def _describable(tensor: Tensor | None) -> bool:
    """Whether a tensor descriptor can be made of a matrix: 16-byte alignment, rows contiguous."""
    if tensor is None:
        return False
    row = tensor.stride(0) * tensor.element_size()
    return (
        tensor.data_ptr() % 16 == 0
        and row % 16 == 0
        and row > 0
        and tensor.stride(1) == 1
        and tensor.numel() > 0
    )


def _terms(gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """gate_weight as [TERMS, E, K] in the dtype of the dots."""
    if gate_weight.ndim == 3:
        return gate_weight
    return (
        gate_weight[None] if gate_weight.dtype == dtype else split_gate_weight(gate_weight, dtype)
    )


_FLAGS: dict[tuple[torch.device, int], Tensor] = {}
_KEPT: list[Tensor] = []  # a captured graph may still point to flags that became too few


def _flags(device: torch.device, row_blocks: int) -> Tensor:
    """Zeros of this stream that the one-launch kernel counts with and sets back to zero."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    flags = _FLAGS.get((device, stream))
    if flags is None or len(flags) < row_blocks:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"one_launch=True needs {row_blocks} flags that this stream does not have yet: "
                "run the call once on it before capturing a graph"
            )
        flags = torch.zeros(max(row_blocks, 1024), dtype=torch.int32, device=device)
        _FLAGS[device, stream] = flags
        _KEPT.append(flags)
    return flags


def _run(kernel, grid: tuple[int, ...], **arguments) -> None:
    """The one place that launches, so that the static gate can compile the very same call."""
    kernel[grid](**arguments)


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace comes from here, so that a test can put it between red zones."""
    return torch.empty(shape, dtype=dtype, device=device)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _chunk(rank_columns: int, dtype: torch.dtype) -> int:
    """Rank columns that are taken at a time; at full precision few, since they cost registers."""
    return min(_power_of_two(rank_columns), WIDEST_CHUNK[dtype])


def _power_of_two(columns: int) -> int:
    """Columns of a dot that hold `columns`: a power of two, at least 16."""
    return max(16, 1 << (columns - 1).bit_length())
