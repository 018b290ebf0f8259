"""Third launch of the backward: every sum over tokens, and grad_x's term from the routers.

    grad_A[e, j, k] = sum_m grad_ranks[m, e, j] * x[m, k]
    grad_B[e, n, j] = sum_m gated_ranks[m, e, j] * grad_y[m, n]
    grad_u[e, k]    = sum_m grad_logits[m, e] * x[m, k]
    grad_c[e]       = sum_m grad_logits[m, e]
    grad_x[m, k]   += sum_e grad_logits[m, e] * gate_weight[e, k]          with sigmoid gates

Axis 1 of the grid has the jobs: BLOCK_R columns of grad_A each, then as many of grad_B, then the
routers; a job that is not wanted ends at once. Axis 0 walks BLOCK_N columns of K or N. One program
walks all tokens in one order, so that the result has the same bits every time, with no atomics.
Reads x twice and grad_y once for up to 64 rank columns; grad_x is read and written once more. No
GPU has timed it.
The idea: nothing [M, N] or [M, K] is made on the way.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.backward_gates import add_through_routers, logit_gradients
from mogu_kernels.kernels.gates import ROUTER_COLUMNS


@triton.jit
def sum_over_tokens(
    ranks_ptr,  # [M, E * RANK], contiguous
    wide_ptr,  # x or grad_y
    out_ptr,  # [E, RANK, columns], in any order of axes
    M,
    columns,
    stride_wm,
    stride_wn,
    stride_oe,
    stride_or,
    stride_on,
    chunk,
    E: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rank columns `chunk` of ranks^T wide, in the dtype WIDE."""
    # where am I
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < columns, offs_r < E * RANK

    # accumulate over M
    acc = tl.zeros([BLOCK_N, BLOCK_R], WIDE)
    for m in range(0, M, BLOCK_M):
        rows = (m + offs_m).to(tl.int64)
        mask_m = rows < M
        wide_ptrs = wide_ptr + rows[None, :] * stride_wm + offs_n[:, None] * stride_wn
        ranks_ptrs = ranks_ptr + rows[:, None] * (E * RANK) + offs_r[None, :]
        wide = tl.load(wide_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        ranks = tl.load(ranks_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(wide, ranks, acc, input_precision="ieee", out_dtype=acc.dtype)

    # store
    out_rows = (offs_r // RANK) * stride_oe + (offs_r % RANK) * stride_or
    out_ptrs = out_ptr + out_rows[None, :] + offs_n[:, None] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def backward_weights_kernel(
    x_ptr,
    grad_y_ptr,
    gate_weight_ptr,
    gates_ptr,
    routed_ptr,
    grad_ranks_ptr,
    gated_ranks_ptr,
    slopes_ptr,
    shares_ptr,
    grad_x_ptr,
    grad_A_ptr,
    grad_B_ptr,
    grad_u_ptr,
    grad_c_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_ym,
    stride_yn,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_gm,
    stride_ge,
    stride_routed,
    stride_dxm,
    stride_dxk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_bn,
    stride_br,
    E: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    SHARES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_ROUTERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """See the module; grad_u [E, K] and grad_c [E] are contiguous, strides a and b of the grads."""
    CHUNKS: tl.constexpr = (E * RANK + BLOCK_R - 1) // BLOCK_R
    WIDE: tl.constexpr = slopes_ptr.dtype.element_ty
    job = tl.program_id(1)
    if job < CHUNKS:
        if WANT_A:
            sum_over_tokens(
                grad_ranks_ptr,
                x_ptr,
                grad_A_ptr,
                M,
                K,
                stride_xm,
                stride_xk,
                stride_ae,
                stride_ar,
                stride_ak,
                job,
                E,
                RANK,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                WIDE,
            )
    elif job < 2 * CHUNKS:
        if WANT_B:
            sum_over_tokens(
                gated_ranks_ptr,
                grad_y_ptr,
                grad_B_ptr,
                M,
                N,
                stride_ym,
                stride_yn,
                stride_be,
                stride_br,
                stride_bn,
                job - CHUNKS,
                E,
                RANK,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                WIDE,
            )
    elif WANT_ROUTERS or WANT_X:
        # where am I
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        experts = tl.arange(0, ROUTER_COLUMNS)
        mask_n, mask_e = offs_n < K, experts < E

        # accumulate over M
        grad_u = tl.zeros([BLOCK_N, ROUTER_COLUMNS], WIDE)
        grad_c = tl.zeros([ROUTER_COLUMNS], WIDE)
        for m in range(0, M, BLOCK_M):
            rows = (m + offs_m).to(tl.int64)
            mask_m = rows < M
            gradients = logit_gradients(
                slopes_ptr,
                shares_ptr,
                gates_ptr,
                routed_ptr,
                rows,
                mask_m,
                M,
                stride_gm,
                stride_ge,
                stride_routed,
                E,
                SHARES,
                SOFTMAX,
                HAS_ROUTED,
            )
            if WANT_ROUTERS:
                x_ptrs = x_ptr + rows[None, :] * stride_xm + offs_n[:, None] * stride_xk
                x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
                high = gradients.to(x.dtype)  # and a low part, as a router's vector has
                low = (gradients - high.to(WIDE)).to(x.dtype)
                grad_u = tl.dot(x, high, grad_u, input_precision="ieee", out_dtype=WIDE)
                grad_u = tl.dot(x, low, grad_u, input_precision="ieee", out_dtype=WIDE)
                grad_c += tl.sum(gradients, axis=0)
            if WANT_X and not SOFTMAX:
                dx_ptrs = grad_x_ptr + rows[:, None] * stride_dxm + offs_n[None, :] * stride_dxk
                mask = mask_m[:, None] & mask_n[None, :]
                grad_x = add_through_routers(
                    tl.load(dx_ptrs, mask=mask, other=0.0).to(WIDE),
                    gradients,
                    gate_weight_ptr,
                    offs_n,
                    mask_n,
                    stride_ut,
                    stride_ue,
                    stride_uk,
                    E,
                    TERMS,
                )
                tl.store(dx_ptrs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)

        # store
        if WANT_ROUTERS:
            u_ptrs = grad_u_ptr + experts[None, :] * K + offs_n[:, None]
            tl.store(u_ptrs, grad_u, mask=mask_n[:, None] & mask_e[None, :])
            mask_c = mask_e & (tl.program_id(0) == 0)
            tl.store(grad_c_ptr + experts, grad_c, mask=mask_c)
