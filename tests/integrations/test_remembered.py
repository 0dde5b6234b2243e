"""The Selection Cache that decides on the device chooses as `selection.select_tokens` does: tokens, hits and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small import NARROW
from torch import Tensor

from tokenselect.cache import Owner, RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.steady import SteadyLayer, SteadySteps
from tokenselect.offload import make_layer
from tokenselect.ops import gpu, reference
from tokenselect.ops.paging import PageTable
from tokenselect.rotary import RotaryTable
from tokenselect.selection import Block, SelectionState, plan_selection, select_tokens

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, MAX_DISTANCE = 6, 2, 16, 200
REUSE = NARROW.replace(reuse_threshold=0.9, score_dtype="same")
CONFIGS = {
    "groups": REUSE,
    "whole": REUSE.replace(reuse_test="flat"),
    "int8": REUSE.replace(score_dtype="int8"),
    "one distance": REUSE.replace(scoring="position_free"),
    "block in window": REUSE.replace(local_includes_block=True),
    "always": REUSE.replace(reuse_threshold=0.0),
    "off": REUSE.replace(reuse_threshold=2.0),
}


def rotary_table(config: TokenSelectConfig) -> RotaryTable:
    frequencies = 1e4 ** -(torch.arange(DIM // 2, device=DEVICE) / (DIM // 2))
    angles = torch.arange(config.num_positions, device=DEVICE)[:, None] * frequencies
    return RotaryTable(angles.cos(), angles.sin(), False, 1.0)


@dataclass
class Sequences:
    """A layer of some sequences that steps read, and what the definition says of the same steps."""

    config: TokenSelectConfig
    padding: list[int]
    length: int = 50
    reserve: int = 90
    offload: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(10)  # no votes at a threshold as close as halves are rounded
        batch = len(self.padding)
        self.table = rotary_table(self.config)
        self.tokens = torch.randn(2, batch, KV_HEADS, 200, DIM, generator=generator).to(DEVICE)
        owner: Any = Owner(reserve=self.reserve, traced=True)
        if self.config.score_dtype == "int8":
            owner.quantize, owner.center_tokens = reference.quantize_rows, self.config.center_tokens
        backend: Any = gpu
        resident = self.config.num_resident_tokens if self.offload else None
        self.layer: RawKeyLayer = make_layer(owner, 0, backend, resident)
        self.layer.update(*self.tokens[:, :, :, : self.length])
        if owner.quantize is not None:
            self.layer.scoring_rows(self.padding)
        self.steady = SteadySteps(self.config, backend, MAX_DISTANCE)
        self.states = [SelectionState() for _ in self.padding]

    def step(self, queries: Tensor) -> Tensor:
        """Attention [B, Hq, D] of the next token of each sequence, decided on the device."""
        column, known = self.length, self.length + 1
        plan = self.steady.begin([self.layer], self.padding, column, known, self.table, lambda: None)
        assert plan is not None
        try:
            layer: SteadyLayer = plan.layer(self.layer)
            layer.update(*self.tokens[:, :, :, column : column + 1])
            out = layer.attend(queries[:, :, None].to(DEVICE), DIM**-0.5, None, None)
            layer.count()
        finally:
            plan.end()
        self.length += 1
        return out[:, 0].cpu()

    def expected(self, queries: Tensor) -> Tensor:
        """The same by `select_tokens` in plain torch, of the step that was made last."""
        column, batch, backend = self.length - 1, len(self.padding), reference
        keys, values = self.tokens[:, :, :, : self.length]
        rows = [part.transpose(1, 2).flatten(0, 1).cpu() for part in (keys, values)]
        pages = PageTable(torch.arange(batch)[:, None], self.length, self.padding)
        table = RotaryTable(self.table.cos.cpu(), self.table.sin.cpu(), False, 1.0)
        blocks = [Block(i, column - pad, column - pad + 1, i) for i, pad in enumerate(self.padding)]
        plan = plan_selection(blocks, self.config, table, MAX_DISTANCE)
        scored, *copy = (rows[0],) if self.config.score_dtype == "same" else self.copied(pages)
        ops: Any = backend
        chosen = select_tokens(queries, scored, pages, plan, self.states, self.config, ops, DIM**-0.5, *copy)
        slots = [pages.slots(i, own) for i, own in enumerate(chosen)]
        lengths = torch.tensor([0, *(part.shape[0] for part in slots)]).cumsum(0)
        return backend.sparse_attention(
            queries, *rows, torch.arange(batch + 1), torch.cat(slots), lengths, table.cos, table.sin, DIM**-0.5
        )

    def copied(self, pages: PageTable) -> tuple[Tensor, Tensor, Tensor]:
        """The int8 copy as the layer made it, laid out like the plain rows."""
        copy = self.layer.int8_copy
        assert copy is not None
        integers = copy.integers[:, :, : self.length].transpose(1, 2).flatten(0, 1).cpu()
        scales = copy.scales[:, :, : self.length].transpose(1, 2).flatten(0, 1).cpu()
        return integers, scales, copy.center.cpu()

    def check(self, queries: Tensor) -> None:
        """Make a step and compare its output."""
        made, expected = self.step(queries), self.expected(queries)
        torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)

    def check_states(self) -> None:
        """What the host is told when it asks."""
        for made, expected in zip(self.layer.states, self.states, strict=True):
            names = ("lookups", "hits", "attended", "available", "window_start", "served")
            if not self.config.reuse:
                names = ("lookups", "hits", "attended", "available")
            assert [getattr(made, name) for name in names] == [getattr(expected, name) for name in names]
            if self.config.reuse:
                assert made.indices is not None
                assert expected.indices is not None
                assert torch.equal(made.indices.cpu(), expected.indices)
                torch.testing.assert_close(made.query, expected.query, check_device=False)


def queries_of(step: int, batch: int) -> Tensor:
    """Queries that turn at another speed in each sequence; the last one's second KV head turns away at times."""
    a, b = torch.randn(2, 1, HEADS, DIM, generator=torch.Generator().manual_seed(10))
    angle = torch.tensor([(0.13, 0.4, 0.0)[i] * step for i in range(batch)])[:, None, None]
    made = angle.cos() * a + angle.sin() * b
    if step % 5 == 4:
        made[-1, HEADS // KV_HEADS :] *= -0.1
    return made


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [[0], [0, 7, 3]], ids=["alone", "padded"])
def test_the_same_tokens_hits_and_counts(name: str, padding: list[int]) -> None:
    made = Sequences(CONFIGS[name], padding)
    for i in range(20):
        made.check(queries_of(i, len(padding)))
    made.check_states()
    hits = [state.hits for state in made.layer.states]
    assert all(0 < each < 20 for each in hits) if made.config.reuse else not any(hits)


