"""Attention of `transformers` models, through the library's own two doors: its attention and its mask interface.

B batch, N queries, M keys, C channels, H query heads, G key/value heads, D head size.

A model of `transformers` asks its config which attention function to call and which mask function to build the mask
with, by one name for the whole model. Two functions are registered under each name "attlas_over_<below>", where
<below> is the implementation that the model had:

- the attention function looks at the module that calls. One that was swapped has a `core`, which computes; any other
  gets the function of <below>, so that layers that were left are what they were;
- the mask function builds the mask of <below> and ties to it what the mask means: which keys are padding, whether it
  is causal, how far a static cache is filled. Mechanisms that know nothing of single pairs are served with that.

Where the library leaves the mask out (None), the calling module says whether it is causal, and that is honoured.

A swapped module is of the class that it was, with its projections, rotary positions, position bias and cache; its
config is a copy of its own, so that `set_attn_implementation` cannot swap it back in silence. In generation keys and
values come from the library's cache: a mechanism with a state of fixed size reads all of them at every step, which is
correct, and not as fast as it could be.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.adapt.swap.host import (
    MARK,
    Core,
    Host,
    Place,
    Put,
    carry_projections,
    dtype_and_device,
    grid_of_call,
    take_over,
)
from attlas.core.errors import AttlasError, BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Mechanism, Mixer, Site
from attlas.core.registry import mechanisms
from attlas.core.spec import Pattern, Takes

NAME = "attlas_over_"
BELOW = ("sdpa", "eager")
"""Implementations whose masks are tensors, so that swapped and other layers can share them."""

PREFIX_TOKENS = {
    "vit": 1,
    "vit_msn": 1,
    "ijepa": 0,
    "deit": 2,
    "dinov2": 1,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}
"""Tokens in front of the patches, for vision models whose patches lie on `image_size / patch_size`."""

FOREIGN = {
    "s_aux": "its softmax has a learned sink",
    "sinks": "its softmax has a learned sink",
    "softcap": "its scores are capped",
    "indices": "it attends to keys that an index picks",
    "block_indices": "it attends to blocks that an index picks",
}
"""Arguments of the attention function that no mechanism here knows what to do with."""


@functools.cache
def register() -> None:
    """Make the names known to transformers; a model that was swapped needs this wherever it is unpickled."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for below in BELOW:
        AttentionInterface.register(NAME + below, functools.partial(_attention, below))
        AttentionMaskInterface.register(NAME + below, functools.partial(_mask, below))


class Reading(NamedTuple):
    """What a mask of transformers says, in our words.

    Attributes:
        mask: the same as a `Mask`.
        plain: whether that is causality and padding only.
        filled: how many places of a static cache hold a token. Keys and values are then to be moved to the end of
            the cache, where `mask` has them; None where they are there already.
    """

    mask: Mask
    plain: bool
    filled: Tensor | None = None


READING = "attlas_reading"
"""The attribute of a mask with its reading, and the version of the mask that was read."""


@dataclass(frozen=True)
class Seat:
    """What a swapped module knows of its place.

    Attributes:
        causal: what calls without a mask are, where neither they nor the module say so: "sdpa" takes them for
            causal, "eager" hides nothing.
        cross: keys and values come from another sequence.
        scale: the scale of the scores that the core has.
        dropout: of the weights, as the core was built for.
    """

    causal: bool
    cross: bool
    scale: float
    dropout: float

    def __reduce__(self) -> Any:
        return _seat, (self.causal, self.cross, self.scale, self.dropout)


def _seat(causal: bool, cross: bool, scale: float, dropout: float) -> Seat:
    register()
    return Seat(causal, cross, scale, dropout)


