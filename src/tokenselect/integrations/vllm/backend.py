"""TokenSelect as an attention backend of vLLM: raw keys in vLLM's own blocks, one call a layer for the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from tokenselect.hardware import keep_freed_memory
from tokenselect.integrations.vllm import refusals
from tokenselect.integrations.vllm.int8_copy import CopyWork, Int8Copy, plan_copies
from tokenselect.integrations.vllm.metrics import Metrics
from tokenselect.integrations.vllm.requests import RequestTable, adapt_runner, current_requests
from tokenselect.integrations.vllm.rotary import table_of, take_rope
from tokenselect.integrations.vllm.settings import read_settings, trace_folder, trained_window
from tokenselect.integrations.vllm.step import Scoring, Step, plan_step
from tokenselect.integrations.vllm.traces import TraceFolder
from tokenselect.ops import find_backend
from tokenselect.ops.paging import PageTable


class TokenSelectBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [*refusals.CACHE_DTYPES]

    @staticmethod
    def get_name() -> str:
        """The registry's name for a backend from outside vLLM."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TokenSelectImpl]:
        """One object per layer; vLLM asks before it makes the first, of either kind of attention: time to refuse."""
        refusals.check(get_current_vllm_config())
        return TokenSelectImpl

    @staticmethod
    def get_builder_cls() -> type[TokenSelectBuilder]:
        """One object per group of layers."""
        return TokenSelectBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All heads of a token side by side: the cache has one row per token."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """A learned logit per head is taken into the softmax."""
        return True


@dataclass(slots=True)
class TokenSelectMetadata(AttentionMetadata):
    """Of one forward pass, shared by its layers; a dummy run has no step."""

    step: Step | None
    slots: Tensor  # [tokens of the step] int64, their rows in the cache
    copies: CopyWork | None


class TokenSelectBuilder(AttentionMetadataBuilder[TokenSelectMetadata]):
    """Plans a forward pass once for all layers."""

    _cudagraph_support = AttentionCGSupport.NEVER  # which tokens are attended is known only when a layer runs

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = read_settings(vllm_config)
        self.page_size, self.num_kv_heads = kv_cache_spec.block_size, kv_cache_spec.num_kv_heads
        self.max_distance = self.config.max_distance or max(1, trained_window(vllm_config) * 7 // 8)
        layers = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        tables = [table_of(rope, self.config.num_positions, device) for rope in {layer.rope for layer in layers}]
        if any(not torch.equal(table.cos, tables[0].cos) for table in tables):
            raise NotImplementedError("TokenSelect: layers with different rotary embeddings are not supported")
        self.table, self.ops = tables[0], layers[0].ops
        self.rotation = self.table.rotation(slice(None), torch.float32)
        self.metrics = Metrics(len(layers))
        folder = trace_folder(vllm_config)
        traces = None if folder is None else TraceFolder(folder, vllm_config)
        self.requests = RequestTable(self.config, traces, self.metrics.leave)
        adapt_runner()
        keep_freed_memory(device)
        self.metrics.announce(self.config, self.ops.NAME, self.page_size)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TokenSelectMetadata:
        """Plan the forward pass of a batch."""
        batch = common_attn_metadata
        requests = current_requests()
        bounds = batch.query_start_loc_cpu.tolist()
        lengths = batch.seq_lens_cpu_upper_bound.tolist()
        own = [bounds[i + 1] - bounds[i] for i in range(len(requests))] if len(requests) < len(bounds) else []
        if not requests or not all(own):
            return TokenSelectMetadata(None, batch.slot_mapping, None)  # a dummy run: nobody reads what it computes
        pairs = [
            self.requests.enter(request, end - count, end)
            for request, count, end in zip(requests, own, lengths, strict=False)
        ]
        states, stretches = [state for state, _ in pairs], [stretch for _, stretch in pairs]
        pages = PageTable(batch.block_table_tensor[: len(requests)].long(), self.page_size, [0] * len(requests))
        rotations = self.table, self.rotation, self.max_distance
        step = plan_step(stretches, states, pages, *rotations, self.ops, self.metrics.tally)
        self.metrics.count(step, stretches)
        copies = plan_copies(stretches, states, pages, self.requests.num_rows, self.num_kv_heads)
        return TokenSelectMetadata(step, batch.slot_mapping[: step.num_tokens], copies)


class _Rows(NamedTuple):
    """A layer's cache as vLLM hands it over, token by token [num_blocks, block_size, ...], and as one row per token."""

    cache: Tensor
    by_token: Tensor
    keys: Tensor  # [num_rows, num_kv_heads, head_size]
    values: Tensor


