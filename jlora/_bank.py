"""Many adapters of one base: stack, pick, put."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._algebra.slots import taken
from jlora._explicit import automatic
from jlora._leaf import Adapted, Full, LoRA, base, fields, is_adapted
from jlora._leaf.bank import Bank, one_slot, refuse_bank, slots_of
from jlora._leaf.forms import Misfit
from jlora._tree import by_path, paths


def stack(adapters: Sequence[Mapping[str, Adapted]]) -> Bank:
    """Adapters of one base as a bank: every array has an axis of slots first.

    They may have ranks, alphas and targets of their own.  A lower rank is filled up
    with zeros, which stay zero in training: neither factor has a gradient there.  A
    path that one of them does not have is the base there.  An output bias that one of
    them does not have is zero there; in training it gets a gradient as the others do.

    A bank is trained, partitioned and sharded as an adapter is, and Orbax saves it as
    any tree; inside of `jax.vmap` over its slots it is an adapter.

    Args:
      adapters: as `jlora.adapter` gives them, of the same base.

    Raises:
      ValueError: no adapters; one that is none; two of different models, or of forms
        that do not go together; a base that was dropped.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> one, two = (jlora.adapter(jlora.wrap(params, rank=r)) for r in (1, 2))
      >>> jlora.stack([one, two])["kernel"].a.shape
      (2, 3, 2)
    """
    if isinstance(adapters, Mapping) or not (adapters := list(adapters)):
        raise ValueError(
            "stack: expected a list of adapters, such as [jlora.adapter(tree), ...], "
            f"found {'one' if isinstance(adapters, Mapping) else 'none'}."
        )
    for k, adapter in enumerate(adapters):
        _require_one(adapter, f"stack: adapter {k}")
    like: dict[str, Any] = {}
    for k, adapter in enumerate(adapters):
        for path, x in adapter.items():
            own = _struct(x)
            with _at(f"stack: {path!r} of adapter {k}"):
                like[path] = _common(like.get(path, own), own)
    slots = [_slot(adapter, like) for adapter in adapters]
    leaves = jax.tree.map(lambda *xs: jnp.stack(xs), *slots)
    return Bank(leaves, {path: x.ndim for path, x in like.items()})


def pick(bank: Bank, i: Any) -> dict[str, Adapted]:
    """The adapter in slot i; with i = -1 one that does nothing.

    Its rank is that of the bank.  A path that it had not is not in it.  ``i`` may be
    traced: one compiled function serves all slots.  Then all paths are there, those
    that it had not with a scale of zero; and an index that the bank does not have
    counts as -1.

    Args:
      bank: as `stack` gives it.
      i: () an integer.

    Raises:
      ValueError: no bank; a slot that it does not have.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=2))] * 3)
      >>> jlora.pick(bank, 1)["kernel"].a.shape
      (3, 2)
    """
    n = require_bank(bank, "pick")
    found = picked(bank, _index(i, n, "pick", -1), n)
    if isinstance(i, jax.core.Tracer) or i < 0 or not base.is_concrete(found):
        return found
    return {path: _opened(x) for path, x in found.items() if not _silent(x)}


def _silent(leaf: Any) -> bool:
    """Whether a leaf of a slot is none of its adapter; one that is off has an a."""
    gates = [leaf.scale, leaf.a] if isinstance(leaf, LoRA) else [leaf.on]
    return not any((x != 0).any() for x in gates)


def _opened(leaf: Any) -> Any:
    return leaf if isinstance(leaf, LoRA) else dataclasses.replace(leaf, on=None)


def _index(i: Any, n: int, what: str, least: int) -> jax.Array:
    """The index of a slot as an array; raises if it is known that no slot has it."""
    try:
        i = jnp.asarray(i)
    except (TypeError, ValueError):
        raise ValueError(
            f"{what}: found a {type(i).__name__}: expected the index of one slot, an "
            "integer, as in jlora.pick(bank, i) and jlora.put(bank, i, adapter)."
        ) from None
    if i.ndim or not jnp.issubdtype(i.dtype, jnp.integer):
        raise ValueError(
            f"{what}: found {i.dtype} of shape {i.shape}: expected the index of one "
            "slot, an integer. For a batch of them: jlora.per_example."
        )
    if not isinstance(i, jax.core.Tracer) and not least <= int(i) < n:
        none = ", or -1 for no adapter" if least < 0 else ""
        raise ValueError(
            f"{what}: slot {int(i)} of a bank of {n}: expected 0 to {n - 1}{none}."
        )
    return slot_index(i, n)


def slot_index(i: Any, n: int) -> jax.Array:
    """Integers as int32, which holds n; what it does not hold is no slot: -1."""
    if jnp.iinfo(i.dtype).max > jnp.iinfo(jnp.int32).max:
        i = jnp.where(i < n, i, jnp.asarray(-1, jnp.int32))
    return jnp.asarray(i).astype(jnp.int32)


def picked(bank: Bank, i: jax.Array, n: int) -> dict[str, Adapted]:
    """The adapter in slot i of n; one that does nothing if there is no such slot."""
    on = (i >= 0) & (i < n)
    at = jnp.clip(i, 0, n - 1)
    leaves = jax.tree.map(lambda x: _taken(x, at), dict(bank))
    return {path: _gated(x, on) for path, x in leaves.items()}


def _taken(x: Any, i: jax.Array) -> jax.Array:
    """x[i], sharded as a slot of x is."""
    x = jnp.asarray(x)

    def like() -> Any:
        own = jax.typeof(x).sharding
        return own.update(spec=jax.sharding.PartitionSpec(*own.spec[1:]))

    return automatic(taken, like, x, i)


def _gated(leaf: Any, on: jax.Array) -> Any:
    """The leaf; or one that does nothing, whatever is in the slot that was taken."""
    new = {}
    for name in fields.stored(leaf):
        x = getattr(leaf, name)
        new[name] = jnp.where(on, x, jnp.asarray(name == "m", x.dtype))
    return dataclasses.replace(leaf, **new)


def put(bank: Bank, i: Any, adapter: Mapping[str, Adapted]) -> Bank:
    """The bank with an adapter in slot i, in the place of what was there.

    In `jax.jit`, with the bank donated, it writes the slot alone, and one compiled
    function serves all slots and all adapters of one rank.  A traced index that the
    bank does not have writes nothing.

    Args:
      bank: as `stack` gives it.
      i: () an integer, which may be traced.
      adapter: of the same base.  Its rank is the bank's at most.  A path that it does
        not have is the base there.

    Raises:
      ValueError: no bank; a slot that it does not have; an adapter of another model; a
        path that the bank does not have; a rank above the bank's.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((3, 4))}
      >>> new = jlora.adapter(jlora.wrap(params, rank=2, alpha=8))
      >>> bank = jlora.stack([jlora.adapter(jlora.wrap(params, rank=4))] * 3)
      >>> bank = jax.jit(jlora.put, donate_argnums=0)(bank, 1, new)
      >>> bank["kernel"].scale.tolist()
      [1.0, 4.0, 1.0]
    """
    n = require_bank(bank, "put")
    i = _index(i, n, "put", 0)
    _require_one(adapter, "put: the adapter")
    if extra := [path for path in adapter if path not in bank]:
        raise ValueError(
            f"put: the adapter has {extra[0]!r}, which the bank has not; near paths: "
            f"{paths.near(extra[0], bank)}. Stack the adapters anew, with this one."
        )
    if any(isinstance(x, LoRA) and x.dropout is not None for x in bank.values()):
        raise ValueError(
            "put: the bank has dropout keys: expected one without. Call jlora.dropout "
            "inside the loss."
        )
    like = one_slot(bank)
    for path, x in adapter.items():
        with _at(f"put: {path!r}"):
            _require_room(like[path], _common(like[path], _struct(x)))
    slot = _slot(adapter, like)
    new = jax.tree.map(lambda x, y: _written(x, i, y), dict(bank), slot)
    return Bank(new, bank.ndims)


def _written(x: Any, i: jax.Array, y: jax.Array) -> jax.Array:
    """x with y at i, sharded as x is; x itself if it has no such slot."""
    x = jnp.asarray(x)

    def write(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        at = jnp.where(i < 0, len(x), i)  # a negative one would count from the end
        return x.at[at].set(y, mode="drop")

    return automatic(write, lambda: jax.typeof(x).sharding, x, i, y)


def require_bank(bank: Any, what: str) -> int:
    """The number of slots; raises ValueError if it is no bank."""
    n = slots_of(bank)
    own = bank.items() if isinstance(bank, Bank) and n is None else ()
    if halves := [path for path, x in own if fields.lacking(x)]:
        raise ValueError(
            f"{what}: the bank has {halves[0]!r} without "
            f"{', '.join(fields.lacking(bank[halves[0]]))}: expected a whole one. "
            "Combine the halves of the partition: jlora.combine(trainable, frozen)."
        )
    if n is None:
        found = "one adapter" if isinstance(bank, Mapping) else type(bank).__name__
        raise ValueError(
            f"{what}: expected a bank of adapters, found {found}: "
            "jlora.stack([adapter, ...]) makes one."
        )
    return n


def _require_one(adapter: Any, what: str) -> None:
    """Raises unless it is an adapter, whose base was not dropped."""
    refuse_bank(adapter, what)
    if not isinstance(adapter, Mapping) or not all(map(is_adapted, adapter.values())):
        found = f"a {type(adapter).__name__}"
        found = "an adapted tree" if by_path.has_adapted(adapter) else found
        raise ValueError(
            f"{what} is {found}: expected what jlora.adapter(tree) gives, a flat dict "
            "from path to adapted leaf."
        )
    for path, x in adapter.items():
        if base.is_zero(x.w):
            raise ValueError(
                f"{what} has {path!r} without a base, which was dropped: it is a whole "
                "model, and shares no base with others."
            )
        if lacks := fields.lacking(x):
            raise ValueError(
                f"{what} has {path!r} without {', '.join(lacks)}: expected a whole "
                "adapter; if it is half of a partition, combine it first."
            )


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Says where a leaf is that does not fit."""
    try:
        yield
    except Misfit as e:
        raise ValueError(f"{where}: expected {e}.") from None


