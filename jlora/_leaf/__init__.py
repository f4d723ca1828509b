"""What stands where an array stood: the adapted leaves, and what they are made of.

* `node`: registers a class with all that takes trees apart.
* `base`: what ``w`` can be: an array, or an object that makes one for each use.  **A
  new kind of base** is a subclass of `base.Base` in a new file of this folder.
* `quantized`: a quantised array as a base.
* `forms`: how the factors a and b make a·b: a plain pair, or loralib's blocks and
  kernels.  **Another factorisation** is a new class there.  DoRA changes the weight and
  not the factors, so it would not be a form: see `_algebra`.
* `fields`: the table of a, b, scale and all other fields: which of the weight's axes
  each has, whether it trains, whether an adapter keeps it.  **A new field** is a line
  there, and an attribute in `leaf`.
* `leaf`: `LoRA` and `Full`, the classes.

Arrays come in, and a pytree goes out.  All other folders use this one; it uses none of
them.
"""

from jlora._leaf import quantized as quantized
from jlora._leaf.leaf import Adapted as Adapted
from jlora._leaf.leaf import Bare as Bare
from jlora._leaf.leaf import Dropout as Dropout
from jlora._leaf.leaf import Full as Full
from jlora._leaf.leaf import LoRA as LoRA
from jlora._leaf.leaf import Told as Told
from jlora._leaf.leaf import is_adapted as is_adapted
from jlora._leaf.leaf import is_leaf as is_leaf
from jlora._leaf.node import Note as Note
