"""The low-rank algebra: the uses of W + scale * a·b, without forming it.

The lift, the layers of `linen` and `nnx`, and `jlora.merge` have no other
implementation.

* `delta`: the delta a·b, and the merged weight.  **A variant of the weight**, such as
  DoRA would be, goes there, and what it makes of a use to `use`.
* `structure`, `concatenate`: what a transpose, reshape or slice of a weight, or several
  weights in one, are as a leaf.
* `dot`, `ragged`, `conv`, `gather`: the uses, one file for each; `use` is what they
  share.  **A use by a new primitive** is a new file beside them; its rule is in
  `_lift.rules`.

All of it is written on labels, which say which axis of the weight each axis is
(`_labels`).  A base is read through `_leaf.base`, a form through `_leaf.forms`.  What
has no low-rank form raises `NotFactored`.
"""
