"""What is timed on a layer: cuBLAS, our own GEMM without MoGU, and ours in its forms."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.static.plain import plain_linear_kernel, plain_persistent_kernel
from mogu_kernels import launch, ops
from mogu_kernels.tuning import TileConfig
from tests.oracle import Projection

CUBLAS, PLAIN, OURS = "cuBLAS", "plain", "ours"
PDL, ONE_LAUNCH = "two launches, pdl", "one launch (opt-in)"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A function of the operands; `routed` says whether it computes MoGU or the base alone."""

    call: Callable[[Projection], Tensor]
    routed: bool
    config: str


def contenders(p: Projection, one_launch: bool) -> dict[str, Contender]:
    """Everything that runs on p, by name; `one_launch` once it is known not to hang here."""
    E, rank, _ = p.lora_A.shape
    shipped = launch.choose_tiles("mogu_linear", p.x, len(p.weight), E * rank)
    found = {
        CUBLAS: Contender(bare, routed=False, config=""),
        PLAIN: Contender(
            functools.partial(plain, tiles=shipped), routed=False, config=str(shipped)
        ),
        OURS: routed_with(shipped),
    }
    two_launch = dataclasses.replace(shipped, kernel="two_launch")
    if launch.target(p.x.device) in ("hopper", "blackwell"):
        found[PDL] = routed_with(dataclasses.replace(two_launch, pdl=True))
    if one_launch:
        found[ONE_LAUNCH] = routed_with(as_one_launch(two_launch))
    return found


def as_one_launch(tiles: TileConfig) -> TileConfig:
    """The flag form with the same tiles."""
    return dataclasses.replace(
        tiles, kernel="two_launch", descriptors=False, pdl=False, one_launch=True
    )


def routed_with(tiles: TileConfig) -> Contender:
    """The op with these tiles."""
    return Contender(functools.partial(routed, tiles=tiles), routed=True, config=str(tiles))


def routed(p: Projection, tiles: TileConfig | None) -> Tensor:
    """`mogu_linear` on Triton; the shipped tiles if None."""
    return ops.mogu_linear(**p.operands(), backend="triton", config=tiles)


def bare(p: Projection) -> Tensor:
    """The vendor's library."""
    return F.linear(p.x, p.weight)


def plain(p: Projection, tiles: TileConfig) -> Tensor:
    """Our GEMM without MoGU, the same tiles and the same loop."""
    (M, K), N = p.x.shape, len(p.weight)
    y = torch.empty(M, N, dtype=p.x.dtype, device=p.x.device)
    grid = -(-M // tiles.BLOCK_M) * -(-N // tiles.BLOCK_N)
    shared = {
        "bias_ptr": None,
        "stride_bias": 0,
        "M": M,
        "N": N,
        "K": K,
        "HAS_BIAS": False,
        "BLOCK_M": tiles.BLOCK_M,
        "BLOCK_N": tiles.BLOCK_N,
        "BLOCK_K": tiles.BLOCK_K,
        "GROUP_M": tiles.GROUP_M,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    if tiles.descriptors:
        describe = TensorDescriptor.from_tensor
        plain_persistent_kernel[(min(grid, launch._multiprocessors(p.x.device)),)](
            x_desc=describe(p.x, [tiles.BLOCK_M, tiles.BLOCK_K]),
            weight_desc=describe(p.weight, [tiles.BLOCK_N, tiles.BLOCK_K]),
            y_desc=describe(y, [tiles.BLOCK_M, tiles.BLOCK_N]),
            **shared,
        )
    else:
        plain_linear_kernel[(grid,)](
            x_ptr=p.x,
            weight_ptr=p.weight,
            y_ptr=y,
            stride_xm=p.x.stride(0),
            stride_xk=p.x.stride(1),
            stride_wn=p.weight.stride(0),
            stride_wk=p.weight.stride(1),
            stride_ym=y.stride(0),
            stride_yn=y.stride(1),
            **shared,
        )
    return y
