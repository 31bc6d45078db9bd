"""`metrics.jsonl`: cut back where a run resumes, and always JSON."""

import pytest

from moe.config import parse_config
from moe.runs.metrics_log import MetricsLog, read_metrics


def test_a_log_is_cut_back_on_resume_and_refuses_not_a_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, parse_config({}))
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    log = MetricsLog(path, 3, parse_config({}))
    log.write({"step": 4, "again": True})
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 5, "loss": float("nan")})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def test_a_path_may_be_a_string(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert read_metrics(str(tmp_path / "metrics.jsonl")) == [{"step": 1}]
