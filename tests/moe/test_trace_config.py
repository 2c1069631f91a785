"""What launch/trace.py can be told."""

from __future__ import annotations

import pytest

from moe.config_from_dict import from_dict
from moe.errors import ConfigError
from moe.trace_config import TraceConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "valid"}, r"split: got 'valid'; allowed: train, validation. Did you mean"),
        ({"device": "gpu"}, "device: got 'gpu'; allowed: auto, cpu, cuda"),
        ({"max_tokens": -1}, "max_tokens: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"part_tokens": 0}, "part_tokens: got 0"),
        ({"seq_len": 1}, "seq_len: got 1; it must be a finite number of at least 2"),
        ({"domains": ["a", "a"]}, "domains: got .*each name may be given once"),
        ({"domains": "law"}, "domains: got 'law'; it must be a list"),
        ({"logit": True}, r"logit: unknown key. Did you mean 'logits'\?"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TraceConfig, values)


def test_the_defaults_are_allowed() -> None:
    assert from_dict(TraceConfig, {"seq_len": 0}) == TraceConfig()
