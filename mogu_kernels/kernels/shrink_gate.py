"""First launch of two: routers and shrink, ready for the epilogue of any GEMM.

    gates[m, :] = sigmoid or softmax of (x[m, :] . gate_weight[e, :] + gate_bias[e])
    total[m]    = sum_e gates[m, e]
    shrunk[m, e * RANK + j] = scaling_e * gates[m, e] * (x[m, :] . lora_A[e, j, :])

One program owns BLOCK_M rows and RANK_COLUMNS columns of `shrunk` (axis 1 of the grid walks wider
ranks); program column 0 also stores `total` and, on request, the gates. Reads x once per column of
programs; writes 2 * E * RANK + 4 bytes a token in bf16. A row with routing off gets total = 1 and
shrunk = 0, which makes every later step the plain projection.
The idea: the gates and scaling are multiplied in here, in fp32, so that a GEMM needs only `total`
and one more narrow dot.
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


@triton.jit(do_not_specialize=["M"])
def shrink_gate_kernel(
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
):
    """See the module."""
    # where am I
    pid_m, pid_r = tl.program_id(0), tl.program_id(1)
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
