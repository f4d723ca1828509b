"""Flax NNX layers with an adapter.

Each layer is like its Flax twin.  It has the same parameters, names, shapes and initial
values, so pretrained states load unchanged.  The factors are ``nnx.LoRAParam``s, so
filters find them:

    model = Net(rngs)                      # built of jlora.nnx layers
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)

The scale is a variable too (`Scale`), which no such filter selects.  The layer runs the
twin's code through the lift, so there is no second implementation of anything.

A module of plain ``flax.nnx`` layers needs none of this: ``jlora.wrap(model)`` is the
module with adapted weights, and ``jlora.lift(lambda model, x: model(x))`` calls it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora._adapter import Adapter
from jlora._adapter import attach as attach_leaves
from jlora._init.keys import path_key
from jlora._init.make import make
from jlora._leaf import Dropout, LoRA
from jlora._leaf.fields import trained
from jlora._leaf.forms import Blocks, Form
from jlora._lift.lift import lift_layer
from jlora._plan.spec import Spec, check_rank, einsum_axes, fitted
from jlora._tree import by_path


class Scale(nnx.Variable):
    """alpha / rank of an adapter: a variable that does not train."""


@functools.lru_cache(maxsize=256)
def _lifted(method: Callable[..., Any]) -> Callable[..., Any]:
    return lift_layer(method)


class _Adapted:
    """The arguments that the layers have beside those of their twins.

    Args:
      rank: r; 0 for exactly the twin.
      alpha: the delta is alpha / rank * a·b; None for alpha = rank.
      dropout_rate: the rate of dropout on the activation that enters the low-rank
        branch; it needs a ``dropout`` stream in ``rngs``.
      deterministic: whether this dropout is off, as after ``model.eval()``.
    """

    _weight = "kernel"
    _kind = "dense"

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        alpha: float | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        twin: Any = super()  # the Flax layer, which follows in the list of bases
        twin.__init__(*args, rngs=rngs, **kwargs)
        name = type(self).__name__
        if not 0 <= dropout_rate < 1:
            raise ValueError(
                f"{name}: dropout_rate {dropout_rate!r}: expected a number in [0, 1)."
            )
        self.rank, self.dropout_rate = rank, dropout_rate
        self.deterministic = deterministic
        if rank == 0:
            return
        check_rank(rank, name)
        w = getattr(self, self._weight)[...]
        form = fitted(self._form(), name, w.shape, self._roles(w.ndim), self._kind)
        bias = None if getattr(self, "bias", None) is None else "bias"
        spec = Spec.of(self._kind, self._roles(w.ndim), rank, alpha, bias, form)
        # Made without drawing from the stream: a draw would change the keys, and so the
        # initial values, of the layers that follow.
        stream = rngs.params
        key = jax.random.fold_in(stream.key[...], stream.count[...])
        leaf = make(w, "lora", spec, init="kaiming", dtype=jnp.float32, key=key)
        self.lora_a, self.lora_b = nnx.LoRAParam(leaf.a), nnx.LoRAParam(leaf.b)
        self.lora_scale = Scale(leaf.scale)
        self.lora_roles, self.lora_form = leaf.roles, leaf.form
        self.bias_path = leaf.bias_path
        self.dropout_rngs: Any = nnx.data(None)
        if dropout_rate:
            key = jax.random.fold_in(rngs["dropout"].key[...], stream.count[...])
            key = path_key(key, "lora dropout")
            self.dropout_rngs = nnx.data(nnx.RngStream(key, tag="dropout"))

    def _roles(self, n: int) -> str:
        """The roles of the weight's n axes, one letter for each."""
        return "i" * (n - 1) + "o"

    def _form(self) -> Form | None:
        return None

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches dropout on or off, for ``nnx.view``."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _leaf(self, w: Any = None) -> LoRA:
        fields = (self.lora_a[...], self.lora_b[...], self.lora_scale[...])
        return LoRA(
            w,
            *fields,
            roles=self.lora_roles,
            form=self.lora_form,
            bias_path=self.bias_path,
        )

    def _call(
        self,
        method: Callable[..., Any],
        *args: Any,
        deterministic: bool | None = None,
        drops: bool = True,
    ) -> Any:
        """The twin's method with the adapted leaf in place of its weight."""
        if self.rank == 0:
            return method(self, *args)
        leaf = self._leaf(getattr(self, self._weight)[...])
        off = self.deterministic if deterministic is None else deterministic
        if drops and self.dropout_rate and not off:
            keys = jax.random.split(self.dropout_rngs(), leaf.scale.shape)
            leaf = dataclasses.replace(leaf, dropout=Dropout(keys, self.dropout_rate))
        module = by_path.map_leaves(
            lambda path, x: leaf if path == self._weight else x, self
        )
        return _lifted(method)(module, *args)


