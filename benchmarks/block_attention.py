"""Attention of one block of 512 queries, selection included, against the fastest dense attention to be had here.

    python -m benchmarks.block_attention
    python -m benchmarks.block_attention --length 131072 --shape qwen2-7b --repeats 5

One layer, bf16. TokenSelect takes the very path of the Transformers integration: `RawKeyLayer`, `plan_pass`,
`Pass.attend`. Everybody takes turns in one process. Kernels that compute something else than they should get no
numbers: the run ends with exit code 1. Rows go to results/block_attention.csv.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

from benchmarks.buffers import random_bf16
from benchmarks.dense_block import KERNELS
from benchmarks.operations.case import relative_error
from benchmarks.ops import Choice, refuse_wrong_results
from benchmarks.report import put_rows
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timed_ops import TimedOps
from tokenselect.cache import Owner, RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.passes import plan_pass
from tokenselect.measure import alternate, quantiles
from tokenselect.ops import Backend, cpu, find_backend

NAME = "block_attention"
KEY = ("shape", "length", "method", "scoring", "keys", "k", "threads", "device")
_LENGTHS = [32768, 131072, 524288, 1048576]
_BLOCK = 512
_TOKENS_AT_ONCE = 65536
_CHECKED_LENGTH = 5120
_TOLERANCE = 3e-2  # of dense attention in bf16 against float32
_PARTS = {"copy": "quantize_rows", "score": "score_tokens", "topk": "topk_tokens", "attend": "sparse_attention"}

Call = Callable[[], dict[str, float]]  # seconds: "all", and of each operation


def main(
    shape: Annotated[list[str], typer.Option(help="heads of which models")] = list(SHAPES),  # noqa: B006
    length: Annotated[list[int], typer.Option(help="tokens before the block")] = _LENGTHS,
    scoring: Annotated[list[str], typer.Option(help="how keys are scored")] = ["merged", "position_free"],  # noqa: B006
    keys: Annotated[list[str], typer.Option(help="what is scored: bf16, int8")] = ["bf16", "int8"],  # noqa: B006
    num_selected_tokens: Annotated[int, typer.Option(help="k")] = 2048,
    threads: Annotated[int, typer.Option(help="torch threads; 0: what torch chooses")] = 0,
    repeats: Annotated[int, typer.Option(help="most runs of each")] = 15,
    seconds: Annotated[float, typer.Option(help="who has taken so long at a length is not repeated")] = 30.0,
) -> None:
    """Measure the attention of one block."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = TokenSelectConfig(num_selected_tokens=num_selected_tokens, num_dense_tokens=0)
    for name in shape:
        _refuse(name, scoring, keys)
        for tokens in length:
            layer = Layer(SHAPES[name], tokens)
            calls = layer.calls([config.replace(scoring=one) for one in scoring], keys)
            for key, runs in alternate(calls, repeats, seconds).items():
                put_rows(NAME, [_shown(_row(name, tokens, config, key, runs))], KEY)
            del layer, calls  # gigabytes, before the next ones are made
            gc.collect()


