"""`env.json`: what produced a run."""

import json
import subprocess

import torch

from moe.runs.environment import describe_environment
from tests.support.paths import ROOT


def test_the_environment_names_what_produced_the_run():
    environment = describe_environment(1)
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"] == torch.__version__
    )
    assert environment["processor"]
    json.dumps(environment)


def test_the_commit_is_that_of_the_trainer_wherever_it_is_started(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "of another project"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    ours = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert describe_environment(1)["git_sha"] == (ours.stdout.strip() if ours.returncode == 0 else None)
