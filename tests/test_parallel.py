"""FSDP2 and DDP on the CPU, with gloo."""

import copy
import warnings

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from skiprnn import SAGRU, Recurrent
from skiprnn.model.policies import POLICIES

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch without gloo")


def network(policy):
    torch.manual_seed(1)
    options = {"p_skip": 0.6} if POLICIES[policy].draws else {}
    rnn = Recurrent("lstm", policy, 3, 6, 2, batch_first=True, **options)
    if policy == "skip":
        nn.init.constant_(rnn.policy.bias, -1.0)
    return rnn


def train(rnn, x, steps=3):
    """What SGD makes of the weights; a loss of the outputs and of the updates."""
    optimiser = torch.optim.SGD(rnn.parameters(), 0.01)
    for step in range(steps):
        torch.manual_seed(step)
        output, _, updates = rnn(x)
        (output.square().mean() + updates.mean()).backward()
        optimiser.step()
        optimiser.zero_grad()


def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def compare(rank, world_size, store, policies):
    """Each process trains on its share as one would on all; in one process or in one of several."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        for policy in policies:
            x = torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(2))
            alone = network(policy)
            train(alone, x)
            for parallel in (
                nn.parallel.DistributedDataParallel(network(policy)),
                fully_shard(network(policy), mesh=mesh),
            ):
                train(parallel, x.chunk(world_size)[rank])
                for (name, ours), theirs in zip(parallel.named_parameters(), alone.parameters(), strict=True):
                    torch.testing.assert_close(whole(ours), theirs, msg=lambda text, name=name: f"{name}: {text}")
    finally:
        distributed.destroy_process_group()


def test_one_process_trains_as_without():
    compare(0, 1, distributed.HashStore(), ["always", "skip", "selective", "random_steps"])


def compare_in_process(rank, file):
    compare(rank, 2, distributed.FileStore(file, 2), ["always", "skip", "selective"])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(compare_in_process, (str(tmp_path / "store"),), nprocs=2)


def test_parts_that_are_sharded_are_named():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        rnn = SAGRU(3, 6, 2)
        part = copy.deepcopy(rnn)
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(part.layers[1], mesh=mesh)
        fully_shard(rnn, mesh=mesh)
        with pytest.raises(ValueError, match="GRUCell are sharded: give fully_shard the whole network"):
            part(torch.zeros(4, 2, 3))
        with pytest.raises(ValueError, match="GRUCell are sharded"):
            rnn.stream()
    finally:
        distributed.destroy_process_group()
