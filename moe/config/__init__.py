"""The configuration: its keys, their checks, YAML files and command-line overrides. Nothing here imports torch."""
