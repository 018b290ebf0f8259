"""Gate and expand on a projection that something else has computed, in place.

    y[m, n] = total[m] * (y[m, n] + bias[n]) + shrunk[m, :] . lora_B[:, n, :]

One program owns one [BLOCK_M, BLOCK_N] tile of y: read once, written once. `shrunk` and `total`
come from `shrink_gate`; a row with routing off (total = 1, shrunk = 0) keeps its bits.
The idea: any base will do, quantised or foreign, at the price of one more pass over y.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.tiles import accumulator


@triton.jit(do_not_specialize=["M"])
def gated_expand_kernel(
    y_ptr,
    bias_ptr,
    shrunk_ptr,
    total_ptr,
    lora_B_ptr,
    M,
    N,
    stride_ym,
    stride_yn,
    stride_bias,
    stride_sm,
    stride_sr,
    stride_total,
    stride_be,
    stride_bn,
    stride_br,
    E: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """See the module."""
    # where am I
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    mask_y = mask_m[:, None] & mask_n[None, :]

    # gate and expand
    y = tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32)
    y += accumulator(bias_ptr, offs_n, mask_n, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
    y = gate_and_expand(
        y,
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
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_y)
