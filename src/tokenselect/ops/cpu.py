"""The operations in native code for the CPU (csrc/): AMX, AVX-512, AVX2 or portable, whatever the processor can run.

Results are those of `ops.reference` up to rounding; scoring reads the keys once and keeps nothing that is as large.
Arguments are checked natively (csrc/tensor.h, checks.cpp) in less than a microsecond a call, also where compiled code
calls the operations without this file: a wrong one raises ValueError by name, and nothing is read out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from tokenselect.ops.paging import PageTable, Range
from tokenselect.ops.reference import Distances
from tokenselect.ops.resident import claim_rows as claim_rows
from tokenselect.ops.resident import move_rows as move_rows

NAME = "cpu"

# Another build of the same kernels, such as the one with sanitizers, is named by the environment.
_LIBRARY = Path(os.environ.get("TOKENSELECT_KERNELS") or Path(__file__).with_name("_kernels.so"))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SCHEMAS = (
    "score_tokens(Tensor queries, Tensor keys, Tensor key_scales, Tensor pages, Tensor padding, int page_size, "
    "Tensor sequences, Tensor candidates, Tensor context, Tensor cos0, Tensor sin0, Tensor runs0, int run_size0, "
    "Tensor cos1, Tensor sin1, Tensor runs1, int run_size1, bool interleaved, float scale, Tensor start_loc, "
    "Tensor key_center, Tensor alike0, Tensor alike1, float horizon, float prior, Tensor(a!) votes) -> ()",
    "pool_queries(Tensor queries, Tensor starts, Tensor counts, Tensor cos, Tensor sin, bool interleaved, "
    "Tensor(a!) pooled) -> ()",
    "topk_tokens(Tensor votes, Tensor start_loc, int k, Tensor(a!) indices) -> ()",
    "sparse_attention(Tensor queries, Tensor keys, Tensor values, Tensor query_start_loc, Tensor slots, "
    "Tensor slot_start_loc, Tensor cos, Tensor sin, float scale, bool interleaved, float softcap, "
    "Tensor sink_logits, Tensor(a!) out) -> ()",
    "linear(Tensor rows, Tensor weight, Tensor bias) -> Tensor",
    "linear2(Tensor rows, Tensor weight0, Tensor bias0, Tensor weight1, Tensor bias1) -> (Tensor, Tensor)",
    "linear3(Tensor rows, Tensor weight0, Tensor bias0, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) "
    "-> (Tensor, Tensor, Tensor)",
    "rms_norm(Tensor rows, Tensor weight, float epsilon) -> Tensor",
    "write_rows(Tensor keys, Tensor values, Tensor slots, Tensor(a!) key_rows, Tensor(b!) value_rows) -> ()",
    "fill_slots(Tensor chosen, Tensor sequences, Tensor pages, Tensor padding, int page_size, Tensor places, "
    "Tensor(a!) slots) -> ()",
    "range_slots(Tensor ranges, Tensor pages, Tensor padding, int page_size, Tensor(a!) slots) -> ()",
    "quantize_into(Tensor rows, Tensor tokens, Tensor centers, Tensor owners, Tensor(a!) integers, Tensor(b!) scales, "
    "Tensor into) -> ()",
    "quantize_rows(Tensor rows, Tensor center, Tensor(a!) integers, Tensor(b!) scales) -> ()",
)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot run there; None: it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if head_dim % 16 or not 0 < head_dim <= 256:
        return f"it takes head sizes that are multiples of 16 up to 256, not {head_dim}"
    return why_missing()


def why_missing() -> str | None:
    """Why the native library is not there; None: it is, and loaded."""
    with _loading:  # several threads may be the first to ask
        return _why_missing()


_loading = threading.Lock()


@functools.cache
def _why_missing() -> str | None:
    note = _LIBRARY.with_name("_kernels_missing.txt")
    if note.exists():
        return note.read_text(encoding="utf-8")
    try:
        library = _load()
    except (OSError, AttributeError) as error:
        return f"its native library does not load ({error})"
    if library.tokenselect_register():
        return "PyTorch refused to register its operations"
    return None


@functools.cache
def _load() -> ctypes.CDLL:
    # The library takes PyTorch's C interface from the process: make it visible there.
    core = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if core is not None:
        ctypes.CDLL(str(core), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(_LIBRARY))
    for function in (library.tokenselect_runnable, library.tokenselect_in_use):
        function.restype = ctypes.c_char_p
    for schema in _SCHEMAS:
        _definitions.define(schema)  # type: ignore[no-untyped-call]
        fake = _fake if schema.endswith("()") else _fake_layers if schema.endswith(")") else _fake_rows
        torch.library.register_fake(f"tokenselect::{schema.split('(')[0]}", fake, lib=_definitions)
    return library


_definitions = torch.library.Library("tokenselect", "DEF")  # type: ignore[no-untyped-call]


def _fake(*args: object) -> None:
    """An operation that writes into an argument and returns nothing."""


def _fake_rows(rows: Tensor, weight: Tensor, *args: object) -> Tensor:
    """An operation that makes rows as long as the weight's first dimension."""
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


