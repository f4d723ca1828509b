"""Evaluation: a function of params also reads adapted leaves.

* `evaluate`: a jaxpr is evaluated, equation by equation; `RULES` by primitive.
* `shared`: x·a of several weights that meet one activation, as one product.
* `rules`, `control`: what each primitive does with a leaf; loops and calls.  **A rule
  for a new primitive** is a function there, over the algebra of `_algebra`.
* `lift`, `report`: `jlora.lift` and `jlora.explain`.

In comes a function, and arguments with leaves in them; out goes what it returns.
"""
