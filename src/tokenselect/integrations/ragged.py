"""A ragged batch: the tokens of each sequence that go through the model now, cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tokenselect.config import TokenSelectConfig
from tokenselect.ops.paging import Range
from tokenselect.selection import Block, block_starts, candidates_end


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one sequence.

    Attributes:
        start: position of the first one.
        end: one past the position of the last one.
        tail_start: from there on every token selects for itself.
        known_length: tokens that the context is known to have: those of the whole prompt.
    """

    start: int
    end: int
    tail_start: int
    known_length: int

    def covers(self, config: TokenSelectConfig, block: Block) -> bool:
        """Whether a block of this stretch attends every earlier token."""
        return config.covers(max(self.known_length, block.end), block.start)


def cut_blocks(sequence: int, stretch: Stretch, first_query: int, config: TokenSelectConfig) -> list[Block]:
    """The blocks of one sequence's stretch; neighbours that need no selection are one block, however long.

    Args:
        sequence: index of the sequence in the batch.
        stretch: its tokens.
        first_query: row of the first one in the batch's queries.
        config: the settings.
    """
    start, end = stretch.start, stretch.end
    starts = block_starts(start, end, stretch.tail_start, config.block_size)
    blocks: list[Block] = []
    for first, last in pairwise([*starts, end]):
        block = Block(sequence, first, last, first_query + first - start)
        if blocks and stretch.covers(config, block):
            before = blocks.pop()
            block = Block(sequence, before.start, last, before.first_query)
        blocks.append(block)
    return blocks


def attended_ranges(block: Block, config: TokenSelectConfig | None) -> list[Range]:
    """What a block attends, for `range_slots`: with a config, sinks, room for the chosen tokens, and the local window.

    A block that selects has more candidates than it chooses, so all sinks lie before its window.
    """
    if config is None:
        return [(block.sequence, 0, block.end)]
    window, k = candidates_end(block, config), config.num_selected_tokens
    return [(block.sequence, 0, min(config.num_sink_tokens, window)), (-1, 0, k), (block.sequence, window, block.end)]


def range_bounds(ranges: Sequence[Sequence[Range]]) -> list[int]:
    """Where each block's rows begin, and where the last ones end."""
    return [0, *accumulate(sum(end - start for _, start, end in own) for own in ranges)]
