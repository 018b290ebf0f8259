"""Programs that wait for one another, under ttsem: a pytest plugin (`-p tests.interleave`).

ttsem 0.1.0 runs the programs of a launch one by one, so nothing ever waits, and it calls a plain
load of what another program stored a race even where a flag orders the two. For launches with
atomics this plugin

1. runs one program at a time still, but hands the turn to a random one at every atomic: whoever
   does not wait for a flag reads NaN;
2. drops from the search for races the loads that a release and an acquire of one flag order after
   the store (vector clocks over what was executed). Everything else stays a race.

And for all launches: what was stored through a tensor descriptor is written back, which ttsem 0.1.0
forgets, and compilation stops at the TTIR: 80 s instead of 440 for tests/test_gpu.py.
"""

import copy
import random
import sys
import threading

import numpy as np
from ttsem import harness, interp, memory, mlir, pidraces

MOST_TURNS = 10_000  # of a launch; a wait that is never over stops here
ACQUIRES, RELEASES = (2, 4), (3, 4)  # values of `sem`: 1 relaxed, 4 both


class Turns:
    """The programs of one launch, of which one runs at a time."""

    def __init__(self, machine, function, arguments, programs):
        self.machine = machine
        self.alive = list(programs)
        self.gates = {program: threading.Semaphore(0) for program in programs}
        self.over = threading.Semaphore(0)
        self.random = random.Random(0)
        self.left = MOST_TURNS
        self.error: BaseException | None = None
        self.threads = [
            threading.Thread(target=self._program, args=(function, arguments, program))
            for program in programs
        ]

    def run(self):
        """Every program to its end; raises what the first failing one raised."""
        for thread in self.threads:
            thread.start()
        self._next()
        self.over.acquire()
        for thread in self.threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def switch(self):
        """The turn goes to a random program, and comes back some time."""
        store = self.machine.memory
        program, operation = store.agent, store.current_op
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the programs of a launch wait for one another without end")
        self._next()
        self._wait(program)
        store.current_op = operation

    def _next(self):
        if self.alive:
            self.gates[self.random.choice(self.alive)].release()
        else:
            self.over.release()

    def _wait(self, program):
        self.gates[program].acquire()
        if self.error is not None:
            raise RuntimeError("another program of the launch failed")
        self.machine.program_id = self.machine.memory.agent = program

    def _program(self, function, arguments, program):
        try:
            self._wait(program)
            self.machine.run(function, arguments, program)
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.alive.remove(program)
            self._next()


def _operations(region):
    for block in region.blocks:
        for operation in block.ops:
            yield operation
            for inner in operation.regions:
                yield from _operations(inner)


def _run_grid(machine, function, arguments):
    body = machine.module.funcs[function].regions[0]
    if not any(operation.name.startswith("tt.atomic") for operation in _operations(body)):
        return _one_by_one(machine, function, arguments)
    programs = interp.grid_order(machine.num_programs, "")
    machine.memory.turns = Turns(machine, function, arguments, list(programs))
    return machine.memory.turns.run()


def _atomic(store, *arguments, **options):
    if hasattr(store, "turns"):
        store.turns.switch()
    return _at_once(store, *arguments, **options)


def _find_race(log):
    return _search(without_ordered_loads(log) if log else log)


def without_ordered_loads(log):
    """The accesses of a launch, less the loads that flags order against every store they meet."""
    if not any(kind == "a" for _, kind, *_ in log):
        return log
    unordered = _unordered_loads(log)
    kept = []
    for entry in log:
        program, kind, operation, addresses, size, raw = entry
        if kind == "r":
            addresses = addresses[np.isin(addresses, unordered)]
            entry = (program, kind, operation, addresses, size, raw)
        if addresses.size:
            kept.append(entry)
    return kept


def _unordered_loads(log):
    """Addresses that some program loads, and another stores to, with no flag between the two."""
    stored = np.unique(np.concatenate([entry[3] for entry in log if entry[1] != "r"]))
    clocks: dict = {}  # program -> {program: how far it is known to have come}
    flags: dict = {}  # address -> the clocks released into it
    stores: dict = {}  # address -> {program: when}
    loads: dict = {}
    unordered = set()
    for now, (program, kind, operation, addresses, _, _) in enumerate(log):
        clock = clocks.setdefault(program, {})
        if kind == "a":
            order = _semantics(operation)
            for address in addresses.tolist():
                flag = flags.setdefault(address, {})
                if order in ACQUIRES:
                    _join(clock, flag)
                if order in RELEASES:
                    _join(flag, {**clock, program: now})
        mine, others = (loads, stores) if kind == "r" else (stores, loads)
        for address in addresses[np.isin(addresses, stored)].tolist():
            for other, when in others.get(address, {}).items():
                if other != program and clock.get(other, -1) < when:
                    unordered.add(address)
            mine.setdefault(address, {})[program] = now
    return np.array(sorted(unordered), dtype=np.int64)


def _join(clock, other):
    for program, when in other.items():
        clock[program] = max(when, clock.get(program, -1))


def _semantics(operation):
    """The value of `sem` in an atomic's text."""
    return int(operation.split("sem = ")[1].split()[0].rstrip(",}>"))


def _write_back(record, execution):
    record = copy.copy(record)
    record.bound = {
        name: value.base if harness._is_descriptor(value) else value
        for name, value in record.bound.items()
    }
    _write_tensors_back(record, execution)


def _ir_for_launch(record, stage, target):
    return mlir.to_generic(harness._stage_text(record, stage, target), None)


_one_by_one, _at_once, _search = interp.Interp.run_grid, memory.Memory.atomic, pidraces.find_race
interp.Interp.run_grid, memory.Memory.atomic = _run_grid, _atomic
pidraces.find_race = _find_race
_session = sys.modules["__main__"]  # `python -m ttsem.sanitize`
_write_tensors_back, _session._write_back = _session._write_back, _write_back
mlir.enable_generic_printing()
harness.ir_for_launch = _ir_for_launch
