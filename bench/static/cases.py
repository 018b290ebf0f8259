"""The op calls that are compiled: real layer shapes, one M for each bucket that tiles depend on.

`tuning` picks the tiles from the bucket of M, the rank columns, the dtype, the target and the
alignment. Those are walked here, so that every config it ships is met without being named; the
measured tables are read. `QUICK` is the part that fits into CI.
"""

import dataclasses
import itertools
import json

import torch

from mogu_kernels import launch, tuning

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# N, K: Llama2-7B
LAYERS = {
    "linear": (4096, 4096),
    "mlp": (11008, 4096),
    "expand": (4096, 4096),
    "train": (4096, 4096),
}
ODD_LAYER = (4099, 4097)  # no row of x, weight or lora_A starts on a multiple of 16 bytes
SHARED_INPUT = 3  # q, k and v
MEASURED_ON = {
    "sm_80": ("A100",),
    "sm_90": ("H100", "H200", "GH200"),
    "sm_100": ("B200", "GB200"),
    "gfx942": ("MI300", "MI325"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op; prints as `linear-m512-r8-bf16`.

    Attributes:
        M: tokens.
        rank: of each of the E experts.
        dtype: of activations and weights.
        op: "linear"; "mlp" (gate_proj and up_proj); "expand" (q, k and v on a foreign base);
            "train" (a linear that keeps what its backward needs, and that backward).
        E: experts.
        form: "" as a module lays them out; "odd" sizes and strides; "offset" pointers; "transposed"
            weight; "stacked" lora_B, one expert after another.
        extras: bias, row mask, softmax and stored gates.
        option: "pdl" or "one_launch" switched on in the tiles that `tuning` picks.
        config: tiles as text, instead of those that `tuning` picks.
        layer: (N, K), if not the op's usual one.
        device: name of the GPU that `config` was measured on.
    """

    M: int
    rank: int = 8
    dtype: str = "bf16"
    op: str = "linear"
    E: int = 2
    form: str = ""
    extras: bool = False
    option: str = ""
    config: str = ""
    layer: tuple[int, int] | None = None
    device: str = ""

    def __str__(self):
        """A name for tables."""
        parts = [self.op, f"m{self.M}", f"e{self.E}" if self.E != 2 else "", f"r{self.rank}"]
        parts += [self.dtype, self.form, "extras" if self.extras else "", self.option]
        parts += [f"{self.layer[0]}x{self.layer[1]}" if self.layer else "", self.device]
        return "-".join(part for part in parts if part)

    def runs_on(self, target: str) -> bool:
        """Whether the call can be made there at all."""
        if self.device:
            return any(name in self.device for name in MEASURED_ON[target])
        return self.option != "pdl" or target in ("sm_90", "sm_100")

    @property
    def most_launches(self) -> int:
        """Budget 1: one a projection up to 128 tokens, two above, two beside a foreign base.

        Not met: over 64 rank columns in fp32 or at odd addresses. Every one-launch tile that was
        tried there spills (the best, bf16 16x32x32 w8, 3 registers on sm_90), so they take two.
        """
        if self.op == "expand":
            return 2 * SHARED_INPUT
        if self.op == "train":
            return 3 + (1 if self.M <= 128 else 2)
        if self.E * self.rank > 64 and (self.dtype == "fp32" or self.form in ("odd", "offset")):
            return 2
        projections = 2 if self.op == "mlp" else 1
        return projections * (1 if self.M <= 128 or self.option == "one_launch" else 2)

    def call(self) -> None:
        """Call the op on tensors whose values do not matter."""
        calls = {"linear": self._linear, "mlp": self._mlp, "expand": self._expand}
        (calls | {"train": self._train})[self.op]()

    def _linear(self):
        operands = {name: tensors[0] for name, tensors in self._projections(1).items()}
        x, weight = self._x(), self._weight()
        bias = self._bias() if self.extras else None
        config = self._config("mogu_linear", x)
        launch.mogu_linear(x, weight, bias, **operands, **self._router(), config=config)

    def _mlp(self):
        operands, x = self._projections(2), self._x()
        weights, biases = [self._weight(), self._weight()], [self._bias(), self._bias()]
        launch.gated_mlp(
            x,
            weights,
            biases if self.extras else None,
            **operands,
            **self._router(),
            activation="gelu_tanh" if self.extras else "silu",
            config=self._config("gated_mlp", x),
        )

    def _expand(self):
        operands = self._projections(SHARED_INPUT)
        lora_B = operands.pop("lora_B")
        shrunk, total, _ = launch.shrink_gate(self._x(), **operands, **self._router())
        for projection in range(SHARED_INPUT):
            y = self._tensor(self.M, self._layer[0])
            bias = self._bias() if self.extras else None
            launch.gated_expand_(y, shrunk[projection], total[projection], lora_B[projection], bias)

    def _train(self):
        router = self._router()
        experts = {name: tensors[0] for name, tensors in self._projections(1).items()}
        operands = (self._x(), self._weight(), self._bias() if self.extras else None)
        options = (*experts.values(), router["scaling"], router["gate"], router["routed"])
        ranks = torch.empty(self.M, self.E * self.rank)
        y, gates = launch.mogu_linear(*operands, *options, True, None, ranks)
        grad_gates = torch.empty_like(gates) if self.extras else None
        wanted = [True, False, False, True, True, True, True]
        launch.mogu_linear_backward(y, grad_gates, gates, ranks, *operands, *options, wanted)

    @property
    def _layer(self) -> tuple[int, int]:
        return ODD_LAYER if self.form == "odd" else self.layer or LAYERS[self.op]

    def _config(self, op: str, x: torch.Tensor) -> tuning.TileConfig | None:
        if self.config:
            return tuning.TileConfig.parse(self.config)
        if not self.option:
            return None
        tiles = launch.choose_tiles(op, x, self._layer[0], self.E * self.rank)
        descriptors = tiles.descriptors and self.option != "one_launch"
        return dataclasses.replace(tiles, descriptors=descriptors, **{self.option: True})

    def _projections(self, count: int) -> dict[str, list[torch.Tensor]]:
        """Experts and routers of `count` projections of one x."""
        (N, K), dtype = self._layer, DTYPES[self.dtype]
        terms = (self.E, K) if dtype == torch.float32 else (2, self.E, K)
        return {
            "lora_A": [self._tensor(self.E, self.rank, K) for _ in range(count)],
            "lora_B": [self._expand_weight(N) for _ in range(count)],
            "gate_weight": [torch.empty(terms, dtype=dtype) for _ in range(count)],
            "gate_bias": [torch.empty(self.E) for _ in range(count)],
        }

    def _router(self) -> dict:
        return {
            "scaling": [2.0] * self.E,
            "gate": "softmax" if self.extras else "sigmoid",
            "routed": torch.ones(self.M, dtype=torch.bool) if self.extras else None,
            "return_gates": self.extras,
        }

    def _expand_weight(self, N: int) -> torch.Tensor:
        if self.form == "stacked":
            return self._tensor(self.E, N, self.rank)
        return self._tensor(N, self.E, self.rank).permute(1, 0, 2)  # the experts side by side

    def _x(self) -> torch.Tensor:
        return self._tensor(self.M, self._layer[1])

    def _weight(self) -> torch.Tensor:
        N, K = self._layer
        return self._tensor(K, N).T if self.form == "transposed" else self._tensor(N, K)

    def _bias(self) -> torch.Tensor:
        return self._tensor(self._layer[0])

    def _tensor(self, *shape: int) -> torch.Tensor:
        offset = 1 if self.form == "offset" else 0
        flat = torch.empty(torch.Size(shape).numel() + offset, dtype=DTYPES[self.dtype])
        return flat[offset:].view(shape)


BUCKETS = tuning.M_BUCKETS
QUICK = (
    *(Case(M) for M in BUCKETS),
    *(Case(M, form="odd") for M in (BUCKETS[0], BUCKETS[-1])),
    *(Case(M, rank=64) for M in (BUCKETS[1], BUCKETS[-1])),
    Case(BUCKETS[2], dtype="fp16", extras=True),
    Case(BUCKETS[-1], extras=True),
    Case(BUCKETS[1], dtype="fp32"),
    *(Case(BUCKETS[-1], option=option) for option in ("pdl", "one_launch")),
    *(Case(M, op="mlp") for M in (BUCKETS[0], BUCKETS[-1])),
    Case(BUCKETS[-1], op="expand"),
    *(Case(M, op="train") for M in (BUCKETS[1], BUCKETS[-1])),
    Case(BUCKETS[-1], op="train", extras=True),
)


def every_case() -> list[Case]:
    """All of them, QUICK first."""
    cases = [
        *QUICK,
        *itertools.starmap(Case, itertools.product(BUCKETS, (8, 64), DTYPES)),
        *(Case(M, E=E) for M in BUCKETS for E in (1, 8)),
        *(Case(M, rank=rank, form="odd") for M in BUCKETS for rank in (8, 64)),
        *(Case(M, form=form) for M in BUCKETS for form in ("offset", "transposed", "stacked")),
        *(Case(M, extras=True) for M in BUCKETS),
        *(Case(M, option=o) for M in BUCKETS if M > 128 for o in ("pdl", "one_launch")),
        *(Case(M, rank=rank, op="mlp") for M in BUCKETS for rank in (8, 64)),
        *(Case(M, op="mlp", form="odd") for M in BUCKETS),
        *(Case(BUCKETS[-1], op="mlp", dtype=dtype, extras=True) for dtype in DTYPES),
        *(Case(M, op="expand", extras=extras) for M in BUCKETS for extras in (False, True)),
        *(Case(M, rank=rank, op="train") for M in BUCKETS for rank in (8, 64)),
        *(Case(M, op="train", form="odd") for M in (BUCKETS[0], BUCKETS[-1])),
        Case(BUCKETS[-1], op="train", E=8, extras=True),
        *(Case(BUCKETS[-1], op="train", dtype=dtype, extras=True) for dtype in DTYPES),
        *measured_cases(),
    ]
    return list(dict.fromkeys(cases))


def measured_cases() -> list[Case]:
    """One for each row of the measured tables that are shipped."""
    cases = []
    for path in sorted(tuning.TABLES.glob("*/*.json")):
        for shape, rows in json.loads(path.read_text()).items():
            if shape == "most_tiled":  # a CPU's table, which has no tiles
                continue
            op, layer, columns = shape.split(":")
            N, K = map(int, layer.split("x"))
            for M, config in rows.items():
                case = Case(
                    int(M),
                    rank=int(columns.removeprefix("r")) // 2,
                    dtype={"f32": "fp32", "f16": "fp16"}.get(path.stem, path.stem),
                    op={"mogu_linear": "linear", "gated_mlp": "mlp"}[op],
                    config=config,
                    layer=(N, K),
                    device=path.parent.name,
                )
                cases.append(case)
    return cases
