"""What keeps a run going: devices, processes, checkpoints."""
