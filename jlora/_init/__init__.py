"""How the factors of a new leaf start.

* `make`: an adapted leaf from a base and a `Spec`, its factors where the base is.
  **How a new field of the leaf starts** is decided there.
* `kaiming`: the default initialiser.  **Another initialiser** is a new file beside it,
  with a line in `jlora.initializers`.
* `keys`: PRNG keys, one for each path.

A base, a `Spec` and a key come in, and a leaf goes out.
"""
