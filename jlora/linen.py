"""Flax Linen layers with an adapter.

Each layer is like its Flax twin.  It has the same parameters in the ``params``
collection, with the same names and initial values, so pretrained checkpoints load
unchanged.  The factors are adapted leaves in a ``lora`` collection.  The layer runs the
twin's code through the lift, so there is no second implementation of anything.

    model = Net()                          # built of jlora.linen layers
    variables = model.init(key, x)         # {"params": …, "lora": …}
    tx = jlora.optimizer(optax.adamw(1e-4), variables)

`jlora.optimizer`, `jlora.partition`, `jlora.scaled` and `jlora.count` work on the
variables.  Pretrained params replace ``variables["params"]``.  `adapter` and `attach`
of this module carry the adapter to the plain Flax model and back; that is also the way
to merge, to save and to `explain`.  To train a head or biases beside adapters, lift the
plain model instead, and wrap its params with ``jlora.wrap(params, train=...)``.

Under ``nn.scan`` the factors are stacked like the parameters, with
``variable_axes={"params": 0, "lora": 0}``; ``nn.vmap`` likewise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from jlora._adapter import Adapter
from jlora._adapter import adapter as adapter_of
from jlora._adapter import attach as attach_leaves
from jlora._init.make import make
from jlora._leaf import Dropout, LoRA
from jlora._leaf.forms import Blocks, Form
from jlora._lift.lift import lift_layer
from jlora._plan.spec import Spec, check_rank, einsum_axes, fitted
from jlora._tree import paths

COLLECTION = "lora"


class _Adapted(nn.Module, kw_only=True):
    """The fields that the layers have beside those of their twins.

    Attributes:
      rank: r; 0 for exactly the twin.
      alpha: the delta is alpha / rank * a·b; None for alpha = rank.
      dropout_rate: the rate of dropout on the activation that enters the low-rank
        branch; it needs the ``dropout`` rng.
      deterministic: whether this dropout is off; given here or in the call.
    """

    rank: int = 8
    alpha: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None

    def _leaf(
        self, name: str, kind: str, axes: Callable[[int], str], form: Form | None = None
    ) -> LoRA:
        """The adapted leaf of the parameter ``name``, without base; made at init."""
        check_rank(self.rank, type(self).__name__)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"{type(self).__name__}: dropout_rate {self.dropout_rate!r}: expected "
                "a number in [0, 1)."
            )

        def init() -> LoRA:
            w = nn.meta.unbox(self.get_variable("params", name))
            roles = axes(w.ndim)
            fits = fitted(form, "/".join(self.path), w.shape, roles, kind)
            bias = "bias" if self.has_variable("params", "bias") else None
            spec = Spec.of(kind, roles, self.rank, self.alpha, bias, fits)
            # The module's key, into which `make` folds the name.  make_rng would
            # advance the counter from which the twin's parameters are made under
            # nn.scan.
            key = cast(Any, self.scope).rngs["params"].as_jax_rng()
            leaf = make(w, name, spec, init="kaiming", dtype=jnp.float32, key=key)
            return dataclasses.replace(leaf, w=None)

        if not (
            self.has_variable(COLLECTION, name)
            or (self.is_mutable_collection(COLLECTION) and self.has_rng("params"))
        ):
            raise ValueError(
                f"{'/'.join(self.path) or type(self).__name__}: the variables have no "
                f"factors of {name!r}: expected them in the collection {COLLECTION!r}, "
                f"beside 'params'. Keep both of model.init; under nn.scan and nn.vmap "
                f"name it in variable_axes ({{'params': 0, {COLLECTION!r}: 0}}); "
                "rank 0 is the layer without an adapter."
            )
        leaf = self.variable(COLLECTION, name, init).value
        found = tuple(nn.meta.unbox(self.get_variable("params", name)).shape)
        if leaf.shape != found:
            raise ValueError(
                f"{'/'.join(self.path)}: the variables hold factors for a {name} of "
                f"shape {leaf.shape}, and one of shape {found}: expected those of one "
                "layer."
            )
        if leaf.rank != self.rank:
            raise ValueError(
                f"{'/'.join(self.path)}: the variables hold factors of rank "
                f"{leaf.rank}, expected {self.rank} as the layer has: initialise them "
                "with this layer, or give it that rank."
            )
        return leaf

    def _run(
        self,
        twin: type,
        leaf: LoRA,
        name: str,
        method: str,
        args: Any,
        deterministic: bool | None,
    ) -> jax.Array:
        """The twin's method with the adapted leaf in place of its weight."""
        # The lookup has no activation to drop.
        drops = self.dropout_rate and not (name == "embedding" and method == "__call__")
        if drops and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            keys = jax.random.split(self.make_rng("dropout"), leaf.scale.shape)
            leaf = dataclasses.replace(leaf, dropout=Dropout(keys, self.dropout_rate))
        others = {k: v for k, v in self.variables.items() if k != COLLECTION}
        params = nn.meta.unbox(dict(others.pop("params")))
        # They do not train, even if a caller differentiates all variables.
        w, scale = map(lax.stop_gradient, (params[name], leaf.scale))
        params[name] = dataclasses.replace(leaf, w=w, scale=scale)
        fields = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(twin)
            if f.init and f.name not in ("parent", "name")
        }
        try:
            apply = _apply(twin(**fields, parent=None), method)
        except TypeError:  # a field is not hashable, so the twin cannot be a cache key
            apply = _apply.__wrapped__(twin(**fields, parent=None), method)
        return apply(params, others, *args)


