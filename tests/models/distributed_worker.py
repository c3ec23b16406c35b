"""One of two gloo ranks; started by test_model_distributed.py as `python distributed_worker.py RANK STORE OUT`."""

import datetime
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers import loss_and_gradients, random_ids, strong_model
from hici.models.tiled_mlp import tile_mlp

CASES = {
    "past": {"visibility": "past"},
    "all": {"visibility": "all"},
    "one-segment-past": {"visibility": "past", "num_segments": 1},
    "no-slots": {"use_global": False, "use_local": False},
    "no-global": {"use_global": False},
}
FSDP_CASES = ("past", "all", "no-slots")
DDP_CASES = ("past", "one-segment-past", "no-slots", "no-global")
TILED = ("fsdp-tiled", "ddp-tiled", "fsdp-tiled-checkpointed", "ddp-tiled-checkpointed")
RUNS = [("fsdp", case) for case in FSDP_CASES] + [("ddp", case) for case in DDP_CASES]
RUNS += [(task, "past") for task in TILED]
IDS = random_ids(2, 29)


def build(case):
    return strong_model("qwen3" if case == "all" else "llama", check=False, **CASES[case]).train()


def prepare(case, task):
    """The model of a case, with its MLPs in tiles of 8 tokens and checkpointed where the task's name says so."""
    model = build(case)
    if "tiled" in task:
        tile_mlp(model, 8)
    if "checkpointed" in task:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def fsdp(model, rank):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, gradients = loss_and_gradients(model, IDS[rank : rank + 1])
    gradients = {name: g if g is None else g.full_tensor() for name, g in gradients.items()}
    return loss, gradients


def ddp(model, rank):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):  # an unused parameter is an error of the next forward
        model.zero_grad(set_to_none=True)
        loss = wrapped(IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def main():
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    results = {}
    for task, case in RUNS:
        loss, gradients = {"fsdp": fsdp, "ddp": ddp}[task.split("-")[0]](prepare(case, task), rank)
        dist.all_reduce(loss)
        results[task, case] = (loss / 2, gradients)
    if rank == 0:
        torch.save(results, out)
    dist.barrier()
    gc.collect()  # DDP wrappers are reference cycles, and each keeps the process group's threads alive
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Not through the interpreter's own end: a gloo thread that is still joinable there aborts the process
    # ("terminate called without an active exception", 2 of 20 runs before the two lines above and this one).
    # An exception in main() never gets here, and leaves with its traceback and code 1.
    sys.stdout.flush()
    os._exit(0)
