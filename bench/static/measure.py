"""One op call on one target: compile it, read it, hold it to the limits."""

import dataclasses

from bench.static import checks, plain, resources
from bench.static.cases import Case
from bench.static.compiling import Launch, captured
from bench.static.resources import Resources


@dataclasses.dataclass
class Row:
    """One kernel of one op call on one target."""

    target: str
    case: str
    kernel: str
    tile: str
    launches: int  # of the whole call
    ours: Resources | None  # None: it did not compile
    plain: Resources | None  # of the GEMM without MoGU, where there is one
    problems: list[str]

    @property
    def key(self) -> str:
        """What finds the same row in another table."""
        return f"{self.target} {self.case} {self.kernel}"


def measure(case: Case, target: str) -> list[Row]:
    """The kernels that `case` launches on `target`."""
    with captured(target) as launches:
        case.call()
    rows = [_row(case, target, launch, len(launches)) for launch in launches]
    if len(rows) > case.most_launches:
        rows[0].problems.append(f"{len(rows)} launches, at most {case.most_launches}")
    return rows


def _row(case: Case, target: str, launch: Launch, launches: int) -> Row:
    row = Row(target, str(case), launch.name, tile_text(launch), launches, None, None, [])
    beside = plain.counterpart(launch)
    if beside is not None and not beside.error:
        row.plain = resources.read(beside.compiled, target)
    if launch.error:
        row.problems = [launch.error]
    else:
        row.ours = resources.read(launch.compiled, target)
        row.problems = checks.kernel_problems(launch, target, row.ours, row.plain)
    return row


def tile_text(launch: Launch) -> str:
    """Such as `128x256x64 w8 s3`: BLOCK_M, BLOCK_N or rank columns, BLOCK_K, warps, stages."""
    given = launch.arguments
    sizes = [given.get("BLOCK_M"), given.get("BLOCK_N", given.get("RANK_COLUMNS"))]
    sizes.append(given.get("BLOCK_K"))
    text = "x".join(str(size) for size in sizes if size is not None)
    options = {"w": "num_warps", "s": "num_stages"}
    return " ".join([text, *(f"{k}{given[name]}" for k, name in options.items() if name in given)])
