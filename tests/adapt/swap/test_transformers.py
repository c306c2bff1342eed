import copy
import io
import warnings

import pytest
import torch
import transformers
from rich.console import Console
from torch.nn.attention import flex_attention as flex
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import attlas
from attlas.adapt.distil import distil
from attlas.adapt.swap import swap
from attlas.core.errors import BadInput, Unsupported
from attlas.ops.linear import weighted_average

transformers.logging.set_verbosity_error()

WORDS = 40
ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def build(kind, below="sdpa"):
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = sizes | {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2} | ENDS
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, intermediate_size=48, attn_implementation=below))
    elif kind == "gpt2":
        sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **ENDS, attn_implementation=below))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**llama, attn_implementation=below))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**llama, sliding_window=4, attn_implementation=below))
    elif kind == "t5":
        sizes = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        ends = {"decoder_start_token_id": 0, "eos_token_id": None}
        model = T5ForConditionalGeneration(T5Config(**sizes, **ends, attn_implementation=below))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, attn_implementation=below))
    for parameter in model.parameters():  # the small initial weights would hide what attention does
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return model.double().eval()


ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}

IDS = torch.randint(1, WORDS, (2, 9), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones(2, 9, dtype=torch.long)
LEFT[0, :4] = 0
RIGHT = LEFT.flip(1)
PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2), "use_cache": False}
PADDINGS = {"none": None, "left": LEFT, "right": RIGHT}


@torch.no_grad()
def logits(model, ids=IDS, mask=None, **kwargs):
    if isinstance(model, ViTModel):
        picture = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).sin().view(2, 3, 16, 16)
        return model(picture.to(model.dtype)).last_hidden_state
    if isinstance(model, T5ForConditionalGeneration):
        kwargs["decoder_input_ids"] = IDS.flip(1)
    return model(ids, attention_mask=mask, **kwargs)[0]


def real(x, model, mask):
    """What padded positions give is unspecified."""
    whole = mask is None or mask.ndim != 2 or isinstance(model, T5ForConditionalGeneration | ViTModel)
    return x if whole else x[mask.bool()]


def cores(model):
    return [module.core for module in model.modules() if hasattr(module, "core")]


def counted(model):
    """How often each core is called, from here on."""
    calls = []
    for core in cores(model):
        core.register_forward_hook(lambda core, args, output: calls.append(core))
    return calls


@pytest.mark.parametrize(
    ("kind", "padding"),
    [(kind, padding) for kind in ("bert", "gpt2", "llama", "mistral", "t5") for padding in PADDINGS]
    + [("vit", "none")],
)
@pytest.mark.parametrize("below", ["sdpa", "eager"])
def test_softmax_in_the_place_of_softmax_leaves_the_logits(kind, below, padding):
    model, mask, bound = build(kind, below), PADDINGS[padding], 1e-10
    if below == "eager" and kind in ("llama", "mistral", "vit"):  # whose softmax is one of float32
        model, bound = model.float(), 1e-5
    before = logits(model, mask=mask)
    report = swap(model, "softmax")
    assert len(report.of("exact")) == len(report.rows) == (6 if kind == "t5" else 2)
    calls = counted(model)
    after = logits(model, mask=mask)
    torch.testing.assert_close(real(after, model, mask), real(before, model, mask), rtol=0, atol=bound)
    assert len(calls) == len(report.rows)
    report.undo()
    assert torch.equal(logits(model, mask=mask), before)
    assert {config._attn_implementation for config in configs_of(model)} == {below}


def configs_of(model):
    return [module.config for module in model.modules() if hasattr(module, "config")]


def pairs_mask(kind):
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    if kind == "causal":
        return causal.expand(2, 1, -1, -1)
    if kind == "prefix":  # the first four tokens see one another
        return (causal | (torch.arange(9) < 4)).expand(2, 1, -1, -1)
    if kind == "random":
        return (causal & (torch.rand(2, 1, 9, 9) > 0.4)) | torch.eye(9, dtype=torch.bool)
    blind = causal.expand(2, 1, -1, -1).clone()  # a real token that sees nothing
    blind[:, :, 6] = False
    return blind


