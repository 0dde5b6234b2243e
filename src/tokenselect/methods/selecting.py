"""What methods that choose cached tokens share with ours: all but the choice.

Raw keys, re-indexed positions, blocks and their attention are those of `TokenSelect`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.transformers import TokenSelect
from tokenselect.ops.reference import rotate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokenselect.ops import Backend
    from tokenselect.ops.reference import Distances
    from tokenselect.selection import Select
    from tokenselect.trace.recorder import Recorder


class Around:
    """A backend whose operations are another's, but for those that a subclass has of its own.

    Args:
        ops: the other.
    """

    def __init__(self, ops: Backend) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)


def _as_asked(config: TokenSelectConfig) -> TokenSelectConfig:
    return config


@dataclass(frozen=True, slots=True)
class Choice:
    """A method that chooses cached tokens.

    Attributes:
        settings: what it runs with, of what was asked for.
        around: makes the backend that it uses of the one that would be: another vote.
        select: stands for `selection.select_tokens`: another way to choose.
    """

    settings: Callable[[TokenSelectConfig], TokenSelectConfig] = _as_asked
    around: Callable[[Backend], Around] | None = None
    select: Select | None = None

    def attach(
        self,
        model: nn.Module,
        config: TokenSelectConfig,
        on_prefill: Callable[[int, int], None] | None = None,
        recorder: Recorder | None = None,
    ) -> TokenSelect:
        """See `methods.attach`."""
        host = TokenSelect(model, self.settings(config), on_prefill, recorder)
        if self.around is not None:
            host.ops = cast("Backend", self.around(host.ops))
        if self.select is not None:
            host.select = self.select
        return host


def turned_queries(queries: Tensor, view: Distances, block: int) -> Tensor:
    """Pooled queries [Hq, D] of one block, turned by the distance of each run of keys: [runs, Hq, D] float32."""
    first, last = view.run_start_loc[block : block + 2].tolist()
    return rotate(queries, view.cos[first:last, None], view.sin[first:last, None], view.interleaved)
