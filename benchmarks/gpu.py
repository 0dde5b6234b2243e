"""Attention of one layer on a GPU, selection included, against the best dense kernel that PyTorch has.

    python -m benchmarks.gpu [--shape Qwen2-7B]

A block of 512 prompt tokens and a decode step, for the shapes of Qwen2-7B and Llama-3-8B, k = 2,048; scoring is
mixed, or at one distance where a phase is marked so. Every time is that of a captured CUDA graph, so no Python is in
it. Calls go round over the caches of several layers, whose attended tokens alone do not fit the L2 cache (at 1M some
may, as so many layers do not fit the memory): in a model, weights pass through it in between. Every shape and length
has a process of its own: what others left in memory moved some times by a tenth. Dense attention is given
rotated keys; ours pools, scores, selects, gathers, rotates and attends. "int8" scores by an int8 copy of the keys
that exists already. Decode steps are those of `integrations.steady` (see gpu_step.py), whose Selection Cache decides
on the device: a "hit" finds that the last selection serves again, a "miss" that it does not. Before anything is timed,
results are compared with the definition. Rows go to results/gpu.csv as each process ends, and what this very commit
has there is not measured again, so a run that was stopped goes on. The plot is results/gpu.png and gpu.svg. A whole
7B-shaped model is `benchmarks.gpu_model`, passes within the budget are `benchmarks.gpu_within_budget`.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_step
from benchmarks.report import RESULTS, append_rows, known_rows, read_rows
from benchmarks.results_of import Row, of_last_run
from tokenselect.config import TokenSelectConfig
from tokenselect.ops import gpu, reference
from tokenselect.ops.gpu import around
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import Block, SelectionPlan, candidates_end, plan_selection, vote_scale

LENGTHS = (2**15, 2**17, 2**19, 2**20)
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
CONFIG = TokenSelectConfig(num_selected_tokens=2048, num_dense_tokens=0)
ONE_DISTANCE = CONFIG.replace(scoring="position_free")
CACHING = CONFIG.replace(reuse_threshold=0.9)
COPIES, SCORINGS = {"bf16": False, "int8": True}, {"": CONFIG, ", one distance": ONE_DISTANCE}
DEVICE = torch.device("cuda")
KEY = ("shape", "length", "phase")
COLUMNS = (*KEY, "p20_us", "p50_us", "p80_us", "against_dense", "gb_per_s", "of_copy")
COLD_BYTES = 100e6  # twice the L2 cache
CACHE_BYTES = 24e9  # of all layers at the most


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128


SHAPES = (Shape("Qwen2-7B", 28, 4), Shape("Llama-3-8B", 32, 8))


def measure(calls: list[Callable[[], object]], replays: int = 9) -> list[float]:
    """Microseconds of one call, of `replays` replays of a graph that makes all calls a few times."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = max(1, 12 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / rounds / len(calls))
    return sorted(times)


class Layer:
    """One layer's cache of one sequence, and what a forward pass does with it."""

    def __init__(self, shape: Shape, length: int, own: int, table: RotaryTable) -> None:
        self.shape, self.length, self.own, self.table = shape, length, own, table
        size = (1, shape.num_kv_heads, length, shape.head_dim)
        self.keys, self.values = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.center = self.keys[:, :, :128].float().mean(2)
        self.int8, self.scales = int8_copy(self.keys, self.center)
        self.pages = PageTable(torch.zeros((1, 1), dtype=torch.int64, device=DEVICE), length, [0])
        self.queries = torch.randn((own, shape.num_q_heads, shape.head_dim), device=DEVICE, dtype=torch.bfloat16)
        self.block = Block(0, length - own, length, 0)
        self.plans: dict[TokenSelectConfig, SelectionPlan] = {
            config: plan_selection([self.block], config, table, gpu_step.MAX_DISTANCE)
            for config in (CONFIG, ONE_DISTANCE)
        }
        self.config = CONFIG
        self.scale = shape.head_dim**-0.5
        self.chosen = self.slots(False)

    def score(self, by_int8: bool, ops: object = gpu) -> tuple[Tensor, Tensor]:
        """Votes, and where they begin."""
        config, table = self.config, self.table
        plan = self.plans[config]
        pooled = gpu.pool_queries(self.queries, plan.starts, plan.counts, table.cos, table.sin)
        keys, scales, center = rows(self.keys), None, None
        if by_int8:
            keys, scales, center = rows(self.int8), self.scales[0].T, self.center
        scale = vote_scale(self.scale, table, config)
        return ops.score_tokens(  # type: ignore[attr-defined, no-any-return]
            pooled, keys, self.pages, plan.sequences, plan.candidates, plan.distances, scale, None, scales, center,
            config.vote_horizon, config.vote_prior,
        )  # fmt: skip

    def slots(self, by_int8: bool) -> tuple[Tensor, Tensor]:
        """Rows of the cache that are attended, and where they begin."""
        chosen = gpu.topk_tokens(*self.score(by_int8), CONFIG.num_selected_tokens)
        window = candidates_end(self.block, CONFIG)
        slots, bounds = around.attended_slots(chosen, self.pages, [0], [window], [self.length], CONFIG.num_sink_tokens)
        return slots, torch.tensor(bounds)

    def run(self, by_int8: bool, one_distance: bool) -> Tensor:
        """All that a forward pass does in this layer's attention."""
        self.config = ONE_DISTANCE if one_distance else CONFIG
        return self.attend(self.slots(by_int8))

    def attend(self, slots: tuple[Tensor, Tensor], ops: object = gpu) -> Tensor:
        """Sparse attention over chosen rows."""
        start = torch.tensor([0, self.own])
        return ops.sparse_attention(  # type: ignore[attr-defined, no-any-return]
            self.queries, rows(self.keys), rows(self.values), start, *slots, self.table.cos, self.table.sin, self.scale
        )

    def copy(self, of_int8: bool) -> Callable[[], object]:
        """A copy that reads and writes together as many bytes as the keys have."""
        source, target = (self.int8 if of_int8 else self.keys).view(-1).chunk(2)
        return partial(torch.empty_like(target).copy_, source)

    def dense(self) -> Tensor:
        """Attention over everything, as dense kernels want it."""
        query = self.queries.transpose(0, 1)[None]
        return scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)


