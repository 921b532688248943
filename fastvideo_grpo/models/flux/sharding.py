"""Sequence parallelism for FastVideo's FLUX, whose attention can exchange heads for tokens but whose forward never shards.

Each process keeps its share of the image tokens (padded to equal shares) through all blocks and the whole text; only
attention sees all image tokens, of its share of the heads (Ulysses). Nothing of FastVideo's forward is repeated here: the
tokens are cut where they are embedded and put together where they leave, and the attention layers are wrapped.
"""

from __future__ import annotations

from typing import Any

import torch
from fastvideo.attention import DistributedAttention
from fastvideo.distributed.communication_op import (
    sequence_model_parallel_all_gather_with_unpad,
    sequence_model_parallel_shard,
)
from fastvideo.distributed.parallel_state import get_sp_parallel_rank, get_sp_world_size
from torch import Tensor, nn
from torch.nn.functional import pad


class _Tokens:
    """How many image tokens the sample has, and how many this process keeps; set by each forward."""

    total = 0
    share = 0

    def __deepcopy__(self, memo: Any) -> _Tokens:
        return self  # a copied transformer has the same hooks, which set this one


class ShardedJointAttention(nn.Module):
    """FLUX's attention over ``[text, this process's image tokens]``, with FastVideo's exchange inside.

    FastVideo's layer wants the shared (replicated) text apart from the sharded image, and returns the two apart.
    """

    def __init__(self, attention: DistributedAttention, tokens: _Tokens) -> None:
        super().__init__()
        self.attention = attention
        self.tokens = tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        """``[B, text + share, heads, head size]`` each -> the same shape."""
        text = q.shape[1] - self.tokens.share
        images = [t[:, text:] for t in (q, k, v)]
        texts = [t[:, :text] for t in (q, k, v)]
        image_out, text_out = self.attention(*images, self.tokens.total, *texts)
        return torch.cat([text_out, image_out], dim=1), None


def shard_sequence(transformer: Any) -> None:
    """Let a ``FluxTransformer2DModel`` share its image tokens among the processes of the sequence-parallel group."""
    tokens = _Tokens()

    def cut(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        share, tokens.total = sequence_model_parallel_shard(output[0], dim=1)
        tokens.share = share.shape[1]
        return share, output[1]

    def cut_positions(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        text = len(output[0]) - tokens.total
        missing = tokens.share * get_sp_world_size() - tokens.total
        start = text + get_sp_parallel_rank() * tokens.share

        def mine(table: Tensor) -> Tensor:
            return torch.cat([table[:text], pad(table, (0, 0, 0, missing))[start : start + tokens.share]])

        return tuple(mine(table) for table in output)

    def put_together(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return sequence_model_parallel_all_gather_with_unpad(output[0], tokens.total, dim=1), output[1]

    transformer.x_embedder.register_forward_hook(cut)
    transformer.pos_embed.register_forward_hook(cut_positions)
    transformer.proj_out.register_forward_hook(put_together)
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.attn = ShardedJointAttention(block.attn.attn, tokens)
