"""As fused LoRA training does it: a shrink kernel, then a GEMM with the expand in its epilogue.

    ranks[m, :] = factor[m, e] * x[m, :] lora_A[e]^T
    y[m, n] = (total[m] * x[m, :]) . weight[n, :] + ranks[m, :] . lora_B[:, n, :]

Its epilogue adds ranks but scales nothing, so the total of the gates goes onto x beforehand (which
never costs more than onto y in a layer that widens); the shrink kernel multiplies by a factor per
token where the original multiplies by a dropout mask.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _shrink_kernel(
    x_ptr, lora_A_ptr, gates_ptr, ranks_ptr, M, K, scaling,
    E: tl.constexpr, RANK: tl.constexpr, RANK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows, the ranks of all experts side by side."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, columns = tl.arange(0, BLOCK_K), tl.arange(0, RANK_COLUMNS)
    mask_m, mask_r = offs_m < M, columns < E * RANK
    acc = tl.zeros([BLOCK_M, RANK_COLUMNS], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = tl.load(
            lora_A_ptr + columns[None, :] * K + (k + offs_k)[:, None],
            mask=mask_k[:, None] & mask_r[None, :],
            other=0.0,
        )
        acc = tl.dot(x, a, acc, input_precision="ieee")
    mask = mask_m[:, None] & mask_r[None, :]
    gates = tl.load(
        gates_ptr + offs_m[:, None] * E + (columns // RANK)[None, :], mask=mask, other=0.0
    )
    acc *= gates.to(tl.float32) * scaling
    ranks_ptrs = ranks_ptr + offs_m[:, None] * (E * RANK) + columns[None, :]
    tl.store(ranks_ptrs, acc.to(ranks_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, ranks_ptr, lora_B_ptr, y_ptr, M, N, K,
    E: tl.constexpr, RANK: tl.constexpr, RANK_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, columns = tl.arange(0, BLOCK_K), tl.arange(0, RANK_COLUMNS)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, columns < E * RANK
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * K + (k + offs_k)[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + offs_n[None, :] * K + (k + offs_k)[:, None],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
    ranks = tl.load(
        ranks_ptr + offs_m[:, None] * (E * RANK) + columns[None, :],
        mask=mask_m[:, None] & mask_r[None, :],
        other=0.0,
    )
    b_rows = (columns // RANK) * N * RANK + columns % RANK
    b = tl.load(
        lora_B_ptr + b_rows[:, None] + offs_n[None, :] * RANK,
        mask=mask_r[:, None] & mask_n[None, :],
        other=0.0,
    )
    acc = tl.dot(ranks, b, acc, input_precision="ieee")
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def build(problem, folded, blocks=None):
    """Router, one product with the total, shrink, GEMM with expand."""
    p = problem.projection
    logits = problem.logits(folded)
    N, K = p.weight.shape
    E, rank, _ = p.lora_A.shape
    ranks = {
        "E": E,
        "RANK": rank,
        "RANK_COLUMNS": max(16, triton.next_power_of_2(E * rank)),
    }
    rows = max(16, min(128, triton.next_power_of_2(problem.tokens)))
    narrow = (blocks.M, blocks.K) if blocks else (min(rows, 64), 64)
    wide = (blocks.M, blocks.N, blocks.K) if blocks else (rows, 256 if rows == 128 else 64, 64)

    def forward(x):
        M = len(x)
        gates = torch.sigmoid(logits(x))
        gated_x = gates.sum(1, keepdim=True) * x
        shrunk = torch.empty(M, E * rank, dtype=x.dtype)
        _shrink_kernel[(triton.cdiv(M, narrow[0]),)](
            x, p.lora_A, gates, shrunk, M, K, p.scaling[0],
            BLOCK_M=narrow[0], BLOCK_K=narrow[1], **ranks,
        )  # fmt: skip
        y = torch.empty(M, N, dtype=x.dtype)
        _linear_kernel[triton.cdiv(M, wide[0]), triton.cdiv(N, wide[1])](
            gated_x, p.weight, shrunk, p.lora_B, y, M, N, K,
            BLOCK_M=wide[0], BLOCK_N=wide[1], BLOCK_K=wide[2], **ranks,
        )  # fmt: skip
        return y

    return forward
