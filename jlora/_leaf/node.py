"""What classes are made of whose objects are nodes of a tree, in place of arrays.

JAX flattens them.  `jax.export` writes the structure of a function's arguments.  Flax's
serialisation writes a tree as dicts.  **A new class** of a leaf or a base calls
`register`, and needs to know of none of them.  `NotAnArray` is its base class.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
from jax import export

from jlora._imported import when_imported

Static = Mapping[str, Any]


class Note(str):
    """A text on a leaf, any two of which are equal.

    So it does not decide whether two trees have the same structure.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


class NotAnArray:
    """Refuses every use as an array, with what to do instead.

    A subclass says what it is, and what to do, in ``_advice``.
    """

    _advice: ClassVar[str]

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self!r} {self._advice}.")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}; it {self._advice}.",
            name=name,
        )

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """The fields that are there, for notebooks in which treescope shows values."""
        from treescope import formatting_util, repr_lib  # it is there if it asks

        own: Any = self
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(own)}
        empty = {k for k, v in values.items() if v is None or isinstance(v, Note)}
        return repr_lib.render_object_constructor(
            object_type=type(self),
            attributes={k: v for k, v in values.items() if k not in empty},
            path=path,
            subtree_renderer=subtree_renderer,
            color=formatting_util.color_from_string(type(self).__name__),
        )

    __jax_array__ = __array__ = __array_ufunc__ = _refuse
    __getitem__ = __len__ = __iter__ = _refuse
    __float__ = __int__ = __index__ = __complex__ = _refuse


_OPERATORS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
for _name in _OPERATORS.split():
    setattr(NotAnArray, f"__{_name}__", NotAnArray._refuse)
    setattr(NotAnArray, f"__r{_name}__", NotAnArray._refuse)
for _name in "neg pos abs invert lt le gt ge round divmod rdivmod".split():
    setattr(NotAnArray, f"__{_name}__", NotAnArray._refuse)


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
    when_imported("flax.serialization", lambda flax: _with_flax(flax, cls, data))
    return cls


def _with_flax(flax: Any, cls: Any, data: Sequence[str]) -> None:
    """Registers a class with Flax's serialisation, as a dict of its data."""

    def to_state(x: Any) -> dict[str, Any]:
        own = {name: _words(getattr(x, name)) for name in data}
        return {name: flax.to_state_dict(y) for name, y in own.items()}

    def from_state(x: Any, state: Any) -> Any:
        at = flax.current_path().removeprefix("./")
        if not isinstance(state, Mapping) or (data and not {*data} & {*state}):
            raise ValueError(
                f"from_state_dict: {at!r} is {_brief(state)} in the state: expected "
                f"the fields of a {cls.__name__} ({', '.join(data)}), as the tree has "
                "it. The state of plain params is restored onto plain params, "
                "jlora.unwrap(tree); then put the adapter on them: "
                "jlora.attach(params, jlora.adapter(tree))."
            )
        new = {}
        for name in data:
            template, found = getattr(x, name), _keys(state.get(name))
            if not _fits(template, found):
                raise ValueError(
                    f"from_state_dict: {name} of {at!r} is {_brief(found)} in the "
                    f"state: expected {_brief(template)}, as the tree has it. Restore "
                    "onto a tree that was wrapped as the saved one."
                )
            new[name] = flax.from_state_dict(template, found, name=name)
        return dataclasses.replace(x, **new)

    flax.register_serialization_state(cls, to_state, from_state)


def _fits(template: Any, found: Any) -> bool:
    """Whether both are nothing, or both arrays of one shape; a node compares itself."""
    if template is None or found is None:
        return template is found
    if dataclasses.is_dataclass(template) or not hasattr(template, "shape"):
        return True
    return getattr(found, "shape", None) == template.shape


def _brief(x: Any) -> str:
    if x is None:
        return "nothing"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {tuple(x.shape)}"
    return f"a {type(x).__name__}"


def _words(x: Any) -> Any:
    """PRNG keys as what Flax can write; anything else unchanged."""
    if not jnp.issubdtype(getattr(x, "dtype", bool), jax.dtypes.prng_key):
        return x
    return {"words": jax.random.key_data(x), "impl": str(jax.random.key_impl(x))}


def _keys(x: Any) -> Any:
    """The inverse of `_words`."""
    if not isinstance(x, dict) or {*x} != {"words", "impl"}:
        return x
    return jax.random.wrap_key_data(jnp.asarray(x["words"]), impl=x["impl"])
