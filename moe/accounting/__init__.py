"""Parameters, FLOPs, memory, communication, placement, cost and scaling laws, from a configuration alone."""
