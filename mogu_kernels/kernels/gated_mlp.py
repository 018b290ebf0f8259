"""Second launch of two for a gated MLP: both routed projections and their product in one GEMM.

    y[m, n] = activation(p_0[m, n]) * p_1[m, n]
    p_j[m, n] = total[j, m] * (x[m, :] . weight_j[n, :] + bias_j[n])
                + shrunk[j, m, :] . lora_B_j[:, n, :]

j = 0 is gate_proj, j = 1 up_proj; `shrunk` [2, M, E * RANK] and `total` [2, M] come from one
`shrink_gate` of both. One program owns one [BLOCK_M, BLOCK_N] tile of y and two accumulators; it
loads each x tile once for both. The caller guarantees that both weights have the same strides, and
both biases and both lora_B.
The idea: neither projection is ever stored, let alone read back.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.tiles import accumulator, tile_position


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """SwiGLU's or GeGLU's activation of fp32 values."""
    if ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    # gelu_tanh: 0.5 z (1 + tanh(a)) = z * sigmoid(2 a), a = sqrt(2 / pi) (z + 0.044715 z^3)
    return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))


@triton.jit(do_not_specialize=["M"])
def gated_mlp_kernel(
    x_ptr,
    weight_0_ptr,
    weight_1_ptr,
    bias_0_ptr,
    bias_1_ptr,
    shrunk_ptr,
    total_ptr,
    lora_B_0_ptr,
    lora_B_1_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_sj,
    stride_sm,
    stride_sr,
    stride_tj,
    stride_total,
    stride_be,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    E: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    w_offsets = offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    w_0_ptrs, w_1_ptrs = weight_0_ptr + w_offsets, weight_1_ptr + w_offsets

    # accumulate over K
    acc_0 = accumulator(bias_0_ptr, offs_n, mask_n, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
    acc_1 = accumulator(bias_1_ptr, offs_n, mask_n, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w_0 = tl.load(w_0_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        w_1 = tl.load(w_1_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc_0 = tl.dot(x, w_0, acc_0, input_precision="ieee")
        acc_1 = tl.dot(x, w_1, acc_1, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_0_ptrs += BLOCK_K * stride_wk
        w_1_ptrs += BLOCK_K * stride_wk

    # epilogue
    if PDL:
        gdc_wait()  # up to here nothing came from the first launch
    acc_0 = gate_and_expand(
        acc_0,
        shrunk_ptr,
        total_ptr,
        lora_B_0_ptr,
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
    acc_1 = gate_and_expand(
        acc_1,
        shrunk_ptr + stride_sj,
        total_ptr + stride_tj,
        lora_B_1_ptr,
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
    y = activate(acc_0, ACTIVATION) * acc_1

    # store
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
