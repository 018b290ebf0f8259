"""Both launches in one: shrink programs raise flags, GEMM programs wait for them in the epilogue.

    y[m, n] = total[m] * (x[m, :] . weight[n, :] + bias[n])
              + sum_e scaling_e * gates[m, e] * (x[m, :] . lora_A[e]^T) . lora_B[e, n, :]

The first row blocks x CHUNKS programs each shrink BLOCK_M rows (`shrink_rows`) and add one to the
flag of their row block; every later program owns one [BLOCK_M, BLOCK_N] tile of y, and spins on the
flag once its own loop over K is through. The last tile of a row block to have seen the flag sets it
back to 0, so that a captured launch can be replayed; the caller guarantees that all flags are 0.
No program that others wait for waits itself, and low program ids start first.
Unproven on hardware, so it is opt-in (`TileConfig.one_launch`).
The idea: nobody waits in practice, since a shrink is done long before the first loop over K is.
"""

import triton
import triton.language as tl

from mogu_kernels.kernels.epilogue import gate_and_expand
from mogu_kernels.kernels.shrink_gate import shrink_rows
from mogu_kernels.kernels.tiles import accumulator, tile_position


@triton.jit(do_not_specialize=["M"])
def one_launch_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    lora_A_ptr,
    lora_B_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    routed_ptr,
    shrunk_ptr,
    total_ptr,
    flags_ptr,
    y_ptr,
    gates_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_bn,
    stride_br,
    stride_ut,
    stride_ue,
    stride_uk,
    stride_c,
    stride_routed,
    stride_sm,
    stride_sr,
    stride_total,
    stride_ym,
    stride_yn,
    stride_gm,
    stride_ge,
    E: tl.constexpr,
    RANK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    SCALING: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROUTED: tl.constexpr,
    STORE_GATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """See the module."""
    CHUNKS: tl.constexpr = (E * RANK + RANK_COLUMNS - 1) // RANK_COLUMNS
    pid = tl.program_id(0)
    shrinkers = tl.cdiv(M, BLOCK_M) * CHUNKS
    if pid < shrinkers:
        shrink_rows(
            x_ptr,
            lora_A_ptr,
            gate_weight_ptr,
            gate_bias_ptr,
            routed_ptr,
            shrunk_ptr,
            total_ptr,
            gates_ptr,
            M,
            K,
            stride_xm,
            stride_xk,
            stride_ae,
            stride_ar,
            stride_ak,
            stride_ut,
            stride_ue,
            stride_uk,
            stride_c,
            stride_routed,
            stride_sm,
            stride_sr,
            stride_total,
            stride_gm,
            stride_ge,
            pid // CHUNKS,
            pid % CHUNKS,
            E,
            RANK,
            RANK_COLUMNS,
            TERMS,
            SCALING,
            SOFTMAX,
            HAS_ROUTED,
            STORE_GATES,
            BLOCK_M,
            BLOCK_K,
        )
        tl.debug_barrier()  # every thread's stores come before the release
        tl.atomic_add(flags_ptr + pid // CHUNKS, 1, sem="release")
    else:
        # where am I
        pid_m, pid_n = tile_position(pid - shrinkers, M, N, BLOCK_M, BLOCK_N, GROUP_M)
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

        # wait for the rows, and be counted as having seen them
        flag_ptr = flags_ptr + pid_m
        while tl.atomic_add(flag_ptr, 0, sem="acquire") < CHUNKS:
            pass
        tl.debug_barrier()  # no thread's loads come before the acquire
        seen = tl.atomic_add(flag_ptr, 1, sem="relaxed")
        if seen == CHUNKS + tl.cdiv(N, BLOCK_N) - 1:
            tl.atomic_xchg(flag_ptr, 0, sem="relaxed")

        # epilogue
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
