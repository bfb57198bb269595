"""Dropping tokens at a layer of the text model, and from the cache after the prompt was read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from vision_attn.hosts import AttachError
from vision_attn.mllm.caches import RaggedLayer
from vision_attn.mllm.engine import Engine, used_cache
from vision_attn.mllm.image import Layer
from vision_attn.mllm.interface import Compute, listen, listeners, switch
from vision_attn.mllm.tokens import Tokens, keys_of, take, take_mask, take_positions


class Cuts:
    """The hooks on the layers of a text model.

    Every layer is called with the arguments made for the whole prompt, so each layer from the first cut on gathers its
    own, and at later calls builds the mask that fits its own part of the cache.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.layers = engine.model.get_decoder().layers
        count = len(self.layers)
        self.cuts: frozenset[int] = frozenset()
        self.watched: frozenset[int] = frozenset()
        if engine.layer is not None:
            self.cuts, self.watched = frozenset(self._checked(count)), frozenset(engine.layer.watches(count))
        self.index: torch.Tensor | None = None  # of the present tokens among those that entered the text model
        self.notes: dict[str, Any] = {}
        self.views: list[Layer] = []
        self.masks: dict[Any, Any] = {}
        self.ragged: RaggedLayer | None = None  # what the attention that comes next reads part by part

    def _checked(self, count: int) -> tuple[int, ...]:
        method, model = self.engine.layer, self.engine.model
        cuts = method.cuts(count)
        if not cuts or min(cuts) < 1 or max(cuts) >= count:
            raise ValueError(
                f"{type(method).__name__} drops tokens at layers {list(cuts)}, and the text model has {count}; allowed "
                f"are 1 to {count - 1}"
            )
        deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
        if min(cuts) < deep:
            raise ValueError(
                f"{type(model).__name__} adds visual features in its first {deep} layers; drop tokens at layer {deep} "
                f"or later, not at {min(cuts)}"
            )
        return cuts

    def install(self) -> None:
        self.first = 0 if self.engine.cache is not None else min(self.cuts | self.watched)
        for number, module in enumerate(self.layers):
            if number >= self.first:
                self.engine.before(module, functools.partial(self._enter, number))
        if self.engine.cache is not None:
            undo = self.engine._undo
            undo.append(switch(self.engine.config))
            undo += [listen(layer.self_attn, functools.partial(self._around, n)) for n, layer in enumerate(self.layers)]
        self.engine.after(self.engine.text, self._leave)

    def _enter(self, number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        engine, prompt = self.engine, self.engine.current
        self.ragged = None
        if prompt is None:
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if not engine.reading:
            cached, cache = prompt.cached[number], kwargs.get("past_key_values")
            if isinstance(cache.layers[number], RaggedLayer):
                kwargs["attention_mask"] = self._read_ragged(cache.layers[number], module.self_attn, hidden)
            elif cached is not prompt.cached[0]:
                more = cache.get_seq_length(number) - cached.valid.shape[1] + hidden.shape[1]
                kwargs["attention_mask"] = self._mask(number, hidden, cached, more, kwargs)
            return (hidden, *args[1:]), kwargs
        if number == self.first:  # a prompt before this one may have failed half way
            self.index, self.notes, self.views, self.masks = None, {}, [], {}
        now, plain = prompt.tokens[number], kwargs
        if self.index is not None:
            kwargs = self._narrow(number, hidden, now, plain)
        view = Layer(number, module, hidden, now, kwargs.get("position_embeddings"), engine.entered)
        if number in self.cuts:
            with engine.choosing():
                keep = engine.lent(now, number)
                if keep is None:
                    keep = engine.layer.select(view, self.notes) | ~now.visual
            if (now.valid & ~keep).any():
                tokens, index = now.kept(keep)
                hidden = take(hidden, index, 1)
                self.index = index if self.index is None else self.index.gather(1, index)
                prompt.tokens[number:] = [tokens] * (len(self.layers) - number)
                prompt.cached[number:] = prompt.tokens[number:]
                kwargs = self._narrow(number, hidden, tokens, plain)
                view = Layer(number, module, hidden, tokens, kwargs.get("position_embeddings"), engine.entered)
        if number in self.watched:
            with engine.choosing():
                engine.layer.observe(view, self.notes)
        if engine.cache is not None:
            self.views.append(view)
        return (hidden, *args[1:]), kwargs

    def _read_ragged(self, layer: RaggedLayer, attn: Any, hidden: torch.Tensor) -> torch.Tensor | None:
        """Have a layer read part by part; or as one, with this mask, where others want to see the keys of all heads."""
        eager = self.engine.config._attn_implementation.endswith("eager")
        alone = not eager and len(listeners(attn)) == 1
        layer.reader, self.ragged = ("parts", layer) if alone else ("whole", None)
        return None if alone else layer.whole_mask(hidden, attn.num_key_value_groups, eager)

    def _around(self, number: int, module: Any, q, k, v, mask, scale: float, compute: Compute) -> torch.Tensor:
        """Around the attention of a layer, inside of other listeners."""
        ragged, self.ragged = self.ragged, None
        if ragged is not None:
            return ragged.attend(q, compute)
        if self.engine.current is None or not self.engine.reading or self._window(number) is not None:
            return compute(q, k, v, mask)
        return self.engine.cache.attend(self.views[number], q, k, v, mask, compute)

    def _narrow(self, number: int, hidden: torch.Tensor, tokens: Tokens, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer for the tokens that are still there."""
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = take_positions(kwargs["position_ids"], self.index)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(take(part, self.index, 1) for part in kwargs["position_embeddings"])
        prepared = self.engine.prepared
        window = self._window(number)
        if isinstance(prepared, dict):
            prepared = prepared.get("full_attention", next(iter(prepared.values())))
        if torch.is_tensor(prepared) and prepared.ndim == 4:
            keys = keys_of(kwargs.get("past_key_values"), len(tokens), number)
            kwargs["attention_mask"] = take_mask(prepared, self.index, tokens, keys, window)
        else:
            kwargs["attention_mask"] = self._mask(number, hidden, tokens, 0, kwargs)
        return kwargs

    def _window(self, number: int) -> int | None:
        kinds = getattr(self.engine.config, "layer_types", None)
        sliding = kinds is not None and kinds[number] == "sliding_attention"
        return self.engine.config.sliding_window if sliding else None

    def _mask(self, number: int, hidden: torch.Tensor, tokens: Tokens, more: int, kwargs: dict[str, Any]) -> Any:
        """The mask of a layer whose cache holds `tokens` and, at later calls, some after them."""
        make = create_causal_mask if self._window(number) is None else create_sliding_window_causal_mask
        key = id(tokens), make, more, hidden.shape[1]
        if key not in self.masks:
            if not self.engine.reading:
                self.masks = {k: v for k, v in self.masks.items() if k[2] == more}
            self.masks[key] = make(
                config=self.engine.config,
                inputs_embeds=hidden,
                attention_mask=tokens.mask(more),
                past_key_values=kwargs.get("past_key_values"),
                layer_idx=number,
            )
        return self.masks[key]

    def _leave(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        engine = self.engine
        if engine.reading and engine.current is not None and engine.cache is not None:
            self._shorten_cache(used_cache(kwargs, output))
        if engine.reading:
            self.index, self.notes, self.views, self.masks = None, {}, [], {}

    def _shorten_cache(self, cache: Any) -> None:
        prompt, method = self.engine.current, self.engine.cache
        if cache is None:
            raise AttachError(f"{type(method).__name__} shortens the cache, and this call uses none; use_cache=True")
        for view, layer in zip(self.views, cache.layers, strict=True):
            if getattr(layer, "is_sliding", False):
                continue
            if type(layer) is not DynamicLayer:
                raise AttachError(
                    f"{type(method).__name__} cannot shorten a {type(layer).__name__}; use the default dynamic cache"
                )
            view.cached = layer.keys, layer.values
            with self.engine.choosing():
                keep = (method.select(view) | ~view.tokens.visual[:, None]) & view.tokens.valid[:, None]
                keep = self.engine.lent_heads(view.tokens, view.number, keep)
            cache.layers[view.number], prompt.cached[view.number] = method.store(view, keep)
