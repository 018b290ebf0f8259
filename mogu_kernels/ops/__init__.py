"""`torch.library` ops: check the arguments, choose a backend, launch.

    CPU          the C++ kernels where they were built, have the op (mogu_linear, gated_mlp) and
                 take the dtype, else eager
    CUDA, ROCm   the Triton kernels

`backend=` forces one. Gradients of `mogu_linear` take the Triton kernels where the forward pass
did, else `eager`, as those of `gated_mlp` do on every device.
"""

from mogu_kernels import checks
from mogu_kernels.ops.library import needs_grad
from mogu_kernels.ops.linear import mogu_linear
from mogu_kernels.ops.mlp import gated_mlp
from mogu_kernels.ops.parts import gated_expand_, gated_linear, shrink_gate, takes_two_launches

__all__ = [
    "checks",
    "gated_expand_",
    "gated_linear",
    "gated_mlp",
    "mogu_linear",
    "needs_grad",
    "shrink_gate",
    "takes_two_launches",
]
