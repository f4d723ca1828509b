"""The low-rank algebra, the only place where it is written.

Every function takes a leaf whose weight is W = w + scale * a·b, and gives what the
operation of the same name gives on W without forming it.  The lift, the layers and
`merge` have no other implementation.

* `structure`, `concatenate`: a leaf in, a leaf out: transpose, reshape, slice, join.
* `merge`: the delta, and the merged weight.
* `use`: what all uses share; `dot`, `ragged`, `conv`, `gather`: one use each.

**A new primitive** gets its low-rank form here, and its rule in `_lift.rules`.  All is
written on labels (`_labels`); a base is read through `_leaf.base`, and a form through
`_leaf.forms`.  What has no low-rank form raises `NotFactored`.
"""
