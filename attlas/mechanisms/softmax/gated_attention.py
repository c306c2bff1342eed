"""Gated attention: a head that has nothing to say is switched off, token by token.

    o_nh = c σ(g_nh) Σ_m softmax_m(q_nh·k_m / √D + bias_nm) v_m

tokens x (B, N, C), q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads.
The logits g (B, N, H) come from x, the tokens that the queries are made of. x_nh is the C / H channels of x that
are head h's, and each head has weights of its own:

    linear              w_h·x_nh + b_h                                   H (C / H + 1) parameters
    mlp                 w_h·relu(W_h x_nh + a_h) + b_h, C / 4H units     H ((C / H + 1) C / 4H + C / 4H + 1)
    mlp2                the same with C / H units                        H ((C / H + 1) C / H + C / H + 1)
    all_heads_linear    w_h·x_n + b_h                                    H (C + 1)

A gate is conditional per token, conditional per head (the logits' mean over all real tokens, so noncausal only)
or unconditional per head (g = b_h alone, H parameters). With softmax alone a head comes near zero only by scores
that keep growing in training, which is where the outliers of attention models come from.

`pi_init` starts the bias b at logit(π), so that gates start near π. For fine-tuning a model that was trained
without gates, c = 1 / π and the weights of the logits start from N(0, 0.01²): it starts as the model that it was.
Else c = 1.

Time O(N M D H), on fused kernels, and the gates; the state is a key/value cache of 2 N D G numbers.

Source: Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
2023 (arXiv:2306.12929), official code Qualcomm-AI-research/outlier-free-transformers: `linear` with π = 0.25 for
OPT-125m, `mlp` for BERT-base. There π and the small start are those of `linear` alone; here every gate has them.
The paper's other cure is `clipped_softmax`.
"""

import math

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import pair_cost
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

UNITS = {"linear": 0.0, "mlp": 1 / 4, "mlp2": 1.0, "all_heads_linear": 0.0}
"""Hidden units of each predictor, as a share of the channels that it reads."""
TYPES = ("conditional_per_token", "conditional_per_head", "unconditional_per_head")
PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="gated_attention",
    title="Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
    year=2023,
    paper="arXiv:2306.12929",
    equation="o_h = σ(g_h(x)) softmax(q kᵀ / √D + bias) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(parameters=PROJECTIONS + 2 * (8 + 1)),
        Example(
            dim=32,
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"predictor": "mlp"},
            parameters=2 * (32 * 32 + 32) + 2 * (32 * 16 + 16) + 4 * ((8 + 1) * 2 + 2 + 1),
        ),
        Example(
            params={"predictor": "mlp2", "gate_type": "conditional_per_head"},
            parameters=PROJECTIONS + 2 * ((8 + 1) * 8 + 8 + 1),
            patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
        ),
        Example(
            params={"predictor": "all_heads_linear", "pi_init": 0.25, "fine_tuning": True},
            parameters=PROJECTIONS + 2 * (16 + 1),
            patterns=frozenset({Pattern.CAUSAL_SELF}),
        ),
        Example(
            params={"gate_type": "unconditional_per_head"},
            parameters=PROJECTIONS + 2,
            patterns=frozenset({Pattern.CAUSAL_SELF}),
        ),
    ),
)


