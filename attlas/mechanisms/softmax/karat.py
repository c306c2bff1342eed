"""Kolmogorov-Arnold attention: a learned operator on every row of the scores, in place of the softmax.

    y_np = Σ_m φ_pm(a_nm),   a = q kᵀ / √D        p = 1..r, a learned scalar function for each (p, m)
    o_n  = Σ_m (Σ_p W_mp y_np) v_m

Rows are neither positive nor do they sum to 1, and since each key has functions and a row of W of its own,
the operator is tied to the number of keys M that it is built for. Each head of each layer has one; layers that
share the operator of the first are the paper's universal mode (see `operator`). The functions, by basis:

    fourier       s_pm Σ_{g=1..G} a_pmg cos(g x) + t_pm Σ_{g=1..G} b_pmg sin(g x)
    rational      (a_0 + .. + a_i xⁱ) / (1 + |b_1 x + .. + b_j xʲ|)
    mexican_hat   w 2 / (√3 π^¼) (1 - z²) e^(-z²/2),    z = (x - τ) / σ
    morlet        w cos(5 z) e^(-z²/2)
    dog           w z e^(-z²/2)
    meyer         w sin(π |z|) u(|z|),    u = 1 up to 1/2, then cos(π/2 ν(2 |z| - 1)), 0 from 1,
                  ν(t) = t⁴ (35 - 84 t + 70 t² - 20 t³)
    shannon       w sinc(z / π) times a symmetric Hamming window over the keys

each plus a base function b(x), by default 0. Every coefficient belongs to one (p, m). Sums of cosines and sines
are products with matrices, Y = Σ_g cos(g A) a_g + sin(g A) b_g, and without a pair mask o = Y (Wᵀ v): neither
N M r functions nor the rows are ever held.

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E). Time O(N M (D + G r)) per head, (2 G + 3) r M parameters per
head in the Fourier basis; the other bases are evaluated one p after the other, O(N M r) without products. A masked
pair is left out of both sums. A causal layer, our extension, has the operator's first keys while the sequence is
shorter than M, and its state is a key/value cache.

Source: Maity et al., "Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
2025 (arXiv:2503.10632), project page of MaitySubhajit/KArAt; the code is not public. Reconstruction: published
parameter counts have two numbers more for each (p, m) than the printed sum. Here these are s and t, which begin
at 1 / √(M G), with a, b, w ~ N(0, 1) as printed; they add no function to those of the sum. In the other bases
the outer coefficients have a deviation of 1 / √M, so that rows begin at order 1. Degrees, initial W, and the
forms of meyer and shannon (those of wavelet KANs) are ours where the page leaves them open.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import repeat_heads

SELF = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
CROSS = ALL_PATTERNS - SELF
PLANE = frozenset({Pattern.NONCAUSAL_SELF})
PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="karat",
    title="Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
    year=2025,
    paper="arXiv:2503.10632",
    equation="o = (W Φ(q kᵀ / √D))ᵀ v, Φ learned scalar functions",
    complexity="O(N² (D + G r)) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(params={"rank": 3, "frequencies": 2}, parameters=PROJECTIONS + 2 * 7 * 3 * 7, patterns=SELF),
        Example(
            params={"rank": 2, "frequencies": 1, "keys": 10, "base": "silu"},
            parameters=PROJECTIONS + 2 * 5 * 2 * 10,
            patterns=CROSS,
        ),
        Example(
            heads=4,
            kv_heads=2,
            grid=(2, 3),
            prefix=1,
            params={"basis": "rational", "rank": 2, "degrees": (3, 2), "base": "identity"},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 4 * (4 + 2 + 1) * 2 * 7,
            patterns=PLANE,
        ),
        *(
            Example(params={"basis": name, "rank": 2}, parameters=PROJECTIONS + 2 * 4 * 2 * 7, patterns=PLANE)
            for name in ("morlet", "meyer", "shannon")
        ),
    ),
    reconstruction=True,
)

BASE_FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor] | None] = {
    None: None,
    "identity": torch.positive,
    "silu": F.silu,
}


class Operator(nn.Module, ABC):
    """One learned operator for each head, on rows of scores over a fixed number of keys.

    `weight` (H, M, r) is W; a basis adds the parameters of its functions.
    """

    multiplied = 0
    """Products with matrices (M, r) that `_sums` makes."""

    def __init__(self, heads: int, keys: int, rank: int, base: str | None) -> None:
        super().__init__()
        self.shape = (heads, keys, rank)
        self.base = BASE_FUNCTIONS[base]
        self.weight = nn.Parameter((2 * torch.rand(self.shape) - 1) * rank**-0.5)

    def forward(self, scores_BHNM: Tensor, seen: Tensor | None) -> Tensor:
        """y (B, H, N, r); pairs that are not seen have no part in it."""

        def visible(x_BHNM: Tensor) -> Tensor:
            return x_BHNM if seen is None else x_BHNM.masked_fill(~seen, 0)

        y_BHNR = self._sums(scores_BHNM, visible)
        return y_BHNR if self.base is None else y_BHNR + visible(self.base(scores_BHNM)).sum(-1, keepdim=True)

    @abstractmethod
    def _sums(self, x_BHNM: Tensor, visible: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_m φ_pm(x_nm), (B, H, N, r), over the visible m."""

    @abstractmethod
    def edge(self, h: int, p: int, m: int, x: Tensor) -> Tensor:
        """φ_pm(x) of one head, as it is printed."""


