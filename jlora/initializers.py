"""Initialisers: how a and b start, and for some what becomes of the base.

An initialiser is a function (key, w, spec) -> (w, a, b): the leaf's own PRNG key, the
base and its `jlora.Spec` go in; the base and factors of the shapes
``spec.shapes(w.shape)`` come out.  Most return the base as they got it, the same
object.  One that moves a part of the base into the factors returns another one.

    jlora.wrap(params, init="kaiming")
    jlora.wrap(params, init=jlora.initializers.kaiming)
    jlora.wrap(params, init=my_own)
"""

from jlora._init.kaiming import kaiming as kaiming
