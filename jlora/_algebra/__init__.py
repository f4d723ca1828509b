"""The low-rank algebra: the uses of W + scale * a·b, without forming it.

The lift, the layers of `linen` and `nnx`, and `jlora.merge` have no other
implementation.

* `delta`: the delta a·b, and the merged weight.  **A variant of the weight**, such as
  DoRA, goes there; what it changes in every use goes into `use`.
* `rows`: the weight, the lookups and the products of a table whose rows are replaced.
* `structure`, `concatenate`: the leaf of a transposed, reshaped, sliced or concatenated
  weight.
* `dot`, `ragged`, `conv`, `gather`: the uses, one file for each; `use` is what they
  share.  **A use by a new primitive** is a new file beside them; its rule is in
  `_lift.rules`.

All of it is written with labels, which say which axis of the weight each axis is
(`_labels`).  A base is read through `_leaf.base`, a form through `_leaf.forms`.  An
operation that has no low-rank form raises `NotFactored`.
"""
