"""A fixed number of tokens by learned queries: Flamingo's perceiver resampler (Alayrac et al. 2022)."""

from __future__ import annotations

import torch
from torch import nn

from mmtune.core.errors import UserError
from mmtune.parts.connector.base import WHERE, Connector, at_least_one


class ResamplerConnector(Connector):
    """`queries` learned tokens look at the features, and at themselves, in `depth` layers of `heads` heads;
    a norm and a linear layer take what they found to the language model's width.

    Inside it is as wide as the tower, as in Flamingo. The defaults are Flamingo's.
    """

    kind = "resampler"

    def __init__(
        self, vision_width: int, language_width: int, queries: int = 64, depth: int = 6, heads: int = 8
    ) -> None:
        super().__init__(vision_width, language_width, queries=queries, depth=depth, heads=heads)
        at_least_one(queries=queries, depth=depth, heads=heads)
        if vision_width % heads:
            raise UserError(
                f"{heads} heads don't divide the tower's width of {vision_width}",
                where=f"{WHERE}.options.heads",
                mend="Give a number of heads that does.",
            )
        # An embedding, which is called: engines that split weights gather those of what is called.
        self.queries = nn.Embedding(queries, vision_width)
        self.layers = nn.ModuleList(_Layer(vision_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(vision_width)
        self.linear = nn.Linear(vision_width, language_width)

    def tokens(self, features: int) -> int:
        return self.queries.num_embeddings

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        places = torch.arange(self.queries.num_embeddings, device=features.device)
        found = self.queries(places).expand(len(features), -1, -1)
        for layer in self.layers:
            found = layer(found, features)
        return self.linear(self.norm(found))


class _Layer(nn.Module):
    """Attention to the features and the queries together, then an MLP, each on what is normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_features = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, found: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        asking = self.norm_queries(found)
        seen = torch.cat([self.norm_features(features), asking], dim=1)
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q(asking), self.k(seen), self.v(seen))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found = found + self.out(mixed)
        return found + self.mlp(found)
