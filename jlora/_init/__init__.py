"""How the factors of a new leaf start.

* `keys`: PRNG keys, one of its own for each path.
* `kaiming`: the default.  **Another initialiser** is a function in a file beside it,
  public in `jlora.initializers`.
* `make`: an adapted leaf from a base and a `Spec`, its factors where the base is.

In come a base, a `Spec` and a key; out goes a leaf.
"""
