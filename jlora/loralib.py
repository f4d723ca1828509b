"""loralib's own forms of an adapter, and its checkpoints (arXiv:2106.09685).

Its ``Linear`` and ``Embedding`` are this library's own form, transposed.  Two layers are
not: ``MergedLinear`` has factors of its own for each enabled slice of a fused weight
(`Blocks`), and ``ConvLoRA`` reshapes a product of matrices into a kernel (`Kernel`).

    rules = [jlora.Rule("**/qkv/kernel", form=Blocks((True, False, True)))]
"""

from jlora._leaf import Blocks as Blocks
from jlora._leaf import Kernel as Kernel
