"""How far a position scheme has to reach: set once per prompt, for cached keys cannot be turned again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MARGIN = 128  # tokens of an answer that a prompt leaves room for


def doubled(length: int, window: int) -> int:
    """`window` times the least power of two that holds `length` tokens."""
    reach = window
    while reach < length:
        reach *= 2
    return reach


@dataclass(slots=True)
class Reach:
    """The positions that the running sequence is prepared for.

    Attributes:
        window: trained window of the model.
        tokens: what the present sequence was prepared for; at least the window.
    """

    window: int
    tokens: int = 0

    def update(self, positions: Tensor) -> int:
        """Look at the positions [..., T] of a pass, of which those of a prompt set the reach.

        Returns:
            Positions to be prepared for, a power of two times the window. It never shrinks within a sequence.
        """
        first, last = int(positions.min()), int(positions.max())
        is_prompt = positions.shape[-1] > 1
        needed = doubled(last + 1 + (MARGIN if is_prompt else 0), self.window)
        self.tokens = needed if first == 0 and is_prompt else max(self.tokens, needed)
        return self.tokens
