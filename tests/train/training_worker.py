"""One of several gloo processes that train; started by test_train_distributed.py as `training_worker.py CASES`.

CASES is a JSON file: {"out": file, "cases": [{"name", "engine", "values", "resume_from", "nan"}, ...]}. The launcher's
environment variables (RANK, ...) are set. What is compared goes to "out", by case, from the first process.
"""

import contextlib
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # fmt: skip


def run_case(values, *, resume=False):
    """Train; (train.json's values, whole gradients after clipping of every step, how parameters were held).

    In one process as in several.
    """
    import hici.train.run as module
    from hici.train.recipe import recipe_from_dict
    from hici.train.state import trained, whole
    from hici.train.trainer import HiCITrainer

    gradients, kinds = [], set()
    original, picture = HiCITrainer.create_optimizer, module.plot_training

    def create_optimizer(trainer, *args, **kwargs):
        optimizer = original(trainer, *args, **kwargs)

        def keep(*_):
            gradients.append({name: whole(parameter.grad) for name, parameter in trained(trainer.model)})
            kinds.add(type(trainer.model_wrapped).__name__)
            kinds.update(type(parameter).__name__ for _, parameter in trained(trainer.model))

        optimizer.register_step_pre_hook(keep)
        return optimizer

    HiCITrainer.create_optimizer, module.plot_training = create_optimizer, lambda steps, target: target
    try:
        result = module.train(recipe_from_dict(values), resume=resume, progress=False)
    finally:
        HiCITrainer.create_optimizer, module.plot_training = original, picture
    return {"result": result, "gradients": gradients, "kinds": sorted(kinds)}


@contextlib.contextmanager
def nan_on_the_last_process(step):
    """Its loss is NaN in that optimizer step (from 0)."""
    from hici.train.trainer import HiCITrainer

    original = HiCITrainer.compute_loss

    def compute_loss(trainer, *args, **kwargs):
        loss = original(trainer, *args, **kwargs)
        bad = trainer.state.global_step == step and dist.get_rank() == dist.get_world_size() - 1
        return loss * float("nan") if bad else loss

    HiCITrainer.compute_loss = compute_loss
    try:
        yield
    finally:
        HiCITrainer.compute_loss = original


def run_in_several(case):
    """One case on an engine of its own."""
    from accelerate.state import AcceleratorState, GradientState

    for name in FSDP2:
        os.environ.pop(name, None)
    if case["engine"] == "fsdp":
        os.environ.update(FSDP2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if case.get("resume_from"):
        if dist.get_rank() == 0:
            source = Path(case["resume_from"])
            shutil.copytree(source, Path(case["values"]["output_dir"]) / "checkpoints" / source.name)
        dist.barrier()
    context = contextlib.nullcontext() if case.get("nan") is None else nan_on_the_last_process(case["nan"])
    try:
        with context:
            return run_case(case["values"], resume=bool(case.get("resume_from")))
    except ValueError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    results = {}
    for case in job["cases"]:
        found = run_in_several(case)
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, found.get("error"))
        results[case["name"]] = {**found, "errors": errors}
    if dist.get_rank() == 0:
        torch.save(results, job["out"])
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread that is still joinable aborts the interpreter's own end
