"""Runs vLLM's own loader of adapters beside `jlora.peft.check`.

    pip download vllm==0.33.0 --no-deps
    python benchmarks/servers.py vllm-0.33.0-*.whl

Takes out of the wheel the two files that decide, vLLM's ``PEFTHelper`` and its parser
of keys, and nothing that needs a GPU.  Needs ``regex``.  Prints a line for each adapter
of the fixtures, as it is and saved with portable=True, and ends with an error where
vLLM and `check` disagree.
"""

import ast
import logging
import pathlib
import sys
import tempfile
import types
import warnings
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peft_torch  # noqa: E402
import test_peft_files as files  # noqa: E402
from safetensors import safe_open  # noqa: E402

import jlora  # noqa: E402
import jlora.peft  # noqa: E402


def loader(wheel):
    """(PEFTHelper, parse_fine_tuned_lora_name, is_base_embedding_weights) of vLLM."""
    with zipfile.ZipFile(wheel) as z:
        helper = z.read("vllm/lora/peft_helper.py").decode()
        utils = ast.parse(z.read("vllm/lora/utils.py").decode())
    log = logging.getLogger("vllm")
    log.info_once = log.info
    for name, own in {
        "vllm": {},
        "vllm.config": {},
        "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": lambda _: log},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(own)
    module = types.ModuleType("peft_helper")
    sys.modules["peft_helper"] = module
    exec(compile(helper, "peft_helper.py", "exec"), vars(module))
    wanted = "parse_fine_tuned_lora_name", "is_base_embedding_weights"
    body = [x for x in utils.body if getattr(x, "name", "") in wanted]
    scope = {"WeightsMapper": None}
    exec(compile(ast.Module(body, []), "utils.py", "exec"), scope)
    return module.PEFTHelper, *(scope[name] for name in wanted)


def vllm_says(own, where):
    """The reason for which vLLM refuses an adapter; empty if it does not."""
    helper, parse, is_table = own
    try:
        found = helper.from_local_dir(str(where), None)
        found.validate_legal(types.SimpleNamespace(max_lora_rank=512))
        with safe_open(where / "adapter_model.safetensors", "np") as f:
            for key in f.keys():
                if not is_table(key):
                    parse(key)
    except ValueError as e:
        return str(e)
    return ""


def main():
    own = loader(sys.argv[1])
    odd, counts = [], {}
    for model, case in peft_torch.CASES:
        layout = files.LAYOUTS[model][0]
        params, _, _, names = files.known(model, layout)
        where = peft_torch.FIXTURES / model / case
        pairs = [(f"{model}/{case}", where)]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = jlora.peft.load(where, params, names=names)
            try:
                new = pathlib.Path(folder) / "portable"
                jlora.peft.save(new, tree, names=names, portable=True)
                pairs.append((f"{model}/{case} portable", new))
            except ValueError as e:
                print(f"{model}/{case} portable: not written: {str(e)[:90]}")
            for name, place in pairs:
                report = jlora.peft.check(place, "vllm")
                ours = [f.what for f in report if f.level == "refused"]
                # What the model in vLLM has not, the loader does not know yet.
                late = "linear layers", "asserts that"
                ours = [w for w in ours if not any(x in w for x in late)]
                theirs = vllm_says(own, place)
                word = "refused" if theirs else "taken"
                print(f"{name}: vLLM: {word} {theirs[:70]!r}; check: {ours}")
                counts[word] = counts.get(word, 0) + 1
                if bool(theirs) != bool(ours):
                    odd.append(name)
    print(f"RESULT {counts} disagreements={odd}")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
