"""Ablations of expert settings: the cells, their runs, the statistics and the report."""
