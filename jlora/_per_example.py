"""per_example: a batch of which every example has its own adapter.

It is a `jax.vmap` of a lifted function, in which the base has no batch axis: its
products are those of one model on all examples.  What the vmap makes of the factors is
one of these products:

* gathered: each example's own factors are taken from the bank, and multiplied;
* joined: the ranks of all slots stand side by side in one product, and those that an
  example has not are zero;
* by token: joined, and each token of an example has ranks of its own;
* kernel: gathered, but what meets few tokens reads its factors out of the bank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._adapter import attach
from jlora._algebra.slots import Slot
from jlora._bank import picked, require_bank, slot_index
from jlora._explicit import automatic, explicit, whole
from jlora._labels import RANK
from jlora._leaf import Adapted, Full, LoRA, fields, is_adapted
from jlora._leaf.bank import Bank, one_slot
from jlora._lift.lift import lift_slots, rehearsed, reported
from jlora._lift.report import Report
from jlora._tree import by_path

PRODUCTS = ("gathered", "joined", "kernel")
FEW_SLOTS = 16
SHARE = 4
"""The joined product is chosen where there are few slots, and this many times as many
examples as slots × the tokens of an example.  A gather reads each example's factors,
writes them side by side, and reads them again, which few tokens do not make up for;
joined, the ranks of other slots cost FLOPs.  By `benchmarks/bank_cost.py`, on CPU; on
TPU the joined product moves less for as many slots as examples."""


def per_example(
    fn: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    strict: bool = False,
    product: str | None = None,
    axis_name: Hashable | None = None,
    spmd_axis_name: Hashable | None = None,
) -> Callable[..., Any]:
    """fn on a batch of which every example has its own adapter.

    The result is called as ``(params, bank, ids, *args)``; fn sees ``params`` with the
    adapter in slot ``ids[k]`` on them, and the k-th slice of each argument, as under
    `jax.vmap`.  The base has no batch axis: its products are those of one model on all
    examples.  An id of -1 is the base alone.  So is a traced id that the bank does not
    have; one whose value is known is an error.

    With ids (examples, tokens) every token of an example has its own adapter, as where
    documents are packed into a row.  Then the ranks of all slots stand side by side,
    and those that a token has not are zero: one product for few adapters, whose rank
    is slots × rank.  The tokens have to be the first axis, besides axes of one, of
    what enters each weight.

    With ids (examples,) that is done, too, where examples have few tokens, as in
    decoding, and the bank few slots; otherwise each example's factors are gathered.
    ``jlora.explain(jlora.per_example(fn), params, bank, ids, *args)`` says which.  A
    slot that holds NaN reaches no other's outputs; where slots are side by side, it
    reaches their gradients.

    A bank to which `jlora.dropout` gave keys has another mask for each example.

    Args:
      fn: a function of params and one example, without a batch axis.  It has positional
        arguments, and writes into none.
      in_axes: the axis of examples of each of ``args``, as in `jax.vmap`; None where an
        argument is for all of them.
      out_axes: as in `jax.vmap`.
      strict: as in `jlora.lift`.
      product: with ids of examples, "gathered" or "joined"; None chooses by the shapes.
        "kernel" is "gathered" where, on one TPU and without derivatives, products of a
        weight (in, out) with up to 16 tokens of an example read its factors out of the
        bank by a Pallas kernel.
      axis_name: as in `jax.vmap`.
      spmd_axis_name: as in `jax.vmap`.

    Raises:
      ValueError: another product.  When it is called: no bank; ids that are no integers
        (examples,) or (examples, tokens); a function that writes into variables; where
        slots are side by side, a use that does not tell which axis the tokens are, and
        a leaf with a magnitude, an output bias or dropout, or that is no pair of
        factors; what `jlora.attach` raises.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=2))] * 3)
      >>> fn = jlora.per_example(lambda params, x: x @ params["kernel"])
      >>> fn(params, bank, jnp.array([2, -1]), jnp.ones((2, 3))).shape
      (2, 4)
    """
    if product not in (None, *PRODUCTS):
        raise ValueError(
            f"per_example: product is {product!r}: expected 'gathered', 'joined', "
            "'kernel' or None, which chooses by the shapes."
        )
    return _PerExample(
        fn=fn,
        product=product,
        strict=strict,
        in_axes=in_axes,
        out_axes=out_axes,
        names={"axis_name": axis_name, "spmd_axis_name": spmd_axis_name},
    )


class _PerExample:
    """What `per_example` returns, which explain can ask."""

    def __init__(
        self,
        fn: Callable[..., Any],
        product: str | None,
        strict: bool,
        in_axes: Any,
        out_axes: Any,
        names: dict[str, Any],
    ):
        self.fn, self.product, self.strict = fn, product, strict
        self.in_axes, self.out_axes, self.names = in_axes, out_axes, names
        self.lifted = lift_slots(fn, strict=strict)
        self.__name__ = getattr(fn, "__name__", "call")

    def __call__(
        self, params: Any, bank: Bank, ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs:
            raise TypeError(
                f"per_example: found the keyword arguments {', '.join(kwargs)}: "
                "expected positional ones, which have examples along in_axes. Bind "
                "what has none: lambda params, x: fn(params, x, train=False)."
            )
        n = require_bank(bank, "per_example")
        ids = _checked_ids(ids, n)
        _require_as_many(ids, self._axes(args), args)

        def one(i: jax.Array, k: jax.Array, *args: Any) -> Any:
            product = self._product(params, bank, ids, args)
            own, adapter = self._adapter(product, bank, i, k, args)
            return _run(self.lifted, own, attach(params, adapter), args)

        mapped = jax.vmap(one, (0, 0, *self._axes(args)), self.out_axes, **self.names)
        return mapped(ids, _numbers(bank, ids), *args)

    def _adapter(
        self, product: str, bank: Bank, i: jax.Array, k: jax.Array, args: Any
    ) -> tuple[dict[str, Any], dict[str, Adapted]]:
        """What the evaluation of one example gets as its own, and the adapter."""
        n = require_bank(bank, "per_example")
        if product in ("joined", "by token"):
            adapter, sound = _side_by_side(bank)
            hot = jax.nn.one_hot(i, n)  # zeros where there is no such slot
            gate = jnp.where(hot > 0, jnp.broadcast_to(sound, hot.shape), 0)
            return {"gate": gate}, adapter
        adapter = {p: _folded(x, k) for p, x in picked(bank, i, n).items()}
        # The kernel is for one device.
        read = product == "kernel" and not explicit((bank, i, args))
        return {"slots": _slots(bank, i, n)} if read else {}, adapter

    def _product(self, params: Any, bank: Bank, ids: jax.Array, args: Any) -> str:
        """Which product; args are those of one example."""
        if ids.ndim == 2 and self.product is None:
            return "by token"
        if ids.ndim == 2:
            raise ValueError(
                f"per_example: product={self.product!r} with ids of tokens, of shape "
                f"{ids.shape}: expected one id for each example. Leave the product out."
            )
        if self.product is not None:
            return self.product
        plain = all(_lacks(x) is None for x in bank.values())
        n, examples = bank.slots or 0, ids.shape[0]
        if not isinstance(examples, int) or not plain:  # one is symbolic in an export
            return "gathered"
        if n > FEW_SLOTS or SHARE * n > examples:
            return "gathered"
        tokens = _most_tokens(self.fn, attach(params, one_slot(bank)), args)
        return "joined" if SHARE * n * tokens <= examples else "gathered"

    def _axes(self, args: Any) -> Any:
        many = isinstance(self.in_axes, (tuple, list))
        return self.in_axes if many else (self.in_axes,) * len(args)

    def explained(self, params: Any, bank: Bank, ids: Any, *args: Any) -> Report:
        """What `jlora.explain` says of it.  It raises what a call would raise."""
        n = require_bank(bank, "explain")
        if not isinstance(ids, jax.ShapeDtypeStruct):
            ids = _checked_ids(ids, n)
        leaves, treedef = jax.tree.flatten((params, bank, ids, args))
        arrays = [k for k, x in enumerate(leaves) if hasattr(x, "dtype")]
        found: list[Report] = []

        def report(given: list[Any]) -> None:
            new = dict(zip(arrays, given, strict=True))
            whole = [new.get(k, x) for k, x in enumerate(leaves)]
            params, bank, ids, args = jax.tree.unflatten(treedef, whole)
            ids = _checked_ids(ids, n)
            _require_as_many(ids, self._axes(args), args)

            def one(i: jax.Array, k: jax.Array, *args: Any) -> None:
                product = self._product(params, bank, ids, args)
                own, adapter = self._adapter(product, bank, i, k, args)
                tree = attach(params, adapter)
                ev = rehearsed(self.fn, (tree, *args), {}, self.strict, **own)
                note = f"{product}: {ids.shape[0]} examples, {n} slots"
                if product == "kernel":
                    note += "; on another device than a TPU gathered"
                found.append(
                    dataclasses.replace(reported(ev, tree), product=product, note=note)
                )

            mapped = jax.vmap(one, (0, 0, *self._axes(args)), **self.names)
            mapped(ids, _numbers(bank, ids), *args)

        jax.eval_shape(report, [leaves[k] for k in arrays])
        return found[0]


def _run(fn: Callable[..., Any], own: Any, tree: Any, args: Any) -> Any:
    before = by_path.flatten(tree)[0]
    out = fn(own, tree, *args)
    _require_unwritten(before, tree)
    return out


def _most_tokens(fn: Callable[..., Any], tree: Any, args: Any) -> float:
    """The most rows of one example that a weight meets.

    Infinity if one is used otherwise than in products and lookups: it cannot have slots
    side by side.
    """
    rows = rehearsed(fn, (tree, *args), {}).rows
    return max(rows.values(), default=math.inf)


def _lacks(leaf: Any) -> str | None:
    """Why slots of a leaf cannot be side by side; None if they can."""
    extra = [k for k in ("c", "m", "dropout") if getattr(leaf, k, None) is not None]
    if isinstance(leaf, Full) or leaf.form is not None:
        return "is no pair of factors"
    return f"has {', '.join(extra)}" if extra else None


def _side_by_side(bank: Bank) -> tuple[dict[str, Adapted], jax.Array]:
    """One adapter with the ranks of all slots, one slot after another.

    A slot that is not finite is zero there, so that it reaches no other's outputs.

    Returns:
      The adapter; and (slots,) one for each slot, NaN for one that is not finite.

    Raises:
      ValueError: a leaf that is no plain pair of factors.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    leaves: dict[str, Any] = jax.tree.map(whole, dict(bank))
    for path, leaf in leaves.items():
        if why := _lacks(leaf):
            raise ValueError(
                f"per_example: {path!r} {why}: expected plain factors where slots are "
                "side by side. Give one id for each example, and no product='joined'."
            )
        scale = jax.lax.stop_gradient(leaf.scale)
        scale = jnp.expand_dims(scale, range(scale.ndim, leaf.b.ndim))
        pairs[path] = leaf.a, scale * leaf.b
    finite = [
        jnp.isfinite(x).all(range(1, x.ndim)) for pair in pairs.values() for x in pair
    ]
    sound = functools.reduce(jnp.logical_and, finite)
    out: dict[str, Any] = {}
    for path, pair in pairs.items():
        like = leaves[path]
        axes = like.roles.rjust(bank.ndims[path], "b")
        new: dict[str, Any] = {}
        for name, x in zip("ab", pair, strict=True):
            x = jnp.where(jnp.expand_dims(sound, range(1, x.ndim)), x, 0)
            at = fields.labels(name, axes).index(RANK)
            x = jnp.moveaxis(x, 0, at)
            shape = (*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
            new[name] = x.reshape(shape)
        scale = jnp.ones_like(like.scale[0])
        out[path] = dataclasses.replace(like, scale=scale, **new)
    return out, jnp.where(sound, 1.0, jnp.nan)


def _slots(bank: Bank, i: jax.Array, n: int) -> dict[str, Slot]:
    """Where the factors of weights (in, out) are."""
    at = jnp.where(i < n, i, -1)
    leaves: dict[str, Any] = {**bank}
    return {
        path: Slot(x.a, x.b, at)
        for path, x in leaves.items()
        if isinstance(x, LoRA) and x.form is None and x.a.ndim == x.b.ndim == 3
    }


def _numbers(bank: Bank, ids: jax.Array) -> jax.Array:
    """The number of each example; the ids will do where nothing asks for it."""
    if not any(isinstance(x, LoRA) and x.dropout is not None for x in bank.values()):
        return ids
    return automatic(
        lambda ids: jnp.arange(len(ids)), lambda: jax.typeof(ids).sharding, ids
    )


def _folded(leaf: Any, k: jax.Array) -> Any:
    """The leaf with dropout keys for the k-th example."""
    if not isinstance(leaf, LoRA) or leaf.dropout is None:
        return leaf
    fold = jax.random.fold_in
    for _ in leaf.dropout.key.shape:
        fold = jax.vmap(fold, (0, None))
    dropout = dataclasses.replace(leaf.dropout, key=fold(leaf.dropout.key, k))
    return dataclasses.replace(leaf, dropout=dropout)


def _require_unwritten(before: Any, tree: Any) -> None:
    """Raises if a function has written into the variables of its module."""
    for (path, x), (_, y) in zip(before, by_path.flatten(tree)[0], strict=True):
        if x is not y and not is_adapted(x):
            raise ValueError(
                f"per_example: fn writes into {path!r}, of which each example would "
                "have its own: expected a function that writes nothing. Call "
                "model.eval() before; for dropout give jlora.dropout a key."
            )


def _require_as_many(ids: jax.Array, axes: Any, args: Any) -> None:
    """Raises unless there is one id for each example of each argument.

    What is symbolic, in an export, is left to `jax.vmap`.
    """
    n = ids.shape[0]
    for k, (axis, arg) in enumerate(zip(axes, args, strict=False)):
        if not isinstance(axis, int):  # no axis, or a tree of them, which vmap checks
            continue
        for path, x in by_path.flatten(arg)[0]:
            shape = np.shape(x)
            if not -len(shape) <= axis < len(shape):
                continue
            known = isinstance(n, int) and isinstance(shape[axis], int)
            if known and shape[axis] != n:
                at = f", {path!r}," if path else ""
                raise ValueError(
                    f"per_example: {n} ids, and argument {k}{at} of shape "
                    f"{shape} has {shape[axis]} examples along axis {axis}: expected "
                    "one id for each example; in_axes says which axis that is."
                )


def _checked_ids(ids: Any, n: int) -> jax.Array:
    """The ids in int32; raises if it is known that no slot has one."""
    try:
        ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    except (TypeError, ValueError):
        raise ValueError(
            f"per_example: ids is a {type(ids).__name__} of which NumPy makes no array "
            "of numbers: expected integers, one for each example or (examples, "
            "tokens), with as many tokens in each."
        ) from None
    if ids.shape == (0,):
        ids = ids.astype(np.int32)
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"per_example: ids is {ids.dtype} of shape {ids.shape}: expected integers, "
            "one for each example or (examples, tokens); -1 for no adapter."
        )
    if not isinstance(ids, jax.core.Tracer):
        wrong = [int(i) for i in np.asarray(ids).ravel() if not -1 <= i < n]
        if wrong:
            raise ValueError(
                f"per_example: ids has {wrong[0]}, and the bank has {n} slots: "
                f"expected 0 to {n - 1}, or -1 for no adapter."
            )
    return slot_index(ids, n)
