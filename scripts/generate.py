"""Write text with a trained model.

python scripts/generate.py RUN --prompt "def " [--max-new-tokens N] [--temperature T] [--top-p P] [--seed S]
"""

import sys
from pathlib import Path

import torch

from moe.config.loading import OneLineParser
from moe.config.schema import ConfigError
from moe.data.tokenizer import end_token
from moe.inference.generation import generate, load_model


def main(arguments: list[str]) -> int:
    """Parse the command line, generate, print."""
    parser = OneLineParser(prog="generate.py", description="Write text with a trained model.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/tiny")
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="sample among the likeliest tokens of this mass"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        if options.max_new_tokens < 1:
            raise ConfigError("--max-new-tokens", f"should be at least 1, got {options.max_new_tokens}")
        if not options.temperature >= 0:
            raise ConfigError("--temperature", f"should be at least 0, got {options.temperature}")
        if not 0 <= options.seed < 2**63:
            raise ConfigError("--seed", f"should be at least 0 and below 2**63, got {options.seed}")
        if not 0 < options.top_p <= 1:
            raise ConfigError("--top-p", f"should be above 0 and at most 1, got {options.top_p}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer, config = load_model(options.run, device)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_id = tokenizer.token_to_id(end_token(tokenizer, config.data.end_token))
    ids = tokenizer.encode(options.prompt, add_special_tokens=False).ids or [end_id]
    tokens = generate(
        model,
        torch.tensor(ids, device=device),
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
        config.model.max_seq_len,
        end_id,
    )
    print(tokenizer.decode(tokens.tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