def _mask(
    below: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of transformers: the mask of `below`, and its meaning where it is causal and padding only."""
    from transformers import masking_utils as library

    mask_function = mask_function or library.causal_mask_function
    mask = library.ALL_MASK_ATTENTION_FUNCTIONS[below](
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    causal = mask_function is library.causal_mask_function
    plain = causal or mask_function is library.bidirectional_mask_function
    if mask is None or not plain or isinstance(kv_offset, Tensor):
        return mask
    keys = attention_mask
    if keys is not None:
        keys = F.pad(keys, (0, max(0, kv_offset + kv_length - keys.shape[1])))[:, kv_offset : kv_offset + kv_length]
    filled = None
    if causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        filled = torch.as_tensor(q_offset, device=mask.device) + (q_length - kv_offset)
        held = (torch.arange(kv_length, device=mask.device) < filled).expand(batch_size, -1)
        keys = _to_end(held if keys is None else keys & held, filled, 1)
    _remember_reading(mask, Reading(Mask(causal=causal, keys=keys), True, filled))
    return mask


def _to_end(x: Tensor, filled: Tensor, dim: int) -> Tensor:
    """The `filled` first entries along `dim` moved to its end, without reading the number from the device."""
    places = torch.arange(x.shape[dim], device=x.device)
    return x.index_select(dim, (places + filled) % x.shape[dim])


def _attention(
    below: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers: (B, H, N, D), (B, G, M, D), (B, G, M, E) -> (B, N, H, E), no weights."""
    if "attlas_seat" not in module.__dict__:
        if below == "eager":  # which every modelling file has for itself
            function = _eager(module)
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            function = ALL_ATTENTION_FUNCTIONS[below]
        return function(module, query, key, value, attention_mask, **kwargs)
    return _attend(module, query, key, value, attention_mask, **kwargs), None


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager attention that `forward` names; a file may have several."""
    names = [name for name in _code(module).co_names if name.endswith(EAGER)]
    return inspect.unwrap(type(module).forward).__globals__[names[0] if names else EAGER]


EAGER = "eager_attention_forward"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    seat, core = module.attlas_seat, module.core
    for name, why in FOREIGN.items():
        if kwargs.get(name) is not None:
            raise Unsupported(f"{type(module).__name__} passes {name}: {why}; undo the swap of this module")
    if kwargs.get("cache") is not None:
        raise Unsupported("a paged cache is not served; generate without continuous batching")
    if output_attentions:
        _no_weights()
    built = (seat.dropout, getattr(core.mechanism, "weight_dropout", None))
    if module.training and dropout not in built and not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(module).__name__} drops a share of {dropout:g} of its weights, and {core.mechanism.spec.name} was "
            f"built for {seat.dropout:g}: set weight_dropout= in the swap where the mechanism has it",
            stacklevel=2,
        )
    causal = getattr(module, "is_causal", seat.causal) if is_causal is None else is_causal
    causal = causal and not seat.cross
    queries, keys = query.shape[2], key.shape[2]
    cross = seat.cross or (not causal and queries != keys)
    if cross and not getattr(module, "has_relative_attention_bias", False):
        position_bias = None  # which is made of zeros
    if mask is None and causal and 1 < queries < keys:  # a static cache that begins with these tokens
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    reading = _reading(mask, causal, cross, query.shape[0], queries, key.shape[2])
    if reading.filled is not None:
        key, value = (_to_end(x, reading.filled, 2) for x in (key, value))
        position_bias = None if position_bias is None else _to_end(position_bias, reading.filled, 3)
    seen = _served(core.mechanism, reading, queries)
    if position_bias is not None:
        seen = seen & Mask.biased(position_bias.to(query.dtype))
    if scaling is not None and scaling != seat.scale:
        query = query * (scaling / seat.scale)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions leave float32
    grid = grid_of_call(core.mechanism.site.grid, queries)
    o_BNC = core(query, key, value, tokens=module.attlas_tokens, mask=seen, grid=grid, cross=cross)
    return o_BNC.unflatten(-1, (query.shape[1], -1))


def _no_weights() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "a swapped module returns no attention weights, so that the tuple of them has no entry for it; undo the "
            "swap for those of the model as it was, or see attlas.analysis for what other mechanisms look at",
            stacklevel=3,
        )


def _served(mechanism: Mechanism, reading: Reading, queries: int) -> Mask:
    """The mask for this mechanism; what it cannot serve is refused."""
    spec, mask = mechanism.spec, reading.mask
    if not reading.plain:
        if Takes.PAIRS in spec.masks:
            return mask
        able = ", ".join(mechanisms(pattern=Pattern.of(mechanism.site.causal, False), mask=Takes.PAIRS))
        raise Unsupported(
            f"this mask hides more than padding and the future (a window, packed sequences, a mask of your own), "
            f"which {spec.name} does not serve; these do: {able}"
        )
    if queries == 1:  # the last, which sees all
        return mask.with_(causal=False)
    if mechanism.site.causal and not mask.causal:
        raise Unsupported(f"this mask lets tokens see later ones, and {spec.name} was built causal for this place")
    if mask.causal and not mechanism.site.causal and Takes.PAIRS not in spec.masks:
        raise Unsupported(FUTURE.format(spec.name))
    return mask


FUTURE = (
    "this call hides the future, and {} was built for this place to look both ways: swap it in with causal=True where "
    "the model's own calls are causal, or take one that honours any pairs"
)


def _reading(mask: Tensor | None, causal: bool, cross: bool, batch: int, queries: int, keys: int) -> Reading:
    """What the mask says to these queries; where it leaves causality open, `causal` decides."""
    if mask is None:
        return Reading(Mask(causal=causal), True)
    if not isinstance(mask, Tensor):
        raise Unsupported(
            f"a mask of class {type(mask).__name__} cannot be read: call model.set_attn_implementation('sdpa')"
        )
    if mask.shape[-1] != keys:
        raise BadInput(f"a mask for {keys} keys has so many columns, got {tuple(mask.shape)}")
    if mask.ndim == 2:
        return Reading(Mask(causal=causal, keys=mask.bool()), True)
    if mask.ndim != 4:
        raise BadInput(f"a mask is (batch, keys) or (batch, 1 or heads, queries, keys), got {tuple(mask.shape)}")
    if mask.shape[2] != queries:  # one row for all of them
        mask = mask.expand(-1, -1, queries, -1)
    known = getattr(mask, READING, None)
    if known is not None and known[0] == _version(mask):
        return known[1]
    reading = _read(mask, cross, batch)
    # Under inference_mode nobody would notice that a mask was changed since.
    return reading if _untracked(mask) else _remember_reading(mask, reading)


def _remember_reading(mask: Tensor, reading: Reading) -> Reading:
    setattr(mask, READING, (_version(mask), reading))
    return reading


def _version(mask: Tensor) -> int:
    return 0 if _untracked(mask) else mask._version


def _untracked(mask: Tensor) -> bool:
    return torch.compiler.is_compiling() or mask.is_inference()


def _read(mask: Tensor, cross: bool, batch: int) -> Reading:
    """A mask of pairs is read pair by pair. While compiling, where no value can be looked at, it stays one of pairs."""
    looking = not torch.compiler.is_compiling()
    queries, keys = mask.shape[2:]
    seen, bias = mask, None
    if mask.dtype != torch.bool:
        seen = mask > torch.finfo(mask.dtype).min / 2
        bias = mask.masked_fill(~seen, 0)
        bias = None if looking and not bool(bias.any()) else bias
    filled = None
    if not cross and queries < keys:  # the last query sees itself: the places behind it are empty yet
        places = torch.arange(1, keys + 1, device=mask.device)
        filled = (seen.flatten(0, 2).any(0) * places).amax().clamp(min=queries)
        filled = None if looking and int(filled) == keys else filled
    if filled is not None:
        seen, bias = _to_end(seen, filled, 3), None if bias is None else _to_end(bias, filled, 3)
    if looking and bias is None:
        keys_BM = seen.any(2).any(1)
        idle = ~seen.any(-1, keepdim=True)
        if not cross and queries <= keys:
            idle = idle & ~keys_BM[:, None, keys - queries :, None]  # queries that are padding themselves
        padded = keys_BM[:, None, None]
        for causal in (True, False):
            expected = padded & torch.ones_like(seen).tril(keys - queries) if causal else padded
            if bool(((seen == expected) | idle).all()):
                plain = None if bool(keys_BM.all()) else keys_BM.expand(batch, -1)
                return Reading(Mask(causal=causal, keys=plain), True, filled)
    pairs = Mask.pairs_(seen)
    return Reading(pairs if bias is None else pairs & Mask.biased(bias), False, filled)


HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
HEAD_SIZE = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTH = ("embed_dim", "hidden_size", "d_model")
DROPOUT = ("attention_dropout", "attn_dropout", "dropout", "dropout_prob", "dropout_p", "attn_drop")
VALUE_SIZE = ("v_head_dim",)
"""What modules and configs call these; the module is asked first."""


@dataclass
class TransformersPlace(Place):
    """An attention module of transformers.

    Attributes:
        configs: that masks are made for here: the module's and its model's.
    """

    configs: tuple[Any, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether calls may come with a cache."""
        return self.site.causal and not self.causal_open

    @property
    def packed(self) -> bool:
        """Whether all sequences of a batch come in one row of tokens, and to the attention function one by one."""
        return "cu_seqlens" in inspect.signature(type(self.module).forward).parameters

    def site_for(self, cls: type[Mechanism]) -> Site:
        """The site as this mechanism meets it.

        Who honours any pairs gets causality from the mask, which may let parts of a prompt see their future.
        """
        if issubclass(cls, Mixer):
            return replace(self.site, kv_heads=self.site.heads, head_dim=0)
        by_mask = Takes.PAIRS in cls.spec.masks and Pattern.NONCAUSAL_SELF in cls.spec.patterns
        return replace(self.site, causal=False) if by_mask else self.site

    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """The module's own class, that finds the core in itself."""
        register()
        assert self.scale is not None
        if self.generates:
            self._try(core, 1, DECODED, "read a cache of keys and values")
        if self.packed:
            self._try(core, PACKED, PACKED, "do without the tokens, which come packed here", packed=True)
        config: Any = self.module.config
        if id(config) not in memo:
            memo[id(config)] = copy.copy(config)
            memo[id(config)]._attn_implementation_internal = NAME + _below(config)
        module: Any = take_over(type(self.module), self.module, memo, core=core)
        module.attlas_seat = Seat(_below(config) == "sdpa", self.pattern.endswith("cross"), self.scale, self.dropout)
        module.attlas_tokens = None
        module.attlas_configs = self.configs
        notes = []
        spec = core.mechanism.spec
        if spec.streams and not isinstance(core.mechanism, CachedAttend) and self.generates:
            notes.append("in generation it reads all cached keys and values at every step, not a state of fixed size")
        window = _window(self.module)
        if window and Takes.PAIRS not in spec.masks:
            notes.append(f"sequences longer than this layer's window of {window} tokens are refused")
        return Put(module, notes=tuple(notes))

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """A module that is called as the old one; in generation the cache holds tokens instead of keys."""
        names = [name for name in inspect.signature(type(self.module).forward).parameters if name != "self"]
        if self.pattern.endswith("cross") or "position_bias" in names:
            raise BadInput("a mechanism with projections of its own goes into self-attention without a position bias")
        if _window(self.module):
            raise BadInput(
                "a mechanism with projections of its own needs all tokens, and this layer's cache drops some"
            )
        if self.packed:
            raise BadInput("a mechanism with projections of its own would mix the sequences, which come packed here")
        register()
        module = TokenMixing(mixer, tuple(names), getattr(self.module, "layer_idx", None), self.configs)
        note = "in generation the cache holds tokens, and all are mixed anew at every step"
        converted = carry_projections(mixer, self._projections())
        return Put(module, converted, (note,) if self.generates else ())

    def _projections(self) -> dict[str, tuple[str, Tensor]]:
        """The plain projections by our names, with their own."""
        found: dict[str, tuple[str, Tensor]] = {}
        for ours, names in PROJECTIONS.items():
            for name in names:
                linear = getattr(self.module, name, None)
                if type(linear) is nn.Linear:
                    found |= {f"{ours}.{kind}": (f"{name}.{kind}", each) for kind, each in linear.named_parameters()}
        return found

    def _try(self, core: Core, queries: int, keys: int, what: str, packed: bool = False) -> None:
        """A call as only some come here.

        Raises:
            Unsupported: the mechanism cannot.
        """
        site, (dtype, device) = self.site, dtype_and_device(self.module)
        q, k, v, tokens = (
            torch.zeros(1, *shape, dtype=dtype, device=device)
            for shape in (
                (site.heads, queries, site.head_dim),
                (site.kv_heads, keys, site.head_dim),
                (site.kv_heads, keys, self.value_dim or site.head_dim),
                (queries, site.dim),
            )
        )
        given: Any = None if packed else tokens
        training = core.training
        try:
            with torch.no_grad():
                core.eval()(q, k, v, tokens=given)
        except (AttlasError, TypeError, AttributeError) as error:
            raise Unsupported(f"{core.mechanism.spec.name} cannot {what}: {error}") from error
        finally:
            core.train(training)


DECODED, PACKED = 5, 16
"""Keys of such calls."""

PROJECTIONS = {
    "q_proj": ("q_proj", "query", "q_lin"),
    "k_proj": ("k_proj", "key", "k_lin"),
    "v_proj": ("v_proj", "value", "v_lin"),
    "out_proj": ("o_proj", "out_proj", "out_lin"),
}
"""What modules call their projections."""


class TokenMixing(nn.Module):
    """A mixer where transformers expects an attention module of a decoder or encoder.

    Args:
        mixer: the mechanism.
        names: of the positional arguments of the module that was here.
        layer_idx: its place in the cache.
        configs: that make its masks.
    """

    def __init__(self, mixer: Mixer, names: tuple[str, ...], layer_idx: int | None, configs: tuple[Any, ...]) -> None:
        super().__init__()
        self.mixer, self.names, self.layer_idx, self.attlas_configs = mixer, names, layer_idx, configs

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()
        super().__setstate__(state)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The arguments of the old module, and its outputs without weights."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x_BNC, cache = given["hidden_states"], given.get("past_key_values")
        tokens_BMC = x_BNC
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            row = x_BNC.unsqueeze(1)
            tokens_BMC = cache.update(row, row[..., :1], self.layer_idx)[0].squeeze(1)
        if given.get("output_attentions"):
            _no_weights()
        mask = given.get("attention_mask", given.get("mask"))
        mask = _of_tokens(self.mixer, mask, given.get("is_causal"), x_BNC, tokens_BMC)
        return self.mixer(tokens_BMC, mask=mask)[:, tokens_BMC.shape[1] - x_BNC.shape[1] :], None


def _of_tokens(mixer: Mixer, mask: Tensor | None, told: bool | None, x_BNC: Tensor, tokens_BMC: Tensor) -> Mask:
    """The mask of all tokens, from that of the last ones and from what the call says of causality."""
    causal, queries, keys = mixer.site.causal, x_BNC.shape[1], tokens_BMC.shape[1]
    reading = _reading(mask, causal if told is None else told, False, x_BNC.shape[0], queries, keys)
    if reading.filled is not None or (mask is None and 1 < queries < keys):
        raise Unsupported(STATIC)
    if reading.plain and reading.mask.causal and not causal and queries > 1:
        raise Unsupported(FUTURE.format(mixer.spec.name))
    if not reading.plain or (reading.mask.causal != causal and queries > 1):
        raise Unsupported(
            f"this mask hides more or less than padding and the future, which {mixer.spec.name} does not serve here"
        )
    return reading.mask.with_(causal=causal)


STATIC = "a mechanism with projections of its own needs a cache that grows: leave cache_implementation at its default"


def _remember(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the tokens for the attention function, which is not given them; the old module shares its hooks."""
    if "attlas_seat" in module.__dict__:
        module.attlas_tokens = args[0] if args else kwargs.get("hidden_states")


def _forget(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """No tokens stay behind, whatever happened."""
    if "attlas_seat" in module.__dict__:
        module.attlas_tokens = None


def _below(config: Any) -> str:
    """The implementation that a config names, or that our name says was there."""
    return str(config._attn_implementation).removeprefix(NAME)


class TransformersHost(Host):
    """Models whose attention modules ask `ALL_ATTENTION_FUNCTIONS`."""

    library = "transformers"

    def places(self, model: nn.Module) -> Iterable[Place]:
        """Modules whose `forward` asks the interface."""
        from transformers import PreTrainedModel

        modules = dict(model.named_modules())
        for name, module in modules.items():
            if hasattr(module, MARK) or not _asks(module):
                continue
            above, told = name.rpartition(".")[0], False
            while above and not isinstance(modules[above], PreTrainedModel):
                told = told or "is_causal" in _keywords(modules[above])
                above = above.rpartition(".")[0]
            told = told or "is_causal" in _keywords(modules[above])
            yield _place(name, module, modules[above], told)

    def enter(self, model: nn.Module, places: Sequence[Place]) -> Callable[[], None]:
        """The configs of the models around name our functions, as long as a swapped module is there."""
        mine = [place for place in places if isinstance(place, TransformersPlace)]
        swapped = {model.get_submodule(place.name) for place in mine}
        configs = {id(config): config for place in mine for config in place.configs}
        configs = {key: config for key, config in configs.items() if _below(config) in BELOW}
        for config in configs.values():
            config._attn_implementation_internal = NAME + _below(config)
        hooks = []
        for place in mine:
            module = model.get_submodule(place.name)
            if not isinstance(module, TokenMixing) and not place.packed:
                hooks.append(module.register_forward_pre_hook(_remember, with_kwargs=True))
                hooks.append(module.register_forward_hook(_forget, always_call=True))

        def leave() -> None:
            for hook in hooks:
                hook.remove()
            others = {module for module in model.modules() if hasattr(module, MARK)} - swapped
            needed = {id(config) for module in others for config in getattr(module, "attlas_configs", ())}
            for config in configs.values():
                if id(config) not in needed:
                    config._attn_implementation_internal = _below(config)

        return leave


def _place(name: str, module: Any, model: Any, told: bool) -> TransformersPlace:
    """What we know of a module: `told` that its model passes on whether calls are causal."""
    config = module.config
    cross = bool(getattr(module, "is_cross_attention", False)) or any(
        re.search("cross|encdec|encoder_attn", text.lower())
        for text in (type(module).__name__, name.rpartition(".")[2])
    )
    causal = (getattr(module, "is_causal", False) or getattr(module, "is_decoder", False)) and not cross
    dim, heads = _number(WIDTH, module, config), _number(HEADS, module, config)
    size = _number(HEAD_SIZE, module, config) or (dim // heads if dim and heads else None)
    groups = getattr(module, "num_key_value_groups", None)
    kv_heads = heads // groups if heads and groups else _number(KV_HEADS, module) or heads
    grid = _grid(config)
    needs = set() if hasattr(config, "image_size") else {Takes.PADDING}
    if not cross and "position_bias" in inspect.signature(type(module).forward).parameters:
        needs.add(Takes.BIAS)
    site = Site(
        dim=int(dim or 0),
        heads=int(heads or 0),
        kv_heads=int(kv_heads or 0),
        head_dim=int(size or 0),
        causal=causal,
        length=getattr(config, "max_position_embeddings", None) if grid is None else grid.tokens,
        grid=grid,
        layer=getattr(module, "layer_idx", None) or 0,
        layers=getattr(config, "num_hidden_layers", 1),
    )
    return TransformersPlace(
        name,
        module,
        site,
        pattern=Pattern.of(causal, cross),
        needs=frozenset(needs),
        scale=_number(("scaling", "scale"), module) or (float(size) ** -0.5 if size else None),
        dropout=float(_number(DROPOUT, module) or 0.0),
        obstacle=_obstacle(module, site),
        causal_open=told and not causal and not cross,
        value_dim=_number(VALUE_SIZE, module),
        configs=(config, model.config) if hasattr(model, "config") else (config,),
    )


def _obstacle(module: Any, site: Site) -> str | None:
    """Why nothing can go where this module is."""
    if not min(site.dim, site.heads, site.kv_heads, site.head_dim):
        return f"{type(module).__name__} does not say how many heads of what size it has"
    if "forward" in module.__dict__:
        return "something else, such as accelerate's hooks, has replaced the forward of this module: take it away first"
    below = _below(module.config)
    if below not in BELOW:
        return (
            f"the model's attention is {below!r}, whose masks other mechanisms cannot read: call "
            f"model.set_attn_implementation('sdpa') first"
        )
    foreign = _keywords(module) & set(FOREIGN)
    if getattr(module, "attn_logit_softcapping", None) is None:
        foreign -= {"softcap"}
    if foreign:
        return f"{type(module).__name__} is more than attention over keys: {FOREIGN[min(foreign)]}"
    return None


def _window(module: Any) -> int | None:
    """The sliding window of this layer, if it has one."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    kinds, layer = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


def _grid(config: Any) -> Grid | None:
    """The patches of a vision model that we know to lay them out in rows."""
    kind = getattr(config, "model_type", None)
    if kind not in PREFIX_TOKENS:
        return None
    image, patch = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (config.image_size, config.patch_size)
    )
    return Grid(tuple(a // b for a, b in zip(image, patch, strict=True)), PREFIX_TOKENS[kind])


def _code(module: nn.Module) -> Any:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _asks(module: nn.Module) -> bool:
    """Whether `forward` asks the interface for the attention function."""
    code = _code(module)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _keywords(module: nn.Module) -> set[str]:
    """The keywords that `forward` passes on."""
    constants = getattr(_code(module), "co_consts", ())
    return {name for group in constants if isinstance(group, tuple) for name in group}


def _number(names: Sequence[str], *owners: Any) -> Any:
    """The first of these attributes that is a number; the module is asked first, then its config."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            value = getattr(value, "p", value)  # a Dropout module
            if isinstance(value, int | float) and not isinstance(value, bool):
                return value
    return None


HOST = TransformersHost()
