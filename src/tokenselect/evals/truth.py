"""Dense attention of one layer, and how much of it a choice of tokens keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenselect.ops.reference import rotate

if TYPE_CHECKING:
    from tokenselect.config import TokenSelectConfig
    from tokenselect.evals.fidelity import Sums
    from tokenselect.ops import Backend
    from tokenselect.rotary import RotaryTable

Span = tuple[int, int, int]  # start and end of a block, and its first query that is compared
_QUERIES_AT_ONCE = 512


class Truth:
    """One layer that has read a text densely.

    Args:
        queries: [T, Hq, D], raw.
        keys: [T, Hkv, D], raw.
        values: like `keys`.
        out: [T, Hq, D], what dense attention gave.
        table: rotations for T positions.
        scale: factor of the logits.
        base: says which tokens are sinks and local, and k of the oracles.
        ops: computes attention over a choice.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        table: RotaryTable,
        scale: float,
        base: TokenSelectConfig,
        ops: Backend,
    ) -> None:
        self.queries, self.keys, self.values, self.out = queries, keys, values, out
        self.table, self.scale, self.base, self.ops = table, scale, base, ops
        self.cos, self.sin = table.rotation(slice(len(keys)), torch.float32)
        turned = rotate(keys, self.cos[:, None], self.sin[:, None], table.interleaved)
        self._keys = turned.transpose(0, 1).contiguous()  # [Hkv, T, D]
        self._known: dict[tuple[Span, ...], Tensor] = {}  # asked for by every method
        self._middles: dict[tuple[Span, ...], Tensor] = {}
        self._bests: dict[tuple[tuple[Span, ...], int, bool], Tensor] = {}
        self._copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def received(self, spans: tuple[Span, ...]) -> Tensor:
        """Attention that each token gets from a span's queries that are compared, summed over them.

        Args:
            spans: with equally many such queries.

        Returns:
            [spans, Hq, T] float32, T the latest end.
        """
        if spans not in self._known:
            rows, end = self._rows(spans), max(end for _, end, _ in spans)
            q = rotate(self.queries[rows], self.cos[rows, None], self.sin[rows, None], self.table.interleaved)
            q = q.transpose(0, 1).reshape(len(self._keys), -1, q.shape[-1])
            logits = (q @ self._keys[:, :end].transpose(1, 2) * self.scale).view(-1, len(rows), end)
            future = torch.arange(end, device=rows.device) > rows[:, None]
            shares = logits.masked_fill_(future, float("-inf")).softmax(-1)
            self._known[spans] = shares.view(len(shares), len(spans), -1, end).sum(2).transpose(0, 1)
        return self._known[spans]

    def int8_copy(self, center_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What scoring reads with `score_dtype` "int8": integers, scales and center."""
        if center_tokens not in self._copies:
            center = self.keys[:center_tokens].float().mean(0)
            self._copies[center_tokens] = *self.ops.quantize_rows(self.keys, center), center[None]
        return self._copies[center_tokens]

    def compare(self, spans: Sequence[Span], attended: Sequence[Tensor], k: int) -> Sums:
        """Count what the spans' choices keep; `k` tokens are what an oracle would have chosen (0: `base`'s)."""
        from tokenselect.evals.fidelity import Sums

        sums = Sums()
        for first, part in _together(spans):
            positions = attended[first : first + len(part)]
            sums += self._kept(part, positions, k or self.base.num_selected_tokens)
            sums += self._distance(part, positions)
        return sums

    def oracle(self, spans: Sequence[Span], by_head: bool) -> Sums:
        """What the best choice keeps: one for all heads, or one for each."""
        from tokenselect.evals.fidelity import Sums

        sums, k = Sums(), self.base.num_selected_tokens
        for _, part in _together([span for span in spans if self._high(span) - self.base.num_sink_tokens >= k]):
            best, middle = self._best(part, k, by_head), self._middle(part)
            kept = middle.gather(2, best.expand(-1, middle.shape[1], -1)).sum()
            total, of_middle, kept_there = torch.stack((self.received(part).sum(), middle.sum(), kept)).tolist()
            sums += Sums(
                mass=total - of_middle + kept_there, total=total, middle_mass=kept_there, middle_total=of_middle
            )
            if not by_head:
                sums += self._distance(
                    part, [self._attended(span, own[0]) for span, own in zip(part, best, strict=True)]
                )
        return sums

    def _kept(self, spans: tuple[Span, ...], attended: Sequence[Tensor], k: int) -> Sums:
        from tokenselect.evals.fidelity import Sums

        received, middle = self.received(spans), self._middle(spans)
        chosen = torch.zeros(len(spans), 1, received.shape[2], device=received.device)
        for own, positions in zip(chosen, attended, strict=True):
            own[0, positions] = 1
        counted = torch.stack([part.sum() for part in (received * chosen, received, middle * chosen, middle)])
        sums = Sums(*counted.tolist())
        if ranked := tuple(span for span in spans if self._high(span) - self.base.num_sink_tokens > k):
            choices = chosen[[span in ranked for span in spans]]
            sums.choices = len(ranked)
            sums.recall_shared, sums.recall_heads = (
                float(choices.expand(-1, best.shape[1], -1).gather(2, best).mean((1, 2)).sum())
                for best in (self._best(ranked, k, by_head) for by_head in (False, True))
            )
        return sums

    def _high(self, span: Span) -> int:
        """One past the last token that is not local to the block."""
        return max(self.base.num_sink_tokens, span[0] - self.base.num_local_tokens)

    def _attended(self, span: Span, chosen: Tensor) -> Tensor:
        """Sinks, chosen tokens and all from the local window on."""
        sinks = torch.arange(self.base.num_sink_tokens, device=chosen.device)
        return torch.cat((sinks, chosen.sort().values, torch.arange(self._high(span), span[1], device=chosen.device)))

    def _middle(self, spans: tuple[Span, ...]) -> Tensor:
        """As `received`; zero where tokens are sinks or local to the block."""
        if spans not in self._middles:
            received = self.received(spans)
            places = torch.arange(received.shape[2], device=received.device)
            ends = torch.tensor([self._high(span) for span in spans], device=received.device)
            inside = (places >= self.base.num_sink_tokens) & (places < ends[:, None])
            self._middles[spans] = received * inside[:, None]
        return self._middles[spans]

    def _best(self, spans: tuple[Span, ...], k: int, by_head: bool) -> Tensor:
        """[spans, Hq or 1, k] tokens of the middle with the most attention of all queries."""
        key = spans, k, by_head
        if key not in self._bests:
            middle = self._middle(spans)
            middle = middle if by_head else middle.sum(1, keepdim=True)
            # Attention may be so small that it is zero: even then a token outside the middle comes after it.
            places = torch.arange(middle.shape[2], device=middle.device)
            ends = torch.tensor([self._high(span) for span in spans], device=middle.device)
            outside = (places < self.base.num_sink_tokens) | (places >= ends[:, None])
            self._bests[key] = middle.masked_fill(outside[:, None], -1.0).topk(k).indices
        return self._bests[key]

    def _rows(self, spans: Sequence[Span]) -> Tensor:
        """Queries that are compared."""
        return torch.cat([torch.arange(first, end, device=self.queries.device) for _, end, first in spans])

    def _distance(self, spans: Sequence[Span], attended: Sequence[Tensor]) -> Sums:
        """Squared distance of the attention over a choice, at re-indexed positions, to dense attention."""
        from tokenselect.evals.fidelity import Sums

        longest, rows = max(len(positions) for positions in attended), self._rows(spans)
        starts = torch.tensor([0, *accumulate(end - first for _, end, first in spans)])
        slot_starts = torch.tensor([0, *accumulate(len(positions) for positions in attended)])
        found = self.ops.sparse_attention(
            self.queries[rows], self.keys, self.values, starts, torch.cat(list(attended)), slot_starts,
            self.cos[:longest], self.sin[:longest], self.scale, interleaved=self.table.interleaved,
        )  # fmt: skip
        true = self.out[rows].float()
        error, norm = torch.stack(((found.float() - true).square().sum(), true.square().sum())).tolist()
        return Sums(error=error, norm=norm)


def _together(spans: Sequence[Span]) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """Consecutive spans with equally many queries, as many as may be compared at once, and the index of the first."""
    begin = 0
    for count, found in groupby(spans, lambda span: span[1] - span[2]):
        run = tuple(found)
        step = max(1, _QUERIES_AT_ONCE // count)
        for at in range(0, len(run), step):
            yield begin + at, run[at : at + step]
        begin += len(run)
