"""An adapter in torch's own names: leaves by tensor, for arithmetic without a model.

`leaves` makes a jlora adapter of a directory, with the names of torch's tensors for
paths and (in, out) for every weight; `names_of` has the names with which `save` writes
it, or one that came from it, again.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jlora._adapter import Adapter as Leaves
from jlora._leaf import Full, LoRA, Note
from jlora._leaf.forms import Rows
from jlora.peft.modules import Adapter, Module
from jlora.peft.names import Names, Part
from jlora.peft.order import Order

_KINDS = {"linear": "dense", "embedding": "embed", "conv": "conv", "experts": "dense"}


def leaves(adapter: Adapter) -> Leaves:
    """The leaves of an adapter's directory, by the names of torch's tensors."""
    out: Leaves = {t: _leaf(m) for t, m in adapter.modules.items()}
    for tensor, x in adapter.whole.items():
        out[tensor] = Full(None, jnp.array(x))
    for tensor, (indices, values) in adapter.rows.items():
        form, one = Rows(indices, max(indices) + 1), jnp.ones(())
        rows = jnp.array(values)
        out[tensor] = LoRA(
            None, None, rows, one, roles="io", form=form, layer=Note("embed")
        )
    return out


def _leaf(module: Module) -> LoRA:
    batch = module.a.shape[:-2]
    kind = _KINDS[module.kind]
    return LoRA(
        None,
        jnp.array(module.a),
        jnp.array(module.b),
        jnp.full(batch, module.scale, jnp.float32),
        None if module.c is None else jnp.array(module.c),
        None if module.m is None else jnp.array(module.m),
        roles="io",
        layer=Note(f"{kind}/{module.groups}" if module.groups > 1 else kind),
    )


def names_of(adapter: Adapter) -> Names:
    """The names of these leaves: each is the tensor that it is called after."""
    found, shapes = {}, {}
    for tensor, m in adapter.modules.items():
        rows, columns = m.a.shape[-2], m.b.shape[-1]
        axes = {"embedding": "io", "experts": "boi"}.get(m.kind, "oi")
        axes += "i" * len(m.kernel)
        shapes[tensor] = _shape(m, rows, columns)
        own = _whole(rows, columns)
        items = [(k,) for k in range(len(m.a))] if m.kind == "experts" else [()]
        found[tensor] = tuple(
            Part(
                tensor,
                axes,
                "bio" if item else "io",
                _KINDS[m.kind],
                item,
                item,
                *own,
                m.groups,
            )
            for item in items
        )
    for tensor, x in adapter.whole.items():
        shapes[tensor], axes = x.shape, "o" * x.ndim
        own = _whole(1, x.size)
        found[tensor] = (Part(tensor, axes, axes, "vector", (), (), *own),)
    for tensor, (indices, values) in adapter.rows.items():
        own = _whole(max(indices) + 1, values.shape[1])
        found[tensor] = (Part(tensor, "io", "io", "embed", (), (), *own),)
    return Names(found, tensors=shapes)


def _shape(m: Module, rows: int, columns: int) -> tuple[int, ...]:
    if m.kind == "embedding":
        return rows, columns
    if m.kind == "experts":
        return len(m.a), columns, rows
    return columns, rows // int(np.prod(m.kernel or (1,))), *m.kernel


def _whole(rows: int, columns: int) -> tuple[Order, Order, Order, Order]:
    row, column = Order.all(rows), Order.all(columns)
    return row, column, row, column
