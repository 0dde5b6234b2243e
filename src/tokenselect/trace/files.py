"""Traces as files: NumPy's `.npz`, compressed, read with care, for a file may come from anybody."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tokenselect.trace.record import Trace

_FORMAT = 1
_MAX_BYTES = 1 << 30  # of all arrays, unpacked
_MAX_FACTS = 1 << 20
_ARRAYS: dict[str, tuple[Any, int]] = {  # type and dimensions
    "facts": (np.uint8, 1),
    "text": (np.uint8, 1),
    "starts": (np.int32, 1),
    "layers": (np.int32, 1),
    "start_loc": (np.int64, 1),
    "indices": (np.int32, 1),
    "votes": (np.float16, 1),
    "head_shares": (np.uint8, 2),
    "windows": (np.int32, 2),
    "served": (np.int8, 2),
    "mass": (np.float32, 2),
}


class TraceError(ValueError):
    """A file is no whole trace; the message is one sentence that says which file and why."""


def save_trace(trace: Trace, file: str | Path) -> None:
    """Write a trace to a file, which `load_trace` and NumPy read.

    Args:
        trace: what to keep.
        file: where; written anew.
    """
    facts = {"format": _FORMAT, "num_prompt_tokens": trace.num_prompt_tokens, **trace.facts}
    arrays: dict[str, Any] = {name: getattr(trace, name) for name in _ARRAYS if name not in ("facts", "text")}
    arrays["facts"] = _as_bytes(json.dumps(facts))
    arrays["text"] = _as_bytes(trace.text)
    with Path(file).open("wb") as target:
        np.savez_compressed(target, **arrays)


def load_trace(file: str | Path) -> Trace:
    """Read a trace. Nothing in the file is run, and no more memory is taken than the file can fill.

    Args:
        file: what `save_trace` wrote.

    Raises:
        TraceError: it is no trace, or one that contradicts itself.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            arrays = _read_arrays(archive)
        trace = _build(arrays)
        _check(trace)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError) as error:
        raise TraceError(f"{file} is not a trace of tokenselect: {_reason(error)}") from None
    return trace


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split()) or "it is damaged"


def _as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def _read_arrays(archive: zipfile.ZipFile) -> dict[str, NDArray[Any]]:
    members = {name: archive.getinfo(f"{name}.npy") for name in _ARRAYS}
    if sum(member.file_size for member in members.values()) > _MAX_BYTES:
        raise ValueError(f"it holds more than {_MAX_BYTES >> 20} MiB")
    arrays = {}
    for name, member in members.items():
        with archive.open(member) as content:
            arrays[name] = _read_array(content, name, member.file_size)
    return arrays


def _read_array(content: IO[bytes], name: str, size: int) -> NDArray[Any]:
    """One array, whose header must agree with the bytes that are there."""
    dtype, dimensions = _ARRAYS[name]
    if npy.read_magic(content) != (1, 0):
        raise ValueError(f"{name} has an unknown format")
    shape, fortran, found = npy.read_array_header_1_0(content)
    if found != dtype or len(shape) != dimensions or fortran or min(shape) < 0:
        raise ValueError(f"{name} is no array of {np.dtype(dtype)} with {dimensions} dimensions")
    wanted = math.prod(shape) * found.itemsize
    if wanted != size - content.tell():
        raise ValueError(f"{name} has {size - content.tell()} bytes, not {wanted}")
    return np.frombuffer(content.read(wanted), found).reshape(shape)


def _build(arrays: dict[str, NDArray[Any]]) -> Trace:
    text, packed = arrays.pop("text"), arrays.pop("facts")
    if len(packed) > _MAX_FACTS:
        raise ValueError("its facts are too long")
    try:
        facts = json.loads(packed.tobytes())
    except RecursionError:
        raise ValueError("its facts are nested too deeply") from None
    if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
        raise ValueError(f"it is not of format {_FORMAT}")
    prompt = facts.pop("num_prompt_tokens", None)
    if type(prompt) is not int:
        raise ValueError("num_prompt_tokens is missing")
    return Trace(facts, text.tobytes().decode("utf-8", "surrogatepass"), num_prompt_tokens=prompt, **arrays)


def _check(trace: Trace) -> None:
    """What every reader relies on."""
    cells = trace.num_steps * trace.num_layers
    rules = {
        "its facts name no settings": _has_facts(trace.facts),
        "tokens do not follow each other in its text": _ascends(trace.starts, 0, len(trace.text)),
        "it has no prompt": 0 < trace.num_prompt_tokens <= trace.num_tokens,
        "it has more steps than tokens": trace.num_steps <= trace.num_tokens - trace.num_prompt_tokens,
        "its layers do not ascend": _ascends(trace.layers, 0, 1 << 16),
        "its tables differ in shape": trace.windows.shape
        == trace.served.shape
        == trace.mass.shape
        == (trace.num_steps, trace.num_layers),
        "its cells do not follow each other": len(trace.start_loc) == cells + 1
        and trace.start_loc[0] == 0
        and _ascends(trace.start_loc, 0, len(trace.indices))
        and trace.start_loc[-1] == len(trace.indices),
        "its votes are not those of its tokens": len(trace.indices) == len(trace.votes) == len(trace.head_shares),
        "it has a position outside the text": _within(trace.indices, trace.num_tokens)
        and _within(trace.windows, trace.num_tokens + 1),
        "it has a vote that is no share": _are_shares(trace.votes),
        "it has attention that is no share": _are_shares(trace.mass[~np.isnan(trace.mass)]),
        "it has a step that was neither served nor not": bool(np.isin(trace.served, (-1, 0, 1)).all()),
    }
    for reason, holds in rules.items():
        if not holds:
            raise ValueError(reason)


def _has_facts(facts: Mapping[str, Any]) -> bool:
    config = facts.get("config")
    if not isinstance(config, dict):
        return False
    numbers = [facts.get("dropped_steps", 0), *(config.get(name) for name in ("num_sink_tokens", "num_dense_tokens"))]
    return all(type(number) is int and number >= 0 for number in numbers)


def _are_shares(values: NDArray[Any]) -> bool:
    return bool(((values >= 0) & (values <= 1.01)).all())  # rounded


def _ascends(values: NDArray[Any], low: int, high: int) -> bool:
    return not len(values) or bool(values[0] >= low and values[-1] <= high and (np.diff(values) >= 0).all())


def _within(values: NDArray[Any], end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())
