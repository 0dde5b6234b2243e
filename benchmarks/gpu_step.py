"""A decode step of one layer as it really runs: a steady step of `integrations.steady`, over a cache that is there.

Part of `benchmarks.gpu`. The step's own token is in the cache already; what is timed is selection and attention.
"""

from __future__ import annotations

import functools

from torch import Tensor

from tokenselect.cache import Buffers, Owner, RawKeyLayer
from tokenselect.config import TokenSelectConfig
from tokenselect.integrations.steady import SteadyLayer, SteadySteps
from tokenselect.ops import Backend, gpu
from tokenselect.rotary import RotaryTable
from tokenselect.selection import SelectionState

MAX_DISTANCE = 28_672  # 7/8 of Qwen2-7B's trained window


class Step:
    """A decode step of one sequence.

    Args:
        config: the settings.
        keys: [1, Hkv, T, D], the step's own token is the last one.
        values: like `keys`.
        table: rotations of the model.
    """

    def __init__(self, config: TokenSelectConfig, keys: Tensor, values: Tensor, table: RotaryTable) -> None:
        quantize = gpu.quantize_rows if config.score_dtype == "int8" else None
        layer = RawKeyLayer(Owner(quantize=quantize, center_tokens=config.center_tokens, traced=True))
        layer.device, layer.is_initialized = keys.device, True
        layer._own = Buffers(keys, values, keys.shape[2] - 1, states=[SelectionState()])
        layer.scoring_rows([0])  # makes the copy
        steady = SteadySteps(config, as_backend(), MAX_DISTANCE)
        plan = steady.begin([layer], [0], keys.shape[2] - 1, keys.shape[2], table, lambda: None)
        assert plan is not None
        self.layer: SteadyLayer = plan.layer(layer)
        self.scale = keys.shape[3] ** -0.5

    def run(self, query: Tensor) -> Tensor:
        """Attention of a query [1, Hq, 1, D]."""
        return self.layer.attend(query, self.scale, None, None)


@functools.cache
def as_backend() -> Backend:
    """The GPU's operations."""
    backend: Backend = gpu  # type: ignore[assignment]
    return backend
