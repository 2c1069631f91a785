"""launch/convert.py: a run out to transformers and back, mistakes, Ctrl-C, a disk that refuses."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = "runs/a"


@pytest.fixture(scope="module")
def exported(command, workplace, tmp_path_factory) -> Path:
    """runs/a exported to hf/ (in shards) and imported again to ours/."""
    folder = tmp_path_factory.mktemp("exported")
    for source, target, more in (
        (workplace.folder / RUN, folder / "hf", ["max_shard_bytes=200000"]),
        (folder / "hf", folder / "ours", []),
    ):
        done = command("convert", f"source={source}", f"target={target}", *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def generate(command, run: Path, cwd: Path) -> str:
    done = command(
        "generate", f"run={run}", "prompt=import os\n", "sampling.temperature=0",
        "sampling.max_new_tokens=24", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_went_out_and_back_writes_the_same_text(command, workplace, exported):
    before = generate(command, workplace.folder / RUN, workplace.folder)
    assert generate(command, exported / "ours", exported) == before
    assert len(before) > len("import os\n")


def test_text_of_a_run_of_its_export_in_transformers_and_of_the_way_back_is_one(
    command, workplace, tmp_path
):
    transformers = pytest.importorskip("transformers")
    sensitive_run(workplace.folder / RUN, tmp_path / "run")
    for source, target in (("run", "hf"), ("hf", "ours")):
        done = command("convert", f"source={source}", f"target={target}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    before = generate(command, tmp_path / "run", tmp_path)
    assert generate(command, tmp_path / "ours", tmp_path) == before
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    texts = []
    for adds in (True, False):
        given = tokenizer("import os\n", return_tensors="pt", add_special_tokens=adds)
        written = model.generate(**given, max_new_tokens=24)  # greedy is its default
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    assert texts[0] + "\n" == before
    assert texts[1] != texts[0]  # so the first token matters to this model


def sensitive_run(source: Path, target: Path) -> None:
    """A copy of a run whose every text depends on its first token: larger parameters."""
    import torch

    from moe.load_run import load_run
    from moe.train.checkpoint import save_checkpoint

    run = load_run(str(source), device=torch.device("cpu"), on_skip=pytest.fail)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(3)
    files = {name: run.checkpoint.file(name).read_bytes() for name in
             ("config.json", "tokenizer.model")}  # fmt: skip
    save_checkpoint(
        target / "checkpoints", 4, tensors={"model": dict(run.model.named_parameters())},
        extra_files=files, state=run.checkpoint.state, keep_last=1,
    )  # fmt: skip


def test_a_converted_model_is_evaluated_as_its_run(command, workplace, exported):
    tables = []
    for run in (workplace.folder / RUN, exported / "ours"):
        done = command(
            "evaluate", f"run={run}", f"paths.data_dir={workplace.folder / 'data/tiny'}",
            "seq_len=64", "max_tokens=2000", cwd=workplace.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        tables.append(done.stdout.splitlines()[1:])
    assert tables[0] == tables[1]
    assert any("perplexity" in line for line in tables[0])


def test_training_starts_from_a_converted_model(command, workplace, exported, tmp_path):
    place = workplace.copy(tmp_path).folder
    done = command(
        "train", *workplace.train, "paths.run_dir=runs/b", "train.steps=1", "train.save_every=0",
        "optim.warmup_steps=0", f"train.init_from={exported / 'ours'}", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"weights: from {exported / 'ours'}, step 0" in done.stdout
    loss = [json.loads(line) for line in (place / "runs/b/metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (place / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert loss[0]["loss"] < first[0]["loss"]  # runs/a began with random weights


def test_transformers_opens_an_exported_run_and_writes_the_same_text(exported):
    transformers = pytest.importorskip("transformers")
    import torch

    from moe.generate import generate as new_tokens
    from moe.inference_config import Sampling
    from moe.load_run import load_run

    ours = load_run(str(exported / "ours"), device=torch.device("cpu"), on_skip=pytest.fail)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf", dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    text = "def path(name):\n    return os.path.join(name, 'x')\n"
    ids = ours.require_tokenizer().encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        expected, got = (model(torch.tensor([ids])).logits for model in (theirs, ours.model))
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()
    new = list(new_tokens(
        ours.model, ids, Sampling(max_new_tokens=20, temperature=0.0),
        stop_ids=ours.require_tokenizer().stop_ids,
    ))  # fmt: skip
    assert written[0, len(ids) :].tolist()[: len(new)] == new
    assert len(new) >= 5


def test_the_configuration_names_the_published_class_and_the_ids_of_the_vocabulary(exported):
    config = json.loads((exported / "hf/config.json").read_text())
    assert config["architectures"] == ["PhiMoEForCausalLM"]
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 501, 501]


def test_a_fine_tune_with_transformers_comes_back_with_its_tokenizer_and_its_words(
    command, workplace, exported, tmp_path
):
    transformers = pytest.importorskip("transformers")
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf")
    tokenizer.add_tokens(["<|tool|>", "<think>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer("<|tool|>\nx <think>", return_tensors="pt")["input_ids"]
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf/tokenizer.model").exists()  # transformers 5 writes none
    done = command("convert", "source=hf", "target=ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokenizer" not in done.stderr
    from moe.load_run import load_run
    from moe.text_habits import begins_with_bos

    run = load_run(str(tmp_path / "ours"), device=torch.device("cpu"), on_skip=pytest.fail)
    ours = run.require_tokenizer()
    assert begins_with_bos(run.checkpoint)
    assert [ours.bos_id, *ours.encode("<|tool|>\nx <think>")] == ids[0].tolist()
    assert ours.decode(ids[0].tolist()) == "<|tool|>\nx <think>"
    assert len(generate(command, tmp_path / "ours", tmp_path)) > len("import os\n")
    # the run's own data are read, though its tokenizer's file is another
    done = command(
        "evaluate", "run=ours", f"paths.data_dir={workplace.folder / 'data/tiny'}", "seq_len=64",
        "max_tokens=1000", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_files_say_what_the_model_is_and_where_it_stops(exported):
    generation = json.loads((exported / "hf/generation_config.json").read_text())
    assert generation["bos_token_id"] == 1
    assert len(generation["eos_token_id"]) == 3
    card = (exported / "hf/README.md").read_text()
    for text in ("step 4", "tokens seen", "Validation loss", "PhimoeForCausalLM", "licence",
                 "no remote code", "launch/convert.py"):  # fmt: skip
        assert text in card, text
    names = {path.name for path in (exported / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
            "model.safetensors.index.json"} <= names  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr


@pytest.mark.parametrize(
    ("window", "num_keys", "words"),
    [("original", 8, "the released code; transformers"), ("transformers", 7, "shows one more")],
)
def test_how_a_sliding_window_is_read_is_said(command, exported, tmp_path, window, num_keys, words):
    shutil.copytree(exported / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 7}))
    done = command("convert", "source=hf", "target=ours", f"window={window}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"a query sees {num_keys} keys, itself included" in done.stderr
    assert words in done.stderr
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model"]["sliding_window"] == num_keys


def test_each_mistake_is_one_message(command, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    hf = f"source={exported / 'hf'}"
    for arguments, says in (
        ([], ("source: not given",)),
        ([hf], ("target: not given",)),
        (["source=none", "target=x"], ("source: 'none' does not exist",)),
        (["source=file", "target=x"], ("source: 'file' is a file",)),
        (["source=empty", "target=x"], ("source: 'empty' is no model",)),
        ([hf, f"target={exported}"], ("target: ", "holds files already")),
        ([hf, "target=x", "window=mine"], ("window: ", "original", "transformers")),
        ([hf, "target=x", "tokenizer=none"], ("none: is missing",)),
        ([hf, "target=x", "max_shard_bytes=0"], ("max_shard_bytes: ",)),
        ([hf, "target=x", "traget=y"], ("Did you mean 'target'",)),
        ([f"source={exported / 'ours'}", "target=x", "tokenizer=y"], ("tokenizer: ", "its own")),
    ):
        refused(command("convert", *arguments, cwd=tmp_path), *says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_file_size_limit_leaves_nothing(command, exported, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = command(
        "convert", f"source={exported / 'hf'}", "target=a/b", cwd=tmp_path, preexec_fn=limit
    )
    refused(done, "a/b: cannot be written", "ulimit -f")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(environment, exported, tmp_path):
    shutil.copytree(exported / "hf", tmp_path / "hf")
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOWLY, str(ROOT / "launch/convert.py"), "source=hf",
         "target=new/ours"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # what a shell starts in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new/.tmp-*/model.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# every write takes a while, so that there is a middle to interrupt
_SLOWLY = """
import os, runpy, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
write = os.write
def slowly(descriptor, data):
    time.sleep(0.2)
    return write(descriptor, data)
os.write = slowly
runpy.run_path(sys.argv[0], run_name="__main__")
"""
