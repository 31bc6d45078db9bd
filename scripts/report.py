"""Write the report of an ablation, or of any folder of finished runs.

python scripts/report.py DIR
"""

import sys
from pathlib import Path

from moe.config.command_line import OneLineParser, command


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, write the report, print its conclusions."""
    parser = OneLineParser(prog="report.py", description="Write the report of a folder of finished runs.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="every finished run below it is reported")
    folder = parser.parse_args(arguments).folder
    from moe.ablation.html_report import write_report  # takes three seconds

    print("\n".join(write_report(folder)))
    print(f"see {folder / 'report.html'}, results.csv and figures/ beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
