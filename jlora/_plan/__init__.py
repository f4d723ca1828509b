"""What is adapted, and with what.

* `spec`: `Rule` and `Spec`: what a user asks for, and what one weight gets.
* `plan`: the class `Plan`, a mapping from path to `Spec`.
* `select`: applies a user's patterns and rules to the weights that are known.
* `from_tree`: the plan of `wrap` without a plan.  It asks `from_layers` for the roles
  that classes of layers give, **where a new framework's classes go**, and `names` for
  those that names and the shapes of biases show.
* `from_use`: the function `jlora.plan`: weights and their roles by watching a function.
  `watch` follows a weight through the function's jaxpr: `seen` is what it knows, `walk`
  the walk.  **A new primitive from which roles can be learnt** gets a function in
  `uses`; one that only moves a weight's axes, in `moves`.  `roles` makes one string of
  all uses.

Params and perhaps a function come in, and a `Plan` goes out.
"""
