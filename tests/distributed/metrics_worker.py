"""Metrics and the end table on two processes against one that sees everything; exit codes say whether they agree."""

import math

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchmetrics import MetricCollection

from lightning_step import STEP, AtStep, NMPattern, Sparsifier
from lightning_step.functional import apply_mask, magnitude_mask
from lightning_step.metrics import Density, FlipRate, KeptMagnitude, NMCompliance
from lightning_step.outcome import sheet_of_outcome

PATTERN = NMPattern(2, 4)


def collection(**arguments):
    metrics = [Density, NMCompliance, FlipRate, KeptMagnitude]
    return MetricCollection([metric(**arguments) for metric in metrics], compute_groups=False)


def tensors(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    latent, earlier = torch.randn(rows, 8, generator=generator), torch.randn(rows, 8, generator=generator)
    masks = [magnitude_mask(t, PATTERN, 1) for t in (latent, earlier)]
    weight = apply_mask(latent, masks[0]) if seed % 2 else latent
    return {"latent": latent, "weight": weight, "mask": masks[0], "before": masks[1]}


def alone(*batches):
    metrics = collection(distributed_available_fn=lambda: False)
    for batch in batches:
        metrics.update(**batch)
    return {name: value.item() for name, value in metrics.compute().items()}


def check(metrics, want):
    got = {name: value.item() for name, value in metrics.compute().items()}
    assert all(math.isclose(got[name], want[name], rel_tol=1e-12) for name in want), (got, want)


def sharded(batch, mesh, placement):
    return {name: distribute_tensor(tensor, mesh, [placement]) for name, tensor in batch.items()}


def end_table(sharded):
    """Of a short run on the same batches everywhere; the second layer is never cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3))
    if sharded:
        fully_shard(model[0])
        fully_shard(model[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    reduce = {} if sharded else {"reduce": torch.clone}
    sparsifier = Sparsifier(model, optimizer, 1, 2, recipe=STEP(AtStep(2)), measure_every=1, **reduce)
    for _ in range(5):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sheet = sheet_of_outcome([sparsifier])
    # Without the kind of layer: fully_shard makes an FSDPLinear of a Linear.
    return sheet.head, [row[:1] + row[2:] for row in sheet.sections[0].rows], sheet.foot


def main():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    odd, even, small = tensors(1, 6), tensors(2, 5), tensors(3, 1)

    replicas = collection()
    for batch in (odd, even):
        replicas.update(**batch)
    check(replicas, alone(odd, even))

    different = collection(sync_on_compute=True)
    different.update(**(odd, even)[rank])
    check(different, alone(odd, even))
    different.reset()
    different.update(**tensors(5 + rank, 4))
    check(different, alone(tensors(5, 4), tensors(6, 4)))

    # One process alone has seen something; torchmetrics warns on the other.
    lazy = collection()
    if rank == 0:
        lazy.update(**odd)
    check(lazy, alone(odd))

    # Shards next to copies, as under FSDP2: 6 and 1 rows give parts of 3 and 3, of 1 and 0.
    parts = collection()
    for batch, placement in ((odd, Shard(0)), (even, None), (small, Shard(0)), (tensors(7, 4), Replicate())):
        parts.update(**(batch if placement is None else sharded(batch, mesh, placement)))
    check(parts, alone(odd, even, small, tensors(7, 4)))

    # What one batch gives is its own, and of all processes where that is asked for.
    own, both = collection(), collection(dist_sync_on_step=True)
    batch = (odd, even)[rank]
    for metrics, want in ((own, alone(batch)), (both, alone(odd, even))):
        values = metrics(**batch)
        assert all(math.isclose(values[name].item(), want[name], rel_tol=1e-12) for name in want), (values, want)

    # The end table counts shards, too.
    whole, cut = end_table(sharded=False), end_table(sharded=True)
    assert cut == whole, f"{cut}\n{whole}"
    assert whole[0] == "5 optimizer steps, masks on: 42 of 84 weights in 3 tensors are kept", whole
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
