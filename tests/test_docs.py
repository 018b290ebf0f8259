"""Every block of the pages runs, top to bottom, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest

from mogu_kernels import cli
from tests import test_convert, tiny

DOCS = Path(__file__).parent.parent / "docs"
ELSEWHERE = "serve-on-vllm"  # its blocks run beside a server: tests/serve/test_server.py
PAGES = sorted(page for page in DOCS.glob("*.md") if page.stem != ELSEWHERE)
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)


def authors_files(folder: Path) -> None:
    """What the page on conversions finds in the authors' repository."""
    test_convert.llama_files(folder / "made", tiny.llama())
    for source, target in (
        ("unwill", "resp_unwill/960_lora"),
        ("glad", "resp_glad/800_lora"),
        ("router.pth", "router_layer/10_router.pth"),
    ):
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / "made" / source).rename(folder / target)


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem == "convert":
        authors_files(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    namespace = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "mogu"
            with pytest.raises(SystemExit) as done:
                cli.main(arguments)
            assert done.value.code in (0, None)


def test_pages_name_only_files_that_exist():
    root = DOCS.parent
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"`(mogu_kernels/[\w/.-]*)`", page.read_text()):
            assert (root / name).exists(), name
