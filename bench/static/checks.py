"""The limits, none of which may be loosened to make a kernel pass; each says what it protects."""

from collections.abc import Iterable

import triton

from bench.static.compiling import Launch
from bench.static.resources import Resources
from mogu_kernels import launch

FEWEST_INSTRUCTIONS = 100  # fewer is a kernel that the compiler has emptied
EXTRA_REGISTERS = 20  # of a second launch, beyond the plain GEMM
TENSOR_MEMORY_GUARDS = 3  # traps that ptxas puts around taking and giving back tensor memory
GROWTH = 1.05  # of registers and shared memory, beyond the committed table


def kernel_problems(
    made: Launch, target: str, found: Resources, plain: Resources | None
) -> list[str]:
    """What is wrong with one compiled kernel, in words with numbers."""
    problems = []
    if found.instructions <= FEWEST_INSTRUCTIONS:
        problems.append(f"{found.instructions} instructions: an empty kernel")
    if found.stack:
        problems.append(f"{found.stack} bytes of stack")
    if found.spills:
        problems.append(f"{found.spills} spills")
    if found.blocks < 1:
        problems.append(f"no block fits: {found.shared} bytes shared, {found.registers} registers")
    if found.tensor_columns > 512:
        problems.append(f"{found.tensor_columns} columns of tensor memory, at most 512")
    if found.traps > (TENSOR_MEMORY_GUARDS if found.tensor_columns else 0):
        problems.append(f"{found.traps} traps")
    if found.float_atomics:
        problems.append(f"{found.float_atomics} float atomics")
    elif found.atomics and "flags_ptr" not in made.arguments:
        problems.append(f"{found.atomics} atomics in a kernel without flags")
    if target == "sm_90" and element_size(made) == 2:
        problems += hopper_problems(made, found, plain)
    return problems


def hopper_problems(made: Launch, found: Resources, plain: Resources | None) -> list[str]:
    """Budget 3 for half precision on sm_90: wgmma in every dot, and no dearer than the GEMM."""
    problems = []
    if made.arguments["BLOCK_M"] >= 64 and set(found.dots) != {"HGMMA"}:
        problems.append(f"dots are {found.dots or 'missing'}, not all wgmma (HGMMA)")
    if plain is not None and is_second_launch(made):
        if found.blocks < plain.blocks:
            problems.append(f"{found.blocks} blocks per SM, plain {plain.blocks}")
        if found.registers > plain.registers + EXTRA_REGISTERS:
            problems.append(f"{found.registers} registers, plain {plain.registers}")
    return problems


def element_size(made: Launch) -> int:
    """Bytes of an element of the activations."""
    names = ("x_ptr", "x_desc", "y_ptr", "y_desc", "grad_y_ptr")
    x = next(made.arguments[name] for name in names if name in made.arguments)
    return getattr(x, "base", x).element_size()


def is_second_launch(made: Launch) -> bool:
    """A GEMM that gets the ranks ready made: it is held to the plain GEMM of the same tile."""
    return "total_ptr" in made.arguments and "lora_A_ptr" not in made.arguments


def regressions(row: dict, before: dict | None) -> list[str]:
    """What got worse than the committed row, measured with the same Triton."""
    if before is None:
        return ["not in the committed table: look at it, then --full --write"]
    now, then, worse = row["ours"], before["ours"], []
    if now is None or then is None:
        return worse
    for name in ("registers", "shared"):
        was, is_now = then.get(name, 0), now.get(name, 0)
        if is_now > was * GROWTH:
            worse.append(f"{name} {was} -> {is_now}")
    if now.get("blocks", 0) < then.get("blocks", 0):
        worse.append(f"blocks per SM {then['blocks']} -> {now.get('blocks', 0)}")
    if row["launches"] > before["launches"]:
        worse.append(f"launches {before['launches']} -> {row['launches']}")
    return worse


def uncovered(compiled: Iterable[str]) -> list[str]:
    """Kernels that `launch` can launch and no case did."""
    kernels = {k.__name__ for k in vars(launch).values() if isinstance(k, triton.JITFunction)}
    missing = {name.removesuffix("_kernel") for name in kernels} - set(compiled)
    return [f"{name}: no case compiles it, add one to cases.py" for name in sorted(missing)]
