"""The training program: settings, engine, optimizer, learning rate, validation, metrics, checkpoints, loop."""
