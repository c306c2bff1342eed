"""Routing attention: tokens attend to the tokens of their own k-means cluster.

    o_n = 1 / (|C_n| + 0.01) sum_{c in C_n} sum_m softmax_m(q_n . k_m) v_m,   m over the keys in cluster c

q and k are normalised over the head size (layer norm without weight or bias; no other scale), C_n are the
clusters that hold query n. A cluster c holds the w tokens with the largest x . mu_c, so that all clusters
are equally large and a token may be in none, one or several; a query in none gives 0. With C clusters and
w = N / C every token is in one on average.

Not causal, as published: queries and keys are put into clusters on their own, with the same centroids.

Causal: token t is in cluster c where its key is among the w best of positions 0 to t (of equal scores the
later position is better), and its query then sees the keys that are among those w. This is the published
model *at decoding*, where the future does not exist; with k = q, as published, it is the same function. The
published *training* form chooses the w best of the whole sequence, so that later tokens decide what earlier
ones see: a weak leak that this form does not have. Tokens are in time as they are in sequence, prefix
tokens and grids included.

Centroids get no gradient. In every training forward each follows the tokens nearest to it (largest
x . mu_c) by an exponential moving average of their sum and their count, and the auxiliary loss pulls
tokens to their nearest centroid: commitment * mean (x - mu)^2, for queries and for keys where both are
clustered. Padding enters no cluster, no average and no loss.

Where this departs from the published code: padding does not compete for places in clusters (there it does);
averaged counts are per head (there a reshape mixes heads) and start at 1, not 0, which leaves the
directions of the centroids, and with them the clusters, as they are, and their length at that of the
tokens; queries and keys enter one update together (there two race); the one shared loss of k = q counts
once (there twice); the linear layer over the head size behind the heads is left out.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E). Time O(N C D + C w² D), which is O(N^1.5 D) at C = sqrt(N);
the causal form multiplies every token with every cluster's w keys, O(N C w D), in pieces of w tokens. The
causal state is w keys and values per cluster.

Source: Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", 2020
(arXiv:2003.05997), official code google-research/google-research, routing_transformer/utils.py.

In shape suffixes: B batch, H heads, N queries or arriving tokens, M keys, C clusters, W places of a cluster,
S tokens that compete for them, D head size, E value size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import as_written
from attlas.ops.softmax import blank_padding, softmax_attention

OFFSET = 0.01  # of the number of clusters that an output is divided by
SMOOTHING = 1e-5  # of the averaged counts, so that an empty cluster divides by something

SPEC = Spec(
    name="routing",
    title="Efficient Content-Based Sparse Attention with Routing Transformers",
    year=2020,
    paper="arXiv:2003.05997",
    equation="o = mean over the query's clusters of softmax(q kᵀ within the cluster) v",
    complexity="O(N^1.5 D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_SELF}),
    streams=True,
    shell={"bias": False, "out_bias": False},
    # At these sizes no score is near the edge of a cluster, so that half precision forms the same clusters.
    examples=(
        Example(grid=(8,), heads=1, params={"clusters": 3, "window": 5}, parameters=4 * 16 * 16),
        Example(grid=(2, 2), prefix=1, params={"clusters": 2}, parameters=4 * 16 * 16),
    ),
)


class RoutingState(NamedTuple):
    """The best tokens of each cluster in order of arrival, at most w of them.

    Scores (B, H, C, W), -inf for padding; normalised keys (B, H, C, W, D); values (B, H, C, W, E).
    """

    score: Tensor
    k: Tensor
    v: Tensor


@register(SPEC)
class Routing(Attend):
    """Attention within k-means clusters.

    Args:
        site: where it is installed. Its `length` (or grid) gives the number of clusters, and in a causal layer
            the window, where they are not given.
        backend: of `softmax_attention` within the clusters.
        clusters: per head; about the square root of the length by default.
        window: tokens that a cluster holds. By default tokens / clusters, so that a query is in one cluster
            on average; in a causal layer with the tokens that the site is built for.
        decay: of the moving averages that the centroids follow.
        commitment: coefficient of the auxiliary loss.
    """

    centroids: Tensor
    count_average: Tensor
    sum_average: Tensor

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        clusters: int | None = None,
        window: int | None = None,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ) -> None:
        super().__init__(site, backend)
        length = site.grid.tokens if site.length is None and site.grid is not None else site.length
        if length is not None:
            clusters = max(1, round(length**0.5)) if clusters is None else clusters
            if window is None and site.causal:
                window = -(-length // max(1, clusters))
        if clusters is None or (window is None and site.causal):
            raise BadInput(
                "the number of clusters, and in a causal layer the window, follow from the number of tokens: "
                "pass length=, or clusters= and window="
            )
        if clusters < 1 or (window is not None and window < 1):
            raise BadInput(f"clusters and window are at least 1, got {clusters} and {window}")
        if not 0 <= decay < 1:
            raise BadInput(f"decay is a share in [0, 1), got {decay}")
        if commitment < 0:
            raise BadInput(f"commitment is not negative, got {commitment}")
        self.clusters, self.window = clusters, window
        self.decay, self.commitment = decay, commitment
        centroids = F.layer_norm(torch.randn(site.heads, clusters, site.head_dim), (site.head_dim,))
        self.register_buffer("centroids", centroids)
        self.register_buffer("sum_average", centroids.clone())
        self.register_buffer("count_average", torch.ones(site.heads, clusters))
        if not site.causal and length is not None:
            self._places(length)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Routing":
        # Averages move by a thousandth a step, which half precision rounds away: they stay at least float32.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device, torch.float32)
        return self

    def _places(self, tokens: int) -> int:
        """Tokens that a cluster holds."""
        if self.window is None:
            return -(-tokens // self.clusters)
        if self.window > tokens and not self.site.causal:
            raise BadInput(
                f"a cluster holds {self.window} tokens and there are {tokens}; build with a window of at "
                f"most {tokens}, or with window=None for tokens / clusters"
            )
        return self.window

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Cluster, attend inside the clusters, put back."""
        form = self._running if self.site.causal else self._clustered
        return self._route(q_BHND, k_BHMD, v_BHME, call, form)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Cluster by cluster, and in the causal form token by token."""
        form = self._running_oracle if self.site.causal else self._clustered_oracle
        return self._route(q_BHND, k_BHMD, v_BHME, call, form)

    def _route(self, q: Tensor, k: Tensor, v: Tensor, call: Call, form: Callable[..., Tensor]) -> Tensor:
        """What all forms share: normalisation, scores, and learning of the centroids."""
        queries, keys = q.shape[2], k.shape[2]
        if queries != keys and not call.cross and not self.site.causal:
            raise BadInput(f"queries compete for their clusters, so all {keys} of them have to be there, got {queries}")
        (q,), (k, v) = blank_padding(call.mask.queries, q), blank_padding(call.mask.keys, k, v)
        q, k = self._normalise(q), self._normalise(k)
        members = [(q, call.mask.queries), (k, call.mask.keys)]
        if self.site.causal:
            members = members[1:]
        places = [self._places(x.shape[2]) for x, _ in members]
        scores = [self._score(x) for x, _ in members]
        masked = [
            score if real is None else score.masked_fill(~real[:, None, None], -torch.inf)
            for score, (_, real) in zip(scores, members, strict=True)
        ]
        o = form(q, k, v, *masked, *places)
        if self.training:
            self._learn(members, scores)
        return o

    def _normalise(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, self.centroids.dtype))
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    @torch.no_grad()
    def _score(self, x_BHND: Tensor) -> Tensor:
        """x . mu for every cluster, (B, H, C, N)."""
        with as_written(x_BHND):
            return self.centroids.to(x_BHND.dtype) @ x_BHND.mT

    def _clustered(
        self, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor, k_score: Tensor, q_places: int, k_places: int
    ) -> Tensor:
        q_top, k_top = q_score.topk(q_places), k_score.topk(k_places)
        q_real, k_real = q_top.values > -torch.inf, k_top.values > -torch.inf
        o_BHCWE = self._attend(
            _gather(q, q_top.indices),
            _gather(k, k_top.indices),
            _gather(v, k_top.indices),
            q_real.unsqueeze(-1) & k_real.unsqueeze(-2),
        )
        place_BHW = q_top.indices.flatten(2)
        o_BHWE = o_BHCWE.flatten(2, 3)
        total = o_BHWE.new_zeros(*q.shape[:3], o_BHWE.shape[3])
        total = total.scatter_add(2, place_BHW.unsqueeze(-1).expand_as(o_BHWE), o_BHWE)
        count = place_BHW.new_zeros(q.shape[:3]).scatter_add(2, place_BHW, q_real.flatten(2).long())
        return _share(total, count)

    def _attend(self, q_BHCND: Tensor, k_BHCSD: Tensor, v_BHCSE: Tensor, seen_BHCNS: Tensor) -> Tensor:
        """Softmax attention inside every cluster; 0 for a query that sees nothing."""
        o = softmax_attention(
            q_BHCND.to(v_BHCSE.dtype).flatten(1, 2),
            k_BHCSD.to(v_BHCSE.dtype).flatten(1, 2),
            v_BHCSE.flatten(1, 2),
            Mask.pairs_(seen_BHCNS.flatten(1, 2)),
            scale=1.0,
            backend=self.backend,
        )
        return o.unflatten(1, q_BHCND.shape[1:3])

    def _running(self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, window: int) -> Tensor:
        early = k.shape[2] - q.shape[2]
        q = F.pad(q, (0, 0, early, 0))
        return self._stream(q, k, v, score, window, self.initial_state(len(q), v))[0][:, :, early:]

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, window: int, state: RoutingState
    ) -> tuple[Tensor, RoutingState]:
        """Extend by pieces of a window, so that memory does not grow with the square of the segment."""
        outputs = []
        splits = (q.split(window, 2), k.split(window, 2), v.split(window, 2), score.split(window, 3))
        for piece in zip(*splits, strict=True):
            o, state = self._extend(*piece, window, state)
            outputs.append(o)
        return torch.cat(outputs, 2), state

    def _extend(
        self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, window: int, state: RoutingState
    ) -> tuple[Tensor, RoutingState]:
        """Let new tokens compete with those that the clusters hold."""
        arrivals, each = k.shape[2], (-1, -1, self.clusters, -1, -1)
        score_BHCS = torch.cat([state.score, score], 3)
        k_BHCSD = torch.cat([state.k, k.to(v.dtype).unsqueeze(2).expand(each)], 3)
        v_BHCSE = torch.cat([state.v, v.unsqueeze(2).expand(each)], 3)
        order_BHCS = score_BHCS.argsort(dim=-1, stable=True)  # of equal scores the later one is better
        held_BHCNS = _running_top(order_BHCS, score_BHCS > -torch.inf, window, arrivals)
        member_BHCN = held_BHCNS.diagonal(score_BHCS.shape[3] - arrivals, -2, -1)
        seen_BHCNS = held_BHCNS & member_BHCN.unsqueeze(-1)
        o_BHCNE = self._attend(q.unsqueeze(2).expand(each), k_BHCSD, v_BHCSE, seen_BHCNS)
        best = order_BHCS[..., -window:].sort(-1).values
        k_best, v_best = (
            x.gather(3, best.unsqueeze(-1).expand(-1, -1, -1, -1, x.shape[4])) for x in (k_BHCSD, v_BHCSE)
        )
        state = RoutingState(score_BHCS.gather(3, best), k_best, v_best)
        return _share(o_BHCNE.sum(2), member_BHCN.sum(2)), state

    def _clustered_oracle(
        self, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor, k_score: Tensor, q_places: int, k_places: int
    ) -> Tensor:
        total, count = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(*q.shape[:3])
        for b, h, c in torch.cartesian_prod(*map(torch.arange, q_score.shape[:3])):
            rows, columns = (
                [n for n in torch.argsort(s[b, h, c], descending=True)[:places] if s[b, h, c, n] > -torch.inf]
                for s, places in ((q_score, q_places), (k_score, k_places))
            )
            for n in rows:
                if columns:
                    weights = torch.stack([q[b, h, n] @ k[b, h, m] for m in columns]).softmax(0)
                    o = sum(w * v[b, h, m] for w, m in zip(weights, columns, strict=True))
                    total = total.index_put((b, h, n), o, accumulate=True)
                count[b, h, n] += 1
        return _share(total, count).to(v.dtype)

    def _running_oracle(self, q: Tensor, k: Tensor, v: Tensor, score: Tensor, window: int) -> Tensor:
        early = k.shape[2] - q.shape[2]
        outputs = []
        for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])):
            t, total, count = int(n) + early, 0 * v[b, h, 0], 0
            for c in range(self.clusters):
                ranked = sorted((float(score[b, h, c, s]), s) for s in range(t + 1) if score[b, h, c, s] > -torch.inf)
                held = [s for _, s in ranked[-window:]]
                if t in held:
                    weights = torch.stack([q[b, h, n] @ k[b, h, s] for s in held]).softmax(0)
                    total = total + sum(w * v[b, h, s] for w, s in zip(weights, held, strict=True))
                    count += 1
            outputs.append(total / (count + OFFSET))
        return torch.stack(outputs).view(*q.shape[:3], -1).to(v.dtype)

    def _learn(self, members: list[tuple[Tensor, Tensor | None]], scores: list[Tensor]) -> None:
        """Set the auxiliary loss, then let the centroids follow."""
        heads, size = self.site.heads, self.site.head_dim
        head = torch.arange(heads, device=self.centroids.device).view(1, heads, 1)
        count, total = torch.zeros_like(self.count_average), torch.zeros_like(self.sum_average)
        losses = []
        for (x_BHND, keep), score_BHCN in zip(members, scores, strict=True):
            nearest_BHN = head * self.clusters + score_BHCN.argmax(2)
            real = torch.ones_like(nearest_BHN, dtype=torch.bool) if keep is None else keep.unsqueeze(1)
            real_BHN = real.expand_as(nearest_BHN).to(x_BHND.dtype)
            x_BHND = x_BHND.where(real_BHN.unsqueeze(-1) > 0, 0)
            distance = (x_BHND - self.centroids.flatten(0, 1)[nearest_BHN]).square().mean(-1)
            losses.append((distance * real_BHN).sum() / real_BHN.sum().clamp(min=1))
            place = nearest_BHN.flatten()
            with torch.no_grad():
                count.view(-1).index_add_(0, place, real_BHN.flatten().to(count))
                total.view(-1, size).index_add_(0, place, x_BHND.reshape(-1, size).to(total))
        self.auxiliary = self.commitment * torch.stack(losses).sum()
        with torch.no_grad():
            self.count_average.lerp_(count, 1 - self.decay)
            self.sum_average.lerp_(total, 1 - self.decay)
            sizes = self.count_average.sum(-1, keepdim=True)
            smooth = (self.count_average + SMOOTHING) / (sizes + self.clusters * SMOOTHING) * sizes
            self.centroids.copy_(self.sum_average / smooth.unsqueeze(-1))

    def count(self, sizes: Sizes) -> Cost:
        """Scores of the centroids and two products per pair in a cluster.

        What tokens say decides which pairs these are, and in the causal form how many: there the useful ones
        are those expected of tokens in random order. The torch backend multiplies all places of a cluster.
        """
        queries, keys, size = sizes.queries, sizes.keys, self.site.head_dim
        groups = sizes.batch * self.site.heads * self.clusters
        window = self._places(keys)
        if self.site.causal:
            scored = keys
            pairs = int(sum(min(t, window) * min(1.0, window / t) for t in range(1, keys + 1)))
            starts = range(0, keys, window)
            executed = sum(min(window, keys - t) * (min(window, t) + min(window, keys - t)) for t in starts)
        else:
            scored = queries + keys
            pairs = executed = self._places(queries) * window
        scoring = 2 * groups * scored * size
        return Cost(scoring + 4 * groups * pairs * size, scoring + 4 * groups * executed * size)

    def initial_state(self, batch: int, like: Tensor) -> RoutingState:
        """No tokens yet."""
        shape = (batch, self.site.heads, self.clusters, 0)
        score = like.new_empty(shape, dtype=torch.promote_types(like.dtype, self.centroids.dtype))
        rows = like.new_empty(*shape, self.site.head_dim)
        return RoutingState(score, rows, rows)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: RoutingState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, RoutingState]:
        """Route the segment's tokens into clusters that hold the best so far."""
        q, k, v = blank_padding(keep, q, k, v)
        q, k = self._normalise(q), self._normalise(k)
        score = self._score(k)
        if keep is not None:
            score = score.masked_fill(~keep[:, None, None], -torch.inf)
        return self._stream(q, k, v, score, self._places(k.shape[2]), state)


