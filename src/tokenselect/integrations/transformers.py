"""TokenSelect inside a Transformers model: enter, generate, leave as if nothing had happened.

Attention, rotary embedding and cache are exchanged through the host's own extension points; everything is undone on
exit, also after an exception.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from itertools import pairwise
from threading import Lock
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.masking_utils import causal_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast

from tokenselect.cache import Owner, RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.hardware import keep_freed_memory
from tokenselect.integrations.cache_name import CACHE, CACHE_NAMES, cache_argument, cache_in, handed_cache
from tokenselect.integrations.host import Host, check_offload, inspect_model, learn_rotary
from tokenselect.integrations.passes import plan_pass
from tokenselect.integrations.room import with_room
from tokenselect.integrations.steady import SteadySteps
from tokenselect.integrations.steps import Steps, leave_out_rotations, quicken_linears, quicken_norms
from tokenselect.integrations.undo import override, put_back
from tokenselect.offload import make_layer
from tokenselect.ops import find_backend
from tokenselect.selection import Select, select_tokens
from tokenselect.trace.recorder import Recorder

_PREFIX = "tokenselect_over_"
_WORTH_TRACING = 3  # chunks of one length in a prompt; decode steps always are
# By decoder. The model holds its TokenSelect (in what is put before its methods), so this need not.
_ENABLED: WeakKeyDictionary[nn.Module, ref[TokenSelect]] = WeakKeyDictionary()
# Where the prompt that `generate` is reading ends, padding included: its last tokens select one by one.
_PROMPT_END: ContextVar[int | None] = ContextVar("prompt_end", default=None)


class TokenSelect:
    """Context manager: inside it the model reads contexts far beyond its trained window.

    Args:
        model: a Transformers decoder with rotary embedding.
        config: the settings; `TokenSelectConfig()` by default.
        on_prefill: called with (tokens read, tokens to read) while a prompt is read.
        recorder: is told what is selected; see `tokenselect.trace`.

    Raises:
        NotImplementedError: the model cannot be served; the message names why.
        ValueError: the budget is larger than the model's trained window, or a setting needs a GPU.
        BackendUnavailable: a backend asked for by name cannot run.

    Note:
        A left-padded batch read in several chunks is cut into chunks for all its rows at once, so in a row whose
        padding is no multiple of `block_size` a chunk's end cuts a block in two, which may select otherwise than alone.

    Example:
        with TokenSelect(model, TokenSelectConfig()):
            model.generate(**inputs, max_new_tokens=64)
    """

    def __init__(
        self,
        model: nn.Module,
        config: TokenSelectConfig | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.model = model
        self.on_prefill, self.recorder = on_prefill, recorder
        self.host: Host = inspect_model(model)
        self.config = (config or TokenSelectConfig()).for_window(self.host.trained_window)
        self.config.check_window(self.host.trained_window)
        check_offload(self.host, self.config)
        self.ops = find_backend(self.config.backend, self.host.device, self.host.dtype, self.host.head_dim)
        self.select: Select = select_tokens
        self.max_distance = self.config.max_distance or max(1, self.host.trained_window * 7 // 8)
        self._owners: WeakSet[Owner] = WeakSet()
        self._stack = ExitStack()

    def __enter__(self) -> TokenSelect:
        if self.host.decoder in _ENABLED:
            raise RuntimeError("TokenSelect is enabled on this model already: leave it first")
        self.rotary = learn_rotary(self.host, self.config.num_positions)
        keep_freed_memory(self.host.device)
        with ExitStack() as stack:  # undone here too if a step fails
            self._identity = self.rotary.identity(self.host.dtype)
            stack.enter_context(_attention_name(self.host.config))
            put_back(stack, self.host.decoder.rotary_emb)
            self._steps = Steps(self._identity, self.ops)
            self._steady = SteadySteps(self.config, self.ops, self.max_distance)
            for index, module in self.host.attention.items():
                override(stack, module, "forward", functools.partial(self._attention, index))
                layer = self.host.decoder.layers[index]
                override(stack, layer, "forward", functools.partial(self._layer, index, layer))
            quicken_linears(stack, self.model, self.ops)
            quicken_norms(stack, self.model, self.ops)
            leave_out_rotations(stack, self.host.attention.values(), self._identity)
            override(stack, self.host.decoder, "forward", self._forward)
            if hasattr(self.model, "generate"):
                override(stack, self.model, "generate", self._generate)
            _ENABLED[self.host.decoder] = ref(self)
            stack.callback(_ENABLED.pop, self.host.decoder, None)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for owner in self._owners:
            owner.active = False
        self._owners.clear()
        self._stack.close()

    # -- what runs inside the model ------------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, which tells where the prompt ends and what is not supported."""
        _refuse_generation(self.model, kwargs)
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        end = None
        if mask is not None:
            end = mask.shape[-1]
        elif ids is not None:
            past = cache.get_seq_length() if cache is not None else 0
            end = ids.shape[1] if ids.shape[1] > past else past + ids.shape[1]
        token = _PROMPT_END.set(end)
        try:
            return original(*args, **kwargs)
        finally:
            _PROMPT_END.reset(token)

    @torch.no_grad()
    @with_room
    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward: long inputs in chunks, each with its plan."""
        if self.host.decoder.training:
            raise NotImplementedError("training is not supported: call model.eval()")
        parameters = inspect.signature(original).parameters
        kwargs.update(zip(parameters, args, strict=False))
        inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if inputs is None or not inputs.shape[1]:
            return original(**kwargs)  # which says what is missing
        cache, owner = self._prepare_cache(cache_in(kwargs))
        past, length = cache.get_seq_length(), inputs.shape[1]
        padding = _left_padding(kwargs.get("attention_mask"), inputs.shape[0], past + length)
        _check_positions(kwargs.get("position_ids"), padding, past, length)
        as_tuple = kwargs.pop("return_dict", True) is False
        keeps_cache = kwargs.get("use_cache") is not False
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs.update({cache_argument(parameters): cache, "use_cache": True})
        owner.reserve = past + length + self.config.block_size
        if length > 1:
            self._steps.forget_weights()
        outputs = []
        chunks = self._chunks(past, past + length)
        shapes = Counter(end - start for start, end in chunks)
        for start, end in chunks:
            is_frequent = length == 1 or shapes[end - start] >= _WORTH_TRACING
            owner.traced = is_frequent and not torch.is_autocast_enabled(inputs.device.type)
            owner.plan = self._plan(cache.layers, padding, start, end, past + length)
            try:
                outputs.append(original(**_slice_inputs(kwargs, past, start, end)))
            finally:
                owner.plan.end()
                owner.plan = None
            if self.on_prefill and length > 1:
                self.on_prefill(end - past, length)
        merged = _merge(outputs, cache if keeps_cache else None)
        return merged.to_tuple() if as_tuple else merged

    def _plan(self, layers: Sequence[Any], padding: list[int], start: int, end: int, total: int) -> Any:
        config, prompt_end = self.config, _PROMPT_END.get() or total
        is_prompt = total - start > 1 or end - start > 1
        tail = prompt_end - config.num_tail_tokens if is_prompt else total
        known = max(total, prompt_end)
        table = self.rotary.table(max(config.num_attended(known - pad) for pad in padding))
        own, lengths, watched = (padding, start, end - start), (tail, known), (self.select, self.recorder)
        make = functools.partial(plan_pass, config, self.ops, table, self.max_distance, *own, *lengths, *watched)
        steady = None
        if end - start == 1 and self.recorder is None and self.select is select_tokens:
            steady = self._steady.begin(layers, padding, start, known, table, make)
        return steady or make()

    def _chunks(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cut a pass where blocks begin; the first piece holds all that needs no selection."""
        size = self.config.block_size
        step = max(size, self.config.prefill_chunk_size // size * size)
        dense_end = (self.config.dense_limit // size + 1) * size
        cuts = [start]
        while cuts[-1] < end:
            following = cuts[-1] // size * size + step
            cuts.append(min(end, max(following, dense_end)))
        return list(pairwise(cuts))

    def _layer(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A decoder layer's forward; passes of a shape that comes often take its traced program."""
        own = handed_cache(kwargs).layers[index]
        if own.owner.traced and len(args) == 1 and kwargs.get("attention_mask") is None:
            hidden = args[0].contiguous()
            if program := self._steps.find(index, layer, original, hidden, kwargs):
                return program(hidden, own)
        return original(*args, **kwargs)

    def _attention(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """An attention module's forward, with its cache and positions that leave queries and keys raw."""
        if not self.host.config._attn_implementation.startswith(_PREFIX):
            raise RuntimeError("the attention implementation was changed inside TokenSelect: leave it first")
        kwargs.update(position_embeddings=self._identity, tokenselect=handed_cache(kwargs).layers[index])
        return original(*args, **kwargs)

    def _prepare_cache(self, cache: Any) -> tuple[Any, Owner]:
        """The caller's cache with our layers in it, which an empty `DynamicCache` gets on first use."""
        if cache is None:
            cache = DynamicCache(config=self.host.config)
        if type(cache) is not DynamicCache or cache.offloading:
            kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
            raise NotImplementedError(f"{kind} is not supported: pass a DynamicCache, or none")
        ours = next((layer for layer in cache.layers if isinstance(layer, RawKeyLayer)), None)
        if ours is not None:
            if ours.owner not in self._owners:
                raise ValueError("this cache was filled under other settings of TokenSelect: start a new one")
            return cache, ours.owner
        if cache.get_seq_length():
            raise ValueError("this cache was filled without TokenSelect: its keys are rotated; start a new one")
        owner = Owner()
        if self.config.score_dtype == "int8":
            owner.quantize, owner.center_tokens = self.ops.quantize_rows, self.config.center_tokens
        self._owners.add(owner)
        fresh: Any = DynamicCache(config=self.host.config).layers
        resident = self.config.num_resident_tokens if self.config.kv_offload else None
        cache.layers = fresh or [None] * self.host.config.num_hidden_layers
        for index in self.host.attention:
            cache.layers[index] = make_layer(owner, index, self.ops, resident)
        cache.layer_class_to_replicate = None
        return cache, owner


def enable(model: nn.Module, config: TokenSelectConfig | None = None) -> TokenSelect:
    """Switch TokenSelect on until `disable(model)`; see `TokenSelect` for what can be raised."""
    return TokenSelect(model, config).__enter__()


def disable(model: nn.Module) -> None:
    """Undo `enable`.

    Raises:
        RuntimeError: it is not enabled.
    """
    enabled = next((found() for found in map(_ENABLED.get, model.modules()) if found), None)
    if enabled is None:
        raise RuntimeError("TokenSelect is not enabled on this model")
    enabled.__exit__(None, None, None)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tokenselect: RawKeyLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that Transformers calls; layers that do not select keep the host's own."""
    if tokenselect is None:
        own = _own_attention(module)
        result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return result
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions is not supported: no attention matrix exists")
    if tokenselect.handed is None or key is not tokenselect.handed[0] or value is not tokenselect.handed[1]:
        kind = getattr(module.config, "model_type", type(module).__name__)
        raise NotImplementedError(f"{kind} changes keys or values after they are cached, which is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tokenselect.attend(query, scale, kwargs.get("softcap"), kwargs.get("s_aux")), None


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    name = module.config._attn_implementation.removeprefix(_PREFIX)  # type: ignore[union-attr, operator]
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)  # type: ignore[no-any-return]


def _mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask function that Transformers calls: ours need none, sliding layers get the host's own."""
    if kwargs.get("local_size") is not None:
        name = config._attn_implementation.removeprefix(_PREFIX)
        return AttentionMaskInterface()[name](*args, config=config, **kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        raise NotImplementedError("packed sequences and custom mask functions are not supported")
    return None


class _attention_name:  # noqa: N801  (a context manager)
    """Let a config name our attention, registered as long as somebody uses it."""

    users: ClassVar[Counter[tuple[str, int]]] = Counter()  # of a name by a config: models may share one
    lock: ClassVar[Lock] = Lock()

    def __init__(self, config: Any) -> None:
        self.config, self.own = config, config._attn_implementation.removeprefix(_PREFIX)
        self.name = _PREFIX + self.own

    def __enter__(self) -> None:
        with self.lock:
            AttentionInterface.register(self.name, _attend)
            AttentionMaskInterface.register(self.name, _mask)
            self.users[self.name, id(self.config)] += 1
            self.config._attn_implementation = self.name

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users[self.name, id(self.config)] -= 1
            if self.users[self.name, id(self.config)]:
                return
            del self.users[self.name, id(self.config)]
            self.config._attn_implementation = self.own
            if not any(name == self.name for name, _ in self.users):
                AttentionInterface._global_mapping.pop(self.name, None)
                AttentionMaskInterface._global_mapping.pop(self.name, None)


def _refuse_generation(model: nn.Module, kwargs: dict[str, Any]) -> None:
    settings = kwargs.get("generation_config") or model.generation_config
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"):
        if kwargs.get(name) or getattr(settings, name, None):
            raise NotImplementedError(f"generate({name}=...) is not supported")
    for name in ("cache_implementation",):
        value = kwargs.get(name) or getattr(settings, name, None)
        if value not in (None, "dynamic"):
            raise NotImplementedError(f"generate({name}={value!r}) is not supported: leave it out")


def _left_padding(mask: Any, batch: int, total: int) -> list[int]:
    """Tokens of padding before each sequence."""
    if mask is None:
        return [0] * batch
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise NotImplementedError("only 2-D attention masks [batch, tokens] are supported")
    real = mask.bool()
    if bool(real.all()):
        return [0] * batch
    if mask.shape[1] != total:
        raise ValueError(f"attention_mask must cover {total} tokens (cached and new), got {mask.shape[1]}")
    padding = real.int().argmax(dim=1)
    if not bool((real.sum(dim=1) == total - padding).all()):
        raise NotImplementedError("only left padding is supported: attention_mask has a 0 after a 1, or no 1")
    return [int(pad) for pad in padding.tolist()]


def _check_positions(position_ids: Tensor | None, padding: list[int], past: int, length: int) -> None:
    if position_ids is None or length == 1:
        return
    index = torch.arange(past + 1, past + length, device=position_ids.device)
    padded = index <= torch.tensor(padding, device=position_ids.device)[:, None]
    if not bool(((position_ids.diff(dim=-1) == 1) | padded).all()):
        raise NotImplementedError("position_ids must be consecutive: packed sequences are not supported")


def _slice_inputs(kwargs: dict[str, Any], past: int, start: int, end: int) -> dict[str, Any]:
    part = slice(start - past, end - past)
    out = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if out.get(name) is not None:
            out[name] = out[name][:, part]
    if out.get("attention_mask") is not None:
        out["attention_mask"] = out["attention_mask"][:, :end]
    return out


def _merge(outputs: list[Any], cache: Cache | None) -> BaseModelOutputWithPast:
    """One output from those of the chunks."""
    merged = dict(outputs[0])
    merged.pop(CACHE, None)
    if cache is not None:
        merged[CACHE] = cache
    if len(outputs) > 1:
        merged["last_hidden_state"] = torch.cat([part.last_hidden_state for part in outputs], dim=1)
        for name, dim in (("hidden_states", 1), ("router_logits", 0)):
            if merged.get(name) is not None:
                layers = zip(*(part[name] for part in outputs), strict=True)
                merged[name] = tuple(torch.cat(parts, dim=dim) for parts in layers)
    return type(outputs[0])(**merged)
