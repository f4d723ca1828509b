"""What is adapted, and with what.

* `spec`: `Rule` and `Spec`: what a user asks for, and what one weight gets.
* `plan`: the class `Plan`, a mapping from path to `Spec`.
* `select`: applies a user's patterns and rules to the weights that are known.
* `from_names`: weights and their roles by Flax's names and by shapes.  **Roles that a
  framework's module classes give** go in a new file beside it.
* `from_use`: the function `jlora.plan`: weights and their roles by watching a function.
  `watch` follows a weight through the function's jaxpr; **a new primitive from which
  roles can be learnt** gets a function there.

Params and perhaps a function come in, and a `Plan` goes out.
"""
