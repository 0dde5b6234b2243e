"""What a Transformers model is made of, as far as selection needs to know; what it cannot serve is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenselect.config import TokenSelectConfig
from tokenselect.rotary import HostRotary

_PROBE = "tokenselect_probe"
_PROBING = Lock()  # the name is one for the whole process


@dataclass(frozen=True, slots=True)
class Host:
    """A decoder whose full-attention layers can select.

    Attributes:
        decoder: the module that owns the layers and the rotary embedding.
        config: its text config.
        attention: attention module of each layer that selects, by layer index; the others keep their own attention.
        num_kv_heads: KV heads per layer.
        head_dim: size of a head.
        trained_window: positions that the model was trained for.
    """

    decoder: Any
    config: Any
    attention: dict[int, nn.Module]
    num_kv_heads: int
    head_dim: int
    trained_window: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = next(self.decoder.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(self.decoder.parameters()).device
        return device

    @property
    def layer_type(self) -> str | None:
        """Name of the kind of layer that selects, where the rotary embedding differs by kind (Gemma 3)."""
        per_type = isinstance(getattr(self.decoder.rotary_emb, "rope_type", None), dict)
        return "full_attention" if per_type else None


def inspect_model(model: nn.Module) -> Host:
    """Find a model's decoder and the layers that can select.

    Raises:
        NotImplementedError: the model has an architecture that selection does not support; the message names it.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    _refuse_by_config(config, text)
    decoder = _find_decoder(model, text)
    attention = {index: _attention_of(decoder.layers[index], text) for index in _full_attention_layers(text)}
    if not attention:
        raise NotImplementedError(
            f"every layer of {_name(text)} has sliding-window attention: there is nothing to select from"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Host(decoder, text, attention, num_kv_heads, head_dim, text.max_position_embeddings)


def check_offload(host: Host, config: TokenSelectConfig) -> None:
    """Refuse to keep the cache of a model in host memory that runs there.

    Raises:
        ValueError: it does.
    """
    if config.kv_offload and host.device.type != "cuda":
        raise ValueError(
            f"kv_offload needs a model on a GPU, got one on {host.device}: move it there, or leave kv_offload out"
        )


def learn_rotary(host: Host, max_length: int) -> HostRotary:
    """The host's rotary embedding, its layout learned from what every selecting layer does to its queries.

    Raises:
        NotImplementedError: a layer does not rotate its queries in a known way.
    """
    rotary = HostRotary(host.decoder.rotary_emb, max_length, host.layer_type)
    cos, sin = rotary.host_tables(_PROBE_LENGTH)
    real = (cos.to(host.dtype), sin.to(host.dtype))
    for index, module in host.attention.items():
        raw = _queries_of(module, host, rotary.identity(host.dtype))
        turned = _queries_of(module, host, real)
        if torch.equal(raw, turned):
            raise NotImplementedError(f"layer {index} of {_name(host.config)} has no rotary embedding (NoPE)")
        try:
            rotary.learn_layout(raw, turned)
        except NotImplementedError as error:
            raise NotImplementedError(f"layer {index} of {_name(host.config)} has {error}") from None
    return rotary


_PROBE_LENGTH = 8


@torch.no_grad()
def _queries_of(module: nn.Module, host: Host, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """The queries [1, Hq, T, D] that an attention module makes of fixed random input."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_LENGTH, host.config.hidden_size, generator=generator)
    with _recorded_queries(module.config) as queries:
        module(
            hidden_states=hidden.to(host.device, host.dtype),
            position_embeddings=position_embeddings,
            attention_mask=None,
            position_ids=torch.arange(_PROBE_LENGTH, device=host.device)[None],
        )
    return queries[0]


@contextmanager
def _recorded_queries(config: Any) -> Iterator[list[Tensor]]:
    queries: list[Tensor] = []

    def record(_: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        queries.append(query)
        return torch.zeros_like(query).transpose(1, 2), None

    with _PROBING:
        name = config._attn_implementation
        AttentionInterface.register(_PROBE, record)
        config._attn_implementation = _PROBE
        try:
            yield queries
        finally:
            config._attn_implementation = name
            AttentionInterface._global_mapping.pop(_PROBE, None)


def _refuse_by_config(config: Any, text: Any) -> None:
    if config is None:
        raise NotImplementedError("the model has no Transformers config")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{_name(config)} is an encoder-decoder: only decoders are supported")
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(f"{_name(text)} has multi-head latent attention (MLA), which is not supported")
    if getattr(text, "alibi", False) or getattr(text, "model_type", "") in ("bloom", "mpt"):
        raise NotImplementedError(f"{_name(text)} has ALiBi instead of rotary embedding (RoPE), which is not supported")
    others = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise NotImplementedError(f"{_name(text)} has layers of the kind {', '.join(sorted(others))}")


def _find_decoder(model: nn.Module, text: Any) -> Any:
    for module in model.modules():
        if isinstance(getattr(module, "rotary_emb", None), nn.Module) and hasattr(module, "layers"):
            return module
    raise NotImplementedError(f"{_name(text)} has no rotary embedding (RoPE) shared by its layers")


def _full_attention_layers(text: Any) -> list[int]:
    """Layers that keep every token in Transformers' own cache: it knows which ones slide."""
    kinds = [type(layer) for layer in DynamicCache(config=text).layers] or [DynamicLayer] * text.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind is DynamicLayer]


def _attention_of(layer: nn.Module, text: Any) -> nn.Module:
    for module in layer.modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
            if getattr(module, "is_causal", True) is not True:
                raise NotImplementedError(f"{_name(text)} has bidirectional attention: only decoders are supported")
            if getattr(module, "config", None) is not text:
                raise NotImplementedError(f"{_name(text)} has attention that Transformers cannot exchange")
            return module
    raise NotImplementedError(f"no attention module found in {type(layer).__name__}")


def _name(config: Any) -> str:
    return getattr(config, "model_type", None) or type(config).__name__
