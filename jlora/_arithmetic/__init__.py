"""Arithmetic on adapters as values: mix, truncate, extract, and their spectra.

* `factors`: a leaf's factors as stacks of matrices, and a leaf from these.
* `merging`: how several tensors become one, as PEFT has it.  **Another way** is a
  function there, with a line in its table.
* `mix`, `truncate`, `extract`, `spectrum`: one file for each public function.

Adapters come in, and an adapter goes out.  The delta is formed only by what is not
linear in it.
"""
