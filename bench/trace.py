"""Watches every load and store of kernels that run in Triton's interpreter.

    with Trace(order=7) as trace:
        ops.mogu_linear(..., backend="triton")
    trace.launches, trace.bytes_loaded, trace.bytes_stored, trace.flops

Counts distinct bytes per launch (what DRAM must move at least, if each launch's reuse hits the
cache), and refuses, with an `AccessError`, an address outside the elements of the tensors passed
in, a byte stored twice in one launch, and a byte that one program of a launch stores and another
loads. `order` runs the programs of each launch in a random order with that seed.
"""

import dataclasses
import math

import numpy as np
import torch
from triton.runtime import interpreter

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
NOBODY, SEVERAL = -1, -2


class AccessError(AssertionError):
    """A kernel touched what it must not."""


@dataclasses.dataclass
class _Storage:
    """One allocation, byte by byte, during one launch."""

    start: int
    valid: np.ndarray  # belongs to an element of a tensor that was passed in
    loaded_by: np.ndarray  # a program, NOBODY or SEVERAL
    stored_by: np.ndarray  # a program or NOBODY


class Trace:
    """See the module; after the context the attributes hold sums over its launches."""

    def __init__(self, order: int | None = None):
        self.launches = 0
        self.bytes_loaded = 0
        self.bytes_stored = 0
        self.flops = 0
        self._random = None if order is None else np.random.default_rng(order)
        self._storages: dict[int, _Storage] = {}

    def __enter__(self):
        """Patch the interpreter."""
        hooks = {
            (Builder, "create_masked_load"): self._load,
            (Builder, "create_masked_store"): self._store,
            (Builder, "create_dot"): self._dot,
            (Builder, "set_grid_idx"): self._program,
            (Executor, "__call__"): self._launch,
            (Executor, "_init_args_hst"): self._arguments,
        }
        self._originals = {target: getattr(*target) for target in hooks}
        for (owner, name), hook in hooks.items():
            setattr(owner, name, self._wrap(hook, self._originals[owner, name]))
        return self

    def __exit__(self, *error):
        """Put the interpreter back."""
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)

    @staticmethod
    def _wrap(hook, original):
        def wrapped(this, *args, **kwargs):
            return hook(original, this, *args, **kwargs)

        return wrapped

    def _launch(self, original, executor, *args, **kwargs):
        self._storages.clear()
        self._order = None
        original(executor, *args, **kwargs)
        self.launches += 1
        for storage in self._storages.values():
            self.bytes_loaded += int((storage.loaded_by != NOBODY).sum())
            self.bytes_stored += int((storage.stored_by != NOBODY).sum())

    def _arguments(self, original, executor, args, kwargs):
        args, kwargs = original(executor, args, kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self._register(value)
        return args, kwargs

    def _register(self, tensor):
        base = tensor.untyped_storage()
        size, element = base.nbytes(), tensor.element_size()
        if base.data_ptr() not in self._storages:
            self._storages[base.data_ptr()] = _Storage(
                base.data_ptr(),
                np.zeros(size, bool),
                np.full(size, NOBODY, np.int64),
                np.full(size, NOBODY, np.int64),
            )
        if tensor.numel():
            whole = torch.arange(size // element)
            elements = whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            valid = self._storages[base.data_ptr()].valid[: size // element * element]
            valid.reshape(-1, element)[elements.flatten().numpy()] = True

    def _program(self, original, builder, x, y, z):
        if self._random is not None:
            if self._order is None:
                self._order = self._random.permutation(math.prod(builder.grid_dim))
            _, ny, nz = builder.grid_dim
            place = int(self._order[(x * ny + y) * nz + z])
            x, y, z = place // (ny * nz), place // nz % ny, place % nz
        original(builder, x, y, z)

    def _load(self, original, builder, pointer, mask, *args, **kwargs):
        program = self._current(builder)
        for storage, at in self._touched("load", pointer, mask):
            if np.isin(storage.stored_by[at], (NOBODY, program), invert=True).any():
                raise AccessError(f"program {program} loads what another one stores")
            before = storage.loaded_by[at]
            mine = np.isin(before, (NOBODY, program))
            storage.loaded_by[at] = np.where(mine, program, SEVERAL)
        return original(builder, pointer, mask, *args, **kwargs)

    def _store(self, original, builder, pointer, value, mask, *args, **kwargs):
        program = self._current(builder)
        for storage, at in self._touched("store", pointer, mask):
            if np.unique(at).size != at.size or (storage.stored_by[at] != NOBODY).any():
                raise AccessError(f"program {program} stores an element that has been stored")
            if np.isin(storage.loaded_by[at], (NOBODY, program), invert=True).any():
                raise AccessError(f"program {program} stores what another one loads")
            storage.stored_by[at] = program
        return original(builder, pointer, value, mask, *args, **kwargs)

    def _dot(self, original, builder, a, b, *args, **kwargs):
        self.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return original(builder, a, b, *args, **kwargs)

    @staticmethod
    def _current(builder) -> int:
        (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
        return (x * ny + y) * nz + z

    def _touched(self, what, pointer, mask):
        """(storage, byte offsets) for the lanes of an access that are on."""
        element = pointer.get_element_ty().primitive_bitwidth // 8 or 1
        addresses, on = np.broadcast_arrays(pointer.data, True if mask is None else mask.data)
        addresses = addresses[on.astype(bool)].astype(np.int64)
        found = 0
        for storage in self._storages.values():
            at = addresses - storage.start
            at = at[(at >= 0) & (at + element <= storage.valid.size)]
            found += at.size
            if at.size:
                at = (at[:, None] + np.arange(element)).ravel()
                if not storage.valid[at].all():
                    raise AccessError(f"a {what} falls between the elements of its tensor")
                yield storage, at
        if found < addresses.size:
            raise AccessError(f"{addresses.size - found} lanes of a {what} are out of bounds")
