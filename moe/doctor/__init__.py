"""Proof, on one's own configuration, that a run is the same run on any topology."""
