"""Perplexity, nats per token and bits per byte of a trained model on any text.

python scripts/evaluate.py RUN FILE... [--text-field FIELD] [--encoding NAME] [--stride N] [--json]
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moe.config import Config, ConfigError, parse_config
from moe.config.command_line import DONE, OneLineParser, command, positive_int
from moe.data.files import check_files
from moe.tables import align

# Keys and advice of train.py, and what they are here.
_HERE = {
    "data.text_field": "--text-field",
    "data.encoding": "--encoding",
    "data.source": "FILE",
    "; fix it, or skip such records with data.on_bad_record=skip": "; fix it, or name another field",
    "; choose with data.suffixes": "; give a glob such as 'FOLDER/*.txt'",
    "the name, data.subset and the network": "the name and the network",
}


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, predict each text, print."""
    parser = OneLineParser(prog="evaluate.py", description="How well a trained model predicts a text.")
    parser.add_argument("run", help="a run folder, such as runs/tiny")
    file_help = "a file, folder, glob or hub name, as in data.source"
    parser.add_argument("files", nargs="+", metavar="FILE", help=file_help)
    parser.add_argument("--text-field", default="text", help="of records (default: text)")
    parser.add_argument("--encoding", default="utf-8", help="of text files (default: utf-8)")
    stride_help = "move on by so many tokens, for more context (default: a whole window, as in training)"
    parser.add_argument("--stride", type=positive_int, metavar="N", help=stride_help)
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    how = {"text_field": options.text_field, "encoding": options.encoding}
    for name in options.files:
        if "=" in name and name.partition(".")[0] in Config.model_fields:
            raise ConfigError(name, "evaluate.py takes no overrides; see evaluate.py --help")
    with _errors_in_its_own_words():
        texts = {name: parse_config({"data": {"source": name} | how}).data for name in options.files}
        for data in texts.values():
            check_files(data)

    # Imported here, since torch takes a second.
    from moe.inference.perplexity import predict
    from moe.inference.trained_run import load_run

    run = load_run(options.run, options.device)
    with _errors_in_its_own_words():
        found = {name: predict(run, data, options.stride) for name, data in texts.items()}
    if options.json:
        print(json.dumps({name: prediction.record() for name, prediction in found.items()}, indent=1))
        return DONE
    if len(found) > 1:
        predictions = iter(found.values())
        found["all"] = sum(predictions, start=next(predictions))
    header = ("text", "documents", "tokens", "bytes", "nats per token", "perplexity", "bits per byte")
    rows = [
        (
            name,
            f"{text.documents:,}",
            f"{text.tokens:,}",
            f"{text.num_bytes:,}",
            f"{text.nats_per_token:.4f}",
            f"{text.perplexity:,.2f}",
            f"{text.bits_per_byte:.4f}",
        )
        for name, text in found.items()
    ]
    print(align([header, *rows]))
    return DONE


@contextmanager
def _errors_in_its_own_words() -> Iterator[None]:
    """Name options instead of keys, and leave out advice that only train.py takes."""
    try:
        yield
    except ConfigError as error:
        message = error.message
        for theirs, ours in _HERE.items():
            message = message.replace(theirs, ours)
        raise ConfigError(_HERE.get(error.key, error.key), message) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
