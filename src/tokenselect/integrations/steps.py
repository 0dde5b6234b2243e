"""Layers without the host's Python: traced once for a shape and then run as straight calls of their operations.

Between two attentions of a decode step the host spends hundreds of small Python calls, which at short contexts take
longer than the arithmetic. What a layer does with so many tokens does not depend on which they are, so its operations
are recorded once, without rotations by nothing and with norms as one operation; chunks of a long prompt gain from that
too. A layer that cannot be recorded (its work depends on values) runs as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tokenselect.integrations.cache_name import CACHE_NAMES
from tokenselect.integrations.captured import Captured, Shared
from tokenselect.integrations.rewrites import constants, fuse_norms, join_linears, leave_out_rotation
from tokenselect.integrations.undo import override, own_of

_log = logging.getLogger(__name__)
_ATTENTION = "attend(Tensor query, Tensor key, Tensor value, float scale, float softcap, Tensor? sinks) -> Tensor"
_definitions = torch.library.Library("tokenselect", "FRAGMENT")  # type: ignore[no-untyped-call]
_definitions.define(_ATTENTION)  # type: ignore[no-untyped-call]


def _attended(query: Tensor, *args: object) -> Tensor:
    """Shape [B, Tq, Hq, D] of the attention of a query [B, Hq, Tq, D]."""
    return query.new_empty(query.transpose(1, 2).shape)


torch.library.register_fake("tokenselect::attend", _attended, lib=_definitions)


class CannotTrace(Exception):
    """A layer does more than its recorded operations would do."""


@dataclass(frozen=True, slots=True)
class Program:
    """A decoder layer for hidden states of one shape.

    Attributes:
        run: called with the hidden states, the cache's layer and `inputs`.
        inputs: names of the layer's parameters and buffers that `run` reads, or empty tensors themselves.
    """

    run: Callable[..., Any]
    inputs: tuple[str | Tensor, ...]

    def bind(self, layer: nn.Module) -> Bound:
        """The program with the weights of a layer."""
        own = _tensors_of(layer)
        inputs = tuple(own[name] if isinstance(name, str) else name for name in self.inputs)
        return Bound(self.run, inputs, _hooks_within(layer))


@dataclass(frozen=True, slots=True)
class Bound:
    """A layer's own program."""

    run: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    hooks: tuple[dict[int, Any], ...]  # of the modules within the layer: while there are any, they must run

    def __call__(self, hidden: Tensor, cache_layer: Any) -> Any:
        return self.run(hidden, cache_layer, *self.inputs)


# `make_fx` patches modules for the whole process while it records: one thread at a time.
_RECORDING = Lock()