class Linear(_Adapted, nnx.Linear):
    """``flax.nnx.Linear`` with an adapter.

    Beside the arguments of its twin it takes ``rank`` (0 for no adapter), ``alpha``,
    ``dropout_rate`` and ``deterministic``.  So do all layers here.

    Example:
      >>> import jax.numpy as jnp, jlora.nnx
      >>> from flax import nnx
      >>> layer = jlora.nnx.Linear(3, 4, rank=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 3))).shape, layer.lora_a.shape
      ((5, 4), (3, 2))
    """

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """(..., in) to (..., out)."""
        return self._call(
            nnx.Linear.__call__, inputs, out_sharding, deterministic=deterministic
        )


class MergedLinear(Linear):
    """``flax.nnx.Linear`` of fused outputs, with an adapter for some of their slices.

    This is loralib's ``MergedLinear``: each enabled slice has its own factors, such as
    the query and the value of a fused qkv.  If no slice is enabled, the layer is
    exactly its twin.

    Args:
      enable_lora: one flag for each equal slice of the outputs.  All other arguments
        are those of `Linear`.

    Example:
      >>> import jlora.nnx
      >>> from flax import nnx
      >>> qkv = jlora.nnx.MergedLinear(
      ...     3, 12, rank=2, enable_lora=(True, False, True), rngs=nnx.Rngs(0)
      ... )
      >>> qkv.lora_b.shape
      (2, 2, 4)
    """

    def __init__(
        self, *args: Any, enable_lora: Sequence[bool], rank: int = 8, **kwargs: Any
    ):
        self.enable_lora = tuple(map(bool, enable_lora))
        none = self.enable_lora and not any(self.enable_lora)
        super().__init__(*args, rank=0 if none else rank, **kwargs)

    def _form(self) -> Form | None:
        return Blocks(self.enable_lora)


