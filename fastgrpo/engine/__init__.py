"""The update of the trained weights with DeepSpeed, the processes of a run, and its checkpoints."""
