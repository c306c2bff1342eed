"""What every mechanism must hold, as functions of a case. `test_contract` runs them over the registry,
`test_broken` runs them on mechanisms that are wrong on purpose."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import attlas
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Mechanism
from attlas.core.registry import family_of, mechanism
from attlas.core.spec import Example, Pattern, Takes
from attlas.ops.dispatch import record_choices
from attlas.ops.flops import flop_counter

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest relative RMS error against the float64 oracle, forward and backward."""

BATCH = 3


@dataclass(frozen=True)
class Case:
    """One mechanism at one of its examples in one of its patterns."""

    name: str
    index: int
    pattern: Pattern

    @property
    def example(self) -> Example:
        return mechanism(self.name).spec.examples[self.index]

    @property
    def causal(self) -> bool:
        return self.pattern.startswith("causal")

    @property
    def cross(self) -> bool:
        return self.pattern.endswith("cross")

    @property
    def grid(self) -> Grid:
        return Grid(self.example.grid, self.example.prefix)

    def __str__(self) -> str:
        return f"{self.name}-{self.index}-{self.pattern.replace(' ', '-')}"

    def build(self, dtype: torch.dtype = torch.float64, **settings: object) -> attlas.Mixer:
        """The layer in eval mode with random weights everywhere, zero-initialised ones included."""
        example = self.example
        torch.manual_seed(1)
        layer = attlas.mixer(
            self.name,
            example.dim,
            example.heads,
            kv_heads=example.kv_heads,
            causal=self.causal,
            grid=self.grid,
            length=self.grid.tokens,
            **dict(example.params) | settings,
        )
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return layer.to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> list[Tensor]:
        """The tokens, and the context in a cross pattern."""
        torch.manual_seed(2)
        x = torch.randn(batch, self.grid.tokens, self.example.dim, dtype=torch.float64)
        context = torch.randn(batch, self.grid.tokens + 3, self.example.dim, dtype=torch.float64)
        return [t.to(dtype) for t in ([x, context] if self.cross else [x])]

    def paddings(self) -> Iterator[Tensor]:
        """Which keys are real: padding on the left, on the right, inside, and per sequence."""
        tokens = self.inputs()[-1].shape[1]
        places = torch.arange(tokens)
        for keep in (places >= 2, places < tokens - 2, (places < 2) | (places > 3)):
            yield keep.expand(BATCH, -1)
        yield places.expand(BATCH, -1) < torch.tensor([[tokens], [tokens - 3], [1]])


def all_cases() -> list[Case]:
    found = []
    for name in attlas.mechanisms():
        for index, example in enumerate(mechanism(name).spec.examples):
            patterns = example.patterns or mechanism(name).spec.patterns
            found += [Case(name, index, pattern) for pattern in sorted(patterns)]
    return found


def relative_rms(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp(min=1e-6))


def use_backend(layer: nn.Module, backend: str) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, Mechanism):
            module.backend = backend
    return layer


def gradients(
    layer: Callable[..., Tensor],
    inputs: list[Tensor],
    real: Tensor | None = None,
    parameters: list[nn.Parameter] | None = None,
    **kwargs: object,
) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of inputs and parameters under fixed random gradients of the real outputs.

    `parameters` are those of the layer where it is a module.
    """
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = layer(*inputs, **kwargs)
    torch.manual_seed(3)
    seed = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    if real is not None:
        seed = seed.where(real.unsqueeze(-1), 0)
    wanted = inputs + list(layer.parameters() if parameters is None else parameters)
    grads = torch.autograd.grad(y, wanted, seed, allow_unused=True)
    return y, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    assert torch.isfinite(got).all(), f"{what} is not finite"
    scale = expected.double().pow(2).mean().sqrt()
    if scale <= floor:  # nothing but rounding: measured against the floor
        assert (got.double() - expected.double()).pow(2).mean().sqrt() <= floor + tolerance, what
        return
    error = relative_rms(got, expected)
    assert error <= tolerance, f"{what}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"


def check_oracle(case: Case) -> None:
    """1a. Forward and gradients equal the oracle's in float64, without and with padding."""
    masks = [None]
    if Takes.PADDING in mechanism(case.name).spec.masks:
        masks += list(case.paddings())
    layer, inputs = case.build(), case.inputs()
    for mask in masks:
        real = None if case.cross else mask
        kwargs = {"real": real, "mask": mask, "grid": case.grid}
        expected, expected_grads = gradients(use_backend(layer, "oracle"), inputs, **kwargs)
        got, grads = gradients(use_backend(layer, "auto"), inputs, **kwargs)
        rows = slice(None) if real is None else real
        assert_close(got[rows], expected[rows], TOLERANCE[torch.float64], f"output with mask {mask}")
        for index, (a, b) in enumerate(zip(grads, expected_grads, strict=True)):
            assert_close(a, b, TOLERANCE[torch.float64], f"gradient {index} with mask {mask}", floor=1e-12)


