"""How the factors of a new leaf start.

* `make`: an adapted leaf from a base and a `Spec`, its factors where the base is.
  **How a new field of the leaf starts** is decided there.
* `kaiming`, `random`, `principal`: the initialisers.  **Another one** is a new file
  beside them, with a line in `make.NAMED` and in `jlora.initializers`.
* `rows`: a leaf that replaces rows of a table.
* `keys`: PRNG keys, one for each path.

A base, a `Spec` and a key come in, and a leaf goes out.
"""