def test_a_mask_of_one_row_holds_for_all_queries():
    model = build("bert")
    row = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(LEFT[:, None, None] == 0, -torch.inf)
    before = logits(model, mask=LEFT)
    swap(model, "linear")
    linear = logits(model, mask=LEFT)
    torch.testing.assert_close(logits(model, mask=row), linear, rtol=0, atol=1e-12)
    assert not torch.allclose(linear, before)


def test_a_mask_that_was_changed_is_read_again():
    model, mask = build("llama"), pairs_mask("causal").clone()
    swap(model, "linear")
    logits(model, mask=mask)
    mask[:, :, :, :4] = False
    changed = logits(model, mask=mask)
    garbled = IDS.clone()
    garbled[:, :4] = (garbled[:, :4] + 11) % WORDS
    assert torch.equal(logits(model, garbled, mask)[:, 4:], changed[:, 4:])


@pytest.mark.parametrize(
    ("kind", "floating"),
    [
        ("causal", False),
        ("causal", True),
        ("prefix", False),
        ("prefix", True),
        ("random", False),
        ("random", True),
        ("blind", False),  # a lowest number added to every score is not blindness: it cancels
    ],
)
def test_a_mask_of_pairs_is_honoured_as_it_is(kind, floating):
    model, mask = build("llama"), pairs_mask(kind)
    if floating:
        mask = torch.where(mask, torch.randn(9, 9, dtype=torch.float64), torch.finfo(torch.float64).min)
    before = logits(model, mask=mask)
    swap(model, "softmax")
    torch.testing.assert_close(logits(model, mask=mask), before, rtol=0, atol=1e-10)


def test_packed_sequences_stay_apart():
    model = build("llama")
    before = logits(model, **PACKED)
    alone = logits(model, IDS[:, 4:])
    swap(model, "softmax")
    torch.testing.assert_close(logits(model, **PACKED), before, rtol=0, atol=1e-10)
    torch.testing.assert_close(before[:, 4:], alone, rtol=0, atol=1e-10)


def test_a_decoder_that_is_told_to_look_both_ways_does():
    model = build("llama")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    before = logits(model)
    swap(model, "softmax")
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model)[:, 0], logits(build("llama"))[:, 0])


def test_training_drops_the_same_weights():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.5)).train()
    torch.manual_seed(5)
    before = logits(model)
    swap(model, "softmax")
    torch.manual_seed(5)
    torch.testing.assert_close(logits(model), before)
    assert not torch.allclose(logits(model), before)


