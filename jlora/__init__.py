"""jlora: low-rank adaptation (LoRA) for any JAX model, as pure functions on pytrees.

    lora  = jlora.wrap(params, rank=8)
    apply = jlora.lift(model.apply)
    tx    = jlora.optimizer(optax.adamw(1e-4), lora)
    ...
    params = jlora.merge(lora)

The submodules ``jlora.linen``, ``jlora.nnx``, ``jlora.loralib``, ``jlora.schedules``
and ``jlora.checkpoint`` are imported by name.
"""

from jlora import initializers as initializers
from jlora._adapter import adapter as adapter
from jlora._adapter import attach as attach
from jlora._adapter import merge as merge
from jlora._adapter import unmerge as unmerge
from jlora._adapter import unwrap as unwrap
from jlora._fade import drop_base as drop_base
from jlora._fade import fade as fade
from jlora._leaf import Full as Full
from jlora._leaf import LoRA as LoRA
from jlora._leaf import is_adapted as is_adapted
from jlora._leaf.base import Dropped as Dropped
from jlora._lift.lift import explain as explain
from jlora._lift.lift import lift as lift
from jlora._lift.report import Entry as Entry
from jlora._lift.report import Report as Report
from jlora._optim import optimizer as optimizer
from jlora._plan.make import plan as plan
from jlora._plan.plan import Plan as Plan
from jlora._plan.spec import Rule as Rule
from jlora._plan.spec import Spec as Spec
from jlora._summary import count as count
from jlora._summary import summary as summary
from jlora._training import combine as combine
from jlora._training import dropout as dropout
from jlora._training import labels as labels
from jlora._training import partition as partition
from jlora._training import scaled as scaled
from jlora._tree.sharding import shardings as shardings
from jlora._wrap import wrap as wrap

__version__ = "0.1.0"
