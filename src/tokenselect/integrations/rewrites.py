"""What is left out of a traced layer or joined in it; results stay what they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

_aten = torch.ops.aten


def constants(graph: fx.Graph, module: nn.Module) -> dict[fx.Node, Tensor]:
    """Tensors that a graph reads and that are no inputs."""
    return {node: operator.attrgetter(str(node.target))(module) for node in graph.nodes if node.op == "get_attr"}


_SHAPES = {"view", "unsqueeze", "expand", "_to_copy", "slice", "alias", "clone", "detach", "lift_fresh_copy"}


def leave_out_rotation(graph: fx.Graph, module: nn.Module, identity: tuple[Tensor, Tensor]) -> None:
    """`x * 1 + rotate_half(x) * 0` is `x`."""
    values: dict[fx.Node, int] = {}  # nodes that are 1 or 0 everywhere
    for node, tensor in constants(graph, module).items():
        if tensor is identity[0] or tensor is identity[1]:
            values[node] = int(tensor is identity[0])
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name, inputs = getattr(node.target, "__name__", "").split(".")[0], [a for a in node.args if a in values]
        if not inputs:
            continue
        first, second = [*node.args[:2], None][:2]
        if name in _SHAPES and first in values:
            values[node] = values[first]
        elif name == "mul" and isinstance(second, fx.Node):
            other, value = (second, values[first]) if first in values else (first, values[second])
            if value == 0:
                values[node] = 0
            elif _looks_like(other, node):
                node.replace_all_uses_with(other)
        elif name in ("add", "sub") and second in values and values[second] == 0 and _looks_like(first, node):
            node.replace_all_uses_with(first)


def _looks_like(a: Any, b: fx.Node) -> bool:
    one, two = a.meta["val"], b.meta["val"]
    return bool(one.shape == two.shape and one.dtype == two.dtype)


def fuse_norms(graph: fx.Graph, module: nn.Module, ops: Any) -> None:
    """A root mean square norm is one operation, where the backend has it."""
    known = constants(graph, module)
    is_native = not hasattr(ops, "takes_norm")
    takes: Callable[[Tensor], bool] = getattr(ops, "takes_linear" if is_native else "takes_norm", lambda weight: False)
    for node in [node for node in graph.nodes if node.target is _aten.rsqrt.default]:
        found = _norm_around(node, known)
        if found is None or not takes(known[found[2]]):
            continue
        end, x, weight, epsilon = found
        with graph.inserting_before(end):
            target = torch.ops.tokenselect.rms_norm.default if is_native else ops.rms_norm
            norm = graph.call_function(target, (x, weight, epsilon))
        norm.meta = end.meta
        end.replace_all_uses_with(norm)


def _norm_around(rsqrt: fx.Node, known: dict[fx.Node, Tensor]) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """Last node, input, weight and epsilon of `weight * (x * rsqrt(mean(x ** 2) + epsilon)).to(x.dtype)`."""
    add = _made_by(rsqrt.args[0], _aten.add.Tensor)
    mean = add and _made_by(add.args[0], _aten.mean.dim)
    power = mean and list(mean.args[1:]) == [[-1], True] and _made_by(mean.args[0], _aten.pow.Tensor_Scalar)
    if not power or power.args[1] != 2 or not isinstance(add.args[1], float):
        return None
    wide, scaled = power.args[0], _only_user(rsqrt, _aten.mul.Tensor)
    if scaled is None or set(scaled.args) != {wide, rsqrt}:
        return None
    narrow = _only_user(scaled, _aten._to_copy.default) or scaled
    end = _only_user(narrow, _aten.mul.Tensor)
    weight = end and next((part for part in end.args if part in known), None)
    x = wide.args[0] if wide.target is _aten._to_copy.default else wide
    if (
        not weight
        or not x.meta["val"].is_contiguous()
        or not _looks_like(x, end)
        or known[weight].shape != x.meta["val"].shape[-1:]
    ):
        return None
    return (end, x, weight, add.args[1]) if known[weight].dtype == x.meta["val"].dtype else None


def join_linears(graph: fx.Graph) -> None:
    """Two or three linear layers of the same input are one operation, where the native kernels are there."""
    if not hasattr(torch.ops.tokenselect, "linear"):
        return
    linear = torch.ops.tokenselect.linear.default
    by_input: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.target is linear:
            by_input.setdefault(node.args[0], []).append(node)
    joined = {2: torch.ops.tokenselect.linear2, 3: torch.ops.tokenselect.linear3}
    for x, nodes in by_input.items():
        if len(nodes) not in joined:
            continue
        tensors = [part for node in nodes for part in node.args[1:]]
        for tensor in tensors:  # weights are there from the start
            if nodes[0] < tensor:
                nodes[0].prepend(tensor)
        with graph.inserting_before(nodes[0]):
            outs = graph.call_function(joined[len(nodes)].default, (x, *tensors))
            parts = [graph.call_function(operator.getitem, (outs, i)) for i in range(len(nodes))]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _made_by(node: Any, target: Any) -> Any:
    return node if isinstance(node, fx.Node) and node.target is target else None


def _only_user(node: fx.Node, target: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None
