"""The run's own record says which text it saw, also where the command only named the folder."""

from __future__ import annotations

import json


def test_config_json_holds_the_sources_and_vocabulary_that_were_prepared(workplace):
    assert not any("sources" in word or "fraction" in word for word in workplace.train)
    manifest = json.loads((workplace.folder / "data" / "tiny" / "manifest.json").read_text())
    run = workplace.folder / "runs" / "a"
    checkpoints = sorted((run / "checkpoints").glob("step_*"))
    assert checkpoints
    for path in (run / "config.json", checkpoints[-1] / "config.json"):
        config = json.loads(path.read_text())
        assert config["data"]["sources"] == manifest["sources"] != ["builtin:python"]
        assert config["data"]["validation_fraction"] == 0.2
        assert config["tokenizer"]["vocab_size"] == manifest["vocab_size"] == 512
