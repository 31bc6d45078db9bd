"""The folder of a run: its files, its metrics, its environment and its summary."""
