"""Too little text is refused or warned about, in plain words."""

import numpy as np
import pytest

from moe.config import ConfigError, parse_config
from moe.data.amounts import corpus_warnings
from moe.data.text import Text
from moe.data.token_cache import prepare_corpus
from tests.support.corpora import corpus_config


def test_all_that_is_wrong_with_a_small_corpus_is_said_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("a few words\n" * 8)
    with pytest.raises(ConfigError) as refused:
        prepare_corpus(
            corpus_config(tmp_path / "c", source=str(tmp_path / "a.txt"), tokenizer="bpe:4096", seq_len=64)
        )
    message = str(refused.value)
    assert message.startswith("data.seq_len: 64 is longer than the train text of ")
    assert message.count("; also data.seq_len: 64 is longer than the validation text of ") == 1
    assert message.count("; also data.tokenizer: the corpus supports only ") == 1
    assert "; use bpe:" in message
    assert "\n" not in message


def settings(**train):
    return parse_config(
        {"data": {"seq_len": 10}, "train": {"global_batch_size": 10, "micro_batch_size": 10} | train}
    )


def warnings_of(config, train_tokens, validation_tokens):
    texts = []
    for size in (train_tokens, validation_tokens):
        tokens, starts = np.zeros(size, dtype=np.uint16), np.zeros(1, dtype=np.int64)
        texts.append(Text(tokens, starts, {"train": range(size)}, {"train": size}))
    return list(corpus_warnings(config, *texts))


def test_text_that_is_read_many_times_is_warned_about():
    # 100 tokens a step
    assert warnings_of(settings(steps=40), 1000, 10_000) == []
    (warning,) = warnings_of(settings(steps=50), 1000, 10_000)
    assert warning.startswith("train.steps=50 reads the 1,000 training tokens 5.0 times; ")


def test_little_validation_text_is_warned_about():
    assert warnings_of(settings(steps=40), 1000, 160) == []
    (warning,) = warnings_of(settings(steps=40), 1000, 159)
    assert "only 159 validation tokens" in warning
    assert warnings_of(settings(steps=40, eval_batches=1), 1000, 100) == []  # no more was asked for
