"""What the commands that use a model refuse before they load it."""

from __future__ import annotations

import pytest

from moe.errors import ConfigError
from moe.inference_config import GenerateConfig

REFUSED = {
    "two_sources": ({"prompt": "a", "prompts_file": "b"}, ["prompts_file: given together with"]),
    "ids_and_text": ({"prompt": "a", "prompt_ids": (1,)}, ["prompt_ids: given together with"]),
    "chat_of_ids": ({"prompt_ids": (1,), "chat": True}, ["chat: got true with prompt_ids"]),
    "output_of_nothing": ({"output": "a.jsonl", "chat": True}, ["output: got 'a.jsonl'", "prompt"]),
    "samples_of_nothing": ({"num_samples": 2, "chat": True}, ["num_samples: got 2", "prompt"]),
    "no_samples": ({"prompt": "a", "num_samples": 0}, ["num_samples: got 0", "at least 1"]),
    "no_batch": ({"prompt": "a", "batch_size": 0}, ["batch_size: got 0", "at least 1"]),
    "system_alone": ({"prompt": "a", "system": "b"}, ["system: got 'b'", "chat=true"]),
    "system_of_lines": ({"prompts_file": "a.txt", "system": "b"}, ["system: got", "chat=true"]),
    "template_alone": ({"prompt": "a", "chat_template": "grin"}, ["chat_template: got 'grin'"]),
    "other_device": ({"device": "gpu"}, ["device: got 'gpu'", "auto, cpu, cuda"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_both_be_followed_are_refused(name):
    values, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        GenerateConfig(**values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("values", [
    {}, {"prompt": "a", "output": "b.jsonl", "num_samples": 2}, {"prompt": "", "chat": True},
    {"chat": True, "system": "b", "chat_template": "grin"}, {"prompt_ids": (), "num_samples": 3},
    {"prompts_file": "a.jsonl", "system": "b", "chat_template": "phi3"},
])  # fmt: skip
def test_what_can_be_followed_is_taken(values):
    GenerateConfig(**values)
