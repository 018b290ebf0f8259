"""The table: committed as JSON, readable as Markdown, printed in the terminal.

Keyed by Triton's version, since registers differ between compilers.
"""

import dataclasses
import json
import pathlib

import rich.box
import rich.console
import rich.table

from bench.static.measure import Row

FOLDER = pathlib.Path(__file__).parents[1] / "results"
HEADER = (
    "case", "kernel", "tile", "launches", "registers", "blocks", "shared", "spills", "dots", "size",
)  # fmt: skip
LEGEND = """
Compiled offline by `make compile`; no GPU was used and nothing here is a time. Figures are
ours / plain: the plain GEMM has the same tile, loads and options, and no MoGU. `blocks` is how many
one SM or CU holds at once (0: it cannot run), `shared` bytes a block, `spills` bytes of stack +
spills, `dots` matrix instructions by kind, `size` all instructions. N = K = 4096 (Llama2-7B's
o_proj); `odd` has N = 4099 and K = 4097, so that no row starts on a multiple of 16 bytes; `extras`
has bias, row mask, softmax and stored gates; `train` is a forward that keeps what its backward
reads, and that backward, whose plain GEMM is grad_y weight.
""".strip()


def read() -> dict[str, dict[str, dict]]:
    """Triton's version -> key of a row -> row; empty before the first `--write`."""
    file = FOLDER / "static.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write(version: str, rows: list[Row]) -> None:
    """Replace this version's rows in both files."""
    table = read()
    table[version] = {row.key: as_json(row) for row in rows}
    table = dict(sorted(table.items(), reverse=True))
    sections = []
    for name, entries in table.items():
        lines = ",\n".join(
            f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items()
        )
        sections.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    FOLDER.joinpath("static.json").write_text("{\n" + ",\n".join(sections) + "\n}\n")
    FOLDER.joinpath("static.md").write_text(markdown(table))


def as_json(row: Row) -> dict:
    """A row as it is stored: zeros left out, and of the plain GEMM what is shown."""
    entry = dataclasses.asdict(row)
    entry["ours"] = row.ours and {k: v for k, v in entry["ours"].items() if v}
    entry["plain"] = row.plain and {k: entry["plain"][k] for k in ("registers", "blocks", "shared")}
    return entry


def markdown(table: dict[str, dict[str, dict]]) -> str:
    """One table for each version and target."""
    lines = ["# What the kernels compile to", "", LEGEND]
    for version, entries in table.items():
        for target in dict.fromkeys(entry["target"] for entry in entries.values()):
            lines += ["", f"## {target}, Triton {version}", ""]
            lines += ["| " + " | ".join((*HEADER, "not met")) + " |"]
            lines += ["|" + "---|" * (len(HEADER) + 1)]
            for entry in entries.values():
                if entry["target"] == target:
                    cells = (*columns(entry), "; ".join(entry["problems"]))
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(rows: list[Row]) -> None:
    """Print the rows, those that fail in red."""
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for name in ("target", *HEADER):
        shown.add_column(name, no_wrap=True)
    for row in rows:
        style = "red" if row.problems else ""
        shown.add_row(row.target, *columns(as_json(row)), style=style)
    console = rich.console.Console()
    console.width = max(console.width, 180)  # in a log, too
    console.print(shown)


def columns(entry: dict) -> tuple[str, ...]:
    """The cells of one stored row, in HEADER's order."""
    ours, plain = entry["ours"], entry["plain"]

    def beside(name: str) -> str:
        cells = ["-" if side is None else str(side.get(name, 0)) for side in (ours, plain)]
        return " / ".join(cells if plain else cells[:1])

    spills = "-" if ours is None else f"{ours.get('stack', 0)} + {ours.get('spills', 0)}"
    dots = (
        ""
        if ours is None
        else " ".join(f"{count} {k}" for k, count in ours.get("dots", {}).items())
    )
    size = "-" if ours is None else str(ours.get("instructions", 0))
    return (
        entry["case"], entry["kernel"], entry["tile"], str(entry["launches"]), beside("registers"),
        beside("blocks"), beside("shared"), spills, dots, size,
    )  # fmt: skip
