"""What `benchmarks.ops` needs to know of an operation to measure it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tokenselect.ops import BACKENDS, Backend, cpu

Call = Callable[[int], Any]
OTHER_SET = "cpu, "  # before the name of an instruction set, which must be asked for


class Case(ABC):
    """One operation on inputs of one kind, size and layout.

    Attributes:
        key: what tells the case from others, as columns of the results.
        num_bytes: read from the pools by one call.
        num_flops: multiplications and additions of one call, where they count for anything; else 0.
        num_variants: calls with different inputs; together they read more than a last-level cache holds.
        pools: the buffers that are read.
    """

    key: dict[str, Any]
    num_bytes: int
    num_flops: int = 0
    num_variants: int
    pools: list[Tensor]

    @abstractmethod
    def compute(self, ops: Backend, variant: int) -> Any:
        """The operation by a backend."""

    def baselines(self) -> dict[str, Call]:
        """The operation in plain torch, tuned, by name; `reference` among the backends is plain torch too."""
        return {}

    @abstractmethod
    def difference(self, result: Any, expected: Any) -> str | None:
        """What is wrong with a result, given that of `ops.reference`; None: nothing."""

    def calls(self) -> dict[str, Call]:
        """Everybody who can compute this case, by name."""
        ours: dict[str, Call] = {
            name: partial(self.compute, cast("Backend", module))
            for name, module in BACKENDS.items()
            if module.why_not(torch.device("cpu"), torch.bfloat16, 64) is None
        }
        sets = cpu.instruction_sets() if cpu.NAME in ours else []
        return ours | {OTHER_SET + name: partial(self._by, name) for name in sets} | self.baselines()

    def _by(self, instruction_set: str, variant: int) -> Any:
        cpu.use_instruction_set(instruction_set)
        try:
            return self.compute(cast("Backend", cpu), variant)
        finally:
            cpu.use_instruction_set("auto")


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of what is expected; not a number where the result is not finite."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    return float(error)
