"""What is built and shipped: wheel, source distribution, native library, and an install where it cannot be built."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tiny import save_tiny

from tokenselect import embedded
from tokenselect.evals import texts
from tokenselect.ops import cpu

ROOT = Path(__file__).parents[1]
OFFLINE = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir")

pytest.importorskip("setuptools", minversion="77", reason="the packages are built with this environment's setuptools")
needs_library = pytest.mark.skipif(
    cpu.why_missing() is not None or sys.platform != "linux" or not shutil.which("readelf"),
    reason="reads the native library with binutils",
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, from which everything else is built."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    archive = run(sys.executable, "-c", build, cwd=folder / "source").split()[-1]
    with tarfile.open(folder / archive) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11.2 does not have
        file.extractall(folder)
    return folder / archive.removesuffix(".tar.gz")


def test_the_source_distribution_has_the_kernels_sources_and_nothing_built(sdist: Path) -> None:
    sources = {path.name for path in (ROOT / "csrc").iterdir()}
    assert {path.name for path in (sdist / "csrc").iterdir()} == sources
    assert not [
        path for path in sdist.rglob("*") if path.suffix in (".so", ".o") or path.name == "_kernels_missing.txt"
    ]
    assert (sdist / "constraints.txt").exists()


@needs_compiler
def test_one_wheel_serves_every_python(sdist: Path, tmp_path: Path) -> None:
    # Unoptimised: this is about what is in the wheel, and compiles in a third of the time.
    command = (sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", tmp_path, ".")
    run(*command, cwd=sdist, CXXFLAGS="-O0")
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"tokenselect-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = next(file.read(name).decode() for name in names if name.endswith("/WHEEL"))
    assert "tokenselect/ops/_kernels.so" in names
    assert "tokenselect/ops/_kernels_missing.txt" not in names
    assert "tokenselect/py.typed" in names
    assets = [path for path in (ROOT / "src/tokenselect/inspect/assets").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT / "src").as_posix() for path in assets} <= set(names)
    assert "Root-Is-Purelib: false" in metadata
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]


def installed(sdist: Path, target: Path, **variables: str) -> Path:
    """The package in a folder of its own."""
    run(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", target, ".", cwd=sdist, **variables)
    return target


def why_missing(target: Path) -> str:
    """What a process that uses this installation says."""
    code = "import tokenselect; from tokenselect.ops import cpu; print(tokenselect.__file__); print(cpu.why_missing())"
    where, reason = run(
        sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target), TOKENSELECT_KERNELS=""
    ).splitlines()
    assert Path(where).is_relative_to(target)
    assert not list(target.rglob("_kernels.so"))
    return reason


def test_without_a_compiler_it_installs_and_says_what_to_do(sdist: Path, tmp_path: Path) -> None:
    target = installed(sdist, tmp_path / "target", CXX="/no/such/compiler")
    reason = why_missing(target)
    assert reason.startswith("no C++ compiler was found (")
    assert "/no/such/compiler" in reason
    assert "install one, or set CXX, and install tokenselect again: pip install --force-reinstall" in reason
    model = save_tiny(tmp_path / "tiny", num_attention_heads=2)  # heads of 16, which the kernels would take
    small = (
        "--num-local-tokens 16 --num-selected-tokens 16 --block-size 16 --num-dense-tokens 0 --prefill-chunk-size 32"
    )
    command = ("info", "--model", model, *small.split(), "--num-sink-tokens", "4", "--num-tail-tokens", "4")
    variables = {"PYTHONPATH": str(target), "TOKENSELECT_KERNELS": "", "COLUMNS": "1000"}
    shown = run(sys.executable, "-c", "from tokenselect.cli import main; main()", *command, cwd=target, **variables)
    assert f"  cpu: {reason}\n" in shown
    assert "  reference: ready\n" in shown


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only there is AMX")
@needs_compiler
def test_a_compiler_that_does_not_know_amx_builds_the_other_kernels(sdist: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx*) exit 1;; esac\nexec c++ "$@"\n')
    old.chmod(0o755)
    target = installed(sdist, tmp_path / "target", CXX=str(old), CXXFLAGS="-O0")
    code = "from tokenselect.ops import cpu; print(cpu.why_missing(), *cpu.instruction_sets())"
    shown = run(sys.executable, "-c", code, cwd=target, PYTHONPATH=str(target), TOKENSELECT_KERNELS="").split()
    assert shown[0] == "None"
    assert shown[-1] == "portable"
    assert "amx" not in shown


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"CXX": "false"}, "false ended with status 1"),
        ({"CXXFLAGS": "-include /no/such/header.h"}, "error: /no/such/header.h: No such file or directory"),
        ({"LDFLAGS": "-l:no_such_library.so"}, "cannot find -l:no_such_library.so"),
    ],
    ids=["compiler", "source", "link"],
)
@needs_compiler
def test_on_a_failed_build_it_installs_and_tells_the_first_error(
    sdist: Path, tmp_path: Path, variables: dict[str, str], told: str
) -> None:
    reason = why_missing(installed(sdist, tmp_path, **{"CXXFLAGS": "-O0", **variables}))
    assert reason.startswith("the C++ compiler failed (")
    assert told in reason
    assert reason.count("\n") == 0


# What the library takes from PyTorch's stable C interface. PyTorch lists the version that a function came with in
# torch/csrc/stable/c/shim_function_versions.txt; what is not listed there is older than 2.10, our oldest.
SINCE_2_10 = {"torch_get_num_threads", "torch_parallel_for"}
OLDER = {
    "aoti_torch_delete_tensor_object",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_dtype_int32",
    "aoti_torch_dtype_int64",
    "aoti_torch_dtype_int8",
    "aoti_torch_empty_strided",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_numel",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_library_impl",
    "aoti_torch_library_init_impl",
}
LIBRARY = Path(cpu.__file__).with_name("_kernels.so")


@needs_library
def test_the_library_takes_only_old_functions_from_pytorch() -> None:
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", LIBRARY, cwd=ROOT).splitlines()]
    foreign = {name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon_"))}
    assert foreign == SINCE_2_10 | OLDER


@needs_library
def test_the_library_shows_its_own_functions_alone() -> None:
    defined = {line.split()[-1] for line in run("nm", "-D", "--defined-only", LIBRARY, cwd=ROOT).splitlines()}
    assert defined == {"tokenselect_in_use", "tokenselect_register", "tokenselect_runnable", "tokenselect_use"}


@needs_library
def test_the_library_links_neither_pytorch_nor_a_second_thread_pool() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(\w+)", run("readelf", "-d", LIBRARY, cwd=ROOT)))
    assert needed <= {"libstdc", "libgcc_s", "libm", "libc", "ld"}


def test_messages_name_the_versions_that_are_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for module in (embedded, texts):
        commands = re.findall(r"pip install --no-deps ([\w=.-]+)", Path(module.__file__).read_text())
        assert commands
        assert set(commands) <= set(pins)
