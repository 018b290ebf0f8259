"""Compiles the CPU backend where there is a compiler; everything else is in pyproject.toml."""

import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HEADERS = ["gemm", "kernels", "mogu", "parts", "run", "standard", "tensors", "vectors"]
SOURCES = ["module", "portable", "avx2", "avx512", "avx512bf16"]


class OptionalBuild(build_ext):
    """Without a working compiler the install goes on, and says so in one line."""

    def build_extension(self, ext):
        """Compile, or explain."""
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever a compiler may do
            reason = " ".join(str(error).split())[:200]
            line = f"mogu_kernels: the CPU backend was not built ({reason}); eager PyTorch serves"
            sys.stderr.write(line + "\n")


extension = Extension(
    "mogu_kernels._cpu",
    sources=[f"csrc/{name}.cpp" for name in SOURCES],
    depends=[f"csrc/{name}.h" for name in HEADERS],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
    extra_link_args=["-fopenmp"],
    py_limited_api=True,
    optional=True,
)
setup(
    ext_modules=[extension] if platform.system() == "Linux" else [],
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
