"""jlora: low-rank adaptation (LoRA) for any JAX model, as pure functions on pytrees.

    lora  = jlora.wrap(params, rank=8)
    apply = jlora.lift(model.apply)
    tx    = jlora.optimizer(optax.adamw(1e-4), lora)
    ...
    params = jlora.merge(lora)

The submodules ``jlora.linen``, ``jlora.nnx``, ``jlora.loralib``, ``jlora.schedules``
and ``jlora.checkpoint`` are imported by name.
"""

from jlora._fade import drop_base as drop_base
from jlora._fade import fade as fade
from jlora._leaf import Full as Full
from jlora._leaf import LoRA as LoRA
from jlora._leaf import is_adapted as is_adapted
from jlora._lift import Entry as Entry
from jlora._lift import Report as Report
from jlora._lift import explain as explain
from jlora._lift import lift as lift
from jlora._optim import optimizer as optimizer
from jlora._plan import Plan as Plan
from jlora._plan import Rule as Rule
from jlora._plan import Spec as Spec
from jlora._plan import plan as plan
from jlora._sharding import shardings as shardings
from jlora._summary import count as count
from jlora._summary import summary as summary
from jlora._training import combine as combine
from jlora._training import dropout as dropout
from jlora._training import labels as labels
from jlora._training import partition as partition
from jlora._training import scaled as scaled
from jlora._tree import adapter as adapter
from jlora._tree import attach as attach
from jlora._tree import merge as merge
from jlora._tree import unmerge as unmerge
from jlora._tree import unwrap as unwrap
from jlora._wrap import wrap as wrap

__version__ = "0.1.0"
