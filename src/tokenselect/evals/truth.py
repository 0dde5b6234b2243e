"""Dense attention of one layer, and how much of it a choice of tokens keeps."""

from __future__ import annotations

from itertools import accumulate
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
        self._keys = turned.transpose(0, 1)  # [Hkv, T, D]
        self._known: dict[Span, Tensor] = {}  # asked for by every method
        self._bests: dict[tuple[Span, int, bool], Tensor] = {}
        self._copies: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def received(self, span: Span) -> Tensor:
        """Attention [Hq, end] that each token gets from the span's queries that are compared, summed over them."""
        if span not in self._known:
            _, end, first = span
            cos, sin = self.cos[first:end], self.sin[first:end]
            q = rotate(self.queries[first:end], cos[:, None], sin[:, None], self.table.interleaved).transpose(0, 1)
            num_kv_heads = len(self._keys)
            logits = q.reshape(num_kv_heads, -1, q.shape[-1]) @ self._keys[:, :end].transpose(1, 2) * self.scale
            logits = logits.view(-1, end - first, end)
            future = torch.ones(end - first, end, dtype=torch.bool, device=q.device).triu(first + 1)
            self._known[span] = logits.masked_fill_(future, float("-inf")).softmax(-1).sum(1)
        return self._known[span]

    def int8_copy(self, center_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """What scoring reads with `score_dtype` "int8": integers, scales and center."""
        if center_tokens not in self._copies:
            center = self.keys[:center_tokens].float().mean(0)
            self._copies[center_tokens] = *self.ops.quantize_rows(self.keys, center), center[None]
        return self._copies[center_tokens]

    def compare(self, spans: list[Span], attended: list[Tensor], k: int) -> Sums:
        """Count what the spans' choices keep; `k` tokens are what an oracle would have chosen (0: `base`'s)."""
        from tokenselect.evals.fidelity import Sums

        sums = Sums()
        for span, positions in zip(spans, attended, strict=True):
            sums += self._kept(span, positions, k or self.base.num_selected_tokens)
        sums.error, sums.norm = self._error(spans, attended)
        return sums

    def oracle(self, span: Span, by_head: bool) -> Sums:
        """What the best choice keeps: one for all heads, or one for each."""
        from tokenselect.evals.fidelity import Sums

        received, (low, high) = self.received(span), self._middle(span)
        if high - low < self.base.num_selected_tokens:
            return Sums()
        middle = received[:, low:high]
        best = self._best(span, self.base.num_selected_tokens, by_head)
        kept = float(middle.gather(1, best.expand(len(middle), -1)).sum())
        total, all_middle = float(received.sum()), float(middle.sum())
        sums = Sums(mass=total - all_middle + kept, total=total, middle_mass=kept, middle_total=all_middle)
        if not by_head:
            device = best.device
            sinks, recent = torch.arange(low, device=device), torch.arange(high, span[1], device=device)
            positions = torch.cat((sinks, best[0].sort().values + low, recent))
            sums.error, sums.norm = self._error([span], [positions])
        return sums

    def _kept(self, span: Span, positions: Tensor, k: int) -> Sums:
        from tokenselect.evals.fidelity import Sums

        received, (low, high) = self.received(span), self._middle(span)
        is_attended = torch.zeros(span[1], dtype=torch.bool, device=received.device)
        is_attended[positions] = True
        chosen, middle = is_attended[low:high], received[:, low:high]
        sums = Sums(
            mass=float((received * is_attended).sum()),
            total=float(received.sum()),
            middle_mass=float((middle * chosen).sum()),
            middle_total=float(middle.sum()),
        )
        if high - low > k:
            sums.choices = 1
            sums.recall_shared, sums.recall_heads = (
                float(chosen[self._best(span, k, by_head)].float().mean()) for by_head in (False, True)
            )
        return sums

    def _middle(self, span: Span) -> tuple[int, int]:
        """Tokens that are neither sinks nor local to the block."""
        low = self.base.num_sink_tokens
        return low, max(low, span[0] - self.base.num_local_tokens)

    def _best(self, span: Span, k: int, by_head: bool) -> Tensor:
        """[Hq or 1, k] tokens of the middle with the most attention of all queries."""
        key = span, k, by_head
        if key not in self._bests:
            low, high = self._middle(span)
            middle = self.received(span)[:, low:high]
            self._bests[key] = (middle if by_head else middle.sum(0, keepdim=True)).topk(k).indices
        return self._bests[key]

    def _error(self, spans: list[Span], attended: list[Tensor]) -> tuple[float, float]:
        """Squared distance of the attention over a choice, at re-indexed positions, to dense attention."""
        longest = max(len(positions) for positions in attended)
        cos, sin = self.table.rotation(slice(longest), torch.float32)
        starts = torch.tensor([0, *accumulate(end - first for _, end, first in spans)])
        slot_starts = torch.tensor([0, *accumulate(len(positions) for positions in attended)])
        queries = torch.cat([self.queries[first:end] for _, end, first in spans])
        found = self.ops.sparse_attention(
            queries, self.keys, self.values, starts, torch.cat(attended), slot_starts, cos, sin, self.scale,
            interleaved=self.table.interleaved,
        )  # fmt: skip
        true = torch.cat([self.out[first:end] for _, end, first in spans]).float()
        return float((found.float() - true).square().sum()), float(true.square().sum())
