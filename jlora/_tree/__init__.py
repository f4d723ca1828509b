"""Between a user's trees and leaves: names, frameworks, and where arrays live.

* `paths`: the name of a leaf.  `patterns`: whether a pattern matches a name.
* `by_path`: the leaves of a tree with their paths, listed and mapped.
* `boxes`: Linen's boxes, which name the axes of arrays.  `variables`: NNX's mutable
  variables.  **What another framework's trees need** is a new file beside these two.
* `trace`: a user's function with its trees as arguments, as a jaxpr.
* `sharding`: on which devices factors live.
* `output_bias`: an adapter with an output bias adds it to the bias of the weight's
  layer; this finds that bias.

Trees come in, and leaves by path go out.  Nothing here computes with a weight.
"""
