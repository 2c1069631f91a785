"""What tests of moe share: one thread, and prepared data of short documents."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.prepare import prepare


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are tiny: on a busy machine several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 500 documents of 10 to 120 words in three domains, 512 token ids.

    A training window of 64 tokens holds about two ends of documents, and windows differ in how
    many: so they differ in their number of labels.
    """
    folder = tmp_path_factory.mktemp("short_documents")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(300)]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(500):
            count = generator.choice((10, 20, 40, 120))
            text = f"{number} " + " ".join(generator.choices(words, k=count))
            domain = ("code", "news", "law")[number % 3]
            file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    config = PrepareConfig(
        data=DataConfig(sources=(str(folder / "texts.jsonl"),), validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(folder / "data")),
        num_processes=1,
    )
    prepare(config, on_progress=lambda what, done, total: None)
    return folder / "data"
