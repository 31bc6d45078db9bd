"""What the experts of a trained run do: tokens, texts, who works together, who could be dropped.

python scripts/experts.py RUN [FILE ...] [--tokens N] [--drop N] [--page PATH] [--json]
"""

import json
import sys
from pathlib import Path

from moe.config import ConfigError, parse_config
from moe.config.command_line import DONE, OneLineParser, command, positive_int
from moe.data.files import check_files
from moe.tables import align


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, route the texts, print and write the page."""
    parser = OneLineParser(prog="experts.py", description="What the experts of a trained run do.")
    parser.add_argument("run", help="a run folder, such as runs/tiny")
    file_help = "texts to route, as in data.source (default: the validation texts of the run)"
    parser.add_argument("files", nargs="*", metavar="FILE", help=file_help)
    parser.add_argument(
        "--tokens", type=positive_int, default=20_000, metavar="N", help="of each text (default: 20000)"
    )
    drop_help = "drop the N least used experts of each layer, one at a time, and show the loss (default: 1)"
    parser.add_argument("--drop", type=int, default=1, metavar="N", help=drop_help)
    parser.add_argument("--page", metavar="PATH", help="where the page goes (default: RUN/routing.html)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.drop < 0:
        raise ConfigError("--drop", f"should be at least 0, got {options.drop}")
    given = {name: parse_config({"data": {"source": name}}).data for name in options.files}
    for data in given.values():
        check_files(data)

    # Imported here, since torch takes a second.
    from moe.inference.routing_page import HEADER, layer_rows, routing_page
    from moe.inference.routing_statistics import routing_statistics
    from moe.inference.routing_texts import windows_of_files, windows_of_run
    from moe.inference.trained_run import earlier_step, load_run

    run, before = load_run(options.run, options.device), earlier_step(options.run)
    earlier = None if before is None else load_run(options.run, options.device, before)
    texts = windows_of_files(run, given, options.tokens) if given else windows_of_run(run, options.tokens)
    routing = routing_statistics(run, texts, earlier, options.drop)
    page = Path(options.page or Path(options.run) / "routing.html")
    text = routing_page(routing, f"Experts of {run.config.run.name}", run.tokenizer)
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"{page} cannot be written ({error.strerror})"
        raise ConfigError("--page", f"{problem}; give another path") from None
    if options.json:
        print(json.dumps(routing.record(run.tokenizer), indent=1))
        return DONE
    print(align([HEADER, *layer_rows(routing)]))
    print(f"\nloss {routing.loss:.4f} on {routing.layers[0].tokens:,} tokens of {', '.join(routing.texts)}")
    if before is not None:
        print(f"routes kept: since the checkpoint of step {before}")
    print(f"see {page}")
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