@functools.lru_cache(maxsize=1024)
def _apply(twin: nn.Module, method: str) -> Callable[..., Any]:
    def apply(params: Any, others: Any, *args: Any) -> Any:
        return twin.apply({**others, "params": params}, *args, method=method)

    return lift_layer(apply)


def _kernel_layer(
    layer: _Adapted,
    twin: type,
    kind: str,
    axes: Callable[[int], str],
    args: tuple[Any, ...],
    deterministic: bool | None,
    form: Form | None = None,
) -> jax.Array:
    """The call of a layer whose weight is its ``kernel``."""
    # At init the twin makes the kernel first, whose shape gives those of the factors.
    if layer.rank == 0 or layer.is_initializing():
        y = twin.__call__(layer, *args)
        if layer.rank != 0:
            layer._leaf("kernel", kind, axes, form)
        return y
    leaf = layer._leaf("kernel", kind, axes, form)
    return layer._run(twin, leaf, "kernel", "__call__", args, deterministic)


class Dense(nn.Dense, _Adapted):
    """``flax.linen.Dense`` with an adapter.

    Beside the fields of its twin it has ``rank`` (0 for no adapter), ``alpha``,
    ``dropout_rate`` and ``deterministic``.  So have all layers here.

    Example:
      >>> import jax, jax.numpy as jnp, jlora.linen
      >>> layer = jlora.linen.Dense(4, rank=2)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> variables["lora"]["kernel"].a.shape
      (3, 2)
    """

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """(..., in) to (..., features)."""
        return _kernel_layer(
            self, nn.Dense, "dense", lambda n: "io", (inputs,), deterministic
        )


class DenseGeneral(nn.DenseGeneral, _Adapted):
    """``flax.linen.DenseGeneral`` with an adapter; kernel (*batch, *in, *features)."""

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """Contracts ``axis`` of the inputs and puts ``features`` last."""
        batch, in_ = (
            1 if isinstance(v, int) else len(v) for v in (self.batch_dims, self.axis)
        )
        return _kernel_layer(
            self,
            nn.DenseGeneral,
            "dense",
            lambda n: "b" * batch + "i" * in_ + "o" * (n - batch - in_),
            (inputs,),
            deterministic,
        )


class Einsum(nn.Einsum, _Adapted):
    """``flax.linen.Einsum`` with an adapter; its einsum string gives the roles."""

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        einsum_str: str | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """The einsum of the inputs and the kernel."""
        text = nn.merge_param("einsum_str", self.einsum_str, einsum_str)
        return _kernel_layer(
            self,
            nn.Einsum,
            "dense",
            lambda n: einsum_axes(text, n),
            (inputs, einsum_str),
            deterministic,
        )


class Conv(nn.Conv, _Adapted):
    """``flax.linen.Conv`` with an adapter, groups and dilations included."""

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """(*batch, *spatial, in) to (*batch, *spatial, features)."""
        return _kernel_layer(
            self,
            nn.Conv,
            "conv",
            lambda n: "i" * (n - 1) + "o",
            (inputs,),
            deterministic,
        )


class ConvTranspose(nn.ConvTranspose, _Adapted):
    """``flax.linen.ConvTranspose`` with an adapter."""

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """(*batch, *spatial, in) to (*batch, *spatial, features)."""
        last = "oi" if self.transpose_kernel else "io"
        return _kernel_layer(
            self,
            nn.ConvTranspose,
            "conv",
            lambda n: "i" * (n - 2) + last,
            (inputs,),
            deterministic,
        )


