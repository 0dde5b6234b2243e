"""A KV cache kept from prompt to prompt: what two of them have in common is read once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Prefix:
    """A cache that is cut back to what the next prompt shares with the last one.

    It is kept up to a multiple of the block size, so a prompt selects what it would select if read from its start.

    Args:
        model: who fills it, under one method with one configuration.
        block_size: see above.
    """

    def __init__(self, model: PreTrainedModel, block_size: int) -> None:
        self.cache = DynamicCache(config=model.config)
        self.block_size = block_size
        self.ids = torch.empty(0, dtype=torch.int64)

    def share_with(self, ids: Tensor) -> DynamicCache:
        """The cache, cut back to what it has in common with `ids` [tokens]; the caller reads the rest into it."""
        length = min(len(self.ids), len(ids) - 1)
        different = (self.ids[:length] != ids[:length]).nonzero()
        common = int(different[0]) if len(different) else length
        self.cache.crop(common // self.block_size * self.block_size - self.cache.get_seq_length())
        self.ids = ids
        return self.cache
