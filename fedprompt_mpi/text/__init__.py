"""From files and hubs to batches of token ids; no tensors here."""
