"""What stands where an array stood: the adapted leaves, and what they are made of.

* `base`: what ``w`` can be.  **A new kind of base**, such as a quantised array, is a
  subclass of `base.Base` in a file of its own.
* `forms`: how a and b make the delta.  **Another factorisation** is a class there.
* `fields`: the table of which axes each field has.  **A new field** is a line there.
* `leaf`: `LoRA` and `Full`.

In come arrays; out goes a pytree.  Everything below may call this package; what a
weight's uses become is in `_algebra`.
"""

from jlora._leaf.leaf import Adapted as Adapted
from jlora._leaf.leaf import Dropout as Dropout
from jlora._leaf.leaf import Full as Full
from jlora._leaf.leaf import LoRA as LoRA
from jlora._leaf.leaf import is_adapted as is_adapted
from jlora._leaf.leaf import is_leaf as is_leaf