def _share(total_BHNE: Tensor, clusters_BHN: Tensor) -> Tensor:
    """The mean over the clusters that each query is in."""
    return total_BHNE / (clusters_BHN.to(total_BHNE.dtype) + OFFSET).unsqueeze(-1)


def _gather(x_BHND: Tensor, place_BHCW: Tensor) -> Tensor:
    """The tokens at the places of each cluster, (B, H, C, W, D)."""
    place = place_BHCW.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x_BHND.shape[3])
    return x_BHND.gather(2, place).unflatten(2, place_BHCW.shape[2:])


def _running_top(order: Tensor, real: Tensor, window: int, arrivals: int) -> Tensor:
    """Which tokens are among the `window` best of those up to each of the last `arrivals` tokens.

    Args:
        order: (..., S) the tokens, numbered by arrival, from the worst to the best.
        real: (..., S) False for tokens that are never held; they are the worst.
        window: how many are held.
        arrivals: how many of the last tokens arrive one by one; those before are all there from the start.

    Returns:
        (..., arrivals, S) bool.
    """
    tokens = order.shape[-1]
    early = tokens - arrivals
    rank = order.argsort(-1)
    # A token is held until as many better ones arrived as it had places left above the better early ones.
    not_better = (order < early).cumsum(-1, dtype=torch.int32).gather(-1, rank)
    left = (window - early + not_better).where(real, 0)
    better = rank[..., early:].unsqueeze(-1) > rank.unsqueeze(-2)
    place = torch.arange(tokens, device=order.device)
    there = place <= place[early:].unsqueeze(-1)
    return (better.cumsum(-2, dtype=torch.int32) < left.unsqueeze(-2)) & there