class LinearGeneral(_Adapted, nnx.LinearGeneral):
    """``flax.nnx.LinearGeneral`` with an adapter; kernel (*batch, *in, *out)."""

    def _roles(self, n: int) -> str:
        batch, in_ = len(self.batch_axis), len(self.in_features)
        return "b" * batch + "i" * in_ + "o" * (n - batch - in_)

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Contracts ``axis`` of the inputs and puts the out features last."""
        return self._call(
            nnx.LinearGeneral.__call__,
            inputs,
            out_sharding,
            deterministic=deterministic,
        )


class Einsum(_Adapted, nnx.Einsum):
    """``flax.nnx.Einsum`` with an adapter; its einsum string gives the roles."""

    def _roles(self, n: int) -> str:
        return einsum_axes(self.einsum_str, n)

    def __call__(
        self,
        inputs: jax.Array,
        einsum_str: str | None = None,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """The einsum of the inputs and the kernel."""
        return self._call(
            nnx.Einsum.__call__,
            inputs,
            einsum_str,
            out_sharding,
            deterministic=deterministic,
        )


class Conv(_Adapted, nnx.Conv):
    """``flax.nnx.Conv`` with an adapter, groups and dilations included."""

    _kind = "conv"

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """(*batch, *spatial, in) to (*batch, *spatial, out)."""
        return self._call(
            nnx.Conv.__call__, inputs, out_sharding, deterministic=deterministic
        )


class ConvTranspose(_Adapted, nnx.ConvTranspose):
    """``flax.nnx.ConvTranspose`` with an adapter."""

    _kind = "conv"

    def _roles(self, n: int) -> str:
        return "i" * (n - 2) + ("oi" if self.transpose_kernel else "io")

    def __call__(
        self, inputs: jax.Array, *, deterministic: bool | None = None
    ) -> jax.Array:
        """(*batch, *spatial, in) to (*batch, *spatial, out)."""
        return self._call(
            nnx.ConvTranspose.__call__, inputs, deterministic=deterministic
        )


class Embed(_Adapted, nnx.Embed):
    """``flax.nnx.Embed`` with an adapter, in the lookup and in ``attend``.

    Dropout applies to the query of `attend`; a lookup has no activation.
    """

    _weight = "embedding"
    _kind = "embed"

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Integer (...) to (..., features)."""
        return self._call(nnx.Embed.__call__, inputs, out_sharding, drops=False)

    def attend(
        self,
        query: jax.Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """(..., features) to (..., num_embeddings), with the same (tied) weight."""
        return self._call(
            nnx.Embed.attend, query, out_sharding, deterministic=deterministic
        )


def _layers(model: Any) -> Iterator[tuple[str, _Adapted]]:
    for keys, module in nnx.iter_modules(model):
        if isinstance(module, _Adapted) and module.rank:
            yield "/".join(map(str, (*keys, module._weight))), module


def adapter(model: nnx.Module) -> Adapter:
    """The adapter in a module that is built of these layers.

    Its paths are those of the weights, so it attaches to the plain Flax twin:
    ``jlora.attach(twin, adapter)``.

    Raises:
      ValueError: the module has no such layer.

    Example:
      >>> import jlora.nnx
      >>> from flax import nnx
      >>> list(jlora.nnx.adapter(jlora.nnx.Linear(3, 4, rngs=nnx.Rngs(0))))
      ['kernel']
    """
    found: Adapter = {path: module._leaf() for path, module in _layers(model)}
    if not found:
        raise ValueError(
            f"nnx.adapter: {type(model).__name__} has no layer of jlora.nnx with an "
            "adapter: expected one; of a module that jlora.wrap made, use "
            "jlora.adapter."
        )
    return found


def attach(model: nnx.Module, adapter: Adapter) -> Any:
    """A new module with the adapter's factors in its layers; see `adapter`.

    Raises:
      ValueError: as in `jlora.attach`; a path that is no layer of jlora.nnx; a leaf
        with other roles or another form than the layer has; a leaf that trained whole,
        has an output bias, or lost its base.

    Example:
      >>> import jlora.nnx
      >>> from flax import nnx
      >>> layer = jlora.nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> again = jlora.nnx.attach(layer, jlora.nnx.adapter(layer))
    """
    model = nnx.clone(model)
    layers = dict(_layers(model))
    weights = {p: getattr(m, m._weight)[...] for p, m in layers.items()}
    attach_leaves(weights, adapter)  # verifies that it fits
    for path, leaf in adapter.items():
        layer = layers[path]
        if {*trained(leaf)} != {"a", "b"} or leaf.w is not None:
            raise ValueError(
                f"nnx.attach: {path!r} was trained whole, has an output bias or a "
                "magnitude, or lost its base: expected leaves of a and b only, which "
                "these layers have."
            )
        have, want = ((x.axes, x.form) for x in (layer._leaf(), leaf))
        if have != want:
            raise ValueError(
                f"nnx.attach: {path!r} has roles and form {want} in the adapter, "
                f"{have} in the layer: it was made for another model."
            )
        layer.rank = leaf.rank
        layer.lora_a, layer.lora_b = nnx.LoRAParam(leaf.a), nnx.LoRAParam(leaf.b)
        layer.lora_scale = Scale(leaf.scale)
    return model
