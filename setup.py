"""Build of the native CPU kernels; everything else stands in pyproject.toml.

Each kernel file is compiled once per instruction set. Without a compiler, or if it fails, the package installs without
the kernels and keeps the reason in `_kernels_missing.txt`, which `tokenselect info` shows.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_SOURCES = Path("csrc")
_KERNELS = ("score_tokens", "topk_tokens", "sparse_attention", "linear", "rms_norm", "quantize_rows")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_X86 = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")}
_QUIET = ("-Wno-psabi", "-Wno-maybe-uninitialized")
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
)
_UNDEFINED = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()


class BuildKernels(build_ext):
    """Compile the library that `tokenselect.ops.cpu` loads; it is no Python module."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_name("_kernels_missing.txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            _build(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            note.write_text(_reason(error), encoding="utf-8")
            self.warn(f"tokenselect installs without its CPU kernels: {_reason(error)}")

    def copy_extensions_to_source(self) -> None:
        """For an editable install the library is built in place already."""

    def get_ext_fullpath(self, ext_name: str) -> str:
        if self.inplace or self.editable_mode:
            return str(Path("src", *ext_name.split(".")).with_suffix(".so"))
        return super().get_ext_fullpath(ext_name)


def _build(target: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = {"portable": ()} | (_X86 if is_x86 else {})
    jobs = {folder / f"{name}.o": [*flags, _source(name)] for name in ("dispatch", "bindings")}
    for isa, options in variants.items():
        for name in _KERNELS:
            jobs[folder / f"{name}.{isa}.o"] = [*flags, *options, f"-DTS_ISA={isa}", _source(name)]
    commands = [[*compiler, *options, "-c", "-o", str(made)] for made, options in jobs.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    link = [*compiler, "-shared", *_UNDEFINED, *shlex.split(os.environ.get("LDFLAGS", ""))]
    _run([*link, "-o", str(target), *map(str, jobs)])


def _source(name: str) -> str:
    return str(_SOURCES / f"{name}.cpp")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"no C++ compiler was found ({error}): install one, or set CXX, and install again"
    first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
    return f"the C++ compiler failed ({first.strip()})"


setup(ext_modules=[Extension("tokenselect.ops._kernels", [])], cmdclass={"build_ext": BuildKernels})
