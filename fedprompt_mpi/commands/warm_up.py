"""Import all that a rank uses, and load a small model once: much of transformers and torch is imported on first use."""

import importlib

from fedprompt_mpi.plm.late_imports import own_the_process

NEEDED = (
    "jsonargparse", "mpi4py", "torch", "torch.optim",
    "fedprompt_mpi.comm.mpi_channel", "fedprompt_mpi.commands.run", "fedprompt_mpi.commands.bench",
    "fedprompt_mpi.federation.client_training", "fedprompt_mpi.federation.evaluate",
    "fedprompt_mpi.federation.prepare", "fedprompt_mpi.plm.methods", "fedprompt_mpi.plm.prefix",
)  # fmt: skip


def warm_up() -> None:
    """Import, and load the embedded model."""
    from fedprompt_mpi.plm import hugging_face

    own_the_process()
    config = hugging_face.read_config("embedded")
    hugging_face.model_class(config)
    for name in NEEDED:
        importlib.import_module(name)
    import torch

    from fedprompt_mpi.commands.settings import parse_settings
    from fedprompt_mpi.config import ModelConfig
    from fedprompt_mpi.plm.backbone import load_backbone

    parse_settings([])
    folder = str(hugging_face.EMBEDDED)
    hugging_face.load_tokenizer(folder)
    torch.set_num_threads(1)  # a rank sets its own number; threads would not survive a fork
    load_backbone(ModelConfig(dtype="float32"), folder, torch.tensor([0, 1]), torch.device("cpu"), 0)
