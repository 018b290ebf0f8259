"""Second launch of two where tensor descriptors can be had (sm_90 and later): one wave of programs.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n]) + shrunk[m, :] . lora_B[n, :]

Program p owns the tiles p, p + programs, p + 2 * programs, ... of y, as many programs as the GPU
holds at once. Matrices come and go through descriptors, which fill with zeros beyond the edges:
x [M, K], weight [N, K], shrunk [M, E * RANK], lora_B [N, E * RANK] (the experts side by side) and
y [M, N]. The caller guarantees that their rows start at multiples of 16 bytes.
The idea: no thread computes an address, so the epilogue costs no registers beyond the plain GEMM
(156 and 155 on sm_90 at 128x256x64); and while one tile's epilogue runs, the loads of the next do.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mogu_kernels.kernels.tiles import accumulator, tile_position


@triton.jit(do_not_specialize=["M"])
def persistent_linear_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    shrunk_desc,
    total_ptr,
    lora_B_desc,
    y_desc,
    M,
    N,
    K,
    stride_bias,
    stride_total,
    RANK_COLUMNS: tl.constexpr,  # E * RANK
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
    # wide ranks would be prefetched too, into more shared memory than there is; a bias would be
    # carried from tile to tile in registers
    OVERLAP: tl.constexpr = RANK_COLUMNS <= 32 and not HAS_BIAS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=OVERLAP):
        # where am I
        pid_m, pid_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = pid_m * BLOCK_M, pid_n * BLOCK_N

        # accumulate over K
        offs_n = column.to(tl.int64) + tl.arange(0, BLOCK_N)
        acc = accumulator(bias_ptr, offs_n, offs_n < N, stride_bias, HAS_BIAS, BLOCK_M, BLOCK_N)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            w = weight_desc.load([column, k])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")

        # epilogue: gate the base, then expand BLOCK_R rank columns at a time
        if PDL:
            gdc_wait()  # up to here nothing came from the first launch
        offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        total = tl.load(total_ptr + offs_m * stride_total, mask=offs_m < M, other=0.0)
        acc *= total[:, None]
        for r in tl.static_range(0, RANK_COLUMNS, BLOCK_R):
            shrunk = shrunk_desc.load([row, r])
            b = lora_B_desc.load([column, r])
            acc = tl.dot(shrunk, b.T, acc, input_precision="ieee")

        # store
        y_desc.store([row, column], acc.to(y_desc.dtype))
