"""Drafters by name, from models, and the check of one that somebody else wrote."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.batch import Model
from jaxinfer.checkpoint.placement import keep_params
from jaxinfer.errors import InvalidArgument
from jaxinfer.layerwise import refuse_quantized
from jaxinfer.recipes import Recipe, make_recipe
from jaxinfer.sampling import History, greedy_rows
from jaxinfer.speculative.drafter import Draft, Drafter, NoDrafter
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.model_drafter import ModelDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.speculative.speculation import Speculation, Verifier
from jaxinfer.speculative.vocab import identity, map_vocabularies
from jaxinfer.tokenizer import Tokenizer

NAMES = ("auto", "none", "ngram", "self")
_SELF = "self:"


def is_name(drafter: Any) -> bool:
    """Whether it is the name of a drafter, and not of a model."""
    return isinstance(drafter, str) and (drafter in NAMES or drafter.startswith(_SELF))


def recipe_of(drafter: Any, platform: str) -> Recipe | None:
    """What "self:int4:g64", or a SelfDrafter, says of its weights; None: another drafter.

    Raises InvalidArgument where that is no recipe.
    """
    if isinstance(drafter, FallbackDrafter):
        first, second = (recipe_of(part, platform) for part in (drafter.first, drafter.second))
        return first or second
    own = as_self(drafter)
    if own is None or own.quantize is None:
        return None
    name = _SELF + own.quantize
    try:
        recipe = make_recipe(own.quantize, platform)
    except InvalidArgument as error:
        raise InvalidArgument(f"drafter={name!r:.40}: {error}") from error
    if recipe is None or recipe.stored:
        raise InvalidArgument(f"drafter={name!r:.40}: made of the model's weights, not of a file")
    return recipe


def as_self(drafter: Any) -> SelfDrafter | None:
    """The SelfDrafter that "self" or "self:int8" stands for, or that it is; None: another one."""
    if isinstance(drafter, SelfDrafter):
        return drafter
    if drafter == "self":
        return SelfDrafter()
    if isinstance(drafter, str) and drafter.startswith(_SELF):
        return SelfDrafter(quantize=drafter.removeprefix(_SELF))
    return None


def make_speculation(
    drafter: Drafter,
    num_draft: int | Literal["auto"] | None,
    verifier: Verifier,
    exact: bool,
) -> Speculation:
    """What `LLM.speculation` says, with every default told."""
    if num_draft is not None and not isinstance(drafter, NoDrafter):
        drafter = drafter.replace(num_draft=num_draft)
    asked = Speculation(drafter, verifier, exact)
    return asked if drafter.max_draft else dataclasses.replace(asked, drafter=NoDrafter())


def make_drafter(wanted: Any, model: Model, tokenizer: Tokenizer) -> Drafter:
    """The drafter that `wanted` says: None, a name, an LLM, or a Drafter as it is."""
    if wanted is None or wanted == "none":
        return NoDrafter()
    if own := as_self(wanted):
        return self_drafter(model, own).replace(num_draft=own.num_draft)
    if isinstance(wanted, Drafter):
        _check_fields(wanted)
        return wanted
    if wanted in ("auto", "ngram"):  # lookup costs next to nothing, and switches itself off
        return NGramDrafter()
    if isinstance(getattr(wanted, "model", None), Model):
        return model_drafter(wanted.model, wanted.tokenizer, model, tokenizer)
    names = ", ".join([*NAMES, f"{_SELF}RECIPE"])
    raise InvalidArgument(
        f"drafter={wanted!r:.60}: None, one of {names}, a Drafter or an LLM;"
        " load(..., drafter=NAME) takes a second model by name"
    )


def model_drafter(
    own: Model, own_tokenizer: Tokenizer, target: Model, tokenizer: Tokenizer
) -> ModelDrafter:
    """A second model as drafter; InvalidArgument where the vocabularies have nothing in common."""
    if own.devices != target.devices:
        raise InvalidArgument(
            f"the drafter lies on {own.devices} and the model on {target.devices}: load both alike"
        )
    vocab = map_vocabularies(
        tokenizer, own_tokenizer, target.config.vocab_size, own.config.vocab_size
    )
    return ModelDrafter(
        params=own.params,
        vocab=vocab,
        config=own.config,
        dtype=own.dtype,
        kernels=own.kernels(),
    )


def self_drafter(model: Model, wanted: SelfDrafter) -> ModelDrafter:
    """The model itself with a subset of its layers, weights shared; or with its weights in fewer
    bits, which lie beside its own.

    Raises:
      InvalidArgument: no such layers or recipe, or weights that are quantized already;
      OutOfMemory: no room for others.
    """
    config, count, layers = model.config, model.config.num_layers, wanted.layers
    recipe = recipe_of(wanted, model.layout.platform)
    if layers is None and recipe is None:
        middle = range(count // 4, count - count // 4)
        layers = tuple(i for i in range(count) if i not in middle or i % 2)
        if not layers:
            raise InvalidArgument(f"drafter='self': {count} layers are too few to leave any out")
    params = model.params
    if layers is not None:
        if list(layers) != sorted({i for i in layers if 0 <= i < count}):
            raise InvalidArgument(f"layers={layers}: numbers from 0 to {count - 1}, ascending")
        params = {name: x for name, x in params.items() if not name.startswith("layer_")}
        params |= {f"layer_{own}": model.params[f"layer_{i}"] for own, i in enumerate(layers)}
        config = dataclasses.replace(config, layers=tuple(config.layers[i] for i in layers))
    if recipe:
        refuse_quantized(params)
        params = keep_params(params, config, model.dtype, model.layout, recipe)
    size = config.vocab_size
    return ModelDrafter(
        params=params,
        vocab=identity(size, size),
        config=config,
        dtype=model.dtype,
        kernels=model.kernels(),
    )


def _check_fields(drafter: Drafter) -> None:
    """Refuse a field that is declared the wrong way round: what is no array cannot be an argument
    of the compiled loop, and an array cannot be a part of it."""
    for field in dataclasses.fields(drafter):
        name = f"{type(drafter).__name__}.{field.name}"
        held = jax.tree.leaves(getattr(drafter, field.name))
        if field.metadata.get("pytree_node", True):
            if not all(hasattr(x, "dtype") or isinstance(x, int | float) for x in held):
                raise InvalidArgument(
                    f"{name}: is no array: declare it with jaxinfer.speculative.static"
                )
        elif any(isinstance(x, jax.Array | np.ndarray) for x in held):
            raise InvalidArgument(f"{name}: holds an array: declare it without static")


def check_drafter(
    model: Model, speculation: Speculation, batch: int, capacity: int, max_len: int
) -> None:
    """Trace a drafter once and refuse one whose results have the wrong shapes.

    Raises:
      InvalidArgument: what it returned and what was expected; or a draft as long as the context.
    """
    drafter, size = speculation.drafter, speculation.drafter.max_draft
    if drafter.num_draft != "auto" and size + 1 >= max_len:
        raise InvalidArgument(f"num_draft={size}: does not fit the context of {max_len} tokens")
    _check(model, drafter, batch, capacity)


def _check(model: Model, drafter: Drafter, batch: int, capacity: int) -> None:
    if isinstance(drafter, FallbackDrafter):  # its parts first: they know their names
        for part in drafter.parts():
            _check(model, part, batch, capacity)
    name, size = type(drafter).__name__, drafter.max_draft
    ints: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens: Any = jax.ShapeDtypeStruct((batch, capacity), jnp.int32)
    context = History(tokens, ints, ints)
    hidden = jax.ShapeDtypeStruct((batch, size + 1, model.config.width), model.dtype)
    rows = greedy_rows(batch, model.vocab_limit)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (batch, size)))
    state = jax.eval_shape(lambda: drafter.init(batch, capacity))
    kinds: Any = drafter.kinds
    if not (isinstance(kinds, tuple) and kinds and all(0 < share <= 1 for share in kinds)):
        raise InvalidArgument(f"{name}.kinds={kinds}: a tuple of shares between 0 and 1")
    got = _trace("propose", drafter, state, context, rows, ints, keys)
    if type(got) is not tuple or len(got) != 2 or not isinstance(got[0], Draft):
        raise InvalidArgument(f"{name}.propose: must return (Draft, state), not {got!r:.80}")
    draft, after = got
    wanted = {"tokens": ((batch, size), "int32"), "num": ((batch,), "int32")}
    if drafter.draws:
        wanted["probs"] = ((batch, size, model.config.vocab_size), "float32")
    if draft.kind is not None:
        wanted["kind"] = ((batch,), "int32")
    for field, (shape, dtype) in wanted.items():
        part = getattr(draft, field)
        if getattr(part, "shape", None) != shape or str(part.dtype) != dtype:
            shown = f"{part.dtype}{list(part.shape)}" if hasattr(part, "shape") else repr(part)
            raise InvalidArgument(
                f"{name}.propose: draft.{field} must be {dtype}{list(shape)}, is {shown}"
            )
    if draft.probs is not None and not drafter.draws:
        raise InvalidArgument(f"{name}.propose: gives probs, so {name}.draws must be True")
    seen = _trace("observe", drafter, state, context, ints, hidden)
    for method, new in (("propose", after), ("observe", seen)):
        if _shapes(new) != _shapes(state):
            raise InvalidArgument(
                f"{name}.{method}: the state it returns must have the structure, shapes and dtypes"
                " of the one that init made"
            )


def _trace(method: str, drafter: Drafter, *arguments: Any) -> Any:
    """Shapes of what a method of somebody else's returns, its errors in one line with its name."""
    name = f"{type(drafter).__name__}.{method}"
    try:
        return jax.eval_shape(getattr(type(drafter), method), drafter, *arguments)
    except jax.errors.JAXTypeError as error:
        raise InvalidArgument(
            f"{name}: wants the value of an array where there are but shapes; a field that is a"
            " number to Python is declared with jaxinfer.speculative.static"
        ) from error
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name}: {str(error).splitlines()[0]}") from error


def _shapes(state: Any) -> Any:
    leaves, tree = jax.tree.flatten(state)
    return tree, [(x.shape, x.dtype) for x in leaves]
