"""DeepSpeed, ranks and checkpoints."""
