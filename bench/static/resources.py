"""What a compiled kernel takes of a GPU, read from its binary.

NVIDIA: `cuobjdump`, which comes with Triton, prints registers, stack and instructions (SASS).
AMD: the assembly has the counts in its metadata.
"""

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile

from triton import knobs

_SASS = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
_GCN = re.compile(r"^\t([a-z]+_[a-z0-9_]+)", re.MULTILINE)
_SASS_FLOAT = re.compile(r"\.B?F(16|32|64)|UTMAREDG")
_GCN_FLOAT = re.compile(r"_b?f(16|32|64)\b|_f(add|min|max)")


@dataclasses.dataclass(frozen=True)
class Device:
    """Capacity of one SM or CU, in the unit that a binary counts in."""

    lanes: int  # threads in a warp
    registers: int  # of one scheduler, per lane
    granule: int  # a warp takes registers in multiples of this, per lane
    warps: int  # of one scheduler
    shared: int  # bytes
    reserved: int  # bytes of it that each block loses
    blocks: int


DEVICES = {
    "sm_80": Device(32, 512, 8, 16, 167936, 1024, 32),
    "sm_90": Device(32, 512, 8, 16, 233472, 1024, 32),
    "sm_100": Device(32, 512, 8, 16, 233472, 1024, 32),
    "gfx942": Device(64, 512, 8, 8, 65536, 0, 32),
}
SCHEDULERS, TENSOR_COLUMNS = 4, 512  # the same on every one of them


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one binary; a thread's, a block's, or a count of instructions in the text."""

    registers: int
    stack: int  # bytes of local memory (scratch)
    spills: int  # instructions that touch local memory (LDL, STL), or registers spilt on AMD
    shared: int  # bytes
    tensor_columns: int  # of tensor memory, sm_100
    warps: int
    blocks: int  # that one SM or CU holds at once
    instructions: int
    dots: dict[str, int]  # matrix instructions by kind
    atomics: int  # on global memory
    float_atomics: int
    traps: int


@functools.cache
def read(compiled, target: str) -> Resources:
    """The resources of what `warmup` returned for `target`."""
    return (
        _read_amd(compiled, target) if target.startswith("gfx") else _read_nvidia(compiled, target)
    )


def blocks_per_sm(
    target: str, registers: int, warps: int, shared: int = 0, tensor_columns: int = 0
) -> int:
    """How many blocks one SM or CU holds at once; 0 if not even one fits."""
    device = DEVICES[target]
    taken = -(-max(registers, 1) // device.granule) * device.granule
    warps_held = min(device.registers // taken, device.warps) * SCHEDULERS
    limits = [warps_held // warps, device.blocks]
    if shared:
        limits.append(device.shared // (shared + device.reserved))
    if tensor_columns:
        limits.append(TENSOR_COLUMNS // tensor_columns)
    return min(limits)


def sass_instructions(text: str) -> list[str]:
    """Opcodes of a `cuobjdump -sass` listing, predicates and operands left out."""
    return _SASS.findall(text)


def count_sass(opcodes: list[str]) -> dict:
    """The counts of `Resources` that NVIDIA's instructions give."""
    names = collections.Counter(opcode.split(".")[0] for opcode in opcodes)
    kinds = ("HGMMA", "HMMA", "IMMA", "DMMA")
    dots = {kind: names[kind] for kind in kinds if names[kind]}
    tcgen05 = sum(count for name, count in names.items() if re.fullmatch(r"UTC\w*MMA", name))
    atomics = [op for op in opcodes if re.match(r"(REDG?|ATOM[GS]?|UTMAREDG)\b", op)]
    return {
        "spills": names["LDL"] + names["STL"],
        "instructions": len(opcodes),
        "dots": dots | ({"UTCMMA": tcgen05} if tcgen05 else {}),
        "atomics": sum(not opcode.startswith("ATOMS") for opcode in atomics),
        "float_atomics": sum(bool(_SASS_FLOAT.search(opcode)) for opcode in atomics),
        "traps": sum(opcode.startswith("BPT.TRAP") for opcode in opcodes),
    }


def count_gcn(text: str) -> dict:
    """The same for AMD's assembly."""
    opcodes = _GCN.findall(text)
    mfma = sum(opcode.startswith("v_mfma") for opcode in opcodes)
    atomics = [op for op in opcodes if re.match(r"(global|buffer|flat|ds)_atomic", op)]
    return {
        "instructions": len(opcodes),
        "dots": {"MFMA": mfma} if mfma else {},
        "atomics": len(atomics),
        "float_atomics": sum(bool(_GCN_FLOAT.search(opcode)) for opcode in atomics),
        "traps": opcodes.count("s_trap"),
    }


def _read_nvidia(compiled, target: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _cuobjdump("-res-usage", "-sass", file.name)
    usage = dict(_USAGE.findall(listing))
    threads = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])
    warps = -(-int(threads[1]) // DEVICES[target].lanes)
    shared = compiled.metadata.shared
    tensor_columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    registers = int(usage["REG"])
    return Resources(
        registers=registers,
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=shared,
        tensor_columns=tensor_columns,
        warps=warps,
        blocks=blocks_per_sm(target, registers, warps, shared, tensor_columns),
        **count_sass(sass_instructions(listing)),
    )


def _read_amd(compiled, target: str) -> Resources:
    text = compiled.asm["amdgcn"]
    found = dict(re.findall(r"^\s*\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text, re.M))
    registers, warps = int(found["vgpr_count"]), compiled.metadata.num_warps
    shared = compiled.metadata.shared
    return Resources(
        registers=registers,
        stack=int(found["private_segment_fixed_size"]),
        spills=int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
        shared=shared,
        tensor_columns=0,
        warps=warps,
        blocks=blocks_per_sm(target, registers, warps, shared),
        **count_gcn(text),
    )


def _cuobjdump(*arguments: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
