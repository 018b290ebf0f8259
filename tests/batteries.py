"""Few runs of a kernel that together reach every line of it, for the memory and mutant tests.

Each op of a battery takes operands and gives an output that is compared with the truth. Operands
come between red zones and with odd strides, outputs are poisoned, and a trace watches every access.
"""

import contextlib
from collections.abc import Iterator

import torch
from triton.runtime.errors import InterpreterError

from bench.trace import Trace
from mogu_kernels import launch, ops
from mogu_kernels.tuning import TileConfig
from tests import cases, oracle, red_zones

SHAPES = [
    ("m17-n136-k72-e2-r8-softmax", "f16"),
    ("m37-n72-k48-e1-r1-routed", "f32"),
    ("m33-n40-k129-e3-r5-routed", "bf16"),
    ("m35-n67-k33-e8-r7", "f16"),
    ("m19-n72-k40-e8-r17", "f16"),
]
MLP = TileConfig("two_launch", 16, 32, 32, GROUP_M=2)
OPERANDS = ("weight", "bias", "lora_A", "lora_B", "gate_weight", "gate_bias")
OPS = (*cases.KERNELS, "gated_mlp", "gated_expand")

# the ops that run a kernel file
OPS_OF = {
    "fused": ["fused"],
    "shrink_gate": ["two_launch", "gated_mlp"],
    "gated_linear": ["two_launch"],
    "epilogue": ["two_launch"],
    "persistent_linear": ["persistent"],
    "one_launch": ["one_launch"],
    "gated_mlp": ["gated_mlp"],
    "gated_expand": ["gated_expand"],
}


def shapes_of(op: str) -> list[tuple[str, str]]:
    """The named shapes and dtypes that an op is tried on."""
    return [(s, d) for s, d in SHAPES if op not in cases.KERNELS or cases.takes(op, s)]


def problem(op: str, shape: str, dtype: str) -> list[oracle.Projection]:
    """The projections of one run, with a mask; two for the gated MLP."""
    projection = cases.projection(shape, dtype)
    projection.routed = torch.arange(len(projection.x)) % 3 != 0
    return [projection, cases.twin(projection, 1)] if op == "gated_mlp" else [projection]


def run(op: str, projections: list[oracle.Projection]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, gates) of an op on Triton."""
    p = projections[0]
    options = {"scaling": p.scaling, "gate": p.gate, "routed": p.routed, "backend": "triton"}
    if op == "gated_mlp":
        pairs = {name: [getattr(q, name) for q in projections] for name in OPERANDS}
        pairs["bias"] = None if p.bias is None else pairs["bias"]
        return ops.gated_mlp(p.x, **pairs, **options, return_gates=True, config=MLP)
    if op == "gated_expand":
        shrunk, total = ops.shrink_gate(p.x, p.lora_A, p.gate_weight, p.gate_bias, **options)
        wide = p.double()
        base = (wide.x @ wide.weight.T).to(p.x.dtype)
        y = red_zones.poisoned((*reversed(base.shape),), base.dtype).T.copy_(base)
        ops.gated_expand_(y, shrunk, total, p.lora_B, p.bias, backend="triton")
        assert red_zones.intact(y.T)
        return y, None
    operands = p.operands()
    if op == "persistent":
        operands["lora_B"] = cases.side_by_side(p.lora_B)
        operands["bias"] = torch.stack([p.bias, p.bias * 2], 1)[:, 0]  # any stride will do
    config = cases.KERNELS[op]
    return ops.mogu_linear(**operands, backend="triton", config=config, return_gates=True)


def judge(op: str, projections, y, gates) -> None:
    """Compare with the truth."""
    if op == "gated_mlp":
        first, second = projections
        oracle.assert_mlp_matches(actual=y, gate_proj=first, up_proj=second, activation="silu")
        for own, projection in zip(gates, projections, strict=True):
            true = oracle.true_gates(projection)
            torch.testing.assert_close(own.double(), true, rtol=0, atol=2e-5)
    elif op == "gated_expand":  # the base was rounded before, so only the bound is ours
        ref = oracle.truth(projections[0])
        total, _ = oracle.effective_gates(projections[0])
        wide = projections[0].double()
        rounded = total[:, None] * (wide.x @ wide.weight.T).abs() * oracle.UNIT[y.dtype]
        assert ((y.double() - ref).abs() <= oracle.bound(projections[0]) + rounded).all()
    else:
        oracle.assert_matches(actual=y, projection=projections[0], gates=gates)


@contextlib.contextmanager
def watched(op: str, order: int | None = None, producers: int = 0) -> Iterator[Trace]:
    """Poisoned outputs and a trace; afterwards all flags are down."""
    with red_zones.around_outputs(), Trace(order, producers) as trace:
        yield trace
    if op == "one_launch":
        assert not launch._flags(torch.device("cpu"), 1).any(), "a flag was left up"


def producers(projection: oracle.Projection) -> int:
    """Programs of the one-launch kernel that the others wait for."""
    columns = projection.lora_A.shape[0] * projection.lora_A.shape[1]
    chunk = launch._chunk(columns, projection.x.dtype)
    rows = launch._tiles(len(projection.x), cases.ONE_LAUNCH.BLOCK_M)
    return rows * launch._tiles(columns, chunk)


def assert_tiles_wait_for_their_flags() -> None:
    """Run before the programs that shrink, a tile of the one-launch kernel waits, here for ever."""
    projections, message = problem("one_launch", *SHAPES[0]), "no tile waited"
    try:
        with Trace(order=1):  # no producers in front
            run("one_launch", projections)
    except InterpreterError as error:
        message = str(error)
    finally:
        launch._FLAGS.clear()
    assert "waits for a flag" in message, message


def battery(file: str) -> None:
    """Every op that runs a kernel file, on every shape that it takes, watched and judged."""
    if file == "one_launch":
        assert_tiles_wait_for_their_flags()
    for op in OPS_OF.get(file, ["fused", "two_launch"]):
        for shape, dtype in shapes_of(op):
            projections = problem(op, shape, dtype)
            for change in (red_zones.guarded, red_zones.strided):
                operands = [change(projection) for projection in projections]
                operands[-1].x = operands[0].x
                with watched(op):
                    y, gates = run(op, operands)
                judge(op, projections, y, gates)
