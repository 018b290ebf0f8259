"""What `make gpu` found, as Markdown and in the terminal. Pure functions of the JSON."""

import rich.box
import rich.console
import rich.table

from bench import host
from bench.gpu import contenders, operands, steps
from bench.layers import EXPERTS, LAYERS, RANK

NAMES = (
    contenders.CUBLAS, contenders.PLAIN, contenders.OURS, contenders.PDL, contenders.ONE_LAUNCH,
)  # fmt: skip
HALF = 2  # bytes
SHORT = ("layer", "M", "cuBLAS us", *(f"{name} x" for name in NAMES[1:]))
LONG = (
    "layer", "M", "implementation", "tiles", "us", "quartiles", "x cuBLAS", "of copy", "of matrix",
)  # fmt: skip
LEGEND = f"""
bf16, E = {EXPERTS}, r = {RANK}. One figure is one call: a CUDA graph of at least 40 calls over
rotated operands (three times the L2 cache) is replayed, all implementations of a row in interleaved
rounds, and the median is taken. `x` is the median over rounds of the ratio to cuBLAS. cuBLAS and
`plain` (our GEMM with the tiles of `ours`) compute the base projection alone. `of copy` and `of
matrix`: the bytes and FLOPs that the bare linear cannot do without, a second, as a share of what
this card was measured to copy and to multiply in bf16.
""".strip()


def good(found: dict) -> bool:
    """Whether every step ran, ended well, and every implementation with it."""
    return all(step["status"] == "ok" for step in found["steps"].values()) and not errors(found)


def markdown(found: dict) -> str:
    """The whole report."""
    lines = [f"# Measured on {found['machine'].get('gpu', 'an unknown GPU')}", ""]
    lines += ["Written by `make gpu`.", ""]
    lines += [f"- {name}: {value}" for name, value in found["machine"].items()]
    lines += ["", "## Steps", "", *table(("step", "status", "seconds", "found"), step_rows(found))]
    failed = [(name, row) for name, row in found["steps"].items() if "said" in row]
    for name, row in failed:
        lines += ["", f"{name} {row['status']}; it said last:", "", "```", row["said"], "```"]
    if timings(found):
        lines += ["", "## Times", "", LEGEND, "", *table(SHORT, short_rows(found))]
        lines += ["", *table(LONG, long_rows(found))]
    lines += [f"- {text}" for text in errors(found)]
    if "result" in found["steps"].get("host", {}):
        lines += [
            "",
            host.markdown(found["steps"]["host"]["result"]).replace("\n## ", "\n### ")[1:],
        ]
    return "\n".join(lines).rstrip() + "\n"


def show(found: dict) -> None:
    """Steps and ratios in the terminal."""
    console = rich.console.Console()
    console.width = max(console.width, 120)  # in a log, too
    for header, rows in (
        (("step", "status", "seconds", "found"), step_rows(found)),
        (SHORT, short_rows(found)),
    ):
        if not rows:
            continue
        shown = rich.table.Table(*header, box=rich.box.SIMPLE_HEAD)
        for row in rows:
            shown.add_row(*row, style="red" if row[1] in ("failed", "hung", "not run") else "")
        console.print(shown)
    for name, row in found["steps"].items():
        if "said" in row:
            console.print(f"{name} {row['status']}; it said last:\n{row['said']}", markup=False)
    for text in errors(found):
        console.print(text, markup=False)


def step_rows(found: dict) -> list[tuple[str, ...]]:
    """One row a step."""
    return [
        (name, row["status"], f"{row['seconds']:.0f}", summary(name, row.get("result")))
        for name, row in found["steps"].items()
    ]


def summary(name: str, result: dict | None) -> str:
    """A step's result in a few words."""
    if not result or name.startswith(steps.TIMING):
        return ""
    if name == "correctness":
        named = f": {', '.join(result['failed'])}" if result["failed"] else ""
        counts = [f"{result[key]} {key}" for key in ("passed", "failures", "errors", "skipped")]
        return ", ".join(counts) + named
    if name == "ceilings":
        copy, matrix = ceilings(result)
        return f"{copy / 1e12:.2f} TB/s copied, {matrix / 1e12:.0f} TFLOP/s in bf16"
    if name == "replays":
        return "; ".join(replayed(M, row) for M, row in result["tokens"].items())
    if name == "rows":
        other = f"; other bits: {'; '.join(result['different'])}" if result["different"] else ""
        return f"{result['compared']} comparisons, {len(result['different'])} differ{other}"
    whole = result["whole, inference_mode"]
    return f"{whole['ops.mogu_linear']['median']:.1f} us of the host for a call"


def replayed(M: str, row: dict) -> str:
    """One M of the replays."""
    return (
        f"M = {M}: {row['replays']} replays, {row['chunks_with_other_bits']} chunks with other "
        f"bits, {row['flags_left_up']} flags left up"
    )


def timings(found: dict) -> dict[tuple[str, str], dict]:
    """{(layer, M): contenders} of the layers that were timed."""
    return {
        (name.removeprefix(steps.TIMING), M): cell
        for name, row in found["steps"].items()
        if name.startswith(steps.TIMING)
        for M, cell in row.get("result", {}).items()
    }


def errors(found: dict) -> list[str]:
    """Implementations that were not timed, and why."""
    return [
        f"{layer}, M = {M}, {name}: {row['error']}"
        for (layer, M), cell in timings(found).items()
        for name, row in cell.items()
        if "error" in row
    ]


def short_rows(found: dict) -> list[tuple[str, ...]]:
    """One row for a layer and M: cuBLAS in microseconds, the others as multiples."""
    rows = []
    for (layer, M), cell in timings(found).items():
        bare = cell.get(contenders.CUBLAS, {}).get("seconds")
        cells = [f"{1e6 * bare['median']:.1f}" if bare else "-"]
        cells += [times(cell.get(name, {}).get("over_cublas")) for name in NAMES[1:]]
        rows.append((layer, M, *cells))
    return rows


def long_rows(found: dict) -> list[tuple[str, ...]]:
    """One row for everything that was timed."""
    measured = found["steps"].get("ceilings", {}).get("result")
    rows = []
    for (layer, M), cell in timings(found).items():
        moved, multiplied = operands.bare_work(int(M), *LAYERS[layer], HALF)
        for name in (name for name in NAMES if "seconds" in cell.get(name, {})):
            row = cell[name]
            us = {key: 1e6 * value for key, value in row["seconds"].items()}
            shares = ("-", "-")
            if measured:
                work = zip((moved, multiplied), ceilings(measured), strict=True)
                shares = tuple(f"{w / row['seconds']['median'] / most:.0%}" for w, most in work)
            spread = f"{us['low']:.1f} to {us['high']:.1f}"
            rows.append(
                (layer, M, name, row["config"], f"{us['median']:.1f}", spread,
                 times(row["over_cublas"]), *shares)
            )  # fmt: skip
    return rows


def ceilings(result: dict) -> tuple[float, float]:
    """Bytes and FLOPs a second."""
    return result["copy_bytes_per_second"], result["bf16_flops_per_second"]


def times(ratio: float | None) -> str:
    """A ratio as a cell."""
    return "-" if ratio is None else f"{ratio:.3f}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown lines."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows
    ]
