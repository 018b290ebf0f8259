"""Second launch of two where tensor descriptors can be had (sm_90 and later): one wave of programs.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n]) + shrunk[m, :] . lora_B[:, n, :]

Program p owns the tiles p, p + programs, p + 2 * programs, ... of y, as many programs as the GPU
holds at once. x and weight come through descriptors [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K],
which fill with zeros beyond the edges; what the epilogue reads beyond them and what is stored goes
by ordinary pointers. The caller guarantees 16-byte alignment of x, weight and their rows.
The idea: loads of the next tile run while this tile's epilogue does, and no thread computes an
address in the loop.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.tiles import tile_position


@triton.jit(do_not_specialize=["M"])
def persistent_linear_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    shrunk_ptr,
    total_ptr,
    lora_B_ptr,
    y_ptr,
    M,
    N,
    K,
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
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        # where am I
        pid_m, pid_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N

        # accumulate over K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k])
            w = weight_desc.load([pid_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc)

        # epilogue
        if PDL:
            gdc_wait()  # up to here nothing came from the first launch
        acc = gate_and_expand(
            acc,
            bias_ptr,
            shrunk_ptr,
            total_ptr,
            lora_B_ptr,
            offs_m,
            offs_n,
            mask_m,
            mask_n,
            stride_bias,
            stride_sm,
            stride_sr,
            stride_total,
            stride_be,
            stride_bn,
            stride_br,
            E,
            RANK,
            HAS_BIAS,
            BLOCK_R,
        )

        # store
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
