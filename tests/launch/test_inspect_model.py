"""launch/inspect_model.py as a user calls it: tables, a run, a config.json and its YAML."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.convert.hf_config import load_hf_config
from moe.errors import ConfigError
from moe.inspect_config import InspectConfig

PUBLISHED = Path(__file__).parents[1] / "moe/convert/published"


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of that name."""
    line = next(line for line in text.splitlines() if line.startswith(f"{name}  "))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_the_tables_of_the_real_model_say_its_published_numbers(command, tmp_path):
    done = command("inspect_model", "model=phi35_moe", "batch_size=2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert row(done.stdout, "all")[:2] == ["41,873,153,344", "6,640,999,744"]
    assert row(done.stdout, "experts")[:2] == ["40,265,318,400", "5,033,164,800"]
    # 2 (keys, values) * 2 texts * 4,096 places * 32 layers * 8 heads * 128 * 2 bytes
    assert row(done.stdout, "allocated, every place") == ["1.00 GiB"]
    assert row(done.stdout, "a token") == ["128.00 KiB"]
    assert row(done.stdout, "weights, gradients, AdamW")[0] == "623.96 GiB"
    assert "2 texts of 4,096 tokens" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in done.stdout.splitlines())


def test_what_a_window_and_a_pattern_save_is_said(command, tmp_path):
    done = command("inspect_model", "model=phi3_small_8k", "seq_len=8192", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "allocated, every place") == ["1.00 GiB"]
    # of 128 blocks a sparse layer's key head needs 16 local ones and 4 of 8 columns before them
    needed = (16 * 128 + 16 * (16 + 56)) / (32 * 128)
    assert row(done.stdout, "what the next token sees of it") == [f"{needed * 1024:,.2f} MiB"]
    assert row(done.stdout, "pairs seen, of causal ones") == ["66.2%"]


def test_a_run_is_described_by_its_own_configuration(command, workplace):
    done = command("inspect_model", "run=runs/a", "dtype=float32", cwd=workplace.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"nano_moe \(.*runs/a/checkpoints/step_00000004\)\n", done.stdout)
    config = json.loads((workplace.folder / "runs/a/config.json").read_bytes())
    model = from_dict(TrainConfig, config).model
    assert row(done.stdout, "all")[0] == f"{model.num_parameters():,}"


def test_a_config_json_becomes_an_option_that_training_finds(command, tmp_path):
    folder = tmp_path / "Phi 3.5 (mini)"  # a folder as one downloads it
    folder.mkdir()
    shutil.copy(PUBLISHED / "phi35_mini.json", folder / "config.json")
    done = command(
        "inspect_model", f"config_json={folder}", "write_yaml=own/model/my_mini.yaml",
        "seq_len=131072", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "written: own/model/my_mini.yaml" in done.stdout
    assert "train.py --config-dir own model=my_mini" in done.stdout
    assert "family phi3" in done.stdout
    composed = command(
        "train", "--config-dir", "own", "model=my_mini", "data.seq_len=131072", "--cfg", "job",
        "--resolve", cwd=tmp_path,
    )  # fmt: skip
    assert composed.returncode == 0, composed.stderr
    values: Any = OmegaConf.to_container(OmegaConf.create(composed.stdout))
    values.pop("paths")
    config = from_dict(TrainConfig, values)
    found = load_hf_config(folder)
    assert config.model.name == config.name == "my_mini"
    assert config.model.rope == found.model.rope
    assert config.model.usable_length == 131_072


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config_json=nowhere"], "nowhere: cannot be read"),
        (["run=nowhere"], "run: 'nowhere' does not exist"),
        (["config_json=c.json", "model=tiny_moe"], "model: given with config_json='c.json'"),
        (["seq_len=5000"], "seq_len: got 5000; the model takes at most 4096"),
        (["config_json=c.json", "write_yaml=model/a.txt"], "a file that ends in .yaml"),
        (["config_json=c.json", "write_yaml=c.yaml"], "'c.yaml' exists and is not overwritten"),
        (["config_json=c.json", "write_yaml=m/a.yaml", "name=b"], "name: got 'b'.*m/b.yaml"),
        (["config_json=c.json", "write_yaml=m/-.yaml"], "name: got '-'; allowed: letters"),
        (["config_json=c.json", "write_yaml=c.json/m.yaml"], "write_yaml: cannot write"),
        (["config_json=broken.json"], "broken.json: is not JSON"),
        (["sequence=3"], "sequence: unknown key.*seq_len"),
    ],
)
def test_a_mistake_gets_one_message(command, tmp_path, arguments, message):
    shutil.copy(PUBLISHED / "phi3_mini_4k.json", tmp_path / "c.json")
    (tmp_path / "broken.json").write_text('{"model_type": "phi3"')
    (tmp_path / "c.yaml").write_text("")
    done = command("inspect_model", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.match(f"error: .*{message}", done.stderr)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "c.json", "c.yaml"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "a", "config_json": "b"}, "run: got 'a' with config_json='b'; allowed: one of"),
        ({"batch_size": 0}, "batch_size: got 0; it must be a finite number of at least 1"),
        ({"seq_len": -1}, "seq_len: got -1"),
        ({"dtype": "int8"}, "dtype: got 'int8'; allowed: bfloat16, float16, float32"),
        ({"window": "left"}, "window: got 'left'; allowed: original, transformers"),
        ({"write_yaml": "a.yaml"}, r"write_yaml: got 'a.yaml' without config_json"),
        ({"config_json": "c", "name": "a b"}, "name: got 'a b'; allowed: letters"),
    ],
)
def test_a_configuration_checks_itself(values, message):
    with pytest.raises(ConfigError, match=message):
        InspectConfig(**values)


def test_help_says_how_it_is_called(command, tmp_path):
    done = command("inspect_model", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "usage: python launch/inspect_model.py" in done.stdout
    assert "  config_json=" in done.stdout
    assert "phi35_moe" in done.stdout
