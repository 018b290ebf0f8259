"""First launch of the backward: what the gradient of y says to the ranks and to the gates.

    v[m, e, j]           = grad_y[m, :] . lora_B[e, :, j]
    grad_ranks[m, e, j]  = scaling_e * gates[m, e] * v[m, e, j]
    gated_ranks[m, e, j] = scaling_e * gates[m, e] * ranks[m, e, j]
    total[m]             = sum_e gates[m, e]
    slopes[m, e]         = scaling_e * (v[m, e, :] . ranks[m, e, :]) + grad_y[m, :] . bias
                           + grad_gates[m, e]

A slope is the gradient of a gate, but for the share <grad_y, weight x> of the base, which is the
same for all experts: `backward_input` finds it where it has grad_y weight in registers. A softmax
does not see what all experts share, so there the bias is left out, too. `ranks` [M, E * RANK] and
`gates` [M, E] are the forward's. A row with routing off acts with gates of 0 and total = 1.

One program owns BLOCK_M rows and reads grad_y once for every BLOCK_R rank columns. All outputs are
contiguous; 4 * E * RANK + 4 * E + 4 bytes a token in bf16. No GPU has timed the backward yet.
The idea: whatever is narrow is finished here, so that the GEMM meets ready-made operands again.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.gates import EXPERT_COLUMNS, ROUTER_COLUMNS, rank_factors

SHARE_ROWS = tl.constexpr(32)  # parts of the base's share that are added at a time


@triton.jit(do_not_specialize=["M"])
def backward_gates_kernel(
    grad_y_ptr,
    bias_ptr,
    lora_B_ptr,
    ranks_ptr,
    gates_ptr,
    grad_gates_ptr,
    routed_ptr,
    grad_ranks_ptr,
    gated_ranks_ptr,
    total_ptr,
    slopes_ptr,
    M,
    N,
    stride_ym,
    stride_yn,
    stride_bias,
    stride_be,
    stride_bn,
    stride_br,
    stride_rm,
    stride_rr,
    stride_gm,
    stride_ge,
    stride_dgm,
    stride_dge,
    stride_routed,
    E: tl.constexpr,
    RANK: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    HAS_GRAD_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """See the module; BLOCK_K is the step over the N columns of grad_y."""
    # where am I
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_K)
    experts = tl.arange(0, EXPERT_COLUMNS)
    mask_m = offs_m < M
    mask_e = mask_m[:, None] & (experts < E)[None, :]
    gates_ptrs = gates_ptr + offs_m[:, None] * stride_gm + experts[None, :] * stride_ge
    gates = tl.load(gates_ptrs, mask=mask_e, other=0.0)
    total = tl.sum(gates, axis=1)
    if HAS_ROUTED:
        routed = tl.load(routed_ptr + offs_m * stride_routed, mask=mask_m, other=0) != 0
        total = tl.where(routed, total, 1.0)
        gates = tl.where(routed[:, None], gates, 0.0)
    slopes = tl.zeros([BLOCK_M, EXPERT_COLUMNS], total_ptr.dtype.element_ty)

    for r in tl.static_range(0, E * RANK, BLOCK_R):
        columns = r + tl.arange(0, BLOCK_R)
        mask_r = columns < E * RANK
        b_rows = (columns // RANK) * stride_be + (columns % RANK) * stride_br
        b_ptrs = lora_B_ptr + b_rows[None, :] + offs_n[:, None] * stride_bn
        y_ptrs = grad_y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn

        # accumulate over N
        v = tl.zeros([BLOCK_M, BLOCK_R], total_ptr.dtype.element_ty)
        for n in range(0, N, BLOCK_K):
            mask_n = offs_n < N - n
            dy = tl.load(y_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            v = tl.dot(dy, b, v, input_precision="ieee", out_dtype=v.dtype)
            if HAS_BIAS and not SOFTMAX and r == 0:
                bias_ptrs = bias_ptr + (n + offs_n) * stride_bias
                bias = tl.load(bias_ptrs, mask=mask_n, other=0.0).to(slopes.dtype)
                slopes += tl.sum(dy.to(slopes.dtype) * bias[None, :], axis=1)[:, None]
            y_ptrs += BLOCK_K * stride_yn
            b_ptrs += BLOCK_K * stride_bn

        # epilogue
        mask = mask_m[:, None] & mask_r[None, :]
        ranks_ptrs = ranks_ptr + offs_m[:, None] * stride_rm + columns[None, :] * stride_rr
        ranks = tl.load(ranks_ptrs, mask=mask, other=0.0)
        factors = rank_factors(gates, columns, E, RANK, SCALING)
        for e in tl.static_range(E):
            own = tl.where((columns // RANK == e)[None, :], v * ranks, 0.0)
            slope = tl.sum(own, axis=1) * SCALING[e]
            slopes += tl.where((experts == e)[None, :], slope[:, None], 0.0)

        # store
        offsets = offs_m[:, None] * (E * RANK) + columns[None, :]
        narrow = grad_ranks_ptr.dtype.element_ty
        tl.store(grad_ranks_ptr + offsets, (v * factors).to(narrow), mask=mask)
        tl.store(gated_ranks_ptr + offsets, (ranks * factors).to(narrow), mask=mask)

    if HAS_ROUTED:
        slopes = tl.where(routed[:, None], slopes, 0.0)
    if HAS_GRAD_GATES:
        dg_ptrs = grad_gates_ptr + offs_m[:, None] * stride_dgm + experts[None, :] * stride_dge
        slopes += tl.load(dg_ptrs, mask=mask_e, other=0.0)
    tl.store(total_ptr + offs_m, total, mask=mask_m)
    tl.store(slopes_ptr + offs_m[:, None] * E + experts[None, :], slopes, mask=mask_e)


@triton.jit
def logit_gradients(
    slopes_ptr,
    shares_ptr,
    gates_ptr,
    routed_ptr,
    offs_m,
    mask_m,
    M,
    stride_gm,
    stride_ge,
    stride_routed,
    E: tl.constexpr,
    SHARES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
):
    """Gradients of the gate logits [BLOCK_M, 16], zero beyond column E.

    The base's share of a row comes in SHARES parts, `shares` [SHARES, M], added in this one order.
    """
    experts = tl.arange(0, ROUTER_COLUMNS)
    mask = mask_m[:, None] & (experts < E)[None, :]
    gates_ptrs = gates_ptr + offs_m[:, None] * stride_gm + experts[None, :] * stride_ge
    gates = tl.load(gates_ptrs, mask=mask, other=0.0)
    slopes = tl.load(slopes_ptr + offs_m[:, None] * E + experts[None, :], mask=mask, other=0.0)
    if SOFTMAX:
        gradients = gates * (slopes - tl.sum(gates * slopes, axis=1)[:, None])
    else:
        share = tl.zeros([offs_m.shape[0]], slopes.dtype)
        for first in tl.static_range(0, SHARES, SHARE_ROWS):
            parts = first + tl.arange(0, SHARE_ROWS).to(tl.int64)
            mask_shares = (parts < SHARES)[:, None] & mask_m[None, :]
            shares_ptrs = shares_ptr + parts[:, None] * M + offs_m[None, :]
            share += tl.sum(tl.load(shares_ptrs, mask=mask_shares, other=0.0), axis=0)
        if HAS_ROUTED:
            routed = tl.load(routed_ptr + offs_m * stride_routed, mask=mask_m, other=0) != 0
            share = tl.where(routed, share, 0.0)
        gradients = (slopes + share[:, None]) * gates * (1.0 - gates)
    return gradients


@triton.jit
def add_through_routers(
    acc,  # [BLOCK_M, BLOCK_N], columns offs_n of K
    gradients,  # [BLOCK_M, 16], of the logits
    gate_weight_ptr,
    offs_n,
    mask_n,
    stride_ut,
    stride_ue,
    stride_uk,
    E: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Acc plus what reaches x through the logits; the gradients are rounded as the ranks' are."""
    experts = tl.arange(0, ROUTER_COLUMNS)
    for term in tl.static_range(TERMS):
        u_ptrs = gate_weight_ptr + experts[:, None] * stride_ue + offs_n[None, :] * stride_uk
        mask = (experts < E)[:, None] & mask_n[None, :]
        u = tl.load(u_ptrs + term * stride_ut, mask=mask, other=0.0)
        rounded = gradients.to(u.dtype)
        acc = tl.dot(rounded, u, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc
