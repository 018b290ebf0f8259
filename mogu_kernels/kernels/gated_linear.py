"""Second launch of two: the base GEMM with the gate and the expand in its epilogue.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n]) + shrunk[m, :] . lora_B[:, n, :]

One program owns one [BLOCK_M, BLOCK_N] tile of y. Beyond the plain GEMM it reads `shrunk` and
`total` of its rows and `lora_B` of its columns; y is written once and never read. Takes any strides
on any GPU; `persistent_linear` is the form for tensor descriptors.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.tiles import accumulator, tile_position


@triton.jit(do_not_specialize=["M"])
def gated_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shrunk_ptr,
    total_ptr,
    lora_B_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_sm,
    stride_sr,
    stride_total,
    stride_be,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    E: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """See the module."""
    # where am I
    pid_m, pid_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk

    # accumulate over K
    acc = accumulator(bias_ptr, offs_n, mask_n, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    # epilogue
    if PDL:
        gdc_wait()  # up to here nothing came from the first launch
    acc = gate_and_expand(
        acc,
        shrunk_ptr,
        total_ptr,
        lora_B_ptr,
        offs_m,
        offs_n,
        mask_m,
        mask_n,
        stride_sm,
        stride_sr,
        stride_total,
        stride_be,
        stride_bn,
        stride_br,
        E,
        RANK,
        BLOCK_R,
    )

    # store
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
