"""First launch of two: routers and shrink, ready for the epilogue of any GEMM.

    gates[m, :] = sigmoid or softmax of (x[m, :] . gate_weight[e, :] + gate_bias[e])
    total[m]    = sum_e gates[m, e]
    shrunk[m, e * RANK + j] = scaling_e * gates[m, e] * (x[m, :] . lora_A[e, j, :])

Projections that read the same x (q, k and v; gate and up) share one launch: axis 2 of the grid
walks them, axis 1 walks RANK_COLUMNS columns of `shrunk` at a time. One program owns BLOCK_M rows
of one such slice; the one at axis 1 = 0 also stores `total` and, on request, the gates. Writes
2 * E * RANK + 4 bytes a token and projection in bf16. A row with routing off gets total = 1 and
shrunk = 0, which makes every later step the plain projection. For a backward, a single projection
also stores what its gates multiply, x[m, :] . lora_A[e, j, :], as contiguous fp32 [M, E * RANK].
The idea: the gates and scaling are multiplied in here, in fp32, so that a GEMM needs only `total`
and one more narrow dot.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mogu_kernels.kernels.gates import (
    EXPERT_COLUMNS,
    ROUTER_COLUMNS,
    gates_from_columns,
    rank_factors,
    router_mask,
    router_pointers,
)


@triton.jit
def shrink_rows(
    x_ptr,
    lora_A_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    routed_ptr,
    shrunk_ptr,
    total_ptr,
    gates_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_c,
    stride_routed,
    stride_sm,
    stride_sr,
    stride_total,
    stride_gm,
    stride_ge,
    pid_m,
    pid_r,
    E: tl.constexpr,
    RANK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    STORE_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ranks_ptr=None,
    STORE_RANKS: tl.constexpr = False,
):
    """Rows pid_m, rank columns pid_r of one projection."""
    # where am I
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    columns = pid_r * RANK_COLUMNS + tl.arange(0, RANK_COLUMNS)
    mask_m, mask_r = offs_m < M, columns < E * RANK
    mask_u = router_mask(E, TERMS)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_rows = (columns // RANK) * stride_ae + (columns % RANK) * stride_ar
    a_ptrs = lora_A_ptr + a_rows[None, :] + offs_k[:, None] * stride_ak
    u_ptrs = router_pointers(gate_weight_ptr, offs_k, stride_ut, stride_ue, stride_uk)

    # accumulate over K
    shrunk = tl.zeros([BLOCK_M, RANK_COLUMNS], tl.float32)
    router_columns = tl.zeros([BLOCK_M, ROUTER_COLUMNS], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_k[:, None] & mask_u[None, :], other=0.0)
        shrunk = tl.dot(x, a, shrunk, input_precision="ieee")
        router_columns = tl.dot(x, u, router_columns, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
        u_ptrs += BLOCK_K * stride_uk

    # epilogue: gates in fp32, multiplied into the ranks
    if STORE_RANKS:
        ranks_ptrs = ranks_ptr + offs_m[:, None] * (E * RANK) + columns[None, :]
        tl.store(ranks_ptrs, shrunk, mask=mask_m[:, None] & mask_r[None, :])
    gates = gates_from_columns(router_columns, gate_bias_ptr, stride_c, E, SOFTMAX, BLOCK_M)
    total = tl.sum(gates, axis=1)
    shrunk *= rank_factors(gates, columns, E, RANK, SCALING)
    if HAS_ROUTED:
        routed = tl.load(routed_ptr + offs_m * stride_routed, mask=mask_m, other=0) != 0
        total = tl.where(routed, total, 1.0)
        shrunk = tl.where(routed[:, None], shrunk, 0.0)

    # store
    shrunk_ptrs = shrunk_ptr + offs_m[:, None] * stride_sm + columns[None, :] * stride_sr
    shrunk = shrunk.to(shrunk_ptr.dtype.element_ty)
    tl.store(shrunk_ptrs, shrunk, mask=mask_m[:, None] & mask_r[None, :])
    tl.store(total_ptr + offs_m * stride_total, total, mask=mask_m & (pid_r == 0))
    if STORE_GATES:
        experts = tl.arange(0, EXPERT_COLUMNS)
        gates_ptrs = gates_ptr + offs_m[:, None] * stride_gm + experts[None, :] * stride_ge
        mask_gates = mask_m[:, None] & (experts < E)[None, :] & (pid_r == 0)
        tl.store(gates_ptrs, gates, mask=mask_gates)


@triton.jit
def one_of(pointers, projection, PROJECTIONS: tl.constexpr):
    """The pointer that belongs to a projection."""
    pointer = pointers[0]
    for p in tl.static_range(1, PROJECTIONS):
        pointer = tl.where(projection == p, pointers[p], pointer)
    return pointer


@triton.jit(do_not_specialize=["M"])
def shrink_gate_kernel(
    x_ptr,
    lora_A_ptr,  # here and in the next two, one pointer a projection
    gate_weight_ptr,
    gate_bias_ptr,
    routed_ptr,
    shrunk_ptr,
    total_ptr,
    gates_ptr,
    ranks_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_c,
    stride_routed,
    stride_sp,
    stride_sm,
    stride_sr,
    stride_tp,
    stride_total,
    stride_gp,
    stride_gm,
    stride_ge,
    PROJECTIONS: tl.constexpr,
    E: tl.constexpr,
    RANK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    STORE_GATES: tl.constexpr,
    STORE_RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module."""
    if PDL:
        gdc_launch_dependents()  # the GEMM may start; it waits before it reads what is stored here
    projection = tl.program_id(2).to(tl.int64)
    shrink_rows(
        x_ptr,
        one_of(lora_A_ptr, projection, PROJECTIONS),
        one_of(gate_weight_ptr, projection, PROJECTIONS),
        one_of(gate_bias_ptr, projection, PROJECTIONS),
        routed_ptr,
        shrunk_ptr + projection * stride_sp,
        total_ptr + projection * stride_tp,
        gates_ptr + projection * stride_gp,
        M,
        K,
        stride_xm,
        stride_xk,
        stride_ae,
        stride_ar,
        stride_ak,
        stride_ut,
        stride_ue,
        stride_uk,
        stride_c,
        stride_routed,
        stride_sm,
        stride_sr,
        stride_total,
        stride_gm,
        stride_ge,
        tl.program_id(0),
        tl.program_id(1),
        E,
        RANK,
        RANK_COLUMNS,
        TERMS,
        SCALING,
        SOFTMAX,
        HAS_ROUTED,
        STORE_GATES,
        BLOCK_M,
        BLOCK_K,
        ranks_ptr,
        STORE_RANKS,
    )