def _struct(leaf: Any) -> Any:
    """Its arrays' shapes and dtypes, without a base; and with what a slot has."""
    leaf = jax.eval_shape(lambda: fields.bare(leaf))
    if isinstance(leaf, Full):
        return dataclasses.replace(leaf, on=jax.ShapeDtypeStruct((), jnp.float32))
    return leaf


def _common(one: Any, other: Any) -> Any:
    """The shapes and dtypes of slots that can hold both.

    Raises:
      Misfit: nothing can.
    """
    if type(one) is not type(other):
        kinds = [
            "a whole array" if isinstance(x, Full) else "factors" for x in (one, other)
        ]
        raise Misfit(f"{kinds[0]} that train, as in the others, found {kinds[1]}")
    if one.shape != other.shape or one.axes != other.axes:
        raise Misfit(
            f"a weight of shape {one.shape} with the roles {one.axes!r}, as in the "
            f"others, found {other.shape} with {other.axes!r}: it is of another model"
        )
    if one.form != other.form:
        raise Misfit(f"the form {one.form}, as in the others, found {other.form}")
    if isinstance(one, LoRA):
        if str(one.moved) != str(other.moved):
            how = str(one.moved) or str(other.moved)
            raise Misfit(
                f"one base for all: {how!r} has moved a part of it into the factors of "
                "some. jlora.mix([trained, start], [1, -1]) makes an adapter of the "
                "original base"
            )
        if (one.m is None) != (other.m is None):
            raise Misfit(
                "a magnitude (DoRA) in all of them or in none, since without one a "
                "weight has no norm of its own"
            )
        if one.form is not None and one.rank != other.rank:
            raise Misfit(
                f"rank {one.rank}, as in the others, for the form {one.form}, whose "
                f"factors are not filled up, found {other.rank}"
            )
    new = {}
    for name in fields.stored(one) + fields.stored(other):
        pair = [x for x in (getattr(one, name), getattr(other, name)) if x is not None]
        dtype = functools.reduce(jnp.promote_types, [x.dtype for x in pair])
        shape = tuple(map(max, *[x.shape for x in pair])) if pair[1:] else pair[0].shape
        new[name] = jax.ShapeDtypeStruct(shape, dtype)
    return dataclasses.replace(one, **new)


