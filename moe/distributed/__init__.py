"""The ranks of a run: topology, process groups, launchers, collectives, and errors of all ranks."""
