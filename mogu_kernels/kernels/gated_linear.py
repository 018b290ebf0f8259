"""Second launch of two: the base GEMM with the gate and the expand in its epilogue.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n]) + shrunk[m, :] . lora_B[:, n, :]

`shrunk` [M, E * RANK] and `total` [M] come from `shrink_gate`. One program owns one
[BLOCK_M, BLOCK_N] tile of y. Beyond the plain GEMM it reads `shrunk` and `total` of its rows and
`lora_B` of its columns; y is written once and never read.
The idea: scaling the accumulator and going on accumulating into it costs no registers beyond the
plain GEMM; wide ranks are taken BLOCK_R columns at a time.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.tiles import tile_of_program


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
):
    """See the module."""
    # where am I
    pid_m, pid_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk

    # accumulate over K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    # epilogue: gate the base, then expand BLOCK_R rank columns at a time
    total = tl.load(total_ptr + offs_m * stride_total, mask=mask_m, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc *= total[:, None]
    for r in tl.static_range(0, E * RANK, BLOCK_R):
        columns = r + tl.arange(0, BLOCK_R)
        mask_r = columns < E * RANK
        b_rows = (columns // RANK) * stride_be + (columns % RANK) * stride_br
        shrunk_ptrs = shrunk_ptr + offs_m[:, None] * stride_sm + columns[None, :] * stride_sr
        b_ptrs = lora_B_ptr + b_rows[:, None] + offs_n[None, :] * stride_bn
        shrunk = tl.load(shrunk_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(shrunk, b, acc, input_precision="ieee")

    # store
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