class _OneByOne(Operator):
    """Functions that do not factor into products: those of one p after those of another."""

    def _sums(self, x_BHNM: Tensor, visible: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([visible(self._row(x_BHNM, p)).sum(-1) for p in range(self.shape[2])], -1)

    @abstractmethod
    def _row(self, x_BHNM: Tensor, p: int) -> Tensor:
        """φ_pm(x_nm) for one p."""


def _first(parameter_HMR: Tensor, x_BHNM: Tensor) -> Tensor:
    """The numbers of those keys that there are, in x's precision."""
    return parameter_HMR[..., : x_BHNM.shape[-1], :].to(x_BHNM)


class _Fourier(Operator):
    def __init__(self, heads: int, keys: int, rank: int, base: str | None, frequencies: int) -> None:
        super().__init__(heads, keys, rank, base)
        self.multiplied = 2 * frequencies
        self.cosine, self.sine = (nn.Parameter(torch.randn(frequencies, *self.shape)) for _ in range(2))
        start = (keys * frequencies) ** -0.5
        self.cosine_scale, self.sine_scale = (nn.Parameter(torch.full(self.shape, start)) for _ in range(2))

    def _sums(self, x_BHNM: Tensor, visible: Callable[[Tensor], Tensor]) -> Tensor:
        a_FHMR = _first(self.cosine, x_BHNM) * _first(self.cosine_scale, x_BHNM)
        b_FHMR = _first(self.sine, x_BHNM) * _first(self.sine_scale, x_BHNM)
        y = x_BHNM.new_zeros(())
        for g, (a_HMR, b_HMR) in enumerate(zip(a_FHMR, b_FHMR, strict=True), 1):
            y = y + visible((g * x_BHNM).cos()) @ a_HMR + visible((g * x_BHNM).sin()) @ b_HMR
        return y

    def edge(self, h: int, p: int, m: int, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for g in range(self.cosine.shape[0]):
            y = y + self.cosine_scale[h, m, p] * self.cosine[g, h, m, p] * torch.cos(x * (g + 1))
            y = y + self.sine_scale[h, m, p] * self.sine[g, h, m, p] * torch.sin(x * (g + 1))
        return y


class _Rational(_OneByOne):
    def __init__(self, heads: int, keys: int, rank: int, base: str | None, degrees: tuple[int, int]) -> None:
        super().__init__(heads, keys, rank, base)
        self.above = nn.Parameter(torch.randn(degrees[0] + 1, *self.shape) * keys**-0.5)
        self.below = nn.Parameter(torch.randn(degrees[1], *self.shape))

    def _row(self, x_BHNM: Tensor, p: int) -> Tensor:
        above, below = (_first(numbers, x_BHNM)[..., p].unsqueeze(-2).unbind() for numbers in (self.above, self.below))
        return _horner(above, x_BHNM) / (1 + (x_BHNM * _horner(below, x_BHNM)).abs())

    def edge(self, h: int, p: int, m: int, x: Tensor) -> Tensor:
        above = sum(a * x**i for i, a in enumerate(self.above[:, h, m, p]))
        below = sum(b * x**j for j, b in enumerate(self.below[:, h, m, p], 1))
        return above / (1 + torch.as_tensor(below).abs())


def _horner(coefficients: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """c_0 + c_1 x + c_2 x² .."""
    value = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


class _Wavelet(_OneByOne):
    window: Tensor

    def __init__(self, heads: int, keys: int, rank: int, base: str | None, name: str) -> None:
        super().__init__(heads, keys, rank, base)
        self.wavelet = WAVELETS[name]
        self.scale, self.place = nn.Parameter(torch.ones(self.shape)), nn.Parameter(torch.zeros(self.shape))
        self.height = nn.Parameter(torch.randn(self.shape) * keys**-0.5)
        window = torch.hamming_window(keys, periodic=False) if name == "shannon" else torch.ones(keys)
        self.register_buffer("window", window, persistent=False)

    def _row(self, x_BHNM: Tensor, p: int) -> Tensor:
        scale, place, height = (
            _first(numbers, x_BHNM)[..., p].unsqueeze(-2) for numbers in (self.scale, self.place, self.height)
        )
        window = self.window[: x_BHNM.shape[-1]].to(x_BHNM)
        return height * window * self.wavelet((x_BHNM - place) / scale)

    def edge(self, h: int, p: int, m: int, x: Tensor) -> Tensor:
        z = (x - self.place[h, m, p]) / self.scale[h, m, p]
        return self.height[h, m, p] * self.window[m] * self.wavelet(z)


def _mexican_hat(z: Tensor) -> Tensor:
    return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - z * z) * (-z * z / 2).exp()


def _morlet(z: Tensor) -> Tensor:
    return (5 * z).cos() * (-z * z / 2).exp()


def _dog(z: Tensor) -> Tensor:
    return z * (-z * z / 2).exp()


def _meyer(z: Tensor) -> Tensor:
    t = (2 * z.abs() - 1).clamp(0, 1)
    falling = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
    return (math.pi * z.abs()).sin() * (math.pi / 2 * falling).cos()


def _shannon(z: Tensor) -> Tensor:
    return torch.sinc(z / math.pi)


WAVELETS = {"mexican_hat": _mexican_hat, "morlet": _morlet, "dog": _dog, "meyer": _meyer, "shannon": _shannon}
BASES = ("fourier", "rational", *WAVELETS)


@register(SPEC)
class KArAt(CachedAttend):
    """Kolmogorov-Arnold attention.

    Args:
        site: where it is installed; its length, else its grid, is the number of keys.
        backend: `auto`, `torch` or `oracle`.
        basis: of the scalar functions: fourier, rational, mexican_hat, morlet, dog, meyer or shannon.
        rank: r, functions for each key.
        frequencies: G of the Fourier basis, the grid size of the published names: 1 in ViT-Base (G1B), 3 in
            ViT-Small and ViT-Tiny (G3B).
        degrees: of numerator and denominator of the rational basis.
        base: None, "identity" or "silu", the function that is added to each.
        keys: M, for cross-attention to a sequence of another length.
        operator: that of another layer, `other.attend.operator`, to be shared (universal mode).
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        basis: str = "fourier",
        rank: int = 12,
        frequencies: int = 3,
        degrees: tuple[int, int] = (5, 4),
        base: str | None = None,
        keys: int | None = None,
        operator: Operator | None = None,
    ) -> None:
        super().__init__(site, backend)
        if keys is None:
            keys = site.length or (site.grid.tokens if site.grid else None)
        if keys is None:
            raise BadInput("karat learns functions for each key: pass length= (or grid=, or keys=) when building it")
        if basis not in BASES:
            raise BadInput(f"basis is one of {', '.join(BASES)}, got {basis!r}")
        if base not in BASE_FUNCTIONS:
            raise BadInput(f"base is None, 'identity' or 'silu', got {base!r}")
        for name, value in (("rank", rank), ("frequencies", frequencies), ("keys", keys), ("degrees", min(degrees))):
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if operator is not None:
            built = (basis, rank, frequencies, tuple(degrees), base)
            if built != ("fourier", 12, 3, (5, 4), None):
                raise BadInput("operator brings its own basis, rank, frequencies, degrees and base: leave these out")
            if operator.shape[:2] != (site.heads, keys):
                raise BadInput(
                    f"operator is for {operator.shape[0]} heads and {operator.shape[1]} keys, "
                    f"this layer has {site.heads} heads and {keys} keys"
                )
        elif basis == "fourier":
            operator = _Fourier(site.heads, keys, rank, base, frequencies)
        elif basis == "rational":
            operator = _Rational(site.heads, keys, rank, base, degrees)
        else:
            operator = _Wavelet(site.heads, keys, rank, base, basis)
        self.operator = operator

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Sums of functions, then W and the values from the right; rows only where pairs are masked."""
        self._check_keys(k_BGMD, call)
        heads, queries, keys, keep = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2], call.mask.keys
        if keep is not None:  # padding may hold anything, even NaN
            k_BGMD, v_BGME = (x.masked_fill(~keep[:, None, :, None], 0) for x in (k_BGMD, v_BGME))
        seen = call.mask.pairs(queries, keys, q_BHND.device)
        # A score that is off by a rounding of bfloat16 is another angle.
        with as_written(q_BHND):
            q, k, v = (wide(x) for x in (q_BHND, repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)))
            scores_BHNM = q @ k.mT * q.shape[-1] ** -0.5
            if call.mask.bias is not None:
                scores_BHNM = scores_BHNM + call.mask.bias
            y_BHNR = self.operator(scores_BHNM, seen)
            weight_HMR = _first(self.operator.weight, scores_BHNM)
            if call.mask.causal or call.mask.rule is not None:
                rows_BHNM = y_BHNR @ weight_HMR.mT
                o_BHNE = (rows_BHNM if seen is None else rows_BHNM.masked_fill(~seen, 0)) @ v
            else:
                o_BHNE = y_BHNR @ (weight_HMR.mT @ v)
        return o_BHNE.to(v_BGME.dtype)

    def _check_keys(self, k_BGMD: Tensor, call: Call) -> None:
        built, keys = self.operator.shape[1], k_BGMD.shape[2]
        if keys > built or (keys < built and not call.mask.causal):
            raise BadInput(
                f"this operator has functions for {built} keys, got {keys}: build karat with the length it is used "
                "at, and pad shorter sequences"
            )

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Function by function, then row by row."""
        self._check_keys(k_BGMD, call)
        heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
        batch = q_BHND.shape[0]
        k, v = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
        seen, bias = dense_mask(call.mask, (batch, heads, queries, keys), q_BHND)
        scores = torch.einsum("bhnd,bhmd->bhnm", q_BHND, k) / math.sqrt(q_BHND.shape[-1]) + bias
        outputs = []
        for h in range(heads):
            row_BNM = torch.zeros_like(scores[:, h])
            for p in range(self.operator.shape[2]):
                y_BN = scores.new_zeros(batch, queries)
                for m in range(keys):
                    x_BN = scores[:, h, :, m]
                    phi_BN = self.operator.edge(h, p, m, x_BN)
                    if self.operator.base is not None:
                        phi_BN = phi_BN + self.operator.base(x_BN)
                    y_BN = y_BN + seen[:, h, :, m] * phi_BN
                row_BNM = row_BNM + y_BN.unsqueeze(-1) * self.operator.weight[h, :keys, p]
            outputs.append((row_BNM * seen[:, h]) @ v[:, h])
        return torch.stack(outputs, 1)

    def count(self, sizes: Sizes) -> Cost:
        """Scores and cosine products per pair; then W and values, by rows where the layer is causal."""
        batch, heads, size, rank = sizes.batch, self.site.heads, self.site.head_dim, self.operator.shape[2]
        causal = self.site.causal and not sizes.cross
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, batch, heads)
        all_pairs = batch * heads * sizes.queries * sizes.keys
        per_pair = size + self.operator.multiplied * rank
        if causal:
            per_pair += rank + size
            return Cost(2 * pairs * per_pair, 2 * all_pairs * per_pair, pairs)
        flops = 2 * all_pairs * per_pair + 2 * batch * heads * (sizes.queries + sizes.keys) * rank * size
        return Cost(flops, flops, pairs)
