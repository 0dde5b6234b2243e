"""How near a method's attention is to dense attention, whatever the model is able to say.

A text within the trained window is read densely; at every layer the methods choose from the very queries and keys that
dense attention has there, so their figures do not depend on what they did to the layers before. Spans of queries:
"prefill", the text's blocks; "tail", the last tokens of the prompt; "decode", single steps after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenselect.config import TokenSelectConfig
from tokenselect.evals.truth import Truth
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.methods.selecting import Around, Choice
from tokenselect.ops.paging import PageTable
from tokenselect.selection import Block, SelectionPlan, SelectionState, plan_selection, select_tokens

if TYPE_CHECKING:
    from tokenselect.models import LoadedModel
    from tokenselect.ops import Backend

NUM_TAIL, NUM_STEPS = 64, 64
PHASES = ("prefill", "tail", "decode")
ORACLES = ("oracle_shared", "oracle_heads")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method that is measured: a name of the caller's, how it chooses, and the settings that it is asked for."""

    name: str
    choice: Choice
    asked: TokenSelectConfig


@dataclass(slots=True)
class Sums:
    """What is counted of one method in one phase and layer; every figure is a ratio of sums.

    Attributes:
        mass: attention mass that dense attention gives to attended tokens, of `total`.
        middle_mass: of tokens outside sinks and local window, of `middle_total`.
        recall_shared: share of the k tokens with most mass over all heads that are attended, summed over `choices`.
        recall_heads: the same of each head's own k tokens, mean over heads.
        error: squared distance of the attention output to dense attention's, of `norm`.
    """

    mass: float = 0.0
    total: float = 0.0
    middle_mass: float = 0.0
    middle_total: float = 0.0
    recall_shared: float = 0.0
    recall_heads: float = 0.0
    choices: int = 0
    error: float = 0.0
    norm: float = 0.0
    hits: int = 0
    lookups: int = 0

    def __iadd__(self, other: Sums) -> Sums:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def figures(self) -> dict[str, float | None]:
        """The figures by name; None where nothing was counted."""
        return {
            "mass": _share(self.mass, self.total),
            "middle_mass": _share(self.middle_mass, self.middle_total),
            "recall_shared": _share(self.recall_shared, self.choices),
            "recall_heads": _share(self.recall_heads, self.choices),
            "output_error": None if not self.norm else round((self.error / self.norm) ** 0.5, 5),
            "hit_rate": _share(self.hits, self.lookups),
        }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 5) if whole else None


Found = dict[tuple[str, str, int], Sums]  # by method, phase and layer


@torch.no_grad()
def measure_fidelity(
    loaded: LoadedModel,
    ids: Tensor,
    candidates: Sequence[Candidate],
    block_step: int = 1,
    oracles: bool = True,
    layer_step: int = 1,
) -> Found:
    """Read a text densely and compare every method at every layer.

    Args:
        loaded: the model.
        ids: [1, length] tokens, at most the trained window and enough for something to be selected.
        candidates: the methods; those whose budget covers a span are not counted there.
        block_step: of the prompt's blocks only every so many are compared (stateful methods see all of them).
        oracles: whether to measure them too.
        layer_step: only every so many layers are compared.

    Returns:
        Sums by method, phase and layer; `ORACLES` choose by the true attention, with the first candidate's k.

    Raises:
        ValueError: the text is longer than the trained window, where dense attention is no truth.
    """
    length, window = ids.shape[1], loaded.trained_window
    if length > window:
        raise ValueError(f"ids must be within the trained window of {window} tokens, got {length}")
    base = candidates[0].choice.settings(candidates[0].asked)
    size = base.block_size
    config = base.replace(
        num_dense_tokens=window, prefill_chunk_size=-(-length // size) * size, score_dtype="same", reuse_threshold=2.0
    )
    host = TokenSelect(loaded.model, config)
    found: Found = defaultdict(Sums)
    plans = _Plans(host, length)

    def tell(layer: int, *facts: Any) -> None:
        if layer % layer_step == 0:
            _compare(found, host, candidates, plans, block_step, oracles, layer, *facts)

    watched = _Watched(host.ops, tell)
    host.ops = watched  # type: ignore[assignment]
    with host:
        loaded.model(ids, logits_to_keep=1)
    return dict(found)


class _Watched(Around):
    """Tells what every layer attends to."""

    def __init__(self, ops: Backend, tell: Callable[..., None]) -> None:
        super().__init__(ops)
        self._tell, self._layer = tell, 0

    def sparse_attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, slots: Tensor, *rest: Any, **extras: Any
    ) -> Tensor:
        """Dense attention of the whole text, in one block."""
        out = self.ops.sparse_attention(queries, keys, values, starts, slots, *rest, **extras)
        self._tell(self._layer, queries, keys[slots], values[slots], out, rest[-1])
        self._layer += 1
        return out


