"""One launch: base GEMM, shrink, routers and expand in a single loop over K.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n])
              + sum_e scaling_e * gates[m, e] * (x[m, :] . lora_A[e]^T) . lora_B[e, n, :]
    gates[m, :] = sigmoid or softmax of (x[m, :] . gate_weight[e, :] + gate_bias[e]),  total = their
    sum

One program owns one [BLOCK_M, BLOCK_N] tile of y. Every program of a row block shrinks those rows
for itself: lora_A and the routers are a few rows that stay in L2, so nothing is exchanged or waited
for. Reads x and lora_A once per column of tiles, weight once per row of tiles; writes y once, and
the gates once if asked for; for a backward also what they multiply, x[m, :] . lora_A[e, j, :], as
contiguous fp32 [M, E * RANK]. The caller guarantees E * RANK <= RANK_COLUMNS and zero padding of
smaller experts. The idea: the narrow dots ride on an x tile that the base GEMM has loaded anyway.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.gates import (
    EXPERT_COLUMNS,
    ROUTER_COLUMNS,
    gates_from_columns,
    rank_factors,
    router_mask,
    router_pointers,
)
from mogu_kernels.kernels.tiles import accumulator, tile_position


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    lora_A_ptr,
    lora_B_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    routed_ptr,
    y_ptr,
    gates_ptr,
    ranks_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_bn,
    stride_br,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_c,
    stride_routed,
    stride_ym,
    stride_yn,
    stride_gm,
    stride_ge,
    E: tl.constexpr,
    RANK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    STORE_GATES: tl.constexpr,
    STORE_RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the module."""
    # where am I
    pid_m, pid_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, RANK_COLUMNS)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, columns < E * RANK
    mask_u = router_mask(E, TERMS)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    a_rows = (columns // RANK) * stride_ae + (columns % RANK) * stride_ar
    a_ptrs = lora_A_ptr + a_rows[None, :] + offs_k[:, None] * stride_ak
    u_ptrs = router_pointers(gate_weight_ptr, offs_k, stride_ut, stride_ue, stride_uk)

    # accumulate over K
    acc = accumulator(bias_ptr, offs_n, mask_n, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
    shrunk = tl.zeros([BLOCK_M, RANK_COLUMNS], tl.float32)
    router_columns = tl.zeros([BLOCK_M, ROUTER_COLUMNS], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        u = tl.load(u_ptrs, mask=mask_k[:, None] & mask_u[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        shrunk = tl.dot(x, a, shrunk, input_precision="ieee")
        router_columns = tl.dot(x, u, router_columns, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K * stride_ak
        u_ptrs += BLOCK_K * stride_uk

    # epilogue: gate the base, expand the gated ranks into the same accumulator
    if STORE_RANKS:
        ranks_ptrs = ranks_ptr + offs_m[:, None] * (E * RANK) + columns[None, :]
        tl.store(ranks_ptrs, shrunk, mask=mask_m[:, None] & mask_r[None, :] & (pid_n == 0))
    gates = gates_from_columns(router_columns, gate_bias_ptr, stride_c, E, SOFTMAX, BLOCK_M)
    total = tl.sum(gates, axis=1)
    shrunk *= rank_factors(gates, columns, E, RANK, SCALING)
    if HAS_ROUTED:
        routed = tl.load(routed_ptr + offs_m * stride_routed, mask=mask_m, other=0) != 0
        total = tl.where(routed, total, 1.0)
        shrunk = tl.where(routed[:, None], shrunk, 0.0)
    acc *= total[:, None]
    b_rows = (columns // RANK) * stride_be + (columns % RANK) * stride_br
    b_ptrs = lora_B_ptr + b_rows[:, None] + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    acc = tl.dot(shrunk.to(b.dtype), b, acc, input_precision="ieee")

    # store
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    if STORE_GATES:
        experts = tl.arange(0, EXPERT_COLUMNS)
        gates_ptrs = gates_ptr + offs_m[:, None] * stride_gm + experts[None, :] * stride_ge
        mask_gates = mask_m[:, None] & (experts < E)[None, :] & (pid_n == 0)
        tl.store(gates_ptrs, gates, mask=mask_gates)
