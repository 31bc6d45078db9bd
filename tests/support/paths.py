"""Where the repository's own files are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny.yaml"
TRAIN = ROOT / "train.py"
