"""Gives Triton's interpreter real bf16 arithmetic; for tests only.

The interpreter keeps bf16 as its 16 bits in a uint16 array and computes on those bits as if they
were integers. `install` makes every operation go through fp32 (which holds any bf16 exactly) and
round to nearest even on the way back, as the hardware and PyTorch do. The kernels themselves are
untouched.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def _is_bf16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    """A bf16 handle as fp32; anything else as it is."""
    if not _is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values):
    """fp32 values as bf16 bits, to nearest even; a NaN stays one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).reshape(values.shape)


def _narrow(handle):
    """An fp32 result as bf16; a comparison's booleans pass."""
    if handle.data.dtype == np.bool_:
        return handle
    return Handle(_round(handle.data), tl.bfloat16)


def _through_fp32(operation):
    @functools.wraps(operation)
    def wrapped(self, *args):
        if not any(_is_bf16(arg) for arg in args):
            return operation(self, *args)
        return _narrow(operation(self, *(_widen(arg) for arg in args)))

    return wrapped


def _cast(operation):
    @functools.wraps(operation)
    def wrapped(self, handle, dtype):
        if dtype.scalar == tl.bfloat16:
            if _is_bf16(handle):
                return handle
            return Handle(_round(handle.data.astype(np.float32)), tl.bfloat16)
        wide = _widen(handle)
        if _is_bf16(handle) and dtype.scalar == tl.float32:
            return wide
        return operation(self, wide, dtype)

    return wrapped


def _dot(operation):
    @functools.wraps(operation)
    def wrapped(self, a, b, acc, *args):
        result = operation(self, _widen(a), _widen(b), _widen(acc), *args)
        return _narrow(result) if _is_bf16(acc) else result

    return wrapped


def install() -> None:
    """Patch the interpreter of this process, once."""
    if hasattr(Builder, "bf16_is_real"):
        return
    Builder.bf16_is_real = True
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_dot = _dot(Builder.create_dot)
    for name in ("binary_op", "unary_op", "create_clampf", "create_fma"):
        setattr(Builder, name, _through_fp32(getattr(Builder, name)))
