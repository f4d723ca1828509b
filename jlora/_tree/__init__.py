"""Between trees and leaves: names, frameworks, and where arrays live.

* `paths`, `patterns`, `leaves`: a leaf's path, how paths are chosen, leaves by path.
* `boxes`, `variables`: Linen's boxes with axis names, NNX's mutable variables.  What
  **another framework's trees** need goes beside them.
* `trace`: the jaxpr of a function that is called with arrays among other things.
* `sharding`, `output_bias`: where factors live; which layer's bias takes an adapter's.

In come a user's trees; out go leaves by path.  Nothing here computes with a weight.
"""
