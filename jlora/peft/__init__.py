"""PEFT's adapter files, both ways, and which weight is which tensor of torch.

    names = jlora.peft.match(params, "path/of/the/base", plan=plan)
    jlora.peft.save("adapter", tree, names=names, portable=True)    # for vLLM
    tree = jlora.peft.load("community/adapter", params, names=names)

What comes in: adapted trees, and directories of ``adapter_config.json`` and
``adapter_model.safetensors``.  What goes out: the same, the other way round.

* `order`, `names`: which weight is which tensor.  `match` finds it by the values,
  with `sums` and `lines`; `given` reads what a user writes.
* `files`: safetensors, read with care.  `config` and `modules`: an adapter as peft has
  it.  **A kind of layer** that peft adapts is a kind in `modules`.
* `weights`: what is known of the arrays of a tree.  `to_torch`, `from_torch`: from
  leaves to modules, and back; `portable`: what every server takes.  `save`, `load`.
* `check`, with `servers`: **a rule of a server's loader** is a line there.
"""

from jlora.peft.check import Finding as Finding
from jlora.peft.check import Report as Report
from jlora.peft.check import check as check
from jlora.peft.files import FormatError as FormatError
from jlora.peft.load import load as load
from jlora.peft.match import match as match
from jlora.peft.merge import merge as merge
from jlora.peft.names import Names as Names
from jlora.peft.names import Part as Part
from jlora.peft.order import Order as Order
from jlora.peft.save import save as save
