"""What the ops accept: every error names the offending values and the remedy."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from mogu_kernels import cpu

GATES = ("sigmoid", "softmax")
BACKENDS = ("auto", "triton", "cpu", "eager")
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS = 8


def check_matrix(x: Tensor) -> None:
    """Tokens by features."""
    if x.ndim != 2:
        raise ValueError(f"hidden_states is {list(x.shape)}: flatten it to [tokens, features]")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor) -> None:
    """The base projection and its expansion."""
    if x.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} must be matrices [M, K] and [N, K]"
        )
    N, K = weight.shape
    if x.shape[1] != K:
        raise ValueError(f"weight has in_features={K} but hidden_states has {x.shape[1]}")
    if lora_B.ndim != 3 or lora_B.shape[1] != N:
        raise ValueError(
            f"lora_B is {list(lora_B.shape)}, but weight [{N}, {K}] asks for [E, {N}, rank]"
        )
    if bias is not None and list(bias.shape) != [N]:
        raise ValueError(f"bias is {list(bias.shape)}, but weight [{N}, {K}] asks for [{N}]")
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_B", lora_B)):
        _check_like(name, tensor, x)


def check_router(
    x: Tensor,
    lora_A: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    gate: str,
    routed: Tensor | None,
) -> None:
    """The shrink, the routers and the mask."""
    if lora_A.ndim != 3 or lora_A.shape[2] != x.shape[1]:
        raise ValueError(
            f"lora_A is {list(lora_A.shape)}, but hidden_states of width {x.shape[1]} ask for "
            f"[E, rank, {x.shape[1]}]"
        )
    E, rank, K = lora_A.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(f"{E} experts: the kernels take 1 to {MAX_EXPERTS}")
    if rank < 1:
        raise ValueError("lora_A has rank 0: take a plain linear")
    split = gate_weight.ndim == 3
    if list(gate_weight.shape) != ([2, E, K] if split else [E, K]):
        raise ValueError(
            f"gate_weight is {list(gate_weight.shape)}, but lora_A {[E, rank, K]} asks for "
            f"[{E}, {K}] or, split, [2, {E}, {K}]"
        )
    if list(gate_bias.shape) != [E]:
        raise ValueError(f"gate_bias is {list(gate_bias.shape)}, but there are {E} experts")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r}: take one of {', '.join(GATES)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if gate_weight.dtype != (x.dtype if split else wide) or gate_bias.dtype != wide:
        raise TypeError(
            f"gate_weight is {gate_weight.dtype} and gate_bias {gate_bias.dtype}: routers are kept "
            f"in {wide} beside {x.dtype} hidden_states, however small the model's dtype"
        )
    _check_like("lora_A", lora_A, x)
    for name, tensor in (("gate_weight", gate_weight), ("gate_bias", gate_bias)):
        _check_device(name, tensor, x)
    if routed is not None:
        if routed.dtype != torch.bool:
            raise TypeError(f"routed is {routed.dtype}: take a bool mask, one entry a token")
        if list(routed.shape) != [len(x)]:
            raise ValueError(f"routed is {list(routed.shape)}, but there are {len(x)} tokens")
        _check_device("routed", routed, x)


def check_pair(lora_A: Tensor, lora_B: Tensor) -> None:
    """The two halves of the experts."""
    if len(lora_A) != len(lora_B) or lora_A.shape[1] != lora_B.shape[2]:
        raise ValueError(
            f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} disagree: "
            "take [E, rank, K] and [E, N, rank]"
        )


def check_shrunk(
    rows: int, y: Tensor, shrunk: Tensor, total: Tensor, lora_B: Tensor, bias: Tensor | None
) -> None:
    """What `shrink_gate` made, beside a projection y [rows, N] or its weight [N, K]."""
    if lora_B.ndim != 3:
        raise ValueError(f"lora_B is {list(lora_B.shape)}: take [E, N, rank]")
    E, N, rank = lora_B.shape
    if list(shrunk.shape) != [rows, E * rank]:
        raise ValueError(
            f"shrunk is {list(shrunk.shape)}, but {rows} tokens and lora_B {[E, N, rank]} ask for "
            f"[{rows}, {E * rank}]"
        )
    if list(total.shape) != [rows]:
        raise ValueError(f"total is {list(total.shape)}, but there are {rows} tokens")
    if bias is not None and list(bias.shape) != [N]:
        raise ValueError(f"bias is {list(bias.shape)}, but lora_B {[E, N, rank]} asks for [{N}]")
    for name, tensor in (("shrunk", shrunk), ("lora_B", lora_B), ("bias", bias)):
        _check_like(name, tensor, y)
    if total.dtype != torch.promote_types(y.dtype, torch.float32):
        raise TypeError(f"total is {total.dtype}: take it as shrink_gate returns it")
    _check_device("total", total, y)


def _check_like(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} is {tensor.dtype} but hidden_states is {x.dtype}: cast one of them"
        )
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{name} is on {tensor.device} but hidden_states is on {x.device}: move one of them"
        )


def check_backend(backend: str, x: Tensor) -> None:
    """A backend that can take x."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: take one of {', '.join(BACKENDS)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"hidden_states is {x.dtype}: take a floating-point dtype")
    if backend not in ("triton", "cpu"):
        return
    if x.dtype not in HALF_AND_SINGLE:
        raise TypeError(
            f"hidden_states is {x.dtype}: the {backend} kernels take fp32, fp16 and bf16; "
            'backend="eager" takes it'
        )
    if backend == "cpu" and not cpu.instruction_sets():
        raise ValueError(
            'backend="cpu" was not built: install again with a C++ compiler, or take "eager"'
        )
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f'backend="cpu" takes CPU tensors, not {x.device}: take "auto"')
    if backend == "cpu":
        return
    if x.device.type == "cpu" and not interpreting():
        raise ValueError(
            'backend="triton" on CPU tensors needs Triton\'s interpreter: set TRITON_INTERPRET=1 '
            'before the first import, or take backend="eager"'
        )


def runs_on_cpp(x: Tensor) -> bool:
    """Whether the C++ backend was built and takes x's dtype."""
    return x.dtype in HALF_AND_SINGLE and bool(cpu.instruction_sets())


def interpreting() -> bool:
    """Whether Triton's kernels run on CPU tensors here."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


def scaling_per_expert(scaling: float | Sequence[float], E: int) -> list[float]:
    """One number per expert."""
    numbers = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * E
    if len(numbers) != E:
        raise ValueError(f"scaling has {len(numbers)} entries, but there are {E} experts")
    return numbers