class Predictor(nn.Module):
    """The logits of conditional gates, (B, N, C) -> (B, N, H); starts like `nn.Linear`.

    Args:
        dim, heads: C and H.
        kind: a key of `UNITS`.
    """

    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.slices = heads, kind != "all_heads_linear"
        if self.slices and dim % heads:
            raise BadInput(f"each head's gate reads dim / heads channels: {heads} heads do not divide {dim} channels")
        size = dim // heads if self.slices else dim
        units = max(1, int(size * UNITS[kind])) if UNITS[kind] else 0
        self.hidden_weight = nn.Parameter(torch.empty(heads, units, size)) if units else None
        self.hidden_bias = nn.Parameter(torch.empty(heads, units)) if units else None
        self.weight = nn.Parameter(torch.empty(heads, units or size))
        self.bias = nn.Parameter(torch.empty(heads))
        for parameter in self.parameters():
            last = parameter is self.weight or parameter is self.bias
            reach = ((units or size) if last else size) ** -0.5
            nn.init.uniform_(parameter, -reach, reach)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """All heads in one product."""
        if not self.slices:
            return nn.functional.linear(x_BNC, self.weight, self.bias)
        x_HRU = x_BNC.reshape(-1, self.heads, x_BNC.shape[2] // self.heads).transpose(0, 1)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            x_HRU = torch.baddbmm(self.hidden_bias[:, None], x_HRU, self.hidden_weight.mT).relu()
        logits_HR1 = torch.baddbmm(self.bias[:, None, None], x_HRU, self.weight[:, :, None])
        return logits_HR1.squeeze(-1).T.unflatten(0, x_BNC.shape[:2])


@register(SPEC)
class GatedAttention(CachedAttend):
    """Softmax attention with a gate on every head.

    Args:
        site: where it is installed.
        backend: of the softmax attention.
        predictor: linear, mlp, mlp2 or all_heads_linear; what makes the logits of a conditional gate.
        gate_type: conditional_per_token, conditional_per_head or unconditional_per_head.
        pi_init: π, what gates start near; by default about 1 / 2.
        fine_tuning: start as a trained model without gates; needs `pi_init`.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        predictor: str = "linear",
        gate_type: str = "conditional_per_token",
        pi_init: float | None = None,
        fine_tuning: bool = False,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if predictor not in UNITS:
            raise BadInput(f"predictor is one of {', '.join(UNITS)}, got {predictor!r}")
        if gate_type not in TYPES:
            raise BadInput(f"gate_type is one of {', '.join(TYPES)}, got {gate_type!r}")
        if gate_type == "conditional_per_head" and site.causal:
            raise BadInput(
                "a conditional_per_head gate is a mean over all tokens, later ones too, so it cannot be causal "
                "or stream: use gate_type='conditional_per_token'"
            )
        if pi_init is not None and not 0 < pi_init < 1:
            raise BadInput(f"pi_init is what the gates start near, between 0 and 1, got {pi_init}")
        if fine_tuning and pi_init is None:
            raise BadInput("fine_tuning divides the gates by pi_init: give both")
        self.per_head = gate_type == "conditional_per_head"
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.factor = 1 / pi_init if fine_tuning and pi_init else 1.0
        conditional = gate_type != "unconditional_per_head"
        self.predict = Predictor(site.dim, site.heads, predictor) if conditional else None
        self.logits = None if conditional else nn.Parameter(torch.zeros(site.heads))
        if pi_init is not None:
            bias = self.logits if self.predict is None else self.predict.bias
            nn.init.constant_(bias, math.log(pi_init / (1 - pi_init)))  # type: ignore[arg-type]
        if fine_tuning and self.predict is not None:
            nn.init.normal_(self.predict.weight, std=0.01)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Fused attention, times the gates."""
        gates_BNH = self._gates(q_BHND, call)
        dropout = self.weight_dropout if self.training else 0.0
        o_BHNE = softmax_attention(q_BHND, k_BGMD, v_BGME, call.mask, dropout=dropout, backend=self.backend)
        return o_BHNE * gates_BNH.transpose(1, 2).unsqueeze(-1).to(o_BHNE.dtype)

    def _gates(self, q: Tensor, call: Call) -> Tensor:
        if self.predict is None:
            return self.gates(q.new_empty(1, 1, self.site.dim))
        shape = (q.shape[0], q.shape[2], self.site.dim)
        if call.tokens is None or call.tokens.shape != shape:
            raise BadInput(
                f"gated_attention gates heads by the tokens that queries are made of: pass tokens of shape {shape} "
                f"(a layer of attlas.mixer does), got {None if call.tokens is None else tuple(call.tokens.shape)}"
            )
        return self.gates(call.tokens, call.mask.queries)

    def gates(self, tokens_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """c σ(g), (B, N, H), or (B, 1, H) per head.

        Args:
            tokens_BNC: what the queries are made of.
            keep_BN: which tokens are real and count in a mean over tokens; None for all.
        """
        if self.predict is None:
            assert self.logits is not None
            return self.factor * self.logits.sigmoid().expand(*tokens_BNC.shape[:1], 1, -1)
        logits_BNH = self.predict(tokens_BNC)
        if self.per_head and keep_BN is not None:
            kept_BNH = logits_BNH.masked_fill(~keep_BN.unsqueeze(-1), 0)
            logits_BNH = kept_BNH.sum(1, keepdim=True) / keep_BN.sum(1).clamp(min=1)[:, None, None]
        elif self.per_head:
            logits_BNH = logits_BNH.mean(1, keepdim=True)
        return self.factor * logits_BNH.sigmoid()

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Head by head, each with its own small network."""
        heads, x_BNC = q_BHND.shape[1], call.tokens
        weights = attention_weights(q_BHND, k_BGMD, call.mask)
        weights = nn.functional.dropout(weights, self.weight_dropout, self.training)
        v_BHME, outputs = repeat_heads(v_BGME, heads), []
        for h in range(heads):
            if self.predict is None:
                assert self.logits is not None
                gate = 1 / (1 + torch.exp(-self.logits[h]))
            else:
                if x_BNC is None:
                    raise BadInput("gated_attention gates heads by tokens: pass tokens=")
                gate = 1 / (1 + torch.exp(-self._head_logits(self.predict, h, x_BNC, call.mask.queries)))
            outputs.append(self.factor * gate * (weights[:, h] @ v_BHME[:, h]))
        return torch.stack(outputs, 1)

    def _head_logits(self, net: Predictor, h: int, x_BNC: Tensor, keep_BN: Tensor | None) -> Tensor:
        """(B, N, 1), or (B, 1, 1) per head."""
        size = x_BNC.shape[-1] // net.heads
        x = x_BNC[..., h * size : (h + 1) * size] if net.slices else x_BNC
        if net.hidden_weight is not None and net.hidden_bias is not None:
            x = (x @ net.hidden_weight[h].T + net.hidden_bias[h]).relu()
        logits_BN1 = (x @ net.weight[h] + net.bias[h]).unsqueeze(-1)
        if not self.per_head:
            return logits_BN1
        real = [slice(None) if keep_BN is None else keep_BN[b] for b in range(len(x))]
        rows = [logits_BN1[b, keep].sum() / max(1, logits_BN1[b, keep].numel()) for b, keep in enumerate(real)]
        return torch.stack(rows)[:, None, None]

    def count(self, sizes: Sizes) -> Cost:
        """That of softmax attention, and the gates."""
        weights = [] if self.predict is None else [self.predict.weight, self.predict.hidden_weight]
        gates = 2 * sizes.batch * sizes.queries * sum(w.numel() for w in weights if w is not None)
        return pair_cost(self.site, sizes) + Cost(gates, gates)
