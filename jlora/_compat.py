"""The only file that touches what differs between the JAX versions we support."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as core
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir
from jax.interpreters import partial_eval


def jaxpr_and_consts(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr in an equation's parameter, and the values of its constants.

    Up to JAX 0.11 a parameter holds a ClosedJaxpr or an open Jaxpr.  From 0.12 on
    there is one class, and its `.consts` may be empty.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def without_dead_code(jaxpr: Any) -> Any:
    """The closed jaxpr without equations whose results nobody reads."""
    body, consts = jaxpr_and_consts(jaxpr)
    live, _ = partial_eval.dce_jaxpr(body, [True] * len(body.outvars), True)
    return core.ClosedJaxpr(live, consts)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried.

    JAX 0.11 replaced `num_consts` and `num_carry` with a flat tree, `ft_in`.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def manual_axes(params: dict[str, Any]) -> frozenset[Any]:
    """The mesh axes that a shard_map makes manual; `manual_axes` before JAX 0.10.2."""
    name = "newly_manual_axes"
    return params[name] if name in params else params["manual_axes"]


def varying(x: Any) -> frozenset[Any]:
    """The manual mesh axes along which x may differ between devices."""
    return jax.typeof(x).manual_axis_type.varying


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding in a traced array's type; None if it has no explicit axes."""
    return explicit_only(jax.typeof(x).sharding)


def explicit_only(
    sharding: jax.sharding.NamedSharding,
) -> jax.sharding.NamedSharding | None:
    """The sharding itself; None if its mesh has no explicit axes."""
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def place(sharding: Any) -> Callable[[Any, Any], Any] | None:
    """The function that puts a traced array under this sharding.

    None if this is not a sharding: a jit has a placeholder for an unspecified one.
    Explicit axes of a mesh are part of an array's type, so they need `reshard`.
    """
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    if isinstance(sharding, jax.sharding.NamedSharding):
        if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
            return jax.sharding.reshard
    return jax.lax.with_sharding_constraint


def target_sharding(eqn: Any) -> Any:
    """The sharding that a constraint or a reshard asks for."""
    p = eqn.params
    return p["sharding"] if "sharding" in p else p["dst_sharding"]


def context(eqn: Any) -> contextlib.AbstractContextManager[Any]:
    """The context that an equation was traced in, with its name scope."""
    name, where = str(eqn.source_info.name_stack), eqn.ctx.manager
    return _named(name, where) if name else where


@contextlib.contextmanager
def _named(name: str, where: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with jax.named_scope(name), where:
        yield


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates one equation unchanged, in the context that it was traced in."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with context(eqn):
        out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def rebind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Binds a primitive that has several results to any number of operands."""
    with context(eqn):
        return list(eqn.primitive.bind(*args, **eqn.params))


@dataclasses.dataclass(frozen=True)
class _Operation:
    """A primitive with its parameters, as a function of its operands."""

    primitive: Any
    params: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        out = self.primitive.bind(*args, **dict(self.params))
        return out[0] if self.primitive.multiple_results else out


def operation(eqn: Any, params: dict[str, Any] | None = None) -> Callable[..., Any]:
    """An equation with one result, as a function of its operands.

    If the parameters are hashable, two equations that do the same give equal functions.
    JAX's trace cache then finds the first one's trace for the second.

    Args:
      eqn: the equation.
      params: parameters to use instead of the equation's.
    """
    params = eqn.params if params is None else params
    own = _Operation(eqn.primitive, tuple(params.items()))
    try:
        hash(own)
    except TypeError:  # a lambda is hashable, by its identity
        return lambda *args: own(*args)
    return own


def copied(x: Any) -> Any:
    """A copy of x.  Its gradients are summed first, then added once to those of x."""
    return core.primitives.copy_p.bind(x)


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a closed jaxpr on flat arguments."""
    nans, infs = jax.config.jax_debug_nans, jax.config.jax_debug_infs  # type: ignore[attr-defined]
    if nans or infs:
        with jax.debug_nans(False), jax.debug_infs(False):
            return _Search(nans, infs).evaluate(jaxpr, args)
    return core.jaxpr_as_fun(jaxpr)(*args)


@dataclasses.dataclass(frozen=True)
class _Search:
    """Evaluates a jaxpr, and raises where a NaN or an infinity is made, as eager code.

    JAX's own evaluation of a jaxpr does not look for NaN: functions such as jnp.var
    select between a number and a NaN on purpose, which a jaxpr does not tell.

    Attributes:
      nans: whether to look for NaN, as the user's jax_debug_nans has it.
      infs: whether to look for infinities, likewise.
    """

    nans: bool
    infs: bool

    def evaluate(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """Evaluates a closed jaxpr on flat arguments."""
        body, consts = jaxpr_and_consts(jaxpr)
        env = dict(zip(body.constvars, consts, strict=True))
        env.update(zip(body.invars, args, strict=True))
        on_purpose: set[Any] = set()
        for eqn in body.eqns:
            values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            outs = bind(eqn, values)
            given = [
                self._is_special(v) if isinstance(v, Literal) else v in on_purpose
                for v in eqn.invars
            ]
            name = eqn.primitive.name
            if given and all(given):
                on_purpose.update(eqn.outvars)
            elif not any(given) or name not in ("select_n", *JIT):
                if name in (*JIT, *REMAT) and self._found(outs):  # where in it?
                    self.evaluate(eqn.params["jaxpr"], values)
                self._require_none(outs, name)
            env.update(zip(eqn.outvars, outs, strict=True))
        outs = [v.val if isinstance(v, Literal) else env[v] for v in body.outvars]
        self._require_none(outs, "a lifted function")
        return outs

    def _is_special(self, v: Any) -> bool:
        if not jnp.issubdtype(v.aval.dtype, jnp.inexact):
            return False
        return bool(self.nans and np.isnan(v.val) or self.infs and np.isinf(v.val))

    def _require_none(self, xs: Sequence[Any], name: str) -> None:
        if kind := self._found(xs):
            raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")

    def _found(self, xs: Sequence[Any]) -> str:
        """The kind that one of these has, also where they are being differentiated."""
        xs = [x for x in xs if jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact)]
        for kind, look in (("nan", self.nans), ("inf", self.infs)):
            nans, infs = look and kind == "nan", look and kind == "inf"
            try:  # JAX looks at what a primitive gives
                with jax.debug_nans(nans), jax.debug_infs(infs):
                    for x in xs if look else ():
                        copied(x)
            except FloatingPointError:
                return kind
        return ""


def default_precision() -> Any:
    """The precision that is set here for products that name none."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def under_jit() -> bool:
    """Whether a jit is being traced.  Use it only to save time.

    The function is in jax.extend, but JAX does not promise that its answer is right.
    """
    return getattr(core, "unsafe_am_i_under_a_jit_DO_NOT_USE", lambda: False)()


Literal = core.Literal

# The names of primitives in the JAX versions that we support.
JIT = "jit", "pjit"
REMAT = "checkpoint", "remat2", "remat"
CALL = "closed_call", "core_call"
COPY = "copy", "copy_p"
ALL_GATHER = "all_gather", "all_gather_invariant"
VARY = "pvary", "pcast"
RESHARD = "sharding_constraint", "reshard"