def test_a_window_that_reaches_too_far_selects_again() -> None:
    made = Sequences(CONFIGS["always"], [0])
    for i in range(20):
        made.check(queries_of(0, 1))
        served = made.layer.states[0].served
        assert served == (i % NARROW.num_local_tokens > 0)
    assert made.layer.states[0].hits == 17


@pytest.mark.parametrize("name", ["groups", "int8"])
def test_asking_the_host_in_between_changes_nothing(name: str) -> None:
    made = Sequences(CONFIGS[name], [0, 2])
    for i in range(12):
        made.check(queries_of(i, 2))
        if i % 3 == 0:
            made.check_states()
    made.check_states()


def test_a_cache_that_grows_remembers() -> None:
    made = Sequences(CONFIGS["groups"], [0, 5], reserve=0, length=250)
    made.tokens = torch.randn(2, 2, KV_HEADS, 300, DIM).to(DEVICE)
    made.layer.reset()
    made.layer.update(*made.tokens[:, :, :, : made.length])
    capacity = made.layer.cache_shape[2]
    for i in range(12):
        made.check(queries_of(i, 2))
    assert made.layer.cache_shape[2] > capacity
    made.check_states()


def test_a_cut_sequence_selects_again() -> None:
    made = Sequences(CONFIGS["always"], [0])
    for _ in range(3):
        made.check(queries_of(0, 1))
    made.layer.crop(-2)
    made.length -= 2
    for state in made.states:
        state.forget()
    made.check(queries_of(0, 1))
    assert [state.hits for state in made.layer.states] == [2]
    made.check_states()


def test_other_sequences_take_their_memory_along() -> None:
    made = Sequences(CONFIGS["groups"], [0, 0, 0])
    for i in range(4):
        made.check(queries_of(i, 3))
    rows = torch.tensor([2, 0, 0])
    made.layer.reorder_cache(rows.to(DEVICE))
    made.tokens[:, :, :, : made.length] = made.tokens[:, rows.to(DEVICE), :, : made.length]
    made.states = [SelectionState(**vars_of(made.states[row])) for row in rows.tolist()]
    for i in range(4, 8):
        made.check(queries_of(i, 3))
    made.check_states()


def vars_of(state: SelectionState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in SelectionState.__slots__}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="keys in host memory need a GPU")
def test_rows_in_host_memory() -> None:
    made = Sequences(CONFIGS["int8"], [0, 7], offload=True)
    for i in range(12):
        made.check(queries_of(i, 2))
    made.check_states()
