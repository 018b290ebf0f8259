"""Second launch of the backward: the base GEMM turned round, with the forward's epilogue.

    q[m, k]      = grad_y[m, :] . weight[:, k]
    grad_x[m, k] = total[m] * q[m, k] + grad_ranks[m, :] . lora_A[:, :, k]
                   + sum_e grad_logits[m, e] * gate_weight[e, k]          with softmax gates
    shares[t, m] = sum over the columns k of tile t of q[m, k] * x[m, k]   with sigmoid gates

`total`, `grad_ranks` and `slopes` come from `backward_gates`. The gradient of a sigmoid's logit
needs q . x over a whole row, of which one program sees one tile: it leaves its part in `shares`,
and `backward_weights` adds the router's term to grad_x. One program owns one [BLOCK_M, BLOCK_N]
tile of grad_x; grad_y and weight are read as by a plain GEMM, x once and only for sigmoids. Without
STORE_X only `shares` are made. No GPU has timed it.
The idea: <grad_y, weight x> = (grad_y weight) . x, so that no gate costs a second GEMM.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.backward_gates import add_through_routers, logit_gradients
from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.tiles import tile_position


@triton.jit(do_not_specialize=["M"])
def backward_input_kernel(
    grad_y_ptr,
    weight_ptr,
    x_ptr,
    lora_A_ptr,
    gate_weight_ptr,
    gates_ptr,
    grad_ranks_ptr,
    total_ptr,
    slopes_ptr,
    grad_x_ptr,
    shares_ptr,
    M,
    N,
    K,
    stride_ym,
    stride_yn,
    stride_wn,
    stride_wk,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_gm,
    stride_ge,
    stride_dxm,
    stride_dxk,
    E: tl.constexpr,
    RANK: tl.constexpr,
    TERMS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    STORE_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the module; BLOCK_N columns of K, BLOCK_K the step over N."""
    # where am I
    pid_m, pid_n = tile_position(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < K
    mask = mask_m[:, None] & mask_n[None, :]
    y_ptrs = grad_y_ptr + offs_m[:, None] * stride_ym + offs_k[None, :] * stride_yn
    w_ptrs = weight_ptr + offs_k[:, None] * stride_wn + offs_n[None, :] * stride_wk

    # accumulate over N
    acc = tl.zeros([BLOCK_M, BLOCK_N], total_ptr.dtype.element_ty)
    for k in range(0, N, BLOCK_K):
        mask_k = offs_k < N - k
        dy = tl.load(y_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(dy, w, acc, input_precision="ieee", out_dtype=acc.dtype)
        y_ptrs += BLOCK_K * stride_yn
        w_ptrs += BLOCK_K * stride_wn

    # epilogue
    if not SOFTMAX:
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(acc.dtype)
        tl.store(shares_ptr + pid_n.to(tl.int64) * M + offs_m, tl.sum(acc * x, axis=1), mask=mask_m)
    if STORE_X:
        acc = gate_and_expand(
            acc,
            grad_ranks_ptr,
            total_ptr,
            lora_A_ptr,
            offs_m,
            offs_n,
            mask_m,
            mask_n,
            E * RANK,
            1,
            1,
            stride_ae,
            stride_ak,
            stride_ar,
            E,
            RANK,
            BLOCK_R,
        )
        if SOFTMAX:
            gradients = logit_gradients(
                slopes_ptr,
                None,
                gates_ptr,
                None,
                offs_m,
                mask_m,
                M,
                stride_gm,
                stride_ge,
                0,
                E,
                0,
                SOFTMAX,
                False,
            )
            acc = add_through_routers(
                acc,
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

        # store
        dx_ptrs = grad_x_ptr + offs_m[:, None] * stride_dxm + offs_n[None, :] * stride_dxk
        tl.store(dx_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask)
