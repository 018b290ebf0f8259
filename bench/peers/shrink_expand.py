"""As multi-adapter servers do it: shrink into a buffer [experts, M, rank], expand into y.

    buffer[e, m, :] = scaling * x[m, :] lora_A[e]^T        fp32
    y[m, n] += sum_e (gate[m, e] * buffer[e, m, :]) . lora_B[e, n, :]

The gates are not these servers' own: they are put where they cost least, on y before the expand and
on the narrow buffer.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F


@triton.jit
def _shrink_kernel(
    x_ptr, lora_A_ptr, buffer_ptr, M, K, scaling,
    RANK: tl.constexpr, RANK_COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one expert."""
    expert = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, RANK_COLUMNS)
    mask_m, mask_r = offs_m < M, offs_r < RANK
    acc = tl.zeros([BLOCK_M, RANK_COLUMNS], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = tl.load(
            lora_A_ptr + (expert * RANK + offs_r)[None, :] * K + (k + offs_k)[:, None],
            mask=mask_k[:, None] & mask_r[None, :],
            other=0.0,
        )
        acc = tl.dot(x, a, acc, input_precision="ieee")
    rows = expert.to(tl.int64) * M + offs_m
    tl.store(
        buffer_ptr + rows[:, None] * RANK + offs_r[None, :],
        acc * scaling,
        mask=mask_m[:, None] & mask_r[None, :],
    )


@triton.jit
def _expand_kernel(
    buffer_ptr, lora_B_ptr, y_ptr, M, N,
    E: tl.constexpr, RANK: tl.constexpr, RANK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y, all experts."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, RANK_COLUMNS)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < RANK
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for e in tl.static_range(E):
        ranks = tl.load(
            buffer_ptr + (e * M + offs_m)[:, None] * RANK + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        b = tl.load(
            lora_B_ptr + (e * N + offs_n)[None, :] * RANK + offs_r[:, None],
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(ranks.to(b.dtype), b, acc, input_precision="ieee")
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0)
    tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=mask)


def build(problem, folded, blocks=None):
    """Base GEMM, router, two products with gates, shrink, expand."""
    p = problem.projection
    logits = problem.logits(folded)
    N, K = p.weight.shape
    E, rank, _ = p.lora_A.shape
    ranks = {"RANK": rank, "RANK_COLUMNS": max(16, triton.next_power_of_2(rank))}
    rows = max(16, min(64, triton.next_power_of_2(problem.tokens)))
    narrow = (blocks.M, blocks.K) if blocks else (min(rows, 32), 128)
    wide = (blocks.M, blocks.N) if blocks else (rows, 128)

    def forward(x):
        M = len(x)
        gates = torch.sigmoid(logits(x))
        y = F.linear(x, p.weight)
        y.mul_(gates.sum(1, keepdim=True))
        buffer = torch.empty(E, M, rank, dtype=torch.float32)
        _shrink_kernel[triton.cdiv(M, narrow[0]), E](
            x, p.lora_A, buffer, M, K, p.scaling[0],
            BLOCK_M=narrow[0], BLOCK_K=narrow[1], **ranks,
        )  # fmt: skip
        buffer.mul_(gates.t()[:, :, None])
        _expand_kernel[triton.cdiv(M, wide[0]), triton.cdiv(N, wide[1])](
            buffer, p.lora_B, y, M, N, E=E, BLOCK_M=wide[0], BLOCK_N=wide[1], **ranks
        )
        return y

    return forward
