"""Write text with a trained model.

python scripts/generate.py RUN --prompt "def " [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S]
"""

import sys

import torch

from moe.config.command_line import OneLineParser, command
from moe.inference.generation import Sampling, generate
from moe.inference.trained_run import load_run


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, generate, print."""
    parser = OneLineParser(prog="generate.py", description="Write text with a trained model.")
    parser.add_argument("run", help="a run folder, such as runs/tiny")
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    top_p_help = "sample among the likeliest tokens of this mass (default 0.95)"
    parser.add_argument("--top-p", type=float, default=0.95, help=top_p_help)
    parser.add_argument("--seed", type=int, default=0, help="of this text (default 0)")
    options = parser.parse_args(arguments)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    run = load_run(options.run, "cuda" if torch.cuda.is_available() else "cpu")
    print(generate(run, options.prompt, sampling))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
