"""What scoring by an int8 copy of the keys changes: recall of the exact top-k on real keys of real text.

    python -m benchmarks.recall --length 16000

While a text is read, every block's votes are counted three times: in float32, which is the truth, by the keys as they
are cached ("same"), and by their int8 copy. Rows go to results/recall.csv: one per k and way, over layers and blocks.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Annotated, Any

import torch
import typer
from rich import print as show
from torch import Tensor

from benchmarks.end_to_end import load_text
from benchmarks.report import append_rows
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.ops import Backend


class Compared:
    """A backend that scores in three ways, and keeps how much of the exact choice the two fast ones find."""

    def __init__(self, ops: Backend, ks: list[int]) -> None:
        self.ops, self.ks = ops, ks
        self.found: dict[tuple[int, str], list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def score_tokens(self, queries: Tensor, keys: Tensor, pages: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        wide = keys.float()  # so that the exact votes round neither keys nor queries
        exact, start_loc = self.ops.score_tokens(queries, wide, pages, *rest)
        center = wide[:1024].mean(0)
        integers, scales = self.ops.quantize_rows(wide, center)
        of, candidates, distances, scale, context, _, _, *by_age = rest
        given = of, candidates, distances, scale, context, scales, center[None], *by_age  # not the cache's own copy
        ways = {"int8": self.ops.score_tokens(queries, integers, pages, *given)[0]}
        ways["same"] = self.ops.score_tokens(queries, keys, pages, *rest)[0]
        for k in self.ks:
            chosen = self._sets(exact, start_loc, k)
            for way, votes in ways.items():
                for ours, theirs in zip(self._sets(votes, start_loc, k), chosen, strict=True):
                    self.found[k, way].append(float(torch.isin(ours, theirs).float().mean()))
        return ways["same"], start_loc

    def _sets(self, votes: Tensor, start_loc: Tensor, k: int) -> list[Tensor]:
        bounds = start_loc.tolist()
        parts = [votes[a:b] for a, b in itertools.pairwise(bounds) if b - a >= 4 * k]
        return [self.ops.topk_tokens(part, torch.tensor([0, len(part)]), k)[0] for part in parts]


@torch.no_grad()
def main(
    length: Annotated[int, typer.Option(help="tokens of the text")] = 16_000,
    ks: Annotated[list[int], typer.Option("-k", help="numbers of selected tokens")] = [512, 2048],  # noqa: B006
) -> None:
    """Recall of the exact top-k where at least 4 k tokens can be chosen from."""
    loaded, ids = load_text(length)
    with TokenSelect(loaded.model, TokenSelectConfig(num_dense_tokens=0, score_dtype="same")) as host:
        compared = Compared(host.ops, ks)
        host.ops = compared  # type: ignore[assignment]
        loaded.model(ids, logits_to_keep=1)
    rows = []
    for (k, way), shares in sorted(compared.found.items()):
        part = torch.tensor(shares)
        row = {
            "length": length,
            "k": k,
            "score_dtype": way,
            "selections": len(shares),
            "recall": round(float(part.mean()), 4),
        }
        rows.append(row | {"p5": round(float(part.quantile(0.05)), 4), "least": round(float(part.min()), 4)})
        show(rows[-1])
    append_rows("recall", rows)


if __name__ == "__main__":
    typer.run(main)