@dataclass(slots=True)
class _Plans:
    """Plans are the same for all layers."""

    host: TokenSelect
    length: int
    known: dict[tuple[str, str, int], SelectionPlan] = field(default_factory=dict)

    def spans(self, phase: str, config: TokenSelectConfig) -> list[list[tuple[int, int, int]]]:
        """Passes of a phase: (start, end, first query that is compared) of the blocks of each."""
        prompt, size = self.length - NUM_STEPS, config.block_size
        tail = prompt - NUM_TAIL
        if phase == "prefill":
            starts = [start for start in range(0, tail, size) if not config.covers(self.length, start)]
            return [[(start, min(start + size, tail), start)] for start in starts]
        if phase == "tail" and not config.num_tail_tokens:
            start = tail // size * size
            return [] if config.covers(self.length, start) else [[(start, prompt, tail)]]
        first = tail if phase == "tail" else prompt
        steps = [(at, at + 1, at) for at in range(first, first + (NUM_TAIL if phase == "tail" else NUM_STEPS))]
        steps = [step for step in steps if not config.covers(self.length, step[0])]
        return [[step] for step in steps] if phase == "decode" and config.reuse else [steps]

    def plan(self, name: str, phase: str, number: int, blocks: list[Block], config: TokenSelectConfig) -> SelectionPlan:
        """The plan of the `number`-th pass of a phase."""
        key = name, phase, number
        if key not in self.known:
            table, distance = self.host.rotary.table(self.length), self.host.max_distance
            self.known[key] = plan_selection(blocks, config, table, config.max_distance or distance)
        return self.known[key]


def _compare(
    found: Found,
    host: TokenSelect,
    candidates: Sequence[Candidate],
    plans: _Plans,
    block_step: int,
    oracles: bool,
    layer: int,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    ops = host.ops.ops  # type: ignore[attr-defined]
    table = host.rotary.table(plans.length)
    truth = Truth(queries, keys, values, out, table, scale, candidates[0].choice.settings(candidates[0].asked), ops)
    for candidate in candidates:
        config = candidate.choice.settings(candidate.asked).replace(num_dense_tokens=0)
        run = _Run(candidate, config, plans, ops, truth, [SelectionState()])
        for phase in PHASES:
            found[candidate.name, phase, layer] += run.phase(phase, block_step)
    base = candidates[0].choice.settings(candidates[0].asked).replace(num_dense_tokens=0)
    for phase in PHASES:
        step = block_step if phase == "prefill" else 1
        spans = [span for one in plans.spans(phase, base)[::step] for span in one]
        for name in ORACLES if oracles else ():
            found[name, phase, layer] += truth.oracle(spans, by_head=name == "oracle_heads")


@dataclass(slots=True)
class _Run:
    """One method at one layer, from the first block to the last step."""

    candidate: Candidate
    config: TokenSelectConfig
    plans: _Plans
    ops: Backend
    truth: Truth
    states: list[SelectionState]

    def phase(self, phase: str, block_step: int) -> Sums:
        """Choose and compare, pass by pass."""
        before = self.states[0].hits, self.states[0].lookups
        compared: list[tuple[int, int, int]] = []
        chosen: list[Tensor] = []
        for number, spans in enumerate(self.plans.spans(phase, self.config)):
            attended = self._choose(phase, number, spans) if spans else []
            if phase != "prefill" or number % block_step == 0:
                compared, chosen = compared + spans, chosen + attended
        sums = self.truth.compare(compared, chosen, self.config.num_selected_tokens)
        sums.hits, sums.lookups = self.states[0].hits - before[0], self.states[0].lookups - before[1]
        return sums

    def _choose(self, phase: str, number: int, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        truth, choice, name = self.truth, self.candidate.choice, self.candidate.name
        rows = [0, *accumulate(end - start for start, end, _ in spans)]
        blocks = [Block(0, start, end, row) for (start, end, _), row in zip(spans, rows, strict=False)]
        plan = self.plans.plan(name, phase, number, blocks, self.config)
        queries = torch.cat([truth.queries[start:end] for start, end, _ in spans])
        ops: Any = choice.around(self.ops) if choice.around else self.ops
        pages = PageTable(torch.zeros(1, 1, dtype=torch.int64, device=queries.device), len(truth.keys), [0])
        keys, copy = truth.keys, (None, None)
        if self.config.score_dtype == "int8":
            keys, *copy = truth.int8_copy(self.config.center_tokens)  # type: ignore[assignment]
        select = choice.select or select_tokens
        return select(queries, keys, pages, plan, self.states, self.config, ops, truth.scale, *copy)
