"""Write text with a trained model.

python scripts/generate.py RUN --prompt "def " [--prompt TEXT ...] [--prompt-file FILE|-] [--max-new-tokens N]
    [--temperature T] [--top-k K] [--top-p P] [--stop TEXT ...] [--seed S] [--device cpu]
"""

import sys
from pathlib import Path

from moe.config import ConfigError
from moe.config.command_line import DONE, OneLineParser, command
from moe.data.files import unicode_encoding


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, and print text as it is generated."""
    parser = OneLineParser(prog="generate.py", description="Write text with a trained model.")
    parser.add_argument("run", help="a run folder, such as runs/tiny")
    more = "may be given several times: the texts are then printed one after another"
    parser.add_argument("--prompt", action="append", default=[], help=f"text to continue; {more}")
    file_help = f"a file with the text to continue, - for standard input; {more}"
    parser.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help=file_help)
    parser.add_argument("--max-new-tokens", type=int, default=200, help="at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among this many of the likeliest tokens")
    top_p_help = "sample among the likeliest tokens of this mass (default 0.95)"
    parser.add_argument("--top-p", type=float, default=0.95, help=top_p_help)
    stop_help = "end the text before this string; may be given several times"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=stop_help)
    seed_help = "of the first text; the next one has the next seed (default 0)"
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    prompts = [_as_text(prompt.encode("utf-8", "surrogateescape"), "utf-8") for prompt in options.prompt]
    prompts += [_read(name) for name in options.prompt_file]

    # Imported here, since torch takes a second.
    from moe.inference.generation import Sampling, generate, stream
    from moe.inference.trained_run import load_run

    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_p, options.seed, options.top_k, options.stop
    )
    run = load_run(options.run, options.device)
    prompts = prompts or [""]
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        try:
            for _, piece in stream(run, prompts, sampling):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)  # at Ctrl-C as well
        return DONE
    for number, text in enumerate(generate(run, prompts, sampling), 1):
        print(f"----- {number}\n{text}")
    return DONE


def _read(name: str) -> str:
    """The text of a file or of standard input."""
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError("--prompt-file", f"{name}: {error.strerror}") from None
    return _as_text(text, unicode_encoding(text))


def _as_text(text: bytes, encoding: str) -> str:
    """What is not text in this encoding becomes the replacement character."""
    return text.decode(encoding, "replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
