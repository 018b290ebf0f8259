"""Records out of JSON, JSONL, CSV and Parquet files, each with its place in the file.

A fault is a ValueError that begins with FILE:LINE, so that it can be found and mended.
"""

import bisect
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 2**20  # bytes; no example is longer, and a tokenizer given more seems to hang

Record = tuple[str, Any]  # "FILE:LINE" of its beginning, and what stands there


def records(path: Path) -> Iterator[Record]:
    """The records of a file, in order, read as its suffix says.

    Raises:
        ValueError: an unknown suffix, text that is not UTF-8, a line above 1 MB, bad syntax.
        ImportError: Parquet without pyarrow.
    """
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}: take {', '.join(readers)}")
    return readers[path.suffix](path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends; a line is never read beyond the limit."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"{path}:{number}: line of more than {MAX_LINE} bytes: break it up or drop it"
                )
            try:
                # a byte-order mark may begin the file
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line): save the "
                    "file as UTF-8"
                ) from error


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({_reason(error)}): write one object a line"
                ) from error


def _json(path: Path) -> Iterator[Record]:
    """The items of one array, decoded one by one: the parser alone tells no positions."""
    lines = list(_lines(path))
    text, ends = "".join(lines), list(itertools.accumulate(map(len, lines)))

    def place(position: int) -> str:
        return f"{path}:{bisect.bisect_right(ends, min(position, len(text) - 1)) + 1}"

    def skip(position: int) -> int:
        while text[position : position + 1].isspace():
            position += 1
        return position

    position, separator = skip(0), "["
    while text.startswith(separator, position):
        position = skip(position + 1)
        if separator == "[" and text.startswith("]", position):
            break
        try:
            item, end = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            fault = getattr(error, "pos", position)
            raise ValueError(f"{place(fault)}: not JSON ({_reason(error)}): mend it") from error
        yield place(position), item
        position, separator = skip(end), ","
    if not text.startswith("]", position) or skip(position + 1) < len(text):
        raise ValueError(f"{place(position)}: not one array: write [, objects with commas, ]")


def _reason(error: Exception) -> str:
    """Without the position inside the text, which the place tells."""
    return (
        "nested too deeply"
        if isinstance(error, RecursionError)
        else getattr(error, "msg", str(error))
    )


def _csv(path: Path) -> Iterator[Record]:
    rows = csv.reader(_lines(path), strict=True)
    header, number = None, 1
    try:
        for row in rows:
            place, number = f"{path}:{number}", rows.line_num + 1
            if header is None:
                header = row
                if len(set(header)) != len(header):
                    raise ValueError(f"{place}: a column named twice: name each once")
            elif row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{place}: {len(row)} values under {len(header)} columns: quote commas"
                    )
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}:{number}: not CSV ({error}): quote the field or cut it"
        ) from error


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'{path}: Parquet needs pyarrow: pip install "mogu_kernels[train]"'
        ) from error
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}:row 1: not Parquet ({error}): write it anew") from error
    for number in range(table.num_rows):
        place, record = f"{path}:row {number + 1}", {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            try:
                record[name] = column[number].as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: {name} is not UTF-8: write it as UTF-8") from error
        yield place, record
