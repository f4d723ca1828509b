"""Evaluates a function some of whose arguments are adapted leaves.

* `evaluate`: evaluates a jaxpr, equation by equation, with the rule for each primitive.
* `rules`: what each primitive does with a leaf.  **A rule for a new primitive** is a
  function there under ``@rule("its_name")``, which calls `_algebra`.
* `control`: the same for loops, branches and calls of other jaxprs.
* `shared`: one product x·a for several weights that read the same activation.
* `lift`: `jlora.lift` and `jlora.explain`.  `report`: what `explain` returns.

A function and arguments with leaves come in; the function's result goes out.
"""