def check_masks(case: Case) -> None:
    """1b. Pair masks and biases equal the oracle's, where they are taken."""
    takes = mechanism(case.name).spec.masks
    layer, inputs = case.build(), case.inputs()
    queries, keys = inputs[0].shape[1], inputs[-1].shape[1]
    torch.manual_seed(4)
    seen = torch.rand(BATCH, 1, queries, keys) > 0.4
    masks = []
    if Takes.PAIRS in takes:
        masks += [attlas.Mask.pairs_(seen), attlas.Mask.window(1) | attlas.Mask.global_(1)]
    if Takes.BIAS in takes:
        masks.append(attlas.Mask.biased(torch.randn(1, 1, queries, keys, dtype=torch.float64)))
    if {Takes.PAIRS, Takes.BIAS} <= takes:
        masks.append(masks[0] & masks[-1] & attlas.Mask.padding(next(case.paddings())))
    for mask in masks:
        expected = use_backend(layer, "oracle")(*inputs, mask=mask, grid=case.grid)
        got = use_backend(layer, "auto")(*inputs, mask=mask, grid=case.grid)
        assert_close(got, expected, TOLERANCE[torch.float64], f"output under {mask}")


def check_gradcheck(case: Case) -> None:
    """1c. Analytic gradients equal numerical ones."""
    layer = case.build()
    inputs = [t[:1].detach().requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(lambda *t: layer(*t, grid=case.grid), inputs, fast_mode=True)


def check_backends(case: Case, dtype: torch.dtype) -> None:
    """1d. Every backend that takes this dtype equals the float64 oracle, forward and backward."""
    layer, inputs = case.build(dtype), case.inputs(dtype)
    reference = case.build(dtype).double()
    expected, expected_grads = gradients(use_backend(reference, "oracle"), [t.double() for t in inputs], grid=case.grid)
    with record_choices() as choices:
        layer(*inputs, grid=case.grid)
    names = {"auto"} | {c.backend for c in choices} | {n for c in choices for n, _ in c.passed_over}
    for name in sorted(names):
        try:
            got, grads = gradients(use_backend(layer, name), inputs, grid=case.grid)
        except BackendUnavailable:
            assert name != "auto"
            continue
        assert got.dtype == dtype
        assert_close(got, expected, TOLERANCE[dtype], f"{name} output")
        largest = max(float(g.double().pow(2).mean().sqrt()) for g in expected_grads)
        for index, (a, b) in enumerate(zip(grads, expected_grads, strict=True)):
            assert_close(a, b, 2 * TOLERANCE[dtype], f"{name} gradient {index}", TOLERANCE[dtype] * largest)


def check_causality(case: Case) -> None:
    """2. Changing the future changes nothing before it, in values and gradients."""
    layer, (x, *context) = case.build(), case.inputs()
    first = layer(x, *context, grid=case.grid)
    for t in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, t:] = torch.randn_like(changed[:, t:]) * 3
        second = layer(changed, *context, grid=case.grid)
        assert torch.allclose(first[:, :t], second[:, :t], rtol=0, atol=1e-12), f"output before {t} changed"
        leaf = x.clone().requires_grad_()
        y = layer(leaf, *context, grid=case.grid)
        (grad,) = torch.autograd.grad(y[:, :t].sum(), leaf, allow_unused=True)
        assert grad is None or not grad[:, t:].any(), f"gradient flows from before {t} to the future"


def check_alignment(case: Case) -> None:
    """2b. Queries are the last N of M positions; a mechanism that cannot do that refuses."""
    attend = getattr(case.build(), "attend", None)
    if not isinstance(attend, Attend) or case.cross:
        return
    site, tokens = attend.site, case.grid.tokens
    q = torch.randn(2, site.heads, tokens, site.head_dim, dtype=torch.float64)
    k, v = (torch.randn(2, site.kv_heads, tokens, site.head_dim, dtype=torch.float64) for _ in "kv")
    x = torch.randn(2, tokens, site.dim, dtype=torch.float64)
    whole = attend(q, k, v, grid=case.grid, tokens=x)
    try:
        last = attend(q[:, :, -3:], k, v, grid=Grid((3,)), tokens=x[:, -3:])
    except BadInput:
        return
    assert_close(last, whole[:, :, -3:], TOLERANCE[torch.float64], "the last queries")


def check_padding(case: Case) -> None:
    """3. What padded positions hold never matters, and no gradient reaches them."""
    layer = case.build()
    for keep in case.paddings():
        inputs = case.inputs()
        padded = ~keep
        source = inputs[-1]
        other = source.clone()
        other[padded] = torch.randn_like(other[padded]) * 5
        leaf = source.clone().requires_grad_()
        first = layer(*inputs[:-1], leaf, mask=keep, grid=case.grid)
        second = layer(*inputs[:-1], other, mask=keep, grid=case.grid)
        real = torch.ones(first.shape[:2], dtype=torch.bool) if case.cross else keep
        assert torch.allclose(first[real], second[real], rtol=0, atol=1e-12), f"padding leaks: {keep[0]}"
        (grad,) = torch.autograd.grad(first[real].sum(), leaf)
        assert torch.isfinite(grad).all(), "gradient is not finite"
        assert not grad[padded].any(), "a gradient reaches padding"


def check_nan_padding(case: Case) -> None:
    """3a. Not even a NaN in padding reaches what is real."""
    layer = case.build()
    for keep in case.paddings():
        *first, source = case.inputs()
        with torch.no_grad():
            expected = layer(*first, source, mask=keep, grid=case.grid)
            got = layer(*first, source.masked_fill(~keep[..., None], torch.nan), mask=keep, grid=case.grid)
        real = torch.ones(got.shape[:2], dtype=torch.bool) if case.cross else keep
        assert torch.allclose(got[real], expected[real], rtol=0, atol=1e-12), f"NaN leaks from padding: {keep[0]}"


def check_sees_nothing(case: Case) -> None:
    """3b. Where everything is padding the attend gives 0, and gradients are finite everywhere."""
    layer, inputs = case.build(), case.inputs()
    keep = torch.ones(inputs[-1].shape[:2], dtype=torch.bool)
    keep[0] = False
    outputs = []
    attend = getattr(layer, "attend", None)
    if attend is not None:
        attend.register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = [t.requires_grad_() for t in inputs]
    y = layer(*inputs, mask=keep, grid=case.grid)
    for output in outputs:
        assert not output[0].any(), "a query that sees nothing must give 0"
        assert output[1:].any()
    for grad in torch.autograd.grad(y.sum(), [*inputs, *layer.parameters()], allow_unused=True):
        assert grad is None or torch.isfinite(grad).all(), "gradient is not finite"


def stream(layer: attlas.Mixer, x: Tensor, keep: Tensor | None, sizes: list[int]) -> Tensor:
    """The output of segments of these sizes, with carried state."""
    state, parts, start = layer.initial_state(len(x), like=x), [], 0
    for size in sizes:
        piece = slice(start, start + size)
        y, state = layer.extend(x[:, piece], state, keep=None if keep is None else keep[:, piece])
        parts.append(y)
        start += size
    return torch.cat(parts, 1)


def check_segments(case: Case) -> None:
    """4. Any segmentation with carried state equals one full pass, with padding too."""
    layer, (x,) = case.build(), case.inputs()
    tokens = x.shape[1]
    for keep in [None, *case.paddings()]:
        whole = layer(x, mask=keep, grid=case.grid)
        real = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        for sizes in ([tokens], [1] * tokens, [3, 0, 1, tokens - 4]):
            with torch.no_grad():
                got = stream(layer, x, keep, sizes)
            assert_close(got[real], whole[real], TOLERANCE[torch.float64], f"segments {sizes}")


def check_stream_gradients(case: Case) -> None:
    """4a. The gradients of a stream are those of the full pass, with padding too."""
    layer, (x,) = case.build(), case.inputs()
    sizes, parameters = [3, 2, x.shape[1] - 5], list(layer.parameters())
    keep = torch.arange(x.shape[1]).expand(BATCH, -1) != torch.tensor([[1], [3], [4]])
    for mask in (None, keep):
        _, expected = gradients(layer, [x], mask, mask=mask, grid=case.grid)
        _, got = gradients(lambda x, mask=mask: stream(layer, x, mask, sizes), [x], mask, parameters)
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b, TOLERANCE[torch.float64], f"gradient {index} of a stream with mask {mask}", floor=1e-12)


def check_branching(case: Case) -> None:
    """4b. A state stays valid when something else was appended to it."""
    layer, (x,) = case.build(), case.inputs()
    with torch.no_grad():
        _, state = layer.extend(x[:, :4], layer.initial_state(BATCH, like=x))
        first, _ = layer.extend(x[:, 4:5], state)
        layer.extend(torch.randn_like(x[:, 4:6]), state)
        again, _ = layer.extend(x[:, 4:5], state)
    assert torch.equal(first, again), "extending a state changed it"


def check_batch(case: Case) -> None:
    """5. Batch slots are independent, strides do not matter, eval is deterministic under dropout."""
    layer, inputs = case.build(), case.inputs()
    y = layer(*inputs, grid=case.grid)
    one = layer(*[t[1:2] for t in inputs], grid=case.grid)
    assert_close(one, y[1:2], TOLERANCE[torch.float64], "one sequence alone")
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    assert_close(layer(*strided, grid=case.grid), y, TOLERANCE[torch.float64], "strided input")
    if isinstance(layer, attlas.Attention):
        dropping = case.build(dropout=0.5)
        first, second = (dropping(*inputs, grid=case.grid) for _ in range(2))
        assert torch.equal(first, second), "dropout is on in eval"
        dropping.train()
        assert not torch.equal(dropping(*inputs, grid=case.grid), first), "dropout is off in training"


def check_dtype(case: Case, dtype: torch.dtype) -> None:
    """6a. The dtype goes in and out, finite."""
    layer, inputs = case.build(dtype), case.inputs(dtype)
    y, grads = gradients(layer, inputs, grid=case.grid)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(g).all() for g in grads)


def check_autocast(case: Case) -> None:
    """6b. Autocast to bfloat16 stays close to float32."""
    layer, inputs = case.build(torch.float32), case.inputs(torch.float32)
    expected = layer(*inputs, grid=case.grid)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = gradients(layer, inputs, grid=case.grid)
    assert_close(y, expected, 2 * TOLERANCE[torch.bfloat16], "under autocast")
    assert all(torch.isfinite(g).all() for g in grads)


def check_compile(case: Case, backend: str = "aot_eager") -> None:
    """6c. The compiled graph is whole and equals eager, forward and backward."""
    torch._dynamo.reset()
    layer, inputs = case.build(torch.float32), case.inputs(torch.float32)
    expected, expected_grads = gradients(layer, inputs, grid=case.grid)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    got, grads = gradients(compiled, inputs, grid=case.grid)
    assert_close(got, expected, TOLERANCE[torch.float32], "compiled output")
    for a, b in zip(grads, expected_grads, strict=True):
        assert_close(a, b, 10 * TOLERANCE[torch.float32], "compiled gradient", floor=1e-5)


def check_export(case: Case) -> None:
    """6d. `torch.export` gives a program with the same output."""
    layer, inputs = case.build(torch.float32), case.inputs(torch.float32)
    program = torch.export.export(layer, tuple(inputs))  # the grid is the layer's own
    expected = layer(*inputs, grid=case.grid)
    assert_close(program.module()(*inputs), expected, 1e-5, "exported output")


def check_state_dict(case: Case) -> None:
    """6e. Saved and loaded weights give the same output, in another process as in this one."""
    layer, inputs = case.build(), case.inputs()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = case.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(*inputs, grid=case.grid), layer(*inputs, grid=case.grid))


def check_cost(case: Case) -> None:
    """7. The cost formula equals what FlopCounterMode counts on the torch backend."""
    layer, inputs = case.build(torch.float32), case.inputs(torch.float32)
    use_backend(layer, "auto" if not has_torch_backend(layer, inputs, case) else "torch")
    with torch.no_grad(), flop_counter() as counter:
        layer(*inputs, grid=case.grid)
    cost = layer.cost(BATCH, inputs[0].shape[1], inputs[1].shape[1] if case.cross else None, grid=case.grid)
    assert cost.executed == counter.get_total_flops(), (
        f"the formula says {cost.executed}, {counter.get_total_flops()} were counted"
    )
    assert cost.flops <= cost.executed or cost.executed == 0, "more useful FLOPs than executed ones"


def has_torch_backend(layer: nn.Module, inputs: list[Tensor], case: Case) -> bool:
    with record_choices() as choices:
        layer(*inputs, grid=case.grid)
    return bool(choices)


def check_pairs(case: Case) -> None:
    """7b. The visible pairs of the cost formula are the pairs that gradients see.

    Of an attend in the values. A mixer's tokens reach one another in other ways, too: there it is asked where seeing
    few is what the mechanism is about.
    """
    layer, inputs = case.build(), case.inputs(batch=1)
    attend = getattr(layer, "attend", None)
    keys = inputs[-1].shape[1]
    cost = layer.cost(1, inputs[0].shape[1], keys if case.cross else None, grid=case.grid)
    if cost.pairs == 0:
        return
    if attend is None and family_of(mechanism(case.name)) != "local_sparse":
        return
    if attend is None:
        seen = layer.site.heads * tokens_that_matter(layer, inputs, case.grid)
        assert cost.pairs == seen, f"the formula says {cost.pairs} pairs, gradients see {seen}"
        return
    site = attend.site
    q = torch.randn(1, site.heads, inputs[0].shape[1], site.head_dim, dtype=torch.float64)
    k = torch.randn(1, site.kv_heads, keys, site.head_dim, dtype=torch.float64)
    v = torch.randn(1, site.kv_heads, keys, site.head_dim, dtype=torch.float64)

    def run(values: Tensor) -> Tensor:
        return attend(q, k, values, grid=case.grid, cross=case.cross, tokens=inputs[0]).sum(-1)

    jacobian = torch.autograd.functional.jacobian(run, v)  # (1, H, N, 1, G, M, E)
    seen = int((jacobian.abs().sum((-1, 3, 4)) > 0).sum())
    assert cost.pairs == seen, f"the formula says {cost.pairs} pairs, gradients see {seen}"


def check_parameters(case: Case) -> None:
    """8. The declared parameter count; every parameter receives a gradient."""
    layer, inputs = case.build(), case.inputs()
    count = sum(p.numel() for p in layer.parameters())
    assert count == case.example.parameters, f"{count} parameters, declared {case.example.parameters}"
    layer.train()
    y = layer(*inputs, grid=case.grid)
    loss = (y * torch.randn_like(y)).sum() + attlas.auxiliary_loss(layer)
    loss.backward() if count else None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} receives no gradient"
        assert parameter.grad.any(), f"the gradient of {name} is zero"


def tokens_that_matter(layer: nn.Module, inputs: list[Tensor], grid: Grid) -> int:
    """How many pairs of an output and an input token depend on one another; in a cross pattern of an output and a
    token of the context, and of x where others than its own matter."""

    def run(*tokens: Tensor) -> Tensor:
        return layer(*tokens, grid=grid).sum(-1)

    jacobians = torch.autograd.functional.jacobian(run, tuple(inputs))  # (1, N, 1, M, C) each
    *own, source = [jacobian.abs().sum((0, 2, 4)) > 0 for jacobian in jacobians]
    others = sum(int(seen.sum()) for seen in own if (seen & ~torch.eye(len(seen), dtype=torch.bool)).any())
    return int(source.sum()) + others
