"""A 7B-shaped model on a GPU end to end: prompts read and tokens written, with TokenSelect, offloaded, and dense.

    python -m benchmarks.gpu_model

Qwen2-7B's shape at random weights in bf16, made on the device: what is generated means nothing, how long it takes does.
Dense is the model as Transformers runs it, SDPA over its DynamicCache, the prompt in one pass. Each method reads a
prompt once unmeasured, so that kernels are compiled, and once measured; then it writes tokens greedily. Rows go to
results/gpu_model.csv.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.cache_name import CACHE
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.measure import quantiles
from tokenselect.offload import OffloadedLayer

LENGTHS = (2**15, 2**17)
DEVICE = torch.device("cuda")
SHAPE = "Qwen2-7B"
NUM_WRITTEN, NUM_WARM = 24, 4
METHODS: dict[str, TokenSelectConfig | None] = {
    "tokenselect": TokenSelectConfig(),
    "tokenselect, kv_offload": TokenSelectConfig(kv_offload=True),
    "tokenselect, Selection Cache, threshold 0": TokenSelectConfig(reuse_threshold=0.0),
    "tokenselect, Selection Cache, threshold 1": TokenSelectConfig(reuse_threshold=1.0),
    "dense": None,
}


def build() -> PreTrainedModel:
    """The model; its window is as long as the longest prompt, so that dense attention is within it."""
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=2**18,
        rope_theta=1e6,
    )
    torch.manual_seed(0)
    with DEVICE:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def entered(model: PreTrainedModel, config: TokenSelectConfig | None) -> AbstractContextManager[Any]:
    """The model under a method."""
    return nullcontext() if config is None else TokenSelect(model, config)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, Tensor, float]:
    """The cache after a prompt, the next token, and seconds."""
    cache = DynamicCache()
    torch.cuda.synchronize()
    start = time.perf_counter()
    token = step(model, ids, cache)
    torch.cuda.synchronize()
    return cache, token, time.perf_counter() - start


def step(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """The likeliest next token [1, 1]."""
    return model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


@torch.no_grad()
def write(model: PreTrainedModel, token: Tensor, cache: DynamicCache) -> tuple[list[float], float]:
    """Milliseconds of each token, and rows of keys and values that a step brought in from host memory."""
    times, brought = [], 0.0
    for i in range(NUM_WARM + NUM_WRITTEN):
        before = _holders(cache)
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = step(model, token, cache)
        torch.cuda.synchronize()
        if i >= NUM_WARM:
            times.append((time.perf_counter() - start) * 1e3)
            pairs = zip(before, _holders(cache), strict=True)
            brought += sum(float((a != b).sum()) for a, b in pairs) / NUM_WRITTEN
    return times, brought


@torch.no_grad()
def device_ms(model: PreTrainedModel, token: Tensor, cache: DynamicCache) -> float:
    """Milliseconds that the kernels of one more step take, whatever the host does in between."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step(model, token, cache)
        torch.cuda.synchronize()
    events = [event for event in profiled.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(float(event.self_device_time_total) for event in events) / 1e3


def _holders(cache: DynamicCache) -> list[Tensor]:
    """Which rows the device has copies of, by layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, OffloadedLayer)]
    return [layer._residents.holders.clone() for layer in layers if layer._residents is not None]


def measure(model: PreTrainedModel, length: int) -> Iterator[dict[str, object]]:
    """A row of each method."""
    ids = torch.randint(0, 150_000, (1, length), device=DEVICE)
    for method, config in METHODS.items():
        with entered(model, config):
            _free(lambda: read(model, ids))
            torch.cuda.reset_peak_memory_stats()
            cache, token, seconds = read(model, ids)
            peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            times, brought = write(model, token, cache)
            kernels = device_ms(model, token, cache)
        yield _row(method, length, seconds, times, peak, kept, brought) | {"step_kernels_ms": round(kernels, 2)}
        del cache, token
        _free(lambda: None)


def _free(act: Callable[[], object]) -> None:
    """Do something of which no memory stays."""
    act()
    gc.collect()
    torch.cuda.empty_cache()


def _row(
    method: str, length: int, seconds: float, times: list[float], peak: int, kept: int, brought: float
) -> dict[str, object]:
    p20, p50, p80 = quantiles(times)
    row: dict[str, object] = {
        "shape": SHAPE,
        "method": method,
        "length": length,
        "prefill_s": round(seconds, 2),
        "prefill_tokens_per_s": round(length / seconds),
        "decode_p20_ms": round(p20, 2),
        "decode_p50_ms": round(p50, 2),
        "decode_p80_ms": round(p80, 2),
        "peak_gb": round(peak / 1e9, 2),
        "kept_gb": round(kept / 1e9, 2),
        "rows_brought": round(brought) if "offload" in method else "",
    }
    print(f"{length:>7} {method:<41} {seconds:6.2f} s {p50:7.2f} ms a token  {peak / 1e9:.1f} GB", flush=True)
    return row


def run() -> list[dict[str, object]]:
    """Measure everything and write it down."""
    model = build()
    weights = torch.cuda.memory_allocated() / 1e9
    print(f"{SHAPE} at random weights: {weights:.1f} GB", flush=True)
    rows = [row | {"weights_gb": round(weights, 2)} for length in LENGTHS for row in measure(model, length)]
    append_rows("gpu_model", rows, DEVICE)
    return rows


if __name__ == "__main__":
    print(json.dumps(run()))
