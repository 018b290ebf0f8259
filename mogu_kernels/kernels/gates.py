"""The routers inside a kernel: logits -> gates -> one factor per rank column.

A folded router is one vector u_e per expert. On tensor cores a half-precision u_e is kept as a sum
of two terms (high and low part), each a row of `gate_weight` [TERMS, E, K]. A kernel multiplies all
of them in one 16-column dot: column j holds term j // 8 of expert j % 8. The helpers below turn
those 16 columns into gates. All of it is fp32 and stays in registers.
"""

import triton
import triton.language as tl

EXPERT_COLUMNS = tl.constexpr(8)  # experts a tile has room for
ROUTER_COLUMNS = tl.constexpr(16)  # two terms of each, and the narrowest dot there is


@triton.jit
def router_pointers(gate_weight_ptr, offs_k, stride_ut, stride_ue, stride_uk):
    """Pointers to the router columns, [BLOCK_K, 16]."""
    columns = tl.arange(0, ROUTER_COLUMNS)
    offsets = (columns // EXPERT_COLUMNS) * stride_ut + (columns % EXPERT_COLUMNS) * stride_ue
    return gate_weight_ptr + offs_k[:, None] * stride_uk + offsets[None, :]


@triton.jit
def router_mask(E: tl.constexpr, TERMS: tl.constexpr):
    """Which of the 16 router columns exist."""
    columns = tl.arange(0, ROUTER_COLUMNS)
    return (columns % EXPERT_COLUMNS < E) & (columns // EXPERT_COLUMNS < TERMS)


@triton.jit
def gates_from_columns(
    router_columns,  # [BLOCK_M, 16]: x times the router columns
    gate_bias_ptr,
    stride_c,
    E: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gates [BLOCK_M, 8], zero beyond column E."""
    experts = tl.arange(0, EXPERT_COLUMNS)
    terms = tl.reshape(router_columns, [BLOCK_M, 2, EXPERT_COLUMNS])
    gate_bias = tl.load(gate_bias_ptr + experts * stride_c, mask=experts < E, other=0.0)
    logits = tl.sum(terms, axis=1) + gate_bias.to(tl.float32)[None, :]
    if SOFTMAX:
        logits = tl.where((experts < E)[None, :], logits, -float("inf"))
        exps = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        gates = exps / tl.sum(exps, axis=1)[:, None]
    else:
        gates = 1.0 / (1.0 + tl.exp(-logits))
    return tl.where((experts < E)[None, :], gates, 0.0)


@triton.jit
def rank_factors(gates, columns, E: tl.constexpr, RANK: tl.constexpr, SCALING: tl.constexpr):
    """scaling_e * gate_e for the expert that owns each rank column, [BLOCK_M, len(columns)]."""
    experts = tl.arange(0, EXPERT_COLUMNS)
    factors = tl.zeros([gates.shape[0], columns.shape[0]], tl.float32)
    for e in tl.static_range(E):
        rank_gate = tl.sum(tl.where((experts == e)[None, :], gates, 0.0), axis=1)
        factor = (rank_gate * SCALING[e])[:, None]
        factors = tl.where((columns // RANK == e)[None, :], factor, factors)
    return factors
