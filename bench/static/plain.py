"""The GEMMs that our kernels replace, written in the same way and without MoGU.

`counterpart` picks one for a launch of ours and gives it that launch's own tensors, strides, tiles
and options, so that the two binaries differ by what MoGU adds and by nothing else.
"""

import triton
import triton.language as tl

from bench.static.compiling import Launch, compile_launch


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(pid_m, pid_n), in groups of GROUP_M rows of tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return group * GROUP_M + within % rows, within // rows


@triton.jit(do_not_specialize=["M"])
def plain_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ym,
    stride_yn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = x weight^T + bias, one tile a program."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M"])
def plain_persistent_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    y_desc,
    M,
    N,
    K,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = x weight^T + bias, through tensor descriptors, one wave of programs."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, k])
            w = weight_desc.load([pid_n * BLOCK_N, k])
            acc = tl.dot(x, w.T, acc)
        if HAS_BIAS:
            offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def plain_mlp_kernel(
    x_ptr,
    weight_0_ptr,
    weight_1_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = silu(x weight_0^T) * (x weight_1^T), one tile a program."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_offsets = offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    w_0_ptrs, w_1_ptrs = weight_0_ptr + w_offsets, weight_1_ptr + w_offsets
    acc_0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
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
    y = acc_0 / (1.0 + tl.exp(-acc_0)) * acc_1
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


OPTIONS = (
    "num_warps",
    "num_stages",
    "num_ctas",
    "maxnreg",
    "waves_per_eu",
    "matrix_instr_nonkdim",
)  # of the compiler


def counterpart(launch: Launch) -> Launch | None:
    """The GEMM without MoGU beside a launch of ours, compiled; None if ours has no GEMM in it."""
    given = launch.arguments
    if "weight_0_ptr" in given:
        kernel = plain_mlp_kernel
    elif "x_desc" in given:
        kernel = plain_persistent_kernel
    elif "grad_x_ptr" in given and "weight_ptr" in given:
        kernel, given = plain_linear_kernel, given | _turned(given)
    elif "weight_ptr" in given:
        kernel = plain_linear_kernel
    elif "lora_A_ptr" in given:  # the shrink: x lora_A^T, as narrow
        kernel, given = plain_linear_kernel, given | _narrow(given)
    else:
        return None
    names = {*kernel.arg_names, *OPTIONS} & given.keys()
    return compile_launch(kernel, (1,), **{name: given[name] for name in names})


def _turned(given: dict) -> dict:
    """Arguments of the plain GEMM grad_y weight, as a GEMM with weight's transpose."""
    return {
        "x_ptr": given["grad_y_ptr"],
        "bias_ptr": None,
        "y_ptr": given["grad_x_ptr"],
        "N": given["K"],
        "K": given["N"],
        "stride_xm": given["stride_ym"],
        "stride_xk": given["stride_yn"],
        "stride_wn": given["stride_wk"],
        "stride_wk": given["stride_wn"],
        "stride_bias": 0,
        "stride_ym": given["stride_dxm"],
        "stride_yn": given["stride_dxk"],
        "HAS_BIAS": False,
    }


def _narrow(given: dict) -> dict:
    """Arguments of the plain GEMM whose weight is lora_A."""
    return {
        "weight_ptr": given["lora_A_ptr"][0],
        "bias_ptr": None,
        "y_ptr": given["shrunk_ptr"],
        "N": given["E"] * given["RANK"],
        "stride_wn": given["stride_ar"],
        "stride_wk": given["stride_ak"],
        "stride_bias": 0,
        "stride_ym": given["stride_sm"],
        "stride_yn": given["stride_sr"],
        "HAS_BIAS": False,
        "BLOCK_N": given["RANK_COLUMNS"],
        "GROUP_M": 1,
    }
