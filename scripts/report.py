"""Rebuild the report of a sweep, or of any folder of finished runs.

python scripts/report.py DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.ablation.html_report import write_report
from moe.config.loading import OneLineParser
from moe.config.schema import ConfigError


def main(arguments: list[str]) -> int:
    """Parse the command line, write the report, print what it says."""
    parser = OneLineParser(prog="report.py", description="Rebuild the report of a folder of finished runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="every finished run below it is reported")
    folder = parser.parse_args(arguments).folder
    try:
        said = write_report(folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(said))
    print(f"see {folder / 'report.html'}, results.csv and the PNGs beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
