"""What every second launch does with a tile of the base projection, before the only rounding.

    acc[m, n] = total[m] * acc[m, n] + shrunk[m, :] . lora_B[:, n, :]

`shrunk` [M, E * RANK] and `total` [M] come from `shrink_gate`: gates and scaling are in them.
The idea: scaling the accumulator and going on accumulating into it costs no registers beyond the
plain GEMM; wide ranks are taken BLOCK_R columns at a time.
"""

import triton
import triton.language as tl


@triton.jit
def gate_and_expand(
    acc,  # [BLOCK_M, BLOCK_N] fp32
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
    E: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The tile [BLOCK_M, BLOCK_N] of y, still in fp32."""
    total = tl.load(total_ptr + offs_m * stride_total, mask=mask_m, other=0.0)
    acc *= total[:, None]
    for r in tl.static_range(0, E * RANK, BLOCK_R):
        columns = r + tl.arange(0, BLOCK_R)
        mask_r = columns < E * RANK
        b_rows = (columns // RANK) * stride_be + (columns % RANK) * stride_br
        shrunk_ptrs = shrunk_ptr + offs_m[:, None] * stride_sm + columns[None, :] * stride_sr
        b_ptrs = lora_B_ptr + b_rows[:, None] + offs_n[None, :] * stride_bn
        shrunk = tl.load(shrunk_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(shrunk, b, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc
