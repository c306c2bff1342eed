"""The Axial Transformer: what each pixel knows, how it begins, what sampling costs and that both ways draw the same."""

from collections import Counter

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.models.axial import PUBLISHED, AxialBlock, AxialImageModel, AxialTransformer, bits, gumbel


def stirred(model, scale=0.3):
    """The model with weights far from their first values, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.double().eval()


def small(height=5, width=5, symbols=4, **settings):
    settings = {"dim": 16, "heads": 2, "outer": 2, "inner": 1} | settings
    return stirred(AxialTransformer(height, width, symbols=symbols, **settings))


@pytest.mark.parametrize("inner", [1, 2])
def test_a_pixel_knows_all_before_it_and_nothing_else(inner):
    """Every pixel of the image is a symbol of its own, so that gradients of embeddings are those of pixels."""
    model = small(symbols=25, inner=inner)
    logits = model(torch.arange(25).view(1, 5, 5)).flatten(0, 2)
    rows = [torch.autograd.grad(row.sum(), model.embedding, retain_graph=True)[0].any(-1) for row in logits]
    assert torch.equal(torch.stack(rows), torch.ones(25, 25).tril(-1).bool())


def test_a_pixel_that_changes_moves_only_what_comes_behind_it():
    model, x = small(4, 6), torch.randint(4, (2, 4, 6))
    first = model(x).flatten(1, 2)
    for place in range(24):
        other = x.flatten(1).clone()
        other[:, place] = (other[:, place] + 1) % 4
        second = model(other.view_as(x)).flatten(1, 2)
        assert torch.equal(first[:, : place + 1], second[:, : place + 1])
        assert (first[:, place + 1 :] != second[:, place + 1 :]).any(-1).all()


def test_channels_know_those_before_them_and_the_condition_reaches_every_pixel():
    model = stirred(AxialImageModel(4, 3, 3, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1))
    x = torch.randint(4, (1, 4, 3, 3))
    first = model(x)
    for c in range(3):
        other = x.clone()
        other[0, 1, 1, c] = (other[0, 1, 1, c] + 1) % 4
        moved = (model(other) != first).any(-1)[0]
        assert not moved[..., :c].any()
        assert moved[..., c + 1 :].all()
        own = moved[..., c].flatten()
        assert own.tolist() == [place > 4 for place in range(12)]


def test_training_takes_one_channel_of_each_image():
    model = stirred(AxialImageModel(4, 3, 3, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1))
    x = torch.randint(4, (5, 4, 3, 3))
    each = [model.loss(x, torch.full((5,), c)) for c in range(3)]
    torch.testing.assert_close(torch.stack(each).mean(), bits(model(x), x))
    mixed = torch.tensor([2, 0, 1, 1, 0])
    alone = [model.loss(x[b : b + 1], mixed[b : b + 1]) for b in range(5)]
    torch.testing.assert_close(model.loss(x, mixed), torch.stack(alone).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_ways_of_sampling_draw_the_same_images(dtype):
    model = small(6, 5, symbols=8, outer=4, inner=2).to(dtype)
    noise = gumbel(4, 6, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    images = model.sample(noise)
    assert torch.equal(images, model.sample_slowly(noise))
    assert len(images.unique()) > 1
    assert not torch.equal(images[0], images[1])


def test_sampling_runs_the_outer_blocks_once_a_row():
    model, noise = small(6, 5, inner=2), gumbel(1, 6, 5, 4)
    counts = Counter()
    model.outer.register_forward_hook(lambda *_: counts.update(outer=1))
    for block in model.inner:
        block.register_forward_hook(lambda *_: counts.update(whole_images=1))
        block.attention_norm.register_forward_hook(lambda _, args, __: counts.update(pixels=args[0].shape[1]))
    model.sample(noise)
    assert counts == {"outer": 6, "pixels": 2 * 6 * 5}
    counts.clear()
    model.sample_slowly(noise)
    assert counts["outer"] == 6 * 5


def test_samples_are_distributed_as_the_logits_say():
    model = small(1, 2, symbols=3)
    noise = gumbel(4000, 1, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    first, second = model.sample(noise)[:, 0].unbind(1)
    with torch.no_grad():
        p1 = model(torch.zeros(1, 1, 2, dtype=torch.int64))[0, 0, 0].softmax(-1)
        images = torch.stack([torch.arange(3), torch.zeros(3, dtype=torch.int64)], 1).unsqueeze(1)
        p2 = model(images)[:, 0, 1].softmax(-1)
    counted = torch.bincount(3 * first + second, minlength=9).view(3, 3) / 4000
    torch.testing.assert_close(counted.double(), p1.unsqueeze(1) * p2, rtol=0, atol=0.03)


def test_channels_are_sampled_one_after_the_other():
    model = stirred(AxialImageModel(3, 4, 2, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1))
    noise = gumbel(2, 3, 4, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    x = torch.zeros(2, 3, 4, 2, dtype=torch.int64)
    with torch.no_grad():
        for c in range(2):
            for row in range(3):
                for column in range(4):
                    at = (slice(None), row, column, c)
                    x[at] = (model(x)[at] + noise[at]).argmax(-1)
    assert torch.equal(model.sample(noise), x)


def test_it_begins_with_eight_bits_for_256_symbols():
    model = AxialImageModel(6, 6, dim=32, heads=2, exterior=2, outer=2, inner=2)
    x = torch.randint(256, (3, 6, 6, 3))
    logits = model(x)
    assert logits.abs().max() < 1e-3
    assert bits(logits, x).item() == pytest.approx(8, abs=1e-4)


def test_blocks_begin_as_the_identity():
    x = torch.randn(2, 12, 16)
    block = AxialBlock(16, 2, (3, 4), axis=0, masked=True)
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "side", "dim"), [("imagenet32", 32, 1536), ("imagenet64", 64, 2048)])
def test_the_parameters_of_the_published_models_by_hand(name, side, dim):
    block = 4 * (dim * dim + dim) + 2 * (dim * dim + dim) + 2 * 2 * dim
    total = 24 * block
    total += 9 * 6 * dim + dim  # the convolution
    total += 2 * 2 * side * dim  # positions, of both networks
    total += 256 * dim + 2 * dim + 256 * dim + 256  # embedding, last norm, logits
    with torch.device("meta"):
        model = AxialImageModel(**PUBLISHED[name])
    assert sum(p.numel() for p in model.parameters()) == total
    if name == "imagenet32":
        assert round(total / 1e6) == 341


def test_what_is_no_image_or_model_is_refused():
    model = small()
    with pytest.raises(BadInput, match=r"integers \(batch, 5, 5\), got torch.int64 \(2, 5, 4\)"):
        model(torch.zeros(2, 5, 4, dtype=torch.int64))
    with pytest.raises(BadInput, match="integers"):
        model(torch.zeros(2, 5, 5))
    with pytest.raises(BadInput, match=r"condition is \(2, 5, 5, 16\)"):
        model(torch.zeros(2, 5, 5, dtype=torch.int64), torch.zeros(2, 25, 16))
    with pytest.raises(BadInput, match=r"noise is \(batch, 5, 5, 4\)"):
        model.sample(torch.zeros(1, 5, 5, 3))
    with pytest.raises(BadInput, match="outer blocks come in pairs"):
        AxialTransformer(4, 4, dim=16, heads=2, outer=3)
    with pytest.raises(BadInput, match="symbols counts what a pixel can be"):
        AxialTransformer(4, 4, symbols=1, dim=16, heads=2)
    channels = AxialImageModel(4, 3, 2, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1)
    with pytest.raises(BadInput, match=r"integers \(batch, 4, 3, 2\)"):
        channels(torch.zeros(1, 4, 3, 3, dtype=torch.int64))
    for shape in ((4, 3, 3, 4), (3, 4, 2, 4), (4, 3, 2, 5)):
        with pytest.raises(BadInput, match=r"noise is \(batch, 4, 3, 2, 4\)"):
            channels.sample(torch.zeros(1, *shape))
    with pytest.raises(BadInput, match="channels are 0 to 1, got 0 to 3"):
        channels.loss(torch.zeros(2, 4, 3, 2, dtype=torch.int64), torch.tensor([0, 3]))
    with pytest.raises(BadInput, match="one channel for each of 2 images"):
        channels.loss(torch.zeros(2, 4, 3, 2, dtype=torch.int64), torch.tensor([1]))
    with pytest.raises(BadInput, match="channels counts those of the image, at least 1, got 0"):
        AxialImageModel(4, 3, 0, dim=16, heads=2)
    with pytest.raises(BadInput, match="inner counts blocks, at least 0, got -1"):
        AxialTransformer(4, 4, dim=16, heads=2, inner=-1)


@pytest.mark.parametrize("sampled", ["sample", "sample_slowly"])
def test_a_condition_is_of_as_many_images(sampled):
    with pytest.raises(BadInput, match=r"condition is \(2, 5, 5, 16\), got \(1, 5, 5, 16\)"):
        getattr(small(), sampled)(torch.zeros(2, 5, 5, 4), torch.zeros(1, 5, 5, 16))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_symbols_are_integers_of_any_size(dtype):
    x, model = torch.randint(4, (2, 5, 5)), small()
    assert torch.equal(model(x.to(dtype)), model(x))
    images = torch.randint(4, (2, 4, 3, 2))
    channels = stirred(AxialImageModel(4, 3, 2, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1))
    assert torch.equal(channels(images.to(dtype)), channels(images))
    channel = torch.tensor([1, 0])
    assert torch.equal(channels.loss(images.to(dtype), channel.to(dtype)), channels.loss(images, channel))


@pytest.mark.parametrize("symbol", [-1, 4])
def test_symbols_that_there_are_not_are_refused(symbol):
    images = torch.zeros(1, 4, 3, 2, dtype=torch.int64)
    images[0, 0, 0, 0] = symbol
    channels = AxialImageModel(4, 3, 2, symbols=4, dim=16, heads=2, exterior=2, outer=2, inner=1)
    for run in (channels, channels.loss):
        with pytest.raises(BadInput, match="symbols are 0 to 3, got"):
            run(images)
    with pytest.raises(BadInput, match="symbols are 0 to 3, got"):
        small()(torch.full((1, 5, 5), symbol))
    with pytest.raises(BadInput, match=r"symbols are integers, got torch\.bool"):
        small()(torch.zeros(1, 5, 5, dtype=torch.bool))
