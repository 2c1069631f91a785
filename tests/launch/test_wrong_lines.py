"""Wrong command lines, of every command: each is told in one message and leaves nothing behind.

A line is refused before its command does anything, so it is asked in this process. Where a message
offers something to type (after "Write"), that is typed in its turn and must be taken.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typed_line

from moe.config_from_dict import known_keys
from moe.right_key import SYNONYMS

# the command -> its lines, as typed in a shell, and words of the message
TOLD = {
    "train": """
        lr=1e-3 | lr: unknown key. Did you mean 'optim.lr'?
        learning_rate=1e-3 | Did you mean 'optim.lr'?
        optim.learning-rate=1 | Did you mean 'optim.lr'?
        optim.learning_rate=1 | Did you mean 'optim.lr'?
        batch_size=4 | Did you mean 'train.batch_size'?
        steps=5 | Did you mean 'train.steps'?
        epochs=5 | Did you mean 'train.steps'?
        num_train_epochs=3 | Did you mean 'train.steps'?
        max_steps=3 | Did you mean 'train.steps'?
        bf16=true | Did you mean 'train.precision'?
        torch_dtype=bfloat16 | Did you mean 'train.precision'?
        seq_length=3 | Did you mean 'data.seq_len'?
        context_length=3 | Did you mean 'data.seq_len'?
        model.d_model=64 | Did you mean 'model.hidden_size'?
        model.n_layer=4 | Did you mean 'model.num_layers'?
        num_experts_per_tok=2 | Did you mean 'model.top_k'?
        max_grad_norm=1 | Did you mean 'optim.grad_clip'?
        gradient_checkpointing=true | Did you mean 'train.activation_checkpointing'?
        nproc_per_node=2 | Did you mean 'launcher.processes_per_node'?
        output_dir=x | Did you mean 'paths.run_dir'?
        device=cpu | Did you mean 'parallel.device'?
        wandb=online | Did you mean 'logging.wandb'?
        resume=never | Did you mean 'train.resume'?
        a.b.c=3 | a.b.c: unknown key
        seed.x=1 | seed is a value, not a group
        optim.lr.x=1 | optim.lr is a value, not a group
        +seed.x=1 | seed: got {'x': 1}
        ~nope | nope: unknown key
        ~train.nope | train.nope: unknown key
        prompt=a | it is one of launch/generate.py
        run=runs/a | launch/evaluate.py
        sampling.top_p=0.5 | launch/generate.py
        num_processes=2 | launch/prepare_data.py
        cluster=h100x8 | launch/plan.py
        comparison=routers | launch/compare.py
        --lr 3e-4 | Write optim.lr=3e-4.
        --train.steps 10 | Write train.steps=10.
        --learning-rate=1 | Write optim.lr=1.
        --batch-size 4 | Write train.batch_size=4.
        --bf16 | Write train.precision=VALUE.
        --xyzzy | --xyzzy: unknown flag
        -x | -x: unknown flag
        -- | --: unknown flag
        --hydra-help | --hydra-help: unknown flag
        --shell-completion install=bash | --shell-completion: unknown flag
        --experimental-rerun x | pickle
        --cfg | allowed: job, hydra, all
        --cfg nope | --cfg: got 'nope'
        --cfg=all=3 | --cfg: got 'all=3'
        --config-dir | --config-dir: got it without a value
        --config-dir a_file | --config-dir: 'a_file' does not exist or is no folder
        --config-dir -m | --config-dir: got it without a value
        --config-name | --config-name: got it without a value
        --config-name nope | 'nope'
        --config-path | --config-path: got it without a value
        --config-path nowhere | 'nowhere'
        --package | --package: got it without a value
        --multirun=3 | --multirun: got '3'; it takes no value
        --resolve | --resolve: it goes with --cfg
        -r -m | --run, --multirun
        seed | seed: got it without a value
        '' | which has no key
        ' ' | which has no key
        =3 | got '=3', which has no key
        ==3 | got '==3', which has no key
        +=3 | got '+=3', which has no key
        ~ | a key has letters
        'seed =3' | Write seed=3.
        'my key=3' | a key has letters
        'sé ed=3' | a key has letters
        name=[a | name: cannot read the value '[a'
        name={a | name: cannot read the value '{a'
        name={{a:1} | name: cannot read the value
        name=a#b | '#' must be quoted
        name='a;b' | ';' must be quoted
        name='a&b' | '&' must be quoted
        name=é | 'é' must be quoted
        name=データ | must be quoted
        name=😀 | '😀' must be quoted
        paths.run_dir='~x' | '~' must be quoted
        'data.sources=[a=b.txt]' | Write 'data.sources=["a=b.txt"]'.
        'launcher.extra=[exclusive,mem=64G]' | Write 'launcher.extra=["exclusive","mem=64G"]'.
        'seed=int(x)' | seed: cannot read the value 'int(x)'; it must be a whole number
        'optim.lr=1,5)' | optim.lr: cannot read the value '1,5)'; it must be a number
        'train.overfit=(yes)' | train.overfit: cannot read the value '(yes)'; it must be true or
        'name=${' | refers to another key
        'name=${nope}' | name: Interpolation key 'nope' not found
        'name=${oc.env:NOPE}' | name: Environment variable 'NOPE' not found
        'name=${nope:1}' | name: Unsupported interpolation type nope
        'name=${name}' | name: Recursive interpolation
        'optim.lr=${optim.lr}' | optim.lr: Recursive interpolation
        'seed=${train}' | seed: got {'steps'
        seed=0,1 | seed: got several values (seed=0,1)
        'seed=choice(1,2)' | seed: got several values
        'seed=range(3)' | seed: got several values
        experiment=nano,micro | experiment: got several values
        name=a,b | Quote a text that has a comma
        -m 'seed=range(0)' | --multirun: what was typed makes no run
        -m 'model=glob(zzz*)' | --multirun: what was typed makes no run
        -m seed=x,0 | seed: got 'x'
        -m nope=0,1 | nope: unknown key
        -m model=nano_moe,nano_mo | model: got 'nano_mo'
        -m seed=0,1 paths.run_dir=x | paths.run_dir: got 'x' with --multirun
        -m seed=0,1 hydra.sweep.dir=/proc/x | /proc/x
        -m seed=0,1 hydra.sweep.dir= | hydra.sweep.dir: got an empty text
        -m seed=0,1 hydra.sweep.dir=null | hydra.sweep.dir: got 'null'
        -m seed=0,1 hydra.sweep.dir=a_file | a_file
        -m seed=0,1 hydra.sweeper.max_batch_size=0 | hydra.sweeper.max_batch_size: got 0
        -m seed=0,1 hydra.sweeper.max_batch_size=x | hydra.sweeper.max_batch_size: got 'x'
        -m hydra.sweeper.params=3 | hydra.sweeper.params: got '3'
        -m '+hydra.sweeper.params={nope:1}' | nope
        hydra.sweep.dir=x | hydra.sweep.dir: it is about a sweep
        hydra.sweeper.max_batch_size=2 | hydra.sweeper.max_batch_size: it is about a sweep
        hydra.mode=MULTIRUN | Several runs are made with -m
        hydra.verbose=3 | hydra.verbose: got 3
        hydra.run.dir=x | The folder of a run is paths.run_dir
        hydra/launcher=joblib | hydra.launcher: it is a setting of Hydra
        hydra=x | hydra: it is a setting of Hydra
        ++optim._target_=os.system | optim._target_: unknown key
        model=/tmp/x.yaml | --config-dir FOLDER model=x
        model=x.yaml | model: got 'x.yaml'
        model= | model: got ''
        model=null | model: got 'null'; it is a group
        optim=3 | optim: got '3'; it is a group
        model@x=nano_moe | Write model=OPTION
        +seed=3 | seed: is there already. Leave out the +
        +model=nano_moe | Leave out the +: model=nano_moe.
        experiment=mine/experiment/bare.yaml | experiment: got 'mine/experiment/bare.yaml'
        --config-dir mine experiment=bare | bare.yaml sets keys of other groups
        --config-dir mine experiment=bom | without a byte order mark
        --config-dir mine experiment=tabs | tabs.yaml, line 3: is not YAML
        --config-dir mine experiment=itself | names the file itself
        --config-dir mine experiment=latin | latin.yaml: is not UTF-8
        --config-dir mine experiment=empty | empty.yaml sets keys of other groups
        --config-dir mine experiment=list | list.yaml
        --config-dir mine experiment=folder | experiment: got 'folder'
        --config-dir mine experiment=typo | train.stepz: unknown key. Did you mean 'train.steps'?
        seed=true | seed: got True
        seed=0x10 | seed: got '0x10'
        seed=-1 | seed: got -1
        seed=1e300 | seed: got 1e+300
        seed=99999999999999999999 | seed: got a number of
        seed=null | seed: got None
        train.steps=nan | train.steps: got nan
        train.steps=inf | train.steps: got inf
        train.steps=-3 | train.steps: got -3
        train.steps=1.5 | train.steps: got 1.5
        train.overfit=yes | train.overfit: got 'yes'
        train.precision=fp16 | Write train.precision=bfloat16.
        train.precision=bf16 | Did you mean 'bfloat16'?
        train=null | train: got None
        model.rope=null | model.rope: got None
        optim.lr= | optim.lr: got ''
        optim.lr=null | optim.lr: got None
        optim.lr=-inf | optim.lr: got -inf
        optim.lr={a:1} | optim.lr: got {'a': 1}
        optim.lr=[1] | optim.lr: got [1]
        optim.lr=1e-3x | optim.lr: got '1e-3x'
        optim.beta1=1 | optim.beta1: got 1.0
        optim.schedule=linear | optim.schedule: got 'linear'
        model.num_kv_heads=3 | model.num_kv_heads: got 3
        model.num_heads=0 | model.num_heads: got 0
        model.top_k=99 | model.top_k: got 99
        model.num_layers=-2 | model.num_layers: got -2
        data.seq_len=1 | data.seq_len: got 1
        data.name=../x | data.name: got '../x'
        data.name= | data.name: got ''
        train.micro_batch_size=3 | train.micro_batch_size: got 3
        parallel=plain parallel.zero_stage=1 | parallel.zero_stage: got 1
        parallel.zero_stage=4 | parallel.zero_stage: got 4
        parallel.device=gpu | parallel.device: got 'gpu'
        parallel.expert_parallel_size=3 | parallel.expert_parallel_size: got 3
        launcher=slurms | launcher: got 'slurms'
        launcher.num_nodes=2 | launcher.num_nodes: got '2'
        launcher=slurm launcher.hostfile=x | launcher.hostfile: got 'x'
        logging.wandb=on | logging.wandb: got
        logging.project= | logging.project: got a text of 0 characters
        train.upcycle=true | train.upcycle: got true without train.init_from
        train.init_from= | train.init_from: got an empty text
        train.keep_every=7 | train.keep_every: got 7
        paths.run_dir= | paths.run_dir: got an empty text
        paths.run_dir=a_file | a_file
        paths.data_dir=a_file | a_file
        paths.data_dir=nowhere | paths.data_dir: nowhere does not exist
    """,
    "prepare_data": """
        experiment=nano | it is one of launch/train.py
        train.steps=3 | it is one of launch/train.py
        optim.lr=1 | it is one of launch/train.py
        -m seed=0,1 | --multirun: this command does one thing
        data.sources=texts | data.sources: got 'texts'
        data.sources=[] | data.sources: got an empty list
        data.sources=null | data.sources: got None
        'data.sources=[a=b]' | Write 'data.sources=["a=b"]'.
        'data.sources=[mine/ä.txt]' | Write 'data.sources=["mine/ä.txt"]'.
        data.validation_fraction=1.5 | data.validation_fraction: got 1.5
        data.validation_fraction=0 | data.validation_fraction: got 0.0
        data.max_bytes=-1 | data.max_bytes: got -1
        data.max_bytes=10GB | data.max_bytes: got '10GB'
        data.text_key= | data.text_key: got an empty text
        tokenizer=gpt2 | tokenizer: got 'gpt2'
        tokenizer.vocab_size=100 | tokenizer.vocab_size: got 100
        tokenizer.chat_template=chatml | tokenizer.chat_template: got 'chatml'
        num_processes=-1 | num_processes: got -1
        overwrite=1 | overwrite: got 1
        --overwrite | Write overwrite=VALUE.
        data.seq_len=64 | data.seq_len: got '64'
    """,
    "generate": """
        prompt=a | run: not given
        run=nowhere prompt=a | run: 'nowhere' does not exist
        run=a_file prompt=a | run: 'a_file'
        run=mine prompt=a | run: 'mine' holds no checkpoint
        model=nano_moe | it is one of launch/train.py
        sampling.temprature=1 | Did you mean 'sampling.temperature'?
        temperature=1 | Did you mean 'sampling.temperature'?
        max_tokens=5 | Did you mean 'sampling.max_new_tokens'?
        top_p=0.5 | Did you mean 'sampling.top_p'?
        seed=3 | Did you mean 'sampling.seed'?
        checkpoint=x | Did you mean 'run'?
        --temperature 0.5 | Write sampling.temperature=0.5.
        --prompt hello | Write prompt=hello.
        sampling.temperature=-1 | sampling.temperature: got -1
        sampling.temperature=nan | sampling.temperature: got nan
        sampling.top_p=0 | sampling.top_p: got 0
        sampling.top_k=-1 | sampling.top_k: got -1
        sampling.max_new_tokens=0 | sampling.max_new_tokens: got 0
        num_samples=0 | num_samples: got 0
        prompt=a prompt_ids=[1] | given together
        system=x | system: got 'x', which only a conversation uses
        device=tpu | device: got 'tpu'
        prompts_file=nowhere.jsonl prompt=a | given together
        prompt_ids=5 | prompt_ids: got 5
        prompt_ids=[a] | prompt_ids[0]: got 'a'
    """,
    "evaluate": """
        split=test | split: got 'test'
        run= | run: not given
        run=a_file | run: 'a_file'
        seq_len=1 | seq_len: got 1
        batch_size=0 | batch_size: got 0
        batch_size=x | batch_size: got 'x'
        max_tokens=-1 | max_tokens: got -1
        data_dir=x | Did you mean 'paths.data_dir'?
        -m split=train,validation | --multirun
        split=train,validation | split: got several values
    """,
    "trace": """
        run=x | x
        run= | run
        split=all | split: got 'all'
        domains=code | domains: got 'code'
        domains=[a,a] | each name may be given once
        batch_size=-1 | batch_size: got -1
        part_tokens=0 | part_tokens: got 0
        logits=maybe | logits: got 'maybe'
        paths.data_dir=x | Did you mean 'data_dir'?
        output=x | launch/generate.py
        device=gpu | device: got 'gpu'
    """,
    "convert": """
        source=nowhere target=x | nowhere
        source= | source
        source=a_file target=x | a_file
        source=mine target=mine | mine
        max_shard_bytes=1.5 | max_shard_bytes: got 1.5
        max_shard_bytes=5GB | max_shard_bytes: got '5GB'
        window=maybe | window: got 'maybe'
        --source x | Write source=x.
        optim.lr=1 | it is one of launch/train.py
    """,
    "compare": """
        comparison=router | comparison: got 'router'
        comparison= | comparison: got ''
        seeds=0 | seeds: got 0
        comparison=routers seeds=[] | seeds: got []
        comparison=routers seeds=[0,0] | seeds: got [0, 0]
        comparison=routers seeds=[-1] | seeds: got -1
        comparison=routers jobs=-1 | jobs: got -1
        jobs=x | jobs: got 'x'
        comparison=routers overrides=train.steps | overrides
        comparison=routers "overrides=a='b" | which a shell would not read
        train.steps=3 | it is one of launch/train.py
        arms=3 | arms: got 3
        -m seeds=[0],[1] | --multirun
    """,
    "plan": """
        optim.lr=3 | it is one of launch/train.py
        cluster=h100 | cluster: got 'h100'
        gpus=8 | gpus: unknown key
        num_gpus=0 | num_gpus: got 0
        num_gpus=7 | batch_size: got 1024
        tokens=0 days=3 | Add tokens=4.9e12
        tokens=-1 | tokens: got -1
        tokens=nan | tokens: got nan
        precision=float16 | precision: got 'float16'
        model.top_k=0 | model.top_k: got 0
        cluster.reserved_gib=9999 | cluster.reserved_gib: got 9999
        model=phi4 | model: got 'phi4'
    """,
    "inspect_model": """
        model=phi | model: got 'phi'
        run=nowhere | nowhere
        config_json=nowhere | nowhere
        run=a config_json=b | config_json
        write_yaml=x.yaml | write_yaml: got 'x.yaml' without config_json
        name='a/b' | name: got 'a/b'
        seq_len=-1 | seq_len: got -1
        dtype=int3 | dtype: got 'int3'
        router=top1 | router: got 'top1'
        train.steps=3 | it is one of launch/train.py
    """,
    "explore": """
        run=nowhere | nowhere
        trace=nowhere | nowhere
        port=99999 | port: got 99999
        port=x | port: got 'x'
        --port 80000000000000000000 | Write port=
        browser=no | browser: got 'no'
        prt=3 | Did you mean 'port'?
    """,
    "log_trace": """
        trace= | trace: not given
        trace=nowhere | nowhere
        logging=disabled trace=x | logging.wandb: got 'disabled'
        logging.tags=x | logging.tags: got 'x'
        run=x | launch/generate.py
    """,
    "doctor": """
        x=1 | x=1: unknown
        --verbose | --verbose: unknown
    """,
}


def _rows(told: dict[str, str]) -> list[tuple[str, str, str]]:
    return [
        (name, *(part.strip() for part in row.rsplit(" | ", 1)))
        for name, rows in told.items()
        for row in rows.strip().splitlines()
    ]  # type: ignore[misc]


LINES = _rows(TOLD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong_lines")
    (folder / "a_file").write_text("not a folder\n")
    own = folder / "mine" / "experiment"
    own.mkdir(parents=True)
    first = "# @package _global_\n"
    (own / "bare.yaml").write_text("train:\n  steps: 3\n")
    (own / "bom.yaml").write_text(f"\ufeff{first}train:\n  steps: 3\n")
    (own / "tabs.yaml").write_text(f"{first}train:\n\tsteps: 3\n")
    (own / "itself.yaml").write_text(f"{first}defaults:\n  - itself\n")
    (own / "latin.yaml").write_bytes(f"{first}name: \xe9\n".encode("latin-1"))
    (own / "empty.yaml").write_text("")
    (own / "list.yaml").write_text("- 1\n- 2\n")
    (own / "typo.yaml").write_text(f"{first}train:\n  stepz: 3\n")
    (own / "folder.yaml").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for variable in ("WORLD_SIZE", "RANK", "NOPE"):
        monkeypatch.delenv(variable, raising=False)


def _found(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


def test_there_are_two_hundred_of_them() -> None:
    assert len({(name, line) for name, line, _ in LINES}) == len(LINES) >= 200


@pytest.mark.parametrize(
    ("name", "line", "words"), LINES, ids=[f"{name} {line}" for name, line, _ in LINES]
)
def test_a_wrong_line_is_told_in_one_message_and_leaves_nothing(
    name: str, line: str, words: str, folder: Path
) -> None:
    before = _found(folder)
    # these two would work for long if they took the line; the others find nothing to work on here
    runs = name not in ("prepare_data", "compare")
    answer = typed_line.ask(name, shlex.split(line), runs=runs)
    assert words in answer.message
    assert answer.code == 2
    assert _found(folder) == before


def _offers(message: str) -> Iterator[str]:
    found = re.search(r"Write (.+?)\.( --help|$)", message)
    if found:
        yield found[1].replace("VALUE", "null")


OFFERED = [
    ("train", "--lr 3e-4", "optim.lr", 3e-4),
    ("train", "--train.steps 1000", "train.steps", 1000),
    ("train", "--learning-rate=1", "optim.lr", 1.0),
    ("train", "--batch-size=16", "train.batch_size", 16),
    ("train", "'seed =3'", "seed", 3),
    ("train", "name=é", "name", "é"),
    ("train", "name='a#b'", "name", "a#b"),
    ("train", "name='~x'", "name", "~x"),
    ("train", "name='a;b & c'", "name", "a;b & c"),
    ("train", "name=[a", "name", "[a"),
    ("train", "name='{a'", "name", "{a"),
    ("train", '''name="it's"''', "name", "it's"),
    ("train", """name='say "x" now;'""", "name", 'say "x" now;'),
    ("train", "train.sample_prompt='def f(x):'", "train.sample_prompt", "def f(x):"),
    ("train", "train.precision=fp16", "train.precision", "bfloat16"),
    (
        "train", "launcher=slurm 'launcher.extra=[exclusive,mem=64G]'", "launcher.extra",
        ("exclusive", "mem=64G"),
    ),
    ("prepare_data", "'data.sources=[a=b.txt]'", "data.sources", ("a=b.txt",)),
    ("prepare_data", "'data.sources=[ä, b#.txt]'", "data.sources", ("ä", "b#.txt")),
    ("prepare_data", "data.sources=a=b.txt", "data.sources", ("a=b.txt",)),
    ("generate", "--temperature 0.5", "sampling.temperature", 0.5),
    ("generate", "--prompt hello", "prompt", "hello"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "line", "key", "wanted"), OFFERED, ids=[o[1] for o in OFFERED])
def test_what_a_message_offers_is_taken(name: str, line: str, key: str, wanted: object) -> None:
    offers = list(_offers(typed_line.ask(name, shlex.split(line)).message))
    assert offers
    chosen = [word for word in shlex.split(line) if word.startswith("launcher=")]
    found = typed_line.ask(name, [*chosen, *shlex.split(offers[0])]).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == wanted


@pytest.mark.parametrize("typed", ["1e3", "1000.0", "1000"])
def test_a_whole_number_may_be_written_as_any_number(typed: str) -> None:
    steps = typed_line.ask("train", [f"train.steps={typed}"]).config.train.steps
    assert (steps, type(steps)) == (1000, int)


def test_what_other_projects_call_a_key_leads_to_one_that_is_there() -> None:
    import commands

    ours = {
        key.rpartition(".")[2]
        for name in commands.COMMANDS
        for key in known_keys(commands.schema_of(name))
    }
    assert not set(SYNONYMS.values()) - ours


def test_a_working_directory_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert typed_line.ask("plan", []).message.startswith("working directory: it was removed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_that_nobody_can_take_is_told(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    import subprocess
    import sys

    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(typed_line.LAUNCH / "plan.py"), *arguments], cwd=tmp_path,
            env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: cannot be written: No space left")
    assert "Traceback" not in done.stderr
