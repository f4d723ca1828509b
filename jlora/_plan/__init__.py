"""What is adapted, and with what.

* `spec`: `Rule` and `Spec`, the nouns; `plan`: `Plan`, a mapping from path to `Spec`.
* `names`: the roles that names and shapes tell.  **What a framework's module tells**
  of its weights goes beside it.
* `watch`: the roles that a traced function shows.  **A new primitive** is a function
  there if a plan should learn roles from it.
* `select`: the one place where patterns decide; `make`: `jlora.plan` itself.

In come params and perhaps a function; out goes a `Plan`.
"""
