"""The training step: loss, optimizer, DeepSpeed engine, evaluation and step metrics."""
