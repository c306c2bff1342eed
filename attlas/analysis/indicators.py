"""Five numbers that say what kind of attention map a layer has.

Each takes the weights (B, H, N, N) of a causal layer, rows summing to 1, and gives a number per head (B, H);
the diversity of the heads is one per layer, (B,).

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602).
"""

from torch import Tensor

from attlas.core.errors import BadInput


def entropy(weights_BHNN: Tensor) -> Tensor:
    """Mean over the queries of −Σ a log a: 0 where each sees one token, log N where it sees N alike."""
    _check(weights_BHNN)
    return -weights_BHNN.xlogy(weights_BHNN).sum(-1).mean(-1)


def concentration(weights_BHNN: Tensor) -> Tensor:
    """Frobenius norm of the map: sqrt(N) where each query sees one token, less where it spreads."""
    _check(weights_BHNN)
    return weights_BHNN.square().sum((-1, -2)).sqrt()


def head_diversity(weights_BHNN: Tensor) -> Tensor:
    """Standard deviation over the heads, averaged over the N (N + 1) / 2 pairs that a causal layer sees."""
    tokens = _check(weights_BHNN)
    return weights_BHNN.std(1, correction=0).tril().sum((-1, -2)) * 2 / (tokens * (tokens + 1))


def sink(weights_BHNN: Tensor) -> Tensor:
    """Mean weight of the first token."""
    _check(weights_BHNN)
    return weights_BHNN[..., 0].mean(-1)


def local_focus(weights_BHNN: Tensor, back: int) -> Tensor:
    """Mean weight of the token `back` places before the query, over the queries that have one."""
    tokens = _check(weights_BHNN)
    if not 0 <= back < tokens:
        raise BadInput(f"back counts places before the query, 0 to {tokens - 1} on {tokens} tokens, got {back}")
    return weights_BHNN.diagonal(-back, -2, -1).mean(-1)


def _check(weights: Tensor) -> int:
    """The number of tokens."""
    if weights.ndim != 4 or weights.shape[2] != weights.shape[3]:
        raise BadInput(f"an attention map is (batch, heads, tokens, tokens), got {tuple(weights.shape)}")
    return weights.shape[2]