def _require_room(bank: Any, both: Any) -> None:
    """Raises Misfit if a slot of the bank is not one that can hold both."""
    for name in fields.stored(both):
        has, needs = getattr(bank, name), getattr(both, name)
        if has is None:
            raise Misfit(f"no {name}, which the bank has not for this path")
        if has.shape != needs.shape:
            raise Misfit(
                f"a rank of at most {bank.rank}, which the bank has, found {both.rank}"
            )


def _slot(adapter: Mapping[str, Any], like: Mapping[str, Any]) -> Any:
    """An adapter's arrays as a slot has them; zeros where it has none."""

    def one(path: str, want: Any) -> Any:
        leaf = adapter.get(path)
        new = {}
        for name in fields.stored(want):
            to = getattr(want, name)
            x = None if leaf is None else getattr(leaf, name)
            if name == "on":
                x = jnp.asarray(float(leaf is not None) if x is None else x)
            elif x is None:  # a magnitude of one, with a scale of zero, is none
                x = jnp.ones(to.shape) if name == "m" else jnp.zeros(to.shape)
            if x.shape != to.shape:  # a lower rank
                more = [(0, n - m) for n, m in zip(to.shape, x.shape, strict=True)]
                x = jnp.pad(x, more)
            new[name] = x.astype(to.dtype)
        return dataclasses.replace(want, **new)

    return {path: one(path, want) for path, want in like.items()}
