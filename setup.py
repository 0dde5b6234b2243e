"""Build of the native CPU kernels; everything else stands in pyproject.toml.

Each kernel file is compiled once per instruction set. Without a compiler, or if it fails, the package installs without
the kernels and keeps the reason in `_kernels_missing.txt`, which `tokenselect info` shows.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_SOURCES = Path("csrc")
_NOTE = "_kernels_missing.txt"  # beside the library
_COMMON = ("bindings", "checks", "dispatch", "paging")
_KERNELS = ("score_tokens", "topk_tokens", "sparse_attention", "linear", "rms_norm", "quantize_rows", "pool_queries")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
_X86 = {"avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": _BF16, "amx": _AMX}
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
# Without its cache, in which pip keeps what it built without kernels.
_AGAIN = (
    "install tokenselect again: pip install --force-reinstall --no-deps --no-cache-dir tokenselect "
    "(in a checkout: -e . instead of the name)"
)
# PyTorch's functions are found when the library is loaded. Only its own are visible: parts of the C++ library that
# were compiled into it could otherwise be taken for those of another one.
_LINK = (
    ("-undefined", "dynamic_lookup", "-Wl,-exported_symbol,_tokenselect_*")
    if platform.system() == "Darwin"
    else (f"-Wl,--version-script={_SOURCES / 'exports.map'}",)
)


class BuildKernels(build_ext):
    """Compile the library that `tokenselect.ops.cpu` loads; it is no Python module."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_name(_NOTE)
        target.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        try:
            _build(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            note.write_text(_reason(error), encoding="utf-8")
            self.warn(f"tokenselect installs without its CPU kernels: {_reason(error)}")

    def copy_extensions_to_source(self) -> None:
        """Where the package runs from its sources: the library, or the note that says why there is none."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            target = Path("src", self.get_ext_filename(ext.name))
            for source, copy in ((built, target), (built.with_name(_NOTE), target.with_name(_NOTE))):
                copy.unlink(missing_ok=True)  # a process may have the old one mapped: never write into it
                if source.exists():
                    shutil.copy(source, copy)


class AnyPython(bdist_wheel):
    """One wheel for every Python: the library is no extension module and takes nothing from Python's own."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _build(target: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    variants = {"portable": ()} | (_X86 if is_x86 else {})
    if is_x86 and not _takes(compiler, _AMX):
        del variants["amx"]
        flags.append("-DTS_NO_AMX")
    jobs = {folder / f"{name}.o": [*flags, _source(name)] for name in _COMMON}
    for isa, options in variants.items():
        for name in _KERNELS:
            jobs[folder / f"{name}.{isa}.o"] = [*flags, *options, f"-DTS_ISA={isa}", _source(name)]
    commands = [[*compiler, *options, "-c", "-o", str(made)] for made, options in jobs.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    link = [*compiler, "-shared", *_LINK, *shlex.split(os.environ.get("LDFLAGS", ""))]
    _run([*link, "-o", str(target), *map(str, jobs)])


def _takes(compiler: list[str], options: tuple[str, ...]) -> bool:
    """Whether a compiler knows these options."""
    asked = [*compiler, *options, "-E", "-x", "c++", os.devnull]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _source(name: str) -> str:
    return str(_SOURCES / f"{name}.cpp")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return f"no C++ compiler was found ({error}): install one, or set CXX, and {_AGAIN}"
    lines = error.stderr.strip().splitlines() or [f"{error.cmd[0]} ended with status {error.returncode}"]
    first = next((line for line in lines if "error" in line and not line.startswith("collect2")), lines[0])
    return f"the C++ compiler failed ({first.strip()}): set CXX to another one, and {_AGAIN}"


setup(
    ext_modules=[Extension("tokenselect.ops._kernels", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