def generate(model, padded=True, **kwargs):
    mask = LEFT if padded else torch.ones_like(LEFT)
    if isinstance(model, T5ForConditionalGeneration):  # which would say one word for ever
        kwargs["decoder_input_ids"] = IDS[:, 3:7]
    result = model.generate(
        IDS * mask,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return result.sequences, torch.stack(result.logits)


HOW = [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]


@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, how) for kind in ("gpt2", "llama", "t5") for how in HOW]
    + [(kind, {"padded": False}) for kind in ("gpt2", "llama")],
    ids=str,
)
def test_generation_through_the_cache_is_the_same(kind, how):
    model = build(kind)
    tokens, before = generate(model, **how)
    swap(model, "softmax")
    calls = counted(model)
    swapped_tokens, after = generate(model, **how)
    assert torch.equal(swapped_tokens, tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    assert calls


OTHERS = {
    "sigmoid": {},
    "linear": {},
    "neighborhood": {"window": 3},
    "lightning": {},
    "gated_attention": {},  # which reads the tokens
    "retention": {},  # with projections of its own
    "softmax": {},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_mechanism_sees_the_future_or_padding(kind, name):
    model = build(kind)
    swap(model, name, **OTHERS[name])
    whole = logits(model)
    changed = IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % WORDS
    other = logits(model, changed)
    assert torch.equal(other[:, :5], whole[:, :5])
    assert (other[:, 5:] - whole[:, 5:]).abs().amax(-1).min() > 1e-6
    for mask in (LEFT, RIGHT):
        garbled = torch.where(mask.bool(), IDS, (IDS + 11) % WORDS)
        kept = real(logits(model, mask=mask), model, mask)
        torch.testing.assert_close(real(logits(model, garbled, mask), model, mask), kept, rtol=0, atol=0)
    # Each sequence alone, without its padding, is what it is in the batch.
    alone = logits(model, IDS[:1, :5])
    torch.testing.assert_close(logits(model, mask=RIGHT)[:1, :5], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_any_steps_through_the_cache_give_the_whole_pass(name, padding):
    model, mask = build("llama"), PADDINGS[padding]
    swap(model, name, **OTHERS[name])
    whole = logits(model, mask=mask)
    steps, past = [], None
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 6), (6, 8), (8, 9)):
            seen = None if mask is None else mask[:, :stop]
            step = model(IDS[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
            past = step.past_key_values
            steps.append(step.logits)
    torch.testing.assert_close(real(torch.cat(steps, 1), model, mask), real(whole, model, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "neighborhood", "sigmoid", "gated_attention"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_serves_other_mechanisms_too(name, padded):
    model = build("llama")
    swap(model, name, **OTHERS[name])
    tokens, scores = generate(model, padded)
    static_tokens, static = generate(model, padded, cache_implementation="static")
    assert torch.equal(tokens, static_tokens)
    torch.testing.assert_close(static, scores, rtol=0, atol=1e-10)


AGENT = {"agents": 4, "table": 0, "kernel": 0}


@pytest.mark.parametrize("name", ["agent", "linear", "sigmoid", "nystrom", "minimal"])
def test_padding_does_not_reach_an_encoder(name):
    model = build("bert")
    swap(model, name, **(AGENT if name == "agent" else {}))
    for mask in (LEFT, RIGHT):
        garbled = torch.where(mask.bool(), IDS, (IDS + 11) % WORDS)
        kept = real(logits(model, mask=mask), model, mask)
        torch.testing.assert_close(real(logits(model, garbled, mask), model, mask), kept, rtol=0, atol=1e-12)
        assert not torch.allclose(real(logits(model), model, mask), kept)


def test_linear_attention_in_llama_is_linear_attention():
    model = build("llama")
    swap(model, "linear", where="*.0.self_attn")
    attention, seen = model.model.layers[0].self_attn, {}
    attention.core.register_forward_pre_hook(lambda core, args: seen.update(zip("qkv", args, strict=True)))
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(o=args[0]))
    logits(model)
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in (seen["q"], seen["k"], seen["v"]))
    phi = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
    expected = weighted_average(*phi, v, None, causal=True, backend="torch")[0]
    torch.testing.assert_close(seen["o"], expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("below", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_layers_that_were_left_are_what_they_were(kind, below):
    model = build(kind, below)
    first = {"bert": "encoder.layer.0", "gpt2": "transformer.h.0", "llama": "model.layers.0"}.get(
        kind, "encoder.block.0"
    )
    last = first[:-1] + "1"
    outputs = []
    model.get_submodule(first).register_forward_hook(
        lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    whole = logits(model, mask=LEFT)
    report = swap(model, "sigmoid", where=last)
    assert report.swapped == [name for name, module in model.named_modules() if hasattr(module, "core")]
    assert len(report.swapped) == 1
    assert not torch.allclose(logits(model, mask=LEFT), whole)
    assert torch.equal(real(outputs[0], model, LEFT), real(outputs[1], model, LEFT))


def test_cross_attention_of_t5_takes_what_has_no_bias():
    model = build("t5")
    before = logits(model, mask=LEFT)
    report = swap(model, "linear", where="*EncDecAttention")
    assert len(report.swapped) == 2
    kept = logits(model, mask=LEFT)
    assert not torch.allclose(kept, before)
    garbled = torch.where(LEFT.bool(), IDS, (IDS + 11) % WORDS)
    assert torch.equal(logits(model, garbled, LEFT), kept)
    tokens, scores = generate(model)
    again, uncached = generate(model, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(scores, uncached, rtol=0, atol=1e-10)


def test_pictures_lie_on_their_grid():
    model = build("vit")
    report = swap(model, "neighborhood", window=3)
    assert len(report.swapped) == 2
    assert cores(model)[0].mechanism.site.grid == attlas.Grid((4, 4), prefix=1)
    before = logits(build("vit"))
    assert not torch.allclose(logits(model), before)
    report.undo()
    assert len(swap(model, "neighborhood", window=4).of("exact")) == 2
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


def test_swaps_are_undone_in_any_order():
    model = build("gpt2")
    before = logits(model)
    first = swap(model, "linear", where="transformer.h.0")
    second = swap(model, "sigmoid", where="transformer.h.1")
    first.undo()
    assert model.config._attn_implementation == "attlas_over_sdpa"
    only_second = logits(model)
    second.undo()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)
    swap(model, "sigmoid", where="transformer.h.1")
    assert torch.equal(logits(model), only_second)


def test_a_dry_run_changes_nothing():
    model = build("gpt2")
    before, state = logits(model), set(model.state_dict())
    assert len(swap(model, "linear", dry_run=True).swapped) == 2
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == state
    assert model.config._attn_implementation == "sdpa"


def test_another_implementation_does_not_swap_back_in_silence():
    model = build("llama")
    report = swap(model, "linear", where="*.1.self_attn")
    expected = {name: real(logits(model, mask=mask), model, mask) for name, mask in PADDINGS.items()}
    for below in ("eager", "sdpa"):
        model.set_attn_implementation(below)
        for name, mask in PADDINGS.items():
            torch.testing.assert_close(real(logits(model, mask=mask), model, mask), expected[name], rtol=0, atol=1e-6)
    report.undo()
    assert model.config._attn_implementation == "sdpa"


def test_what_a_swapped_model_learned_goes_through_a_state_dict():
    model, other = build("llama"), build("llama")
    swap(model, "gated_attention")
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert any("core" in name for name in model.state_dict())
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())
    swap(other, "gated_attention")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_swapped_model_is_saved_and_found_again(tmp_path):
    model = build("llama")
    swap(model, "gated_attention")
    model.save_pretrained(tmp_path)
    assert "attlas" not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    swap(loaded, "gated_attention")
    from safetensors.torch import load_file

    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "retention"])
def test_copies_and_pickles_are_whole(name):
    model = build("llama")
    swap(model, name)
    before = logits(model, mask=LEFT)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(logits(other, mask=LEFT), before)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, mask=LEFT), before)


def test_a_swapped_model_compiles():
    model, mask = build("llama"), LEFT
    swap(model, "linear", where="*.1.self_attn")  # and the other layer is softmax of the library
    before = logits(model, mask=mask)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    after = logits(compiled, mask=mask, use_cache=False)
    torch.testing.assert_close(real(after, model, mask), real(before, model, mask))


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_inference_mode_is_the_same(name):
    model = build("llama")
    swap(model, name)
    for mask in (LEFT, pairs_mask("causal")):
        expected = logits(model, mask=mask)
        with torch.inference_mode():
            assert torch.equal(real(logits(model, mask=mask.clone()), model, mask), real(expected, model, mask))
            _, scores = generate(model)
    assert torch.equal(generate(model)[1], scores)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = build("llama").train()
        torch.manual_seed(1)
        swap(model, "gated_attention")
        if checkpointed:
            model.activation_checkpointing_enable()
        model(IDS, attention_mask=LEFT, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["softmax", "linear", "retention"])
def test_half_precision_models_stay_half(name):
    dtype = torch.bfloat16
    model = build("llama").to(dtype)
    before = logits(model, mask=LEFT)
    swap(model, name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    after = logits(model, mask=LEFT)
    assert after.dtype == dtype
    assert after[LEFT.bool()].isfinite().all()
    if name == "softmax":
        assert torch.equal(after[LEFT.bool()], before[LEFT.bool()])


def test_autocast_casts_inside():
    model = build("llama").float()
    swap(model, "linear")
    whole = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits(model)
    assert half.dtype == torch.bfloat16
    assert (half - whole).norm() < 0.1 * whole.norm()


def test_one_attention_for_all_layers_stays_one():
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**ENCODER, vocab_size=WORDS, embedding_size=16)
    model = transformers.AlbertModel(config).double().eval()
    before = logits(model, mask=LEFT)
    report = swap(model, "softmax")
    assert len(report.of("exact")) == len(report.rows) == 1
    calls = counted(model)
    torch.testing.assert_close(logits(model, mask=LEFT)[LEFT.bool()], before[LEFT.bool()], rtol=0, atol=1e-12)
    assert len(calls) == 2


def test_asking_for_attention_weights_warns():
    model = build("llama")
    swap(model, "linear")
    with pytest.warns(UserWarning, match="returns no attention weights, .* no entry for it; undo"):
        model(IDS, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)


@pytest.mark.parametrize("name", ["agent", "flow", "h2o"])
def test_what_cannot_serve_a_decoder_is_refused(name):
    model = build("gpt2")
    reason = {"agent": "does not serve causal self", "flow": "cannot read a cache", "h2o": "cannot read a cache"}[name]
    with pytest.raises(Unsupported, match=rf"(?s){reason}.*Mechanisms that could: .*"):
        swap(model, name)
    assert model.config._attn_implementation == "sdpa"


def test_a_position_bias_is_not_dropped():
    model = build("t5")
    report = swap(model, "linear")
    assert sorted(report.swapped) == [f"decoder.block.{layer}.layer.1.EncDecAttention" for layer in (0, 1)]
    assert all("bias" in row.notes[0] for row in report.of("left"))


def test_windows_and_packed_sequences_are_refused_where_they_have_no_meaning():
    model = build("mistral")
    assert "window of 4 tokens" in " ".join(swap(model, "linear").rows[0].notes)
    logits(model, IDS[:, :4])  # shorter than the window
    with pytest.raises(Unsupported, match=r"(?s)hides more than padding and the future.*linear.*softmax"):
        logits(model)
    model = build("llama")
    swap(model, "linear")
    with pytest.raises(Unsupported, match="packed sequences"):
        logits(model, **PACKED)
    with pytest.raises(Unsupported, match="lets tokens see later ones"):
        logits(model, mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    model = build("llama")
    swap(model, "retention")
    with pytest.raises(Unsupported, match="more or less than padding and the future"):
        logits(model, mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(Unsupported, match="a cache that grows"):
        generate(model, cache_implementation="static")
    with pytest.raises(Unsupported, match="this layer's cache drops some"):
        swap(build("mistral"), "retention")


def test_an_implementation_without_masks_is_named_with_the_cure():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Unsupported, match=r"flash_attention_2.*set_attn_implementation\('sdpa'\)"):
        swap(model, "linear")


def test_a_module_whose_forward_was_replaced_is_left():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    report = swap(model, "linear")
    assert [row.name for row in report.of("left")] == ["model.layers.0.self_attn"]
    assert "forward" in report.of("left")[0].notes[0]


@pytest.mark.parametrize(("kind", "name"), [("gemma2", "capped"), ("gpt_oss", "learned sink")])
def test_more_than_attention_over_keys_is_left(kind, name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(kind, vocab_size=WORDS, intermediate_size=32, head_dim=8, **sizes)
    with pytest.raises(Unsupported, match=name):
        swap(transformers.AutoModel.from_config(config), "softmax")


def test_a_swapped_module_is_not_swapped_again():
    model = build("llama")
    swap(model, "linear")
    with pytest.raises(BadInput, match="undo"):
        swap(model, "sigmoid")


def test_undo_gives_every_mode_back():
    model = build("gpt2")  # with dropout of weights
    before = logits(model)
    report = swap(model, "retention")
    assert not any(module.training for module in model.modules())
    report.undo()
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), before)
    model.train()
    model.transformer.h[0].attn.attn_dropout.eval()
    modes = [module.training for module in model.modules()]
    report = swap(model, "retention")
    assert model.transformer.h[0].attn.training
    report.undo()
    assert [module.training for module in model.modules()] == modes


def test_what_hangs_on_a_swapped_module_is_gone_after_undo():
    model = build("llama")
    report = swap(model, "linear")
    assert not any("hooks" in note for row in report.rows for note in row.notes)
    report.undo()
    attention = model.model.layers[0].self_attn
    assert not attention._forward_pre_hooks
    assert not attention._forward_hooks


def test_tokens_do_not_stay_behind_when_a_call_fails():
    model = build("llama").train()
    swap(model, "gated_attention")
    with pytest.raises(BadInput, match="a mask for 9 keys has so many columns"):
        model(IDS, attention_mask=torch.ones(2, 1, 9, 1, dtype=torch.bool), use_cache=False)
    with pytest.raises(TypeError):
        model.model.layers[0].self_attn(model.model.embed_tokens(IDS), position_embeddings=None)
    assert model.model.layers[0].self_attn.attlas_tokens is None
    copy.deepcopy(model)


def test_dropout_is_found_under_any_name():
    config = transformers.YolosConfig(
        **ENCODER, image_size=[16, 16], patch_size=4, num_detection_tokens=3, attention_probs_dropout_prob=0.3
    )
    model = transformers.YolosModel(config)
    swap(model, "softmax")
    assert [core.mechanism.weight_dropout for core in cores(model)] == [0.3, 0.3]


def test_dropout_that_was_changed_after_the_swap_warns():
    model = build("gpt2").train()
    swap(model, "softmax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)
    model.transformer.h[0].attn.attn_dropout.p = 0.7
    with pytest.warns(UserWarning, match=r"drops a share of 0.7 of its weights, and softmax was built for 0.1"):
        logits(model)


def clip_text():
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**ENCODER, vocab_size=WORDS))
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return model.double().eval()


