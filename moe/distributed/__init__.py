"""The ranks of a run: topology, process groups, launchers, collectives, and errors that all ranks agree on."""
