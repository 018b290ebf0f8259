"""Watches every load, store, atomic and dot of kernels that run in Triton's interpreter.

    with Trace(order=7) as trace:
        ops.mogu_linear(..., backend="triton")
    trace.launches, trace.bytes_loaded, trace.bytes_stored, trace.flops, trace.useful_flops

Counts distinct bytes per launch (what DRAM must move at least, if each launch's reuse hits the
cache), the multiply-adds that the dots issue and those of them with two nonzero operands (a lane
that a mask turned off holds a zero, so trace with operands that hold none).

Refuses, with an `AccessError`, an address outside the elements of the tensors passed in, a byte
stored twice in one launch, and a byte that one program of a launch stores and another one loads,
unless the storing program has released it through an atomic and the loading program has acquired
from that same address since. `order` runs the programs of each launch in a random order with that
seed; `producers=n` keeps programs 0 to n - 1, on which the others wait, in front.

`count_only=True` neither moves data nor computes dots, so that real layer sizes take seconds: a
floating-point load gives ones where its mask is on, a dot tells which of its elements have terms.
It checks bounds but no hazards.
"""

import dataclasses
import math

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.accesses import AccessError, Clocks, Storage, Tally, bytes_of

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
Handle = interpreter.TensorHandle


@dataclasses.dataclass(kw_only=True)
class Launch:
    """What one launch moved and multiplied."""

    name: str
    bytes_loaded: int = 0
    bytes_stored: int = 0
    flops: int = 0
    useful_flops: int = 0