class Layer:
    """One attention layer whose cache holds `length` random tokens and, after them, a block's own."""

    def __init__(self, shape: Shape, length: int) -> None:
        self.shape, self.length = shape, length
        end = length + _BLOCK
        self.cache = RawKeyLayer(Owner(reserve=end))
        for first in range(0, end, _TOKENS_AT_ONCE):
            own = (1, shape.num_kv_heads, min(_TOKENS_AT_ONCE, end - first), shape.head_dim)
            self.cache.update(random_bf16(*own), random_bf16(*own))
        self.query = torch.randn(1, shape.num_q_heads, _BLOCK, shape.head_dim).bfloat16()

    def calls(self, configs: list[TokenSelectConfig], keys: list[str]) -> dict[str, Call]:
        """Everybody, warmed up; names are "method, scoring, keys"."""
        ops = find_backend("auto", torch.device("cpu"), torch.bfloat16, self.shape.head_dim)
        calls = {
            f"tokenselect, {config.scoring}, {kind}": self._selecting(config, ops, kind)
            for config in configs
            for kind in keys
        }
        for call in calls.values():
            call()
        return calls | {f"dense {name}, , ": partial(_timed, call) for name, call in self.dense().items()}

    def _selecting(self, config: TokenSelectConfig, ops: Backend, keys: str) -> Call:
        timed, end = TimedOps(ops), self.length + _BLOCK
        table, distance = self.shape.rotary_table(config.budget), self.shape.max_distance
        # Made once per forward pass and shared by all layers, so it is no part of what is measured.
        plan = plan_pass(config, cast("Backend", timed), table, distance, [0], self.length, _BLOCK, end, end)

        def call() -> dict[str, float]:
            self.cache.owner.quantize = timed.quantize_rows if keys == "int8" else None
            self._append_again()
            timed.seconds.clear()
            whole = _timed(lambda: plan.attend(self.cache, self.query, self.shape.scale, None, None))
            return whole | timed.seconds

        return call

    def _append_again(self) -> None:
        """The block's own tokens are new once more: their int8 copy, if there is one, is part of what is measured."""
        assert self.cache.keys is not None
        assert self.cache.values is not None
        own = [part[:, :, self.length :].clone() for part in (self.cache.keys, self.cache.values)]
        self.cache.crop(-_BLOCK)
        self.cache.update(*own)

    def dense(self) -> dict[str, Callable[[], Tensor]]:
        """The dense kernels, [Hq, C, D].

        Queries are scaled before the clock starts, and no rotation is asked of dense attention: its cache holds
        rotated keys.
        """
        keys, values = self.cache.keys, self.cache.values
        assert keys is not None
        assert values is not None
        query = self.query[0] * self.shape.scale
        return {name: partial(kernel, query, keys[0], values[0]) for name, kernel in KERNELS.items()}


def _refuse(name: str, scoring: list[str], keys: list[str]) -> None:
    """End the run if an operation, or a dense kernel, computes something else than it should."""
    choice = Choice(
        ["score_tokens", "topk_tokens", "sparse_attention"], [name], scoring, keys, ["contiguous"], [_BLOCK]
    )
    for case in choice.cases([_CHECKED_LENGTH]):
        refuse_wrong_results(case)
    layer = Layer(SHAPES[name], _CHECKED_LENGTH)
    keys_, values, seen = layer.cache.keys, layer.cache.values, _CHECKED_LENGTH + _BLOCK
    assert keys_ is not None
    assert values is not None
    mask = torch.ones(_BLOCK, seen, dtype=torch.bool).tril(_CHECKED_LENGTH)
    given = (layer.query.float(), keys_.float(), values.float())
    expected = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask, enable_gqa=True)[0]
    for kernel, call in layer.dense().items():
        if not (error := relative_error(call(), expected)) <= _TOLERANCE:
            print(f"No numbers: dense {kernel} is wrong by {error:.3g}, allowed {_TOLERANCE}.", file=sys.stderr)
            raise typer.Exit(1)


def _timed(call: Callable[[], Any]) -> dict[str, float]:
    started = time.perf_counter()
    call()
    return {"all": time.perf_counter() - started}


def _row(shape: str, length: int, config: TokenSelectConfig, key: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    method, scoring, keys = key.split(", ")
    ours = method == "tokenselect"
    row: dict[str, Any] = {"shape": shape, "length": length, "method": method, "scoring": scoring, "keys": keys}
    row |= {"k": config.num_selected_tokens if ours else "", "kernels": cpu.instruction_set() if ours else ""}
    row |= {"repeats": len(runs)}
    row |= {
        f"{name}_ms": round(value * 1e3, 3) for name, value in quantiles([run["all"] for run in runs])._asdict().items()
    }
    for part, operation in _PARTS.items():
        row[f"{part}_ms"] = round(quantiles([run.get(operation, 0.0) for run in runs]).p50 * 1e3, 3) if ours else ""
    return row


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    parts = "".join(f", {part} {row[f'{part}_ms']:.2f}" for part in _PARTS if row[f"{part}_ms"] != "")
    how = " ".join(filter(None, (row["method"], row["scoring"], row["keys"])))
    print(f"{row['shape']} {row['length']}, {how}: {row['p50_ms']:.2f} ms{parts} ({row['repeats']} runs)", flush=True)
    return row


if __name__ == "__main__":
    typer.run(main)
