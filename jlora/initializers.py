"""Initialisers: how a and b start; some change the base, too.

An initialiser is a function (key, w, spec) -> (w, a, b).  It takes the leaf's PRNG key,
the base and its `jlora.Spec`.  It returns the base, and factors of the shapes
``spec.shapes(w.shape)``.  Most return the same base object.  One that moves a part of
the base into the factors returns another base.

    jlora.wrap(params, init="kaiming")
    jlora.wrap(params, init="pissa_niter_4")
    jlora.wrap(params, init=jlora.initializers.pissa(4))
    jlora.wrap(params, rules=[jlora.Rule("**/query/kernel", init="olora")])
    jlora.wrap(params, init=my_own)
"""

from jlora._init.eva import eva as eva
from jlora._init.kaiming import kaiming as kaiming
from jlora._init.loftq import loftq as loftq
from jlora._init.principal import olora as olora
from jlora._init.principal import pissa as pissa
from jlora._init.random import gaussian as gaussian
from jlora._init.random import orthogonal as orthogonal