@dataclass(slots=True)
class Steps:
    """The programs of a decoder's layers, traced when they are first needed.

    Args:
        identity: the `position_embeddings` that every layer gets: 1 and 0, which rotate nothing.
        ops: the backend.
    """

    identity: tuple[Tensor, Tensor]
    ops: Any
    _bound: dict[Any, Bound | Captured | None] = field(default_factory=dict)
    _captured: dict[Any, Captured] = field(default_factory=dict)
    _shared: Shared = field(default_factory=Shared)
    _traced: dict[Any, Program | None] = field(default_factory=dict)

    def find(
        self, index: int, layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Bound | Captured | None:
        """What runs layer `index` on contiguous `hidden` [B, T, hidden_size]; None: the layer must run itself."""
        flags = tuple((name, value if isinstance(value, _PLAIN) else type(value)) for name, value in kwargs.items())
        form = (_form(hidden), flags)
        try:
            bound = self._bound[index, form]
        except KeyError:
            with _RECORDING:
                bound = self._trace(index, layer, forward, hidden, kwargs, form)
                if bound is not None and hidden.is_cuda and hidden.shape[1] == 1:
                    bound = self._capture(index, form, bound)
                self._bound[index, form] = bound
        return None if bound is None or any(bound.hooks) else bound

    def _capture(self, index: int, form: tuple[Any, ...], bound: Bound) -> Captured:
        """A decode step's program as graphs: those that there are, if the weights are the same."""
        known = self._captured.get((index, form))
        if known is None or not known.serves(bound):
            known = self._captured[index, form] = Captured(bound, self._shared)
        return known

    def forget_weights(self) -> None:
        """Look at the layers anew: they may have been changed. What was recorded of layers like them stays."""
        with _RECORDING:
            self._bound.clear()

    def _trace(
        self,
        index: int,
        layer: nn.Module,
        forward: Callable[..., Any],
        hidden: Tensor,
        kwargs: dict[str, Any],
        form: tuple[Any, ...],
    ) -> Bound | None:
        if any(_hooks_within(layer)):
            _log.info("layer %d runs its own Python: modules within it have hooks", index)
            return None
        kind = (form, *_signature(layer))
        if kind not in self._traced:
            self._traced[kind] = None  # and stays so if it fails
            try:
                self._traced[kind] = _trace_layer(index, layer, forward, hidden, kwargs, self.identity, self.ops)
            except Exception as error:  # host code may fail in any way when it is traced
                _log.info("layer %d runs its own Python: %s", index, error)
        program = self._traced[kind]
        return None if program is None else program.bind(layer)


_PLAIN = (bool, int, float, str, type(None))


class _Recording:
    """Stands for a cache and for its layer while a decoder layer is traced."""

    def __init__(self, index: int) -> None:
        self.layers = {index: self}
        self.handed: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.handed = key, value
        return key, value

    def attend(self, query: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
        assert self.handed is not None
        result: Tensor = torch.ops.tokenselect.attend(query, *self.handed, scale, softcap or 0.0, sinks)
        return result


def _attend(
    cache_layer: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Any:
    """What a program calls where the layer attended."""
    cache_layer.update(key, value)
    return cache_layer.attend(query, scale, softcap or None, sinks)


@torch.no_grad()
def _trace_layer(
    index: int,
    layer: nn.Module,
    forward: Callable[..., Any],
    hidden: Tensor,
    kwargs: dict[str, Any],
    identity: tuple[Tensor, Tensor],
    ops: Any,
) -> Program:
    """Record what `forward` does.

    Raises:
        CannotTrace: it uses more than its input, its own tensors and its cache.
    """
    cache = {name: _Recording(index) for name in CACHE_NAMES if kwargs.get(name) is not None}
    given = {**kwargs, **cache}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def call(x: Tensor, *rest: Tensor) -> Any:
        return forward(x, **{**given, **dict(zip(tensors, rest, strict=True))})

    module = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(hidden, *tensors.values())
    _refuse_others(module.graph)
    graph = module.graph
    leave_out_rotation(graph, module, identity)
    fuse_norms(graph, module, ops)
    join_linears(graph)
    graph.eliminate_dead_code()
    cache_layer = _take_cache_layer(graph)
    inputs = _take_tensors(graph, module, _tensors_of(layer), cache_layer)
    graph.lint()
    return Program(fx.GraphModule(nn.Module(), graph).forward, inputs)


def _refuse_others(graph: fx.Graph) -> None:
    """Of its tensor arguments a program gets the hidden states alone."""
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if node.users:
            raise CannotTrace(f"it uses {node.name} beside the hidden states")
        graph.erase_node(node)


def _hooks_within(layer: nn.Module) -> tuple[dict[int, Any], ...]:
    """Hooks of the modules within a layer, which its program would not run; its own run around its forward."""
    inside = [module for name, module in layer.named_modules() if name]
    return tuple(hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks))


def _tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


class _Same:
    """Compares an object by identity, and keeps it alive so that no other one takes its place."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _signature(layer: nn.Module) -> Iterator[Any]:
    """Everything that tracing bakes in: two layers that agree here share a program."""
    internal = nn.Module().__dict__.keys() - {"training"} | {"forward", "layer_idx", "_is_hf_initialized"}
    for name, module in layer.named_modules():
        plain = tuple(
            (key, value if isinstance(value, _PLAIN) else _Same(value))
            for key, value in module.__dict__.items()
            if key not in internal
        )
        yield name, type(module), plain, _Same(own_of(module, "forward"))
        yield tuple(_form(part) for part in module.parameters(recurse=False))
        yield tuple(_form(part) for part in module.buffers(recurse=False))


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _take_cache_layer(graph: fx.Graph) -> fx.Node:
    """Let the cache's layer be the second input, and the attention its work."""
    hidden = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(hidden):
        cache_layer = graph.placeholder("cache_layer")
    attentions = [node for node in graph.nodes if node.target is torch.ops.tokenselect.attend.default]
    if len(attentions) != 1:
        raise CannotTrace(f"it attends {len(attentions)} times")
    attentions[0].target = _attend
    attentions[0].args = (cache_layer, *attentions[0].args)
    return cache_layer


def _take_tensors(
    graph: fx.Graph, module: nn.Module, own: dict[str, Tensor], cache_layer: fx.Node
) -> tuple[str | Tensor, ...]:
    """Let the layer's tensors be inputs, so that layers of one kind share a program; returns which they are."""
    names = {id(tensor): name for name, tensor in own.items()}
    taken: list[str | Tensor] = []
    last = cache_layer
    for node, tensor in constants(graph, module).items():
        if id(tensor) not in names and tensor.numel():
            raise CannotTrace(f"it reads a tensor of shape {tuple(tensor.shape)} that is not its own")
        with graph.inserting_after(last):
            last = graph.placeholder(f"tensor_{len(taken)}")
        taken.append(names.get(id(tensor), tensor))
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return tuple(taken)


_FEW_ROWS = 16  # with more, a matrix product reuses what it has read


def quicken_linears(stack: ExitStack, model: nn.Module, ops: Any) -> None:
    """Let linear layers take the backend's `linear` for a few rows, where it has one that takes their weights."""
    takes: Callable[[Tensor], bool] = getattr(ops, "takes_linear", lambda weight: False)
    for module in model.modules():
        if type(module) is nn.Linear and takes(module.weight):
            override(stack, module, "forward", functools.partial(_linear, ops.linear, module))


def _linear(linear: Callable[..., Tensor], module: nn.Linear, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    few = x.numel() <= _FEW_ROWS * x.shape[-1] and x.dtype == module.weight.dtype
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad)
    if few and not wants_gradient and not torch.is_autocast_enabled(x.device.type):
        return linear(x, module.weight, module.bias)
    return original(x)


def leave_out_rotations(stack: ExitStack, modules: Iterable[nn.Module], identity: tuple[Tensor, Tensor]) -> None:
    """Let the host's function that rotates queries and keys do nothing where it is given the `identity`.

    What it would do is ten launches a layer. It belongs to all models of a kind, so others pass through it as ever.
    """
    for source in {sys.modules[type(module).__module__] for module in modules}:
        rotate: Any = source.__dict__.get("apply_rotary_pos_emb")
        if callable(rotate) and _rotates_nothing(rotate, identity):
            holder: Any = source
            override(stack, holder, "apply_rotary_pos_emb", functools.partial(_rotate, identity[0]))


@torch.no_grad()
def _rotates_nothing(rotate: Callable[..., Any], identity: tuple[Tensor, Tensor]) -> bool:
    """Whether it leaves both as they are, shapes included, found out by what it does to random vectors."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 1, identity[0].shape[-1], generator=generator).to(identity[0])
    try:
        turned = rotate(q, k, *identity)
    except Exception as error:  # it may take other arguments
        _log.info("a rotation by nothing is not left out: %s", error)
        return False
    return isinstance(turned, tuple) and len(turned) == 2 and torch.equal(turned[0], q) and torch.equal(turned[1], k)


def _rotate(ones: Tensor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if len(args) > 2 and args[2] is ones:
        return args[0], args[1]
    return original(*args, **kwargs)


def quicken_norms(stack: ExitStack, model: nn.Module, ops: Any) -> None:
    """Let root mean square norms be one launch where the backend has it, also in layers that run their own Python."""
    takes: Callable[[Tensor], bool] = getattr(ops, "takes_norm", lambda weight: False)
    is_known: dict[type, bool] = {}
    for module in model.modules():
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if not (isinstance(weight, Tensor) and isinstance(epsilon, float) and takes(weight)):
            continue
        if own_of(module, "forward") is not None:
            continue
        kind = type(module)
        if kind not in is_known:
            is_known[kind] = _is_plain_norm(module, weight, epsilon)
        if is_known[kind]:
            override(stack, module, "forward", functools.partial(_norm, ops.rms_norm, module))


@torch.no_grad()
def _is_plain_norm(module: nn.Module, weight: Tensor, epsilon: float) -> bool:
    """Whether a norm does what Llama's does, to the last bit, found out by what it does to random input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
    wide = x.float()
    unit = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return torch.equal(module(x), weight * (wide * unit).to(x.dtype))


def _norm(norm: Callable[..., Tensor], module: nn.Module, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    weight: Any = module.weight
    is_plain = type(x) is Tensor and x.dtype == weight.dtype and x.device == weight.device  # while traced it is not
    if is_plain and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return norm(x, weight, module.variance_epsilon)
    return original(x)
