"""Sweeps over settings of the experts: what to train, what the runs show, and the report."""
