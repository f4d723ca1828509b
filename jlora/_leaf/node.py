"""Registers a class whose objects are nodes of a tree, with all that takes trees apart.

JAX flattens them.  `jax.export` writes the structure of a function's arguments.  **A
new class** of a leaf or a base calls `register`, and needs to know of neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import export

Static = Mapping[str, Any]


def register(
    cls: Any,
    data: Sequence[str],
    meta: Sequence[str] = (),
    *,
    document: Callable[[Static], Static] = dict,
    from_document: Callable[[Static], Static] = dict,
    own: bool = False,
) -> Any:
    """Registers a dataclass as a node of trees, and returns it.

    Args:
      cls: the class.
      data: the attributes that hold arrays, or nodes.
      meta: the static attributes.
      document: the static attributes, by name, as what JSON can have.
      from_document: the inverse of ``document``.
      own: whether the class is registered with `jax.tree_util` already; what it gives
        as static are then the values of ``meta``, in order.

    Example:
      >>> import dataclasses, functools
      >>> @functools.partial(register, data=["words"], meta=["bits"])
      ... @dataclasses.dataclass(frozen=True)
      ... class Words:
      ...     words: Any
      ...     bits: int
      >>> jax.tree.map(lambda x: x + 1, Words(2, bits=8))
      Words(words=3, bits=8)
    """
    if not own:
        jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)

    def written(static: Any) -> bytes:
        return json.dumps(document(dict(zip(meta, static, strict=True)))).encode()

    def made(aux_data: Any, children: Any) -> Any:
        return cls(**dict(zip(data, children, strict=True)), **from_document(aux_data))

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__.partition('.')[0]}.{cls.__name__}",
        serialize_auxdata=written,
        deserialize_auxdata=lambda text: json.loads(bytes(text)),
        from_children=made,
    )
    return cls