def int8_copy(keys: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [1, Hkv, T, D] and their scales [1, Hkv, T], as the cache keeps them."""
    made, scales = gpu.quantize_rows(rows(keys), center[0])
    return made.transpose(0, 1)[None].contiguous(), scales.T[None].contiguous()


def rows(buffer: Tensor) -> Tensor:
    """[1, Hkv, T, D] as rows of a cache [T, Hkv, D]."""
    return buffer[0].transpose(0, 1)


def rotary_table() -> RotaryTable:
    frequencies = 1e6 ** -(torch.arange(64, device=DEVICE) / 64)
    angles = torch.arange(CONFIG.budget + 1, device=DEVICE)[:, None] * frequencies
    return RotaryTable(angles.cos(), angles.sin(), False, 1.0)


def check(layer: Layer) -> None:
    """Votes, choice and output against the definition, before anything is timed."""
    votes, start_loc = layer.score(False)
    expected, _ = layer.score(False, reference)
    # What rounds logits rounds them three times as much by the default's scale: .008 (bf16) and .011 (int8) on a CPU.
    assert relative_error(votes, expected) < 2e-2
    assert relative_error(layer.score(True)[0], expected) < 2e-2
    chosen = gpu.topk_tokens(votes, start_loc, 2048)
    assert torch.equal(chosen, reference.topk_tokens(votes, start_loc, 2048))
    assert relative_error(layer.attend(layer.chosen), layer.attend(layer.chosen, reference)) < 1e-2


def relative_error(made: Tensor, expected: Tensor) -> float:
    return float((made.float() - expected.float()).norm() / expected.float().norm())


def num_layers(shape: Shape, length: int) -> int:
    """So many that what is attended of all of them is not in the L2 cache."""
    token = shape.num_kv_heads * shape.head_dim
    attended, cache = 4 * token * CONFIG.dense_limit, 6 * token * length  # keys and values; with two int8 copies
    return max(1, min(math.ceil(COLD_BYTES / attended), int(CACHE_BYTES / cache)))


def cost_card() -> None:
    """What must be moved and computed at the least, before anything is run."""
    print("shape, tokens: MB of keys (bf16), MB of keys and values; block of 512: dense TFLOP, ours GFLOP (attention)")
    attended = CONFIG.dense_limit + 512
    for shape in SHAPES:
        for length in LENGTHS:
            keys = length * shape.num_kv_heads * shape.head_dim * 2 / 1e6
            per_key = 4 * 512 * shape.num_q_heads * shape.head_dim
            print(f"{shape.name:>11} {length:>8}: {keys:7.0f} {2 * keys:7.0f}; {per_key * length / 1e12:6.2f} ", end="")
            print(f"{per_key * attended / 1e9:5.1f}")


def copy_bandwidth() -> float:
    """GB/s of a large copy, bytes read and written."""
    source = torch.randn(2**29, device=DEVICE).to(torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * source.numel() / statistics.median(measure([lambda: target.copy_(source)])) / 1e3


def phases(layers: list[Layer], own: int) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Everything that is timed at one length."""
    if own == 1:
        yield from step_phases(layers)
        return
    for name, by_int8 in COPIES.items():
        for scoring, config in SCORINGS.items():
            yield f"block {name}{scoring}", [partial(layer.run, by_int8, config is ONE_DISTANCE) for layer in layers]


def step_phases(layers: list[Layer]) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Of a decode step."""
    for name, by_int8 in COPIES.items():
        for scoring, config in SCORINGS.items():
            yield f"step {name}{scoring}", steps(layers, config, by_int8)
            for layer in layers:
                layer.config = config
            yield f"score {name}{scoring}", [partial(layer.score, by_int8) for layer in layers]
        yield f"copy of {name} keys", [layer.copy(by_int8) for layer in layers]
    votes = layers[0].score(False)
    yield "topk", [lambda: gpu.topk_tokens(*votes, CONFIG.num_selected_tokens)]
    yield "step hit", steps(layers, CACHING, True)
    yield "step miss", steps(layers, CACHING, True, queries=2)


def steps(
    layers: list[Layer], config: TokenSelectConfig, by_int8: bool, queries: int = 1
) -> list[Callable[[], object]]:
    """Decode steps of all layers, each of some queries in turn."""
    config = config.replace(score_dtype="int8" if by_int8 else "same")
    made = [gpu_step.Step(config, layer.keys, layer.values, layer.table) for layer in layers]
    query = layers[0].queries.transpose(0, 1)[None]
    asked = [query, *(torch.randn_like(query) for _ in range(queries - 1))]
    return [partial(step.run, each) for each in asked for step in made]


def run(shape: Shape, length: int, own: int) -> dict[str, list[float]]:
    """Microseconds of everything, in a process of its own."""
    torch.manual_seed(0)
    table = rotary_table()
    layers = [Layer(shape, length, own, table) for _ in range(num_layers(shape, length))]
    if length == LENGTHS[0]:
        check(layers[0])
    times = {name: measure(calls) for name, calls in phases(layers, own)}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend):
            times[f"dense {name}"] = measure([layer.dense for layer in layers], replays=3 if own > 1 else 9)
    return times


def main(
    shape: Annotated[list[str] | None, typer.Option(help="of a layer; repeatable; default: all")] = None,
) -> None:
    """Run everything that this commit has not measured yet, and write it down."""
    wanted = [each for each in SHAPES if shape is None or each.name in shape]
    if not wanted:
        names = ", ".join(each.name for each in SHAPES)
        raise typer.BadParameter(f"{shape}: none of these is known; known are {names}", param_hint="--shape")
    cost_card()
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    known = known_rows("gpu", KEY)
    if ("", "0", "copy") not in known:
        copied = processes.submit(copy_bandwidth).result()
        write([{"shape": "", "length": 0, "phase": "copy", "gb_per_s": round(copied)}])
    copied = float(of_last_run(read_rows("gpu"))[0]["gb_per_s"])
    for each in wanted:
        for own, name in ((512, "block"), (1, "step")):
            for length in LENGTHS:
                if (each.name, str(length), f"{name} dense cudnn") not in known:
                    times = processes.submit(run, each, length, own).result()
                    write(list(rows_of(each, length, name, times, copied)))
    plot(of_last_run(read_rows("gpu")), torch.cuda.get_device_name())


def write(rows: list[dict[str, object]]) -> None:
    append_rows("gpu", [{column: row.get(column, "") for column in COLUMNS} for row in rows], DEVICE)


def rows_of(
    shape: Shape, length: int, name: str, times: dict[str, list[float]], copied: float
) -> Iterator[dict[str, object]]:
    best = min(statistics.median(times[f"dense {kernel}"]) for kernel in DENSE)
    elements = length * shape.num_kv_heads * shape.head_dim
    for phase, runs in times.items():
        kind = f"{name} {phase}" if phase.startswith("dense") else phase
        middle = statistics.median(runs)
        row: dict[str, object] = {"shape": shape.name, "length": length, "phase": kind, "p50_us": round(middle, 1)}
        row |= {"p20_us": round(runs[len(runs) // 5], 1), "p80_us": round(runs[len(runs) * 4 // 5], 1)}
        if phase.startswith(("block", "step")):
            row["against_dense"] = round(best / middle, 2)
        if phase.startswith(("score", "copy")):
            speed = elements * (2 if "bf16" in phase else 1) / middle / 1e3
            row |= {"gb_per_s": round(speed), "of_copy": round(speed / copied, 2)}
        ratio = row.get("against_dense", row.get("of_copy", ""))
        print(f"{shape.name:>11} {length:>8} {kind:<24} {middle:9.1f} us  {ratio}", flush=True)
        yield row


def plot(found: list[Row], device: str) -> None:
    """How many times faster than the best dense kernel, by length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shapes = [shape for shape in SHAPES if any(row["shape"] == shape.name for row in found)]
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for phase in ("block bf16", "block int8", "step bf16", "step int8", "step hit"):
            points = [r for r in found if r["shape"] == shape.name and r["phase"] == phase]
            gains = [float(r["against_dense"]) for r in points]
            axis.plot([int(r["length"]) for r in points], gains, marker="o", label=phase)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", title=f"{shape.name}, {device}", xlabel="tokens")
        axis.set_xticks(LENGTHS, [f"{n // 1024}K" for n in LENGTHS])
    axes[0, 0].set_ylabel("times faster than the best dense kernel")
    axes[0, 0].legend()
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(RESULTS / f"gpu.{kind}", dpi=120)


if __name__ == "__main__":
    typer.run(main)
