"""What a walk over a jaxpr knows of its values, and what it saw of a weight.

A value's info is

* a `Weight`: it holds a parameter, or a reshaped, sliced or concatenated one.  Each of
  its axes knows the axis of the parameter that it came from;
* a `Product`: it is the product of a weight;
* `Data`: it depends on an input that is no parameter;
* None: nothing is known, as of a constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

# Which axes of the parameter an axis came from: several after a reshape joined them.
Origin = frozenset[int]
NONE: Origin = frozenset()


@dataclasses.dataclass
class Use:
    """One use of a weight: the primitive, and the roles that it gives to the axes.

    Attributes:
      primitive: its name.
      roles: role by axis of the parameter.
      rows: of a lookup, the first use of the rows that it took out, if they were used
        as a weight: a matrix for each token, from a stack of matrices.
      through: the first primitive without a low-rank form that the weight went through
        before this use, such as the maximum of a clip.
      mixed: the paths of the arrays of its own shape that the weight was multiplied by
        before this use.  Any of them may be the weight, and the others its mask.
      groups: a convolution's number of groups.
      decoded: whether it reads floating-point numbers that were multiplied or divided
        by others before, as of codes that the function dequantises.
    """

    primitive: str
    roles: dict[int, str]
    rows: Use | None = None
    through: str | None = None
    mixed: tuple[str, ...] = ()
    groups: int = 1
    decoded: bool = False

    def resolved(self) -> Use:
        """The use of the rows if they were matrices: the weight is a stack of them."""
        rows = self.rows
        if rows is None or not {"i", "o"} <= {*rows.roles.values()}:
            return self
        roles = dict.fromkeys(self.roles, "b") | rows.roles
        return dataclasses.replace(rows, roles=roles)


@dataclasses.dataclass
class Seen:
    """All that was seen of one array.

    Attributes:
      uses: its uses as a weight, in order.
      bias: the path of the array that was added to its product.
      of: the paths of the weights whose bias this array is.
      after: the paths of the weights that were used before this array was added to
        something.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    bias: str | None = None
    of: set[str] = dataclasses.field(default_factory=set)
    after: frozenset[str] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether it is no weight: only lookups use it, as in a stack of biases."""
        lookups = "gather", "dynamic_slice"
        return all(use.primitive in lookups for use in self.uses)

    def may_be_bias_of(self, path: str) -> bool:
        """Whether it may be the bias of a weight whose product the walk lost.

        It was added to something after the weight was used, and it is not known as the
        bias of another weight.
        """
        return path in self.after and self.of <= {path}


# The origin of each axis of a value.
Axes = tuple[Origin, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that holds parameters, or parts of them.

    Rows that a lookup took out may be weights (experts) or the result of the lookup
    (words).  Their next use decides.

    Attributes:
      parts: (path, axes) of each parameter; several after a concatenation.
      gathers: if the value is such rows, the lookup's `Use` for each part.
      through: as in `Use`.
      mixed: whether the parts are the factors of a product of numbers, as of a weight
        and its mask, and not a concatenation.
      perhaps: whether the value was multiplied by data of its own shape.  Then it is a
        weight if it meets data in a product, and data if it meets a weight.
      scaled: whether it was multiplied or divided by numbers.
    """

    parts: tuple[tuple[str, Axes], ...]
    gathers: tuple[Use, ...] = ()
    through: str | None = None
    mixed: bool = False
    perhaps: bool = False
    scaled: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each part."""
        return tuple(path for path, _ in self.parts)

    def move(self, fn: Callable[[Axes], Sequence[Origin]]) -> Weight:
        """The weight with fn(axes) as the axes of each part."""
        parts = tuple((path, tuple(fn(axes))) for path, axes in self.parts)
        return dataclasses.replace(self, parts=parts)

    def as_product(self, shape: tuple[int, ...]) -> Product:
        """What rows are if they are the result of a lookup."""
        # The other axes are those of the indices.
        _, axes = self.parts[0]
        size = math.prod(n for n, origin in zip(shape, axes, strict=True) if origin)
        return Product(self.paths, size)


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of a weight, until something is added to it.

    Attributes:
      paths: the paths of the weights; several after a concatenation.
      size: the number of elements along the out axes, which a bias has, too.
    """

    paths: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Data:
    """The info of a value that depends on an input that is no parameter.

    Attributes:
      axes: the axes along which it may vary; None for all.  A scale that is broadcast
        to the shape of a weight varies along few.
    """

    axes: frozenset[int] | None = None


DATA = Data()