class TokenSelectImpl(AttentionImpl[TokenSelectMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refusals.check_layer(alibi_slopes, sliding_window, attn_type, kv_sharing_target_layer_name)
        vllm_config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softcap, self.sinks = logits_soft_cap or None, sinks
        self.rope = take_rope()
        device = vllm_config.device_config.device
        config = read_settings(vllm_config)
        self.ops = find_backend(config.backend, torch.device(device), vllm_config.model_config.dtype, head_size)
        self._copy: Int8Copy | None = None
        self._rows: _Rows | None = None
        group = get_tp_group()
        self._reduce = group.all_reduce if group.world_size > 1 else None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TokenSelectMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch's queries [num_tokens, num_heads, head_size], into `output`."""
        step = attn_metadata.step if attn_metadata is not None else None
        if attn_metadata is None or step is None:  # profiling, warm-up
            return output.zero_()
        rows = self._rows_of(kv_cache)
        self._write(layer, key, value, rows, attn_metadata.slots)
        scoring = self._scoring(rows, step, attn_metadata.copies)
        slots, slot_start_loc = step.attended(layer.layer_name, query, scoring, self.scale, self._reduce)
        self.ops.sparse_attention(
            query,
            rows.keys,
            rows.values,
            step.query_start_loc,
            slots,
            slot_start_loc,
            step.cos,
            step.sin,
            self.scale,
            interleaved=step.table.interleaved,
            softcap=self.softcap,
            sink_logits=self.sinks,
            out=output,
        )
        return output

    def _rows_of(self, kv_cache: Tensor) -> _Rows:
        """vLLM's cache [num_blocks, num_kv_heads, block_size, 2 * head_size] as rows; it stays the same one."""
        if self._rows is None or self._rows.cache is not kv_cache:
            by_token = kv_cache.transpose(1, 2)
            rows = by_token.flatten(0, 1)
            self._rows = _Rows(kv_cache, by_token, rows[..., : self.head_size], rows[..., self.head_size :])
        return self._rows

    def _write(self, layer: Any, key: Tensor, value: Tensor, rows: _Rows, slots: Tensor) -> None:
        """Put raw keys and values of the batch's tokens into their blocks."""
        if slots.device.type != "cuda":
            self.ops.write_rows(key, value, slots, rows.keys, rows.values)
            return
        from vllm._custom_ops import reshape_and_cache_flash

        into = rows.by_token[..., : self.head_size], rows.by_token[..., self.head_size :]
        given = key, value, *into, slots, self.kv_cache_dtype, layer._k_scale, layer._v_scale
        reshape_and_cache_flash(*given)

    def _scoring(self, rows: _Rows, step: Step, copies: CopyWork | None) -> Scoring | None:
        if copies is not None:
            if self._copy is None or self._copy.integers.shape[0] != rows.cache.shape[0]:
                self._copy = Int8Copy(rows.cache[..., : self.head_size])
            self._copy.update(rows.keys, copies, self.ops)
        if not step.selections:
            return None
        if self._copy is None or copies is None or step.selections[0].config.score_dtype == "same":
            return Scoring(rows.keys, rows.keys, step.pages)
        return self._copy.scoring(rows.keys, copies)
