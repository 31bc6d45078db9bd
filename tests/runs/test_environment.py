"""`env.json`: what produced a run."""

import json

import torch

from moe.runs.environment import describe_environment


def test_the_environment_names_what_produced_the_run():
    environment = describe_environment(1)
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"] == torch.__version__
    )
    assert environment["processor"]
    json.dumps(environment)