class MergedDense(nn.Dense, _Adapted):
    """``flax.linen.Dense`` of fused outputs, with an adapter for some of their slices.

    This is loralib's ``MergedLinear``: each enabled slice has its own factors, such as
    the query and the value of a fused qkv.  If no slice is enabled, the layer is
    exactly its twin.

    Attributes:
      enable_lora: one flag for each equal slice of ``features``.

    Example:
      >>> import jax, jax.numpy as jnp, jlora.linen
      >>> qkv = jlora.linen.MergedDense(12, rank=2, enable_lora=(True, False, True))
      >>> variables = qkv.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> variables["lora"]["kernel"].b.shape
      (2, 2, 4)
    """

    enable_lora: Sequence[bool] = (True,)

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """(..., in) to (..., features)."""
        form = Blocks(tuple(map(bool, self.enable_lora)))
        if form.enabled and not any(form.enabled):
            return nn.Dense.__call__(self, inputs)
        return _kernel_layer(
            self, nn.Dense, "dense", lambda n: "io", (inputs,), deterministic, form
        )


class Embed(nn.Embed, _Adapted):
    """``flax.linen.Embed`` with an adapter, in the lookup and in ``attend``.

    Dropout applies to the query of `attend`; a lookup has no activation.
    """

    def setup(self) -> None:
        """Makes the twin's table, and the factors."""
        super().setup()
        if self.rank != 0:
            self.factors = self._leaf("embedding", "embed", lambda n: "io")

    def _method(self, name: str, x: jax.Array, deterministic: bool | None) -> jax.Array:
        if self.rank == 0 or self.is_initializing():
            return getattr(nn.Embed, name)(self, x)
        return self._run(nn.Embed, self.factors, "embedding", name, (x,), deterministic)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Integer (...) to (..., features)."""
        return self._method("__call__", inputs, None)

    def attend(self, query: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """(..., features) to (..., num_embeddings), with the same (tied) weight."""
        return self._method("attend", query, deterministic)


def adapter(variables: Any) -> Adapter:
    """The adapter in the variables of a model that is built of these layers.

    Its paths are those of the weights in ``{"params": …}``, so it attaches to the plain
    Flax twin: ``jlora.attach({"params": variables["params"]}, adapter)``.

    Raises:
      ValueError: the variables have no ``lora`` collection.

    Example:
      >>> import jax, jax.numpy as jnp, jlora.linen
      >>> variables = jlora.linen.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> list(jlora.linen.adapter(variables))
      ['params/kernel']
    """
    if COLLECTION not in variables:
        raise ValueError(
            f"linen.adapter: expected variables with a {COLLECTION!r} collection, "
            f"found {sorted(variables)}: initialise a model of jlora.linen layers."
        )
    leaves = adapter_of(variables[COLLECTION])
    return {f"params/{path}": leaf for path, leaf in leaves.items()}


def attach(variables: Any, adapter: Adapter) -> dict[str, Any]:
    """The variables with the adapter as their ``lora`` collection; see `adapter`.

    Raises:
      ValueError: as in `jlora.attach`; a leaf that trained whole, or whose base was
        dropped; a path that the ``lora`` collection of the variables does not have.

    Example:
      >>> import jax, jax.numpy as jnp, jlora.linen
      >>> variables = jlora.linen.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> again = jlora.linen.attach(variables, jlora.linen.adapter(variables))
      >>> again["lora"]["kernel"].a is variables["lora"]["kernel"].a
      True
    """
    if "params" not in variables:
        raise ValueError(
            f"linen.attach: expected variables with 'params', found "
            f"{sorted(variables)}."
        )
    had = variables.get(COLLECTION)
    variables = {k: v for k, v in variables.items() if k != COLLECTION}
    attach_leaves({"params": variables["params"]}, adapter)  # verifies that it fits
    known = None if had is None else adapter_of({"params": had})
    for path, leaf in adapter.items():
        if known is not None and path not in known:
            raise ValueError(
                f"linen.attach: {path!r} belongs to no layer of jlora.linen: expected "
                f"one of {paths.near(path, known)}. Attach it to the plain twin: "
                "jlora.attach({'params': params}, adapter)."
            )
        if isinstance(leaf, LoRA) and leaf.w is not None:
            raise ValueError(
                f"linen.attach: the base of {path!r} was dropped: expected one that "
                "stays, which the layer reads. Lift the plain twin on "
                "jlora.attach({'params': params}, adapter)."
            )
        if not isinstance(leaf, LoRA):
            raise ValueError(
                f"linen.attach: {path!r} was trained whole: expected low-rank leaves "
                "only. Put its value into variables['params'], as jlora.merge of the "
                "plain twin's tree does."
            )
    leaves = {tuple(p.split("/")[1:]): leaf for p, leaf in adapter.items()}
    nested = traverse_util.unflatten_dict(leaves)
    return {**variables, COLLECTION: nested}
