"""The evaluation of a function some of whose arguments are adapted leaves.

* `evaluate`: evaluates a jaxpr, equation by equation, with the rule for each primitive.
* `rules`: what each primitive does with a leaf.  **A rule for a new primitive** is a
  function there under ``@rule("its_name")``, which calls `_algebra`.
* `control`: the same for loops, branches and calls of other jaxprs.
* `shared`: computes x·a of several weights that read one activation as one product.
* `lift`: `jlora.lift` and `jlora.explain`.  `report`: what `explain` returns.

In comes a function, and arguments with leaves in them; out goes what it returns.
"""
