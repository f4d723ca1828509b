"""jlora: low-rank adaptation (LoRA) for any JAX model, as pure functions on pytrees.

    lora  = jlora.wrap(params, rank=8)
    apply = jlora.lift(model.apply)
    tx    = jlora.optimizer(optax.adamw(1e-4), lora)
    ...
    params = jlora.merge(lora)

``jlora.initializers`` is imported with it.  Import the submodules ``jlora.linen`` and
``jlora.nnx`` (Flax layers that have an adapter of their own), ``jlora.loralib``
(PyTorch's loralib: its files and layers), ``jlora.peft`` (files of Hugging Face's
PEFT), ``jlora.schedules`` (for `fade`) and ``jlora.checkpoint`` by their names.

The words.  An *adapted leaf* stands in a params tree where an array stood.  Its *base*
is that array, frozen; its *factors* are a and b.  Each axis of a weight has a *role*:
in (contracted with the activation), out, or batch (stacked layers, experts).  A *plan*
says which paths are adapted, and with what.  To *lift* a function is to make it read
adapted leaves.  An *adapter* is a flat dict from path to adapted leaf without its base.

The house.  Each part imports only from the parts above it in this list:

* `_compat`: all that differs between JAX versions.  `_imported`: what is done once a
  user imports another library.  `_printed`: what is shown as a table.  `_product`: a
  product that fixes the order of operands in its gradient.  `_labels`: products of
  arrays whose axes have labels, like the letters of an einsum.
* `_leaf`: the adapted leaf.  `_algebra`: what the uses of a weight become.
* `_tree`: trees, paths and frameworks.  `_plan`: which weights, with which roles.
  `_init`: how factors start.  `_lift`: the evaluation of a function.
* One file for each group of public functions: `_adapter` (merge, unwrap, adapter,
  attach), `_wrap` (wrap: a plan, then a leaf for each planned path), `_training`
  (partition, labels, scaled, dropout), `_summary` (count, summary), `_pairs`
  (riemannian, lora_fa: gradients of both factors), `_optim` (optimizer), `_fade` (fade,
  drop_base: the base goes away while the adapter trains).
* `_bank` (stack, pick, put: many adapters of one base) and `_per_example`.
* `_qwix` (arrays quantised, with qwix) and `_quantize` (quantize, rounding).
* `_observe` (observe, redistribute: what enters each weight).
* `_arithmetic`: adapters as values: mix, truncate, extract, and their spectra.
* `checkpoint`; `linen`, `nnx`; `loralib`, with `_torch_file`, its reader of torch's
  files; `peft`.

Where a new thing goes:

* **a variant of the weight** (DoRA): its new field in `_leaf.fields` and `_leaf.leaf`,
  how it starts in `_init.make`, what it makes of the weight in `_algebra.delta`, what
  it makes of each use in `_algebra.use`, its option in `_plan.spec`;
* **a kind of base**: a new file beside ``_leaf/quantized.py`` with a subclass of
  `_leaf.base.Base`; no other file has to know of it;
* **another factorisation**: a class in `_leaf.forms`;
* **a rule for a primitive**: its low-rank form in `_algebra`, a function under
  ``@rule`` in `_lift.rules` (loops and calls: `_lift.control`), and one in
  `_plan.uses` if a plan should learn roles from it; without a rule the lift
  materialises the weight, with a warning;
* **what a checkpoint holds**: a field of the leaf is stored by its line in
  `_leaf.fields`; anything else goes to `checkpoint.document`;
* **a kind of layer that peft adapts**: in `peft.modules`, how it lies in the file;
  **a server's rule**: a line in `peft.servers`;
* **a framework's modules**: the roles that its classes give go to `_plan.from_layers`,
  which `wrap` asks if it gets no plan; what its trees need to a new file of `_tree`
  beside `boxes`; layers of our own to a file like `linen`;
* **an initialiser**: a new file of `_init` beside `kaiming`, and a line in
  `initializers`.
"""

from jlora import initializers as initializers
from jlora._adapter import adapter as adapter
from jlora._adapter import attach as attach
from jlora._adapter import merge as merge
from jlora._adapter import unmerge as unmerge
from jlora._adapter import unwrap as unwrap
from jlora._arithmetic.extract import extract as extract
from jlora._arithmetic.mix import mix as mix
from jlora._arithmetic.spectrum import Spectrum as Spectrum
from jlora._arithmetic.spectrum import spectrum as spectrum
from jlora._arithmetic.truncate import truncate as truncate
from jlora._bank import pick as pick
from jlora._bank import put as put
from jlora._bank import stack as stack
from jlora._fade import drop_base as drop_base
from jlora._fade import fade as fade
from jlora._leaf import Full as Full
from jlora._leaf import LoRA as LoRA
from jlora._leaf import is_adapted as is_adapted
from jlora._leaf.bank import Bank as Bank
from jlora._leaf.base import Dropped as Dropped
from jlora._lift.lift import explain as explain
from jlora._lift.lift import lift as lift
from jlora._lift.report import Entry as Entry
from jlora._lift.report import Report as Report
from jlora._observe import Moments as Moments
from jlora._observe import observe as observe
from jlora._observe import redistribute as redistribute
from jlora._optim import optimizer as optimizer
from jlora._pairs import lora_fa as lora_fa
from jlora._pairs import riemannian as riemannian
from jlora._per_example import per_example as per_example
from jlora._plan.from_use import plan as plan
from jlora._plan.plan import Plan as Plan
from jlora._plan.spec import Rule as Rule
from jlora._plan.spec import Spec as Spec
from jlora._quantize import Rounding as Rounding
from jlora._quantize import quantize as quantize
from jlora._quantize import rounding as rounding
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