class Trace:
    """See the module; `log` holds the launches in order, the properties are sums over them."""

    def __init__(self, order: int | None = None, producers: int = 0, count_only: bool = False):
        self.log: list[Launch] = []
        self.count_only = count_only
        self._random = None if order is None else np.random.default_rng(order)
        self._producers = producers
        self._storages: dict[int, Storage | Tally] = {}
        self._times_stored: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}

    launches = property(lambda self: len(self.log))
    bytes_loaded = property(lambda self: sum(launch.bytes_loaded for launch in self.log))
    bytes_stored = property(lambda self: sum(launch.bytes_stored for launch in self.log))
    flops = property(lambda self: sum(launch.flops for launch in self.log))
    useful_flops = property(lambda self: sum(launch.useful_flops for launch in self.log))

    def assert_stored_once(self, tensor: torch.Tensor) -> None:
        """Every element of `tensor` was stored exactly once over all launches of this trace."""
        storage = tensor.untyped_storage()
        _, times = self._times_stored.get(storage.data_ptr(), (None, np.zeros(storage.nbytes())))
        times = times[bytes_of(tensor)]
        if (times != 1).any():
            raise AccessError(
                f"of {times.size} bytes, {int((times == 0).sum())} were never stored "
                f"and {int((times > 1).sum())} more than once"
            )

    def __enter__(self):
        """Patch the interpreter."""
        hooks = {
            (Builder, "create_masked_load"): self._load,
            (Builder, "create_masked_store"): self._store,
            (Builder, "create_atomic_rmw"): self._atomic_rmw,
            (Builder, "create_atomic_cas"): self._atomic_cas,
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

    # one launch: its tensors, the order of its programs, its sums

    def _launch(self, original, executor, *args, **kwargs):
        self._storages.clear()
        self._order, self._clocks = None, Clocks()
        self._current = Launch(name=executor.fn.__name__)
        with _disable_current_modes():  # the interpreter's own tensors are no part of the kernel
            original(executor, *args, **kwargs)
        for storage in self._storages.values():
            self._current.bytes_loaded += storage.bytes_loaded()
            self._current.bytes_stored += storage.bytes_stored()
            if isinstance(storage, Storage):
                _, times = self._times_stored.setdefault(
                    storage.start, (storage.keep, np.zeros(storage.valid.size, np.int64))
                )
                times += storage.stored()
        self.log.append(self._current)

    def _arguments(self, original, executor, args, kwargs):
        args, kwargs = original(executor, args, kwargs)
        for value in (*args, *kwargs.values()):
            self._register(value)
        return args, kwargs

    def _register(self, value):
        """Admit the elements of a tensor, of a descriptor's base, of everything in a tuple."""
        if isinstance(value, tuple):
            for item in value:
                self._register(item)
        elif isinstance(value, TensorDescriptor):
            self._register(value.base)
        elif isinstance(value, torch.Tensor):
            make = Tally if self.count_only else Storage
            base = value.untyped_storage()
            if base.data_ptr() not in self._storages:
                self._storages[base.data_ptr()] = make(base, value.element_size())
            self._storages[base.data_ptr()].admit(value)

    def _program(self, original, builder, x, y, z):
        if self._random is not None:
            if self._order is None:
                programs = math.prod(builder.grid_dim)
                first = min(self._producers, programs)
                rest = first + self._random.permutation(programs - first)
                self._order = np.concatenate([self._random.permutation(first), rest])
            _, ny, nz = builder.grid_dim
            place = int(self._order[(x * ny + y) * nz + z])
            x, y, z = place // (ny * nz), place // nz % ny, place % nz
        original(builder, x, y, z)

    # what a program does

    def _load(self, original, builder, pointer, mask, other, *args, **kwargs):
        if self.count_only:
            self._tally("load", pointer, mask)
            if pointer.get_element_ty().is_floating():
                return _ones(pointer, mask, other)
        else:
            for storage, at in self._touched("load", pointer, mask):
                storage.load(at, _current_program(builder), self._clocks)
        return original(builder, pointer, mask, other, *args, **kwargs)

    def _store(self, original, builder, pointer, value, mask, *args, **kwargs):
        if self.count_only:
            self._tally("store", pointer, mask)
            if pointer.get_element_ty().is_floating():
                return None
        else:
            for storage, at in self._touched("store", pointer, mask):
                storage.store(at, _current_program(builder), self._clocks)
        return original(builder, pointer, value, mask, *args, **kwargs)

    def _atomic_rmw(self, original, builder, operation, pointer, value, mask, sem, scope):
        self._atomic(builder, pointer, mask, sem, scope)
        return original(builder, operation, pointer, value, mask, sem, scope)

    def _atomic_cas(self, original, builder, pointer, compare, value, sem, scope):
        self._atomic(builder, pointer, None, sem, scope)
        return original(builder, pointer, compare, value, sem, scope)

    def _atomic(self, builder, pointer, mask, sem, scope):
        program = _current_program(builder)
        if self.count_only:
            self._tally("load", pointer, mask)
            self._tally("store", pointer, mask)
        else:
            for storage, at in self._touched("atomic", pointer, mask):
                storage.atomic(at, program)
        orders = "" if scope.name == "CTA" else sem.name  # a CTA is one program
        for address in np.unique(_addresses(pointer, mask)).tolist():
            self._clocks.atomic(program, address, "RELEASE" in orders, "ACQUIRE" in orders)

    def _dot(self, original, builder, a, b, acc, *args, **kwargs):
        present_a, present_b = a.data != 0, b.data != 0
        self._current.flops += 2 * a.data.size * b.data.shape[-1]
        rows, columns = present_a.sum(-2, dtype=np.int64), present_b.sum(-1, dtype=np.int64)
        self._current.useful_flops += 2 * int((rows * columns).sum())
        if self.count_only:
            terms = present_a.any(-1)[..., :, None] & present_b.any(-2)[..., None, :]
            return Handle(acc.data + terms, acc.dtype.scalar)
        return original(builder, a, b, acc, *args, **kwargs)

    def _touched(self, what, pointer, mask):
        """(storage, byte offsets) for the lanes of an access that are on."""
        element = _element_size(pointer)
        addresses = _addresses(pointer, mask)
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

    def _tally(self, what, pointer, mask):
        """Mark what an access touches, when only counting; it stays in one allocation."""
        element = _element_size(pointer)
        starts, length = _runs(pointer, mask, element)
        if not starts.size:
            return
        low, high = int(starts.min()), int(starts.max()) + length * element
        for storage in self._storages.values():
            if storage.start <= low and high <= storage.end:
                touched = storage.loaded if what == "load" else storage.stored
                at = (starts - storage.start) // element
                if length == 1:
                    touched[at] = True
                for begin in at.tolist() if length > 1 else ():
                    touched[begin : begin + length] = True
                return
        raise AccessError(f"lanes of a {what} are out of bounds")


def _current_program(builder) -> int:
    (x, y, z), (_, ny, nz) = builder.grid_idx, builder.grid_dim
    return (x * ny + y) * nz + z


def _element_size(pointer) -> int:
    return pointer.get_element_ty().primitive_bitwidth // 8 or 1


def _on(mask):
    """A mask as an array; the interpreter passes a handle, a bare array or nothing."""
    return np.asarray(True if mask is None else getattr(mask, "data", mask), bool)


def _addresses(pointer, mask):
    """Of the lanes that are on, flat."""
    addresses, on = np.broadcast_arrays(pointer.data, _on(mask))
    return addresses[on].astype(np.int64)


def _runs(pointer, mask, element):
    """(first addresses, length) of equally long runs of elements that cover the lanes that are on.

    The lanes of a tile are usually whole rows or columns of a matrix; if not, runs of length one.
    """
    addresses, on = np.broadcast_arrays(pointer.data.view(np.int64), _on(mask))
    if addresses.ndim == 2:
        rows, columns = on.any(1), on.any(0)
        if np.count_nonzero(on) == np.count_nonzero(rows) * np.count_nonzero(columns):
            tile = addresses if rows.all() else addresses[rows]
            tile = tile if columns.all() else tile[:, columns]
            for axis in (0, 1):
                if tile.size and (np.diff(tile, axis=axis) == element).all():
                    return tile.take(0, axis), tile.shape[axis]
    return addresses[on], 1


def _ones(pointer, mask, other):
    """What a load gives when only counting."""
    element = pointer.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    outside = dtype.type(0) if other is None else other.data
    return Handle(np.where(_on(mask), dtype.type(1), outside).astype(dtype, copy=False), element)