@pytest.mark.parametrize("name", ["linear", "lightning", "retention", "neighborhood"])
def test_a_text_tower_whose_calls_are_causal_is_built_causal_when_asked(name):
    model = clip_text()
    assert len(swap(model, name, causal=True).swapped) == 2
    changed = IDS.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % WORDS
    whole, other = logits(model), logits(model, changed)
    assert torch.equal(other[:, :5], whole[:, :5])
    assert not torch.allclose(other[:, 5:], whole[:, 5:])


@pytest.mark.parametrize("name", ["linear", "minimal"])
def test_calls_that_hide_the_future_name_the_cure(name):
    model = clip_text()
    swap(model, name)
    with pytest.raises(Unsupported, match=r"hides the future.*causal=True"):
        logits(model)


def latent():
    """Keys of 12 features, values of 6."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **ENCODER,
        vocab_size=WORDS,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    )
    return transformers.DeepseekV3ForCausalLM(config).double().eval()


def test_values_of_another_size_than_keys():
    model = latent()
    before = logits(model, mask=LEFT)
    report = swap(model, "softmax")
    assert len(report.of("exact")) == 2
    torch.testing.assert_close(real(logits(model, mask=LEFT), model, LEFT), real(before, model, LEFT))
    report.undo()
    report = swap(model, "linear", gate="sigmoid", output_norm="rms")
    assert cores(model)[0].gate_proj.out_features == cores(model)[0].output_norm.weight.numel() == 4 * 6
    assert logits(model).isfinite().all()
    report.undo()
    for name in ("abc", "routing"):  # which want as many of the one as of the other
        with pytest.raises(Unsupported, match=f"{name} could go to none of the 2 modules"):
            swap(model, name)


def test_the_eager_attention_of_a_layer_that_was_left_may_have_another_name():
    sizes = {"head_dim": 8, "patch_length": 4, "context_length": 16, "horizon_length": 8}
    config = transformers.TimesFmConfig(**ENCODER, **sizes, attn_implementation="eager")
    model, series = transformers.TimesFmModelForPrediction(config).eval(), [torch.linspace(0, 3, 16).sin()]
    before = model(past_values=series, freq=[0]).mean_predictions
    assert len(swap(model, "softmax", where="*.0.self_attn").of("exact")) == 1
    torch.testing.assert_close(model(past_values=series, freq=[0]).mean_predictions, before)


@pytest.mark.parametrize("name", ["linear", "retention"])
def test_masks_of_flex_attention_are_refused_with_the_cure(name):
    model = build("llama")
    swap(model, name)
    model.set_attn_implementation("flex_attention")
    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, "cpu")  # as the model would, but compiled
    with pytest.raises(Unsupported, match=r"BlockMask cannot be read.*set_attn_implementation\('sdpa'\)"):
        logits(model, mask=mask)
    model.set_attn_implementation("sdpa")
    logits(model)


def test_packed_pictures_take_what_needs_no_tokens():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    torch.manual_seed(0)
    config = qwen.Qwen2VLVisionConfig(depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4)
    model = qwen.Qwen2VisionTransformerPretrainedModel(config).double().eval()
    patches, grids = torch.randn(32, 96, dtype=torch.float64), torch.tensor([[1, 4, 4], [1, 4, 4]])

    def features():
        with torch.no_grad():
            return model(patches, grid_thw=grids).last_hidden_state

    before = features()
    report = swap(model, "softmax")
    assert len(report.of("exact")) == 1
    torch.testing.assert_close(features(), before)
    report.undo()
    for name, reason in (("gated_attention", "do without the tokens"), ("minimal", "would mix the sequences")):
        with pytest.raises(Unsupported, match=reason):
            swap(model, name)
    assert swap(model, "neighborhood", window=3).swapped


def test_projections_go_into_mechanisms_that_have_the_same():
    model = build("bert")
    old = model.encoder.layer[0].attention.self
    report = swap(model, "p_adapter")
    mixer = model.encoder.layer[0].attention.self.mixer
    for letter, linear in (("q", old.query), ("k", old.key), ("v", old.value)):
        assert torch.equal(getattr(mixer, f"{letter}_proj").weight, linear.weight)
        assert torch.equal(getattr(mixer, f"{letter}_proj").bias, linear.bias)
    assert not report.rows[0].dropped


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_swapped_layers_learn_from_the_old_ones(kind):
    model = build(kind).float()
    report = swap(model, "linear")
    old = {name: value.clone() for name, value in model.named_parameters()}
    batches = [{"input_ids": IDS, "attention_mask": LEFT}]
    done = distil(model, report, batches, layer_steps=12, whole_steps=0, console=Console(file=io.StringIO()))
    assert set(done.layers) == set(report.swapped)
    assert all(errors[-1] < 0.9 * errors[0] for errors in done.layers.values())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, old[name])}
    assert changed
    assert all(name.startswith(tuple(report.swapped)) for name in changed)
    report.undo()
    assert all(torch.equal(value, old[name]) for name, value in model.named_parameters())
