"""Compile the kernels for a GPU that is not here: `python compile_gpu.py cuda 90`, or `hip gfx942`.

The operations run with CPU tensors, and every launch is compiled for the target instead. Not a test by itself:
Triton's interpreter, in which the tests run, must be off in this process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from cases import Sparse, Votes, angles, contiguous, sequences_of, sparse_case, votes_case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tokenselect.ops import gpu, reference
from tokenselect.ops.gpu import around
from tokenselect.ops.gpu.attention import Last, attend_steps
from tokenselect.ops.gpu.reuse import decide_reuse
from tokenselect.ops.gpu.score import Spans, score_tokens
from tokenselect.ops.gpu.topk import Maxima, topk_tokens

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
compiled: dict[str, Any] = {}


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def compile_for(target: GPUTarget) -> Any:
    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constants = {p.name: given[p.name] for p in self.params if p.is_constexpr or given[p.name] is None}
        signature = {p.name: "constexpr" if p.name in constants else type_of(given[p.name]) for p in self.params}
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, p in enumerate(self.params)
            if signature[p.name].startswith("*") or (signature[p.name] in ("i32", "i64") and given[p.name] % 16 == 0)
        }
        name = f"{self.__name__}{sorted((k, v) for k, v in constants.items())}{signature}"
        if name not in compiled:
            source = ASTSource(self, signature, constants, divisible)
            compiled[name] = triton.compile(source, target=target, options=options)

    return run


def int8_votes(case: Votes) -> None:
    keys, scales = reference.quantize_rows(case.cache.keys)
    center = torch.randn(len(case.sequences), *keys.shape[1:])
    given = (case.queries, keys, case.cache.pages, case.of, case.candidates, case.views, case.scale, None)
    gpu.score_tokens(*given, scales, center)


def big_votes(blocks: int, dtype: torch.dtype, heads: tuple[int, int] = (28, 4), dim: int = 128) -> Votes:
    """The shapes of a 7B model: a decode step, or the tail of its prompt."""
    sequences = sequences_of([1000], heads[1], dim, dtype)
    candidates = torch.tensor([[128, 900 + i] for i in range(blocks)])
    counts = [-(-(772 + i) // 64) for i in range(blocks)]
    views = []
    for size, runs in ((1, [1] * blocks), (64, counts)):
        cos, sin = angles(sum(runs), dim // 2)
        views.append(reference.Distances(cos, sin, size, torch.tensor([0, *runs]).cumsum(0)))
    cache = contiguous(sequences, padded=False)
    queries, of = torch.randn(blocks, heads[0], dim), torch.zeros(blocks, dtype=torch.int64)
    return Votes(cache, sequences, queries, of, candidates, None, views, dim**-0.5)


def big_attention(own: int, dtype: torch.dtype) -> Sparse:
    sequences = sequences_of([1000], 4, 128, dtype)
    cos, sin = angles(1000, 64)
    queries = torch.randn(own, 28, 128).to(dtype)
    return Sparse(sequences, contiguous(sequences, False), queries, [(0, list(range(1000)), own)], cos, sin, {})


def steady_step() -> None:
    """A decode step that finds out by itself which of two sequences selects anew."""
    served, positions, firsts = torch.zeros(2, dtype=torch.int64), torch.tensor([900, 800]), torch.tensor([0, 1000])
    slots, bounds = torch.zeros((2, 200), dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    queries, numbers = torch.randn(2, 28, 128, dtype=torch.bfloat16), torch.zeros((6, 2), dtype=torch.int64)
    decide_reuse(
        queries, queries.float(), numbers, positions, firsts, slots, bounds,
        num_sinks=16, num_local=32, num_own=1, num_selected=64, parts=4, threshold=0.9,
    )  # fmt: skip
    case = big_votes(2, torch.bfloat16)
    spans = Spans([1000] * 2, [1] * 2, 2000, torch.tensor([0, 772, 1544]))
    given = (case.queries, case.cache.keys, case.cache.pages, case.of, case.candidates, case.views, case.scale)
    maxima = Maxima.of(2, 64, torch.device("cpu"))
    votes, start_loc = score_tokens(*given, spans=spans, served=served, maxima=maxima)
    topk_tokens(votes, start_loc, 64, 1000, into=slots[:, 16:80], firsts=firsts, served=served, maxima=maxima)
    keys, rotation = case.cache.keys, angles(200, 64)
    last = Last(numbers, positions, firsts, 80, 200)
    for given_last, is_settled in product((None, last), (False, True)):
        attend_steps(
            queries, keys, keys, slots.flatten(), bounds, 200, *rotation, 0.1, torch.empty_like(queries),
            served=served, last=given_last, is_settled=is_settled,
        )  # fmt: skip


def main(backend: str, arch: str) -> None:
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    if backend == "hip":
        torch.version.hip = "pretended"  # before the kernels' modules are imported, which ask for it
    JITFunction.run = compile_for(target)  # type: ignore[method-assign]
    for dtype in (torch.bfloat16, torch.float32):
        for case in (big_votes(1, dtype), big_votes(64, dtype), votes_case("page3", dim=80, interleaved=True)):
            case.score(gpu)  # type: ignore[arg-type]
    int8_votes(big_votes(1, torch.bfloat16))
    int8_votes(votes_case("page3", dim=80))
    rows = torch.randn(512, 28, 128, dtype=torch.bfloat16)
    gpu.pool_queries(rows, torch.tensor([0]), torch.tensor([512]), *angles(512, 64))
    gpu.quantize_rows(rows, torch.randn(28, 128))
    around.least_cosine(rows[:2], rows[2:4], 4)
    pages = big_votes(1, torch.bfloat16).cache.pages
    around.attended_slots(torch.zeros((1, 64), dtype=torch.int64), pages, [0], [70], [90], 4)
    gpu.topk_tokens(torch.rand(9000), torch.tensor([0, 9000]), 100)
    for own in (1, 512):
        for dtype in (torch.bfloat16, torch.float32):
            big_attention(own, dtype).run(gpu)  # type: ignore[arg-type]
    options = {"softcap": 50.0, "sink_logits": torch.randn(6), "interleaved": True}
    sparse_case("page3", (6, 2), 80, torch.float16, None, **options).run(gpu)  # type: ignore[arg-type]
    steady_step()
    for name, kernel in compiled.items():
        show(name, kernel, backend)


def show(name: str, kernel: Any, backend: str) -> None:
    """One line: the kernel, its shared memory and, for NVIDIA, what the assembler says of its registers."""
    line = f"{name.partition('[')[0]}: shared {kernel.metadata.shared} B"
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if backend == "cuda" and tool.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        line += " " + " ".join(part for part in usage.split() if part.startswith(("REG", "STACK", "LOCAL")))
    print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
