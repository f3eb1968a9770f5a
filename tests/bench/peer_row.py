"""Our row beside the peers: their workload's model, data and clock, our channel and our local training.

Started by mpiexec in a folder that has `task.py` on the path (the peers' benchmark), with PEER_WORKLOAD, PEER_ROUNDS
and PEER_OUT set. `train` is ten clients on a frozen two-layer BERT; `wire:D` sends vectors without training.
"""

import numpy as np

from fedprompt_mpi.comm.codec import FLOAT32
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.config import FederationConfig, RunConfig
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.server import Server
from fedprompt_mpi.federation.updates import HEADER, LocalUpdates, announce, gather
from fedprompt_mpi.start.launcher import read_launch


def make_trainer(clients: list[int]):
    """Return a function: global vector -> deltas `[k, P]` of these clients, all in one pass."""
    import task  # pyright: ignore[reportMissingImports] - the peers' own
    import torch

    from fedprompt_mpi.config import ClientConfig, PromptConfig
    from fedprompt_mpi.federation.client_training import Job, Trainer, train
    from fedprompt_mpi.plm.backbone import Backbone
    from fedprompt_mpi.plm.methods import SoftPrompt
    from fedprompt_mpi.text.batches import Batch

    torch.set_num_threads(1)
    data = [task.client_data(client) for client in clients]
    ids = np.concatenate([d[0].numpy() for d in data])
    labels = np.concatenate([d[1].numpy() for d in data])
    backbone = Backbone(task.model(), "masked", torch.tensor(task.LABEL_IDS), bf16=False)
    method = SoftPrompt(PromptConfig(num_virtual_tokens=task.PROMPT_LEN), backbone.geometry)
    config = ClientConfig(optimizer="sgd", lr=task.LR, clip_norm=None, batch_size=task.BATCH)
    steps = [np.arange(task.BATCH) + step * task.BATCH % task.N_SAMPLES for step in range(task.LOCAL_STEPS)]
    jobs = [Job(client=c, steps=[rows + k * task.N_SAMPLES for rows in steps]) for k, c in enumerate(clients)]

    def batch(rows: np.ndarray) -> Batch:
        return Batch(
            ids=ids[rows],
            mask=np.ones((len(rows), task.SEQ_LEN), dtype=bool),
            answers=np.full(len(rows), task.MASK_POS),
            labels=labels[rows],
        )

    trainer = Trainer(backbone=backbone, method=method, config=config, make_batch=batch)
    return lambda vector: train(trainer, vector, jobs).deltas


def main() -> None:
    """Run the workload's rounds."""
    channel = open_channel(read_launch())  # before torch is imported: ranks start MPI together
    import task  # pyright: ignore[reportMissingImports] - the peers' own

    _, size, rounds = task.workload()
    config = RunConfig(federation=FederationConfig(clients=task.N_CLIENTS))
    cohort = draw_cohort(config, channel.size, 1)
    clients = cohort.of_rank(channel.rank)
    trainer = make_trainer(clients) if clients and task.is_train() else None
    vector = task.initial_vector() if channel.rank == 0 else np.zeros(size, dtype=np.float32)
    server = Server(vector, config, is_root=channel.rank == 0)
    stamps = task.Stamps()
    channel.agree(None)
    stamps.start()
    for round_ in range(1, rounds + 1):
        announce(channel, size, 0)
        server.broadcast(channel)
        headers = np.zeros(len(clients), dtype=HEADER)
        headers["client"], headers["num_examples"] = clients, task.N_SAMPLES
        if trainer:
            deltas = trainer(server.vector)
        elif clients:
            deltas = np.stack([task.client_step(server.vector, c) - server.vector for c in clients])
        else:
            deltas = np.empty((0, size), dtype=np.float32)
        for client in clients:
            task.trace_client(client)
        updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=[])
        server.apply(gather(channel, updates, FLOAT32, server.judge), channel.phases, round_)
        stamps.round()
    if channel.rank == 0:
        stamps.extra["mpi"] = channel.placement.mpi.library
        stamps.write(server.vector)
    channel.close()


if __name__ == "__main__":
    from fedprompt_mpi.liveness.exit import end_process

    main()
    end_process(0)
