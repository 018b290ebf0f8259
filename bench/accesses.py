"""What the programs of one launch do to one allocation, and what they know of each other.

`at` are byte offsets into the allocation, `program` the flat id of a program.
"""

import numpy as np
import torch

NOBODY, SEVERAL = -1, -2
PATIENCE = 2_000  # atomics on one address in a row before a program counts as stuck


class AccessError(AssertionError):
    """A kernel touched what it must not."""


class Clocks:
    """What each program knows of the others: vector clocks that atomics carry along."""

    def __init__(self):
        self.released: dict[int, int] = {}  # by program: how often it has released
        self.known: dict[int, dict[int, int]] = {}  # by program: releases of others it has seen
        self.carried: dict[int, dict[int, int]] = {}  # by address: releases that went through it
        self.last, self.repeats = None, 0

    def now(self, program):
        """The release that will publish what `program` stores now."""
        return self.released.get(program, 0) + 1

    def atomic(self, program, address, release, acquire):
        """One atomic: take what went through its address, leave what `program` has done."""
        self.repeats = self.repeats + 1 if self.last == (program, address) else 0
        self.last = (program, address)
        if self.repeats > PATIENCE:
            raise AccessError(f"program {program} waits for a flag that nobody will raise")
        known, carried = self.known.setdefault(program, {}), self.carried.setdefault(address, {})
        if acquire:
            _merge(known, carried)
        if release:
            self.released[program] = self.now(program)
            _merge(carried, known | {program: self.released[program]})

    def sees(self, program, others, times):
        """Whether `program` has acquired every release (others[i], times[i])."""
        known = self.known.get(program, {})
        return all(
            known.get(other, 0) >= times[others == other].max()
            for other in np.unique(others).tolist()
        )


class Storage:
    """One allocation, byte by byte, during one launch."""

    def __init__(self, base: torch.UntypedStorage, element: int):
        self.keep, self.start = base, base.data_ptr()
        self.valid = np.zeros(base.nbytes(), bool)  # belongs to an element that was passed in
        self.loaded_by = np.full(base.nbytes(), NOBODY, np.int64)  # a program, NOBODY or SEVERAL
        self.stored_by = np.full(base.nbytes(), NOBODY, np.int64)  # a program or NOBODY
        self.stored_at = np.zeros(base.nbytes(), np.int64)  # the release that publishes it
        self.atomic_by = np.full(base.nbytes(), NOBODY, np.int64)  # as loaded_by

    def admit(self, tensor):
        """Its elements may be touched."""
        self.valid[bytes_of(tensor)] = True

    def load(self, at, program, clocks):
        """Refuse what another program's store or atomic makes uncertain."""
        owner = self.stored_by[at]
        foreign = np.isin(owner, (NOBODY, program), invert=True)
        if foreign.any() and not clocks.sees(program, owner[foreign], self.stored_at[at][foreign]):
            raise AccessError(f"program {program} loads what another one stores")
        if np.isin(self.atomic_by[at], (NOBODY, program), invert=True).any():
            raise AccessError(f"program {program} loads what another one does atomics on")
        self._mark(self.loaded_by, at, program)

    def store(self, at, program, clocks):
        """Refuse a second store, and what another program uses."""
        if np.unique(at).size != at.size or (self.stored_by[at] != NOBODY).any():
            raise AccessError(f"program {program} stores an element that has been stored")
        for users, use in ((self.loaded_by, "loads"), (self.atomic_by, "does atomics on")):
            if np.isin(users[at], (NOBODY, program), invert=True).any():
                raise AccessError(f"program {program} stores what another one {use}")
        self.stored_by[at], self.stored_at[at] = program, clocks.now(program)

    def atomic(self, at, program):
        """Refuse what another program uses in a plain way."""
        for users, use in ((self.loaded_by, "loads"), (self.stored_by, "stores")):
            if np.isin(users[at], (NOBODY, program), invert=True).any():
                raise AccessError(f"program {program} does atomics on what another one {use}")
        self._mark(self.atomic_by, at, program)

    @staticmethod
    def _mark(users, at, program):
        users[at] = np.where(np.isin(users[at], (NOBODY, program)), program, SEVERAL)

    def stored(self):
        """Which bytes were stored, [bytes]."""
        return self.stored_by != NOBODY

    def bytes_loaded(self):
        """Distinct ones."""
        return int(((self.loaded_by != NOBODY) | (self.atomic_by != NOBODY)).sum())

    def bytes_stored(self):
        """Distinct ones."""
        return int(((self.stored_by != NOBODY) | (self.atomic_by != NOBODY)).sum())


class Tally:
    """One allocation, element by element, when only counting."""

    def __init__(self, base: torch.UntypedStorage, element: int):
        self.start, self.end, self.element = (
            base.data_ptr(),
            base.data_ptr() + base.nbytes(),
            element,
        )
        self.loaded, self.stored = np.zeros((2, base.nbytes() // element), bool)

    def admit(self, tensor):
        """Check that its elements can be counted."""
        if tensor.element_size() != self.element:
            raise TypeError("count_only takes one element size per allocation")

    def bytes_loaded(self):
        """Distinct ones."""
        return int(self.loaded.sum()) * self.element

    def bytes_stored(self):
        """Distinct ones."""
        return int(self.stored.sum()) * self.element


def bytes_of(tensor) -> np.ndarray:
    """Offsets in its storage of every byte of `tensor`."""
    element = tensor.element_size()
    starts = torch.arange(tensor.untyped_storage().nbytes() // element)
    if not tensor.numel():
        return np.zeros(0, np.int64)
    starts = starts.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).flatten()
    return (starts.numpy()[:, None] * element + np.arange(element)).ravel()


def _merge(into, new):
    for program, release in new.items():
        into[program] = max(into.get(program, 0), release)
