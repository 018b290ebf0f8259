"""This package's op, with the tiles that it ships for an H100."""

import dataclasses
from unittest import mock

from bench.peers.problem import split_router
from mogu_kernels import launch, ops
from mogu_kernels.tuning import TileConfig, shrink_config, tile_config


def shipped_config(problem) -> TileConfig:
    """The heuristic for bf16 on sm_90."""
    p = problem.projection
    E, rank, _ = p.lora_A.shape
    return tile_config("mogu_linear", problem.tokens, *p.weight.shape, E * rank, "bf16", "hopper")


def build(problem, folded, blocks=None, config=None):
    """`ops.mogu_linear` on Triton, its router split as a module keeps it for half precision."""
    p = problem.projection
    config = config or shipped_config(problem)
    shrink = shrink_config(problem.tokens, "bf16", "hopper")
    if blocks:
        config = dataclasses.replace(config, BLOCK_M=blocks.M, BLOCK_N=blocks.N, BLOCK_K=blocks.K)
        shrink = dataclasses.replace(shrink, BLOCK_M=blocks.M, BLOCK_K=blocks.K)
    gate_weight = split_router(problem)
    lora_B = p.lora_B.transpose(0, 1).contiguous().transpose(0, 1)  # experts side by side in memory

    def forward(x):
        with mock.patch.object(launch, "shrink_config", return_value=shrink):
            return ops.mogu_linear(
                x, p.weight, None, p.lora_A, lora_B, gate_weight, p.gate_bias,
                scaling=p.scaling, backend="triton", config=config,
            )  # fmt: skip

    return forward


def build_one_launch(problem, folded, blocks=None):
    """The same with the opt-in flag kernel wherever two launches are the default."""
    config = shipped_config(problem)
    if config.kernel == "two_launch":
        config = dataclasses.replace(config, descriptors=False, pdl=False, one_launch=True)
        launch._flags(problem.projection.x.device, 1024)  # allocated once per stream, not per call
    return build(problem, folded, blocks, config)