def _fake_layers(rows: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    """Linear layers of the same rows: weights and biases take turns."""
    return tuple(_fake_rows(rows, weight) for weight in args[::2])


def instruction_sets() -> list[str]:
    """Those that this processor can run, best first."""
    names: bytes = _load().tokenselect_runnable()
    return names.decode().split()


def instruction_set() -> str:
    """The one in use."""
    name: bytes = _load().tokenselect_in_use()
    return name.decode()


def use_instruction_set(name: str) -> None:
    """Run on the kernels of one instruction set, for tests and comparisons; "auto" takes the best.

    Raises:
        ValueError: it is unknown or this processor cannot run it.
    """
    if not _load().tokenselect_use(name.encode()):
        raise ValueError(f"instruction set must be one of auto, {', '.join(instruction_sets())}, got {name!r}")


def pool_queries(
    queries: Tensor, starts: Tensor, counts: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """See `ops.reference.pool_queries`."""
    pooled = torch.empty((starts.shape[0], *queries.shape[1:]))
    given = queries.contiguous(), starts, counts, cos.contiguous(), sin.contiguous()
    torch.ops.tokenselect.pool_queries(*given, interleaved, pooled)
    return pooled


def score_tokens(
    queries: Tensor,
    keys: Tensor,
    pages: PageTable,
    sequences: Tensor,
    candidates: Tensor,
    distances: Sequence[Distances],
    scale: float,
    context: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_center: Tensor | None = None,
    horizon: float = 0.0,
    prior: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.score_tokens`."""
    if not 1 <= len(distances) <= 2:
        raise ValueError(f"distances must be one or two views, got {len(distances)}")
    first, second = distances[0], distances[-1]
    # In Python: four small tensor operations take longer than a block's few numbers do here.
    ends = list(accumulate((last - first for first, last in candidates.tolist()), initial=0))
    start_loc = torch.tensor(ends)
    votes = torch.empty(max(0, ends[-1]))  # a negative size is refused below, by name
    torch.ops.tokenselect.score_tokens(
        queries.contiguous(),
        _rows(keys),
        _NO_FLOATS if key_scales is None else key_scales,
        pages.pages.contiguous(),
        _padding(tuple(pages.padding)),
        pages.page_size,
        sequences.contiguous(),
        candidates.contiguous(),
        candidates.contiguous() if context is None else context.contiguous(),
        first.cos.contiguous(),
        first.sin.contiguous(),
        first.run_start_loc,
        first.run_size,
        second.cos.contiguous(),
        second.sin.contiguous(),
        second.run_start_loc,
        second.run_size if len(distances) == 2 else 0,
        first.interleaved,
        scale,
        start_loc,
        _NO_FLOATS if key_center is None else key_center.contiguous(),
        _NO_INTEGERS if first.alike is None else first.alike,
        _NO_INTEGERS if second.alike is None else second.alike,
        horizon,
        prior,
        votes,
    )
    return votes, start_loc


def topk_tokens(votes: Tensor, start_loc: Tensor, k: int) -> Tensor:
    """See `ops.reference.topk_tokens`."""
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    indices = torch.empty((start_loc.shape[0] - 1, k), dtype=torch.int64)
    torch.ops.tokenselect.topk_tokens(votes.contiguous(), start_loc, k, indices)
    return indices


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start_loc: Tensor,
    slots: Tensor,
    slot_start_loc: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    *,
    interleaved: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.reference.sparse_attention`."""
    queries = queries.contiguous()
    if out is None:
        out = torch.empty_like(queries)
    torch.ops.tokenselect.sparse_attention(
        queries,
        _rows(keys),
        _rows(values),
        query_start_loc,
        slots,
        slot_start_loc,
        cos.contiguous(),
        sin.contiguous(),
        scale,
        interleaved,
        softcap or 0.0,
        _NO_FLOATS if sink_logits is None else sink_logits.float().contiguous(),
        out,
    )
    return out


def quantize_rows(
    rows: Tensor, center: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.quantize_rows`."""
    out = out or (rows.new_empty(rows.shape, dtype=torch.int8), rows.new_empty(rows.shape[:2], dtype=torch.float32))
    given = _NO_FLOATS if center is None else center.contiguous()
    torch.ops.tokenselect.quantize_rows(_rows(rows), given, *out)
    return out


def quantize_into(
    rows: Tensor, tokens: Tensor, centers: Tensor, owners: Tensor, integers: Tensor, scales: Tensor, into: Tensor
) -> None:
    """See `ops.reference.quantize_into`."""
    torch.ops.tokenselect.quantize_into(_rows(rows), tokens, centers, owners, integers, scales, into)


def fill_slots(chosen: Tensor, sequences: Tensor, pages: PageTable, places: Tensor, slots: Tensor) -> None:
    """See `ops.reference.fill_slots`."""
    table, padding = pages.pages.contiguous(), _padding(tuple(pages.padding))
    torch.ops.tokenselect.fill_slots(chosen, sequences, table, padding, pages.page_size, places, slots)


def range_slots(ranges: Sequence[Range], pages: PageTable) -> Tensor:
    """See `ops.reference.range_slots`."""
    slots = torch.empty(sum(end - start for _, start, end in ranges), dtype=torch.int64)
    table, padding = pages.pages.contiguous(), _padding(tuple(pages.padding))
    given = torch.tensor(ranges, dtype=torch.int64).view(-1, 3)
    torch.ops.tokenselect.range_slots(given, table, padding, pages.page_size, slots)
    return slots


@functools.lru_cache(maxsize=64)
def _padding(rows: tuple[int, ...]) -> Tensor:
    """Nobody writes to it."""
    return torch.tensor(rows, dtype=torch.int64)


def write_rows(keys: Tensor, values: Tensor, slots: Tensor, key_rows: Tensor, value_rows: Tensor) -> None:
    """See `ops.reference.write_rows`."""
    torch.ops.tokenselect.write_rows(_rows(keys), _rows(values), slots, key_rows, value_rows)


def takes_linear(weight: Tensor) -> bool:
    """Whether `linear` can multiply with this weight [out_features, in_features], or `rms_norm` with [size]."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and weight.shape[-1] % 16 == 0
        and weight.is_contiguous()
        and why_missing() is None
    )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for a few rows, as in a decode step: the weight is read once, by all threads.

    Args:
        rows: [..., in_features], in the dtype of `weight`; 16 rows at the most are worth it.
        weight: [out_features, in_features] that `takes_linear`.
        bias: [out_features].

    Returns:
        [..., out_features], sums in float32, rounded once.
    """
    out: Tensor = torch.ops.tokenselect.linear(rows.contiguous(), weight, _NO_FLOATS if bias is None else bias)
    return out


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Rows divided by their root mean square, times a weight; rounded before the weight and after it, as Llama does.

    Args:
        rows: [..., size] in the dtype of `weight`.
        weight: [size] that `takes_linear`.
        epsilon: added to the mean square.
    """
    out: Tensor = torch.ops.tokenselect.rms_norm(rows.contiguous(), weight, epsilon)
    return out


_NO_FLOATS = torch.empty(0)
_NO_INTEGERS = torch.empty(0, dtype=torch.int64)


def _rows(cache: Tensor) -> Tensor:
    """The kernels take any strides between rows and heads, but whole vectors."""
    return cache if cache.stride(-1) == 1 else cache.contiguous()
