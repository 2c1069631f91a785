"""Typical mistakes, made with the real commands: one message, an exit code, nothing lost.

Every case asserts that the message names the key or file, the value, what is allowed and a fix
(its words), that there is no traceback, and that no file of the workplace has changed.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config import TrainConfig
from moe.train.checkpoint import find_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
_NO_TORCH = "raise RuntimeError('torch was imported before the configuration was checked')"


@pytest.fixture(scope="session")
def poison(tmp_path_factory) -> Path:
    """A folder with a torch that cannot be imported: a quick answer must not need it."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text(_NO_TORCH)
    return folder


@pytest.fixture(scope="session")
def mistakes_place(workplace, tmp_path_factory):
    """The workplace with every wrong file that a case needs."""
    place = workplace.copy(tmp_path_factory.mktemp("mistakes")).folder
    (place / "empty").mkdir()
    (place / "a_file").write_text("not a folder\n")
    (place / "latin.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    (place / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (place / "table.arrow").write_bytes(b"ARROW1")
    (place / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (place / "few").mkdir()
    for number in range(4):
        (place / "few" / f"{number}.txt").write_text(f"A short text, number {number}.\n" * 3)
    own = place / "my_conf" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ntrain:\n  stepz: 3\n")
    (own / "not_yaml.yaml").write_text("# @package _global_\ntrain: [1\nseed: :\n")
    (place / "my_conf" / "optim").mkdir()
    (place / "my_conf" / "optim" / "fast.yaml").write_text("learning_rate: 1.0\n")
    (place / "no_run").mkdir()
    (place / "no_run" / "notes.txt").write_text("no checkpoint here\n")
    damaged = place / "runs" / "damaged"
    shutil.copytree(place / "runs" / "a", damaged)
    for tensors in damaged.glob("checkpoints/step_*/model.safetensors"):
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    return place


def expect_refusal(
    done: subprocess.CompletedProcess[str], words: list[str], *, code: int = 2
) -> None:
    """One `error: ...` message on stderr with all the words, no traceback, the exit code."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.count("error: ") == 1, done.stderr
    message = done.stderr.partition("error: ")[2]
    missing = [word for word in words if word not in message]
    assert not missing, (missing, message)


# id: (command, arguments after the usual ones of train, words of the message)
QUICK = {
    "misspelt_key": (
        "train", ["train.stepz=3"], ["train.stepz", "'train.steps'", "ground, steps, trace_every"],
    ),
    "misspelt_key_with_plus": (
        "train", ["+train.stepz=3"], ["train.stepz", "'train.steps'", "Known"],
    ),
    "misspelt_top_key": ("train", ["sead=3"], ["sead: unknown", "'seed'", "paths, "]),
    "misspelt_group": ("train", ["modl=nano_moe"], ["modl: unknown", "'model'", "--cfg job"]),
    "misspelt_group_with_plus": ("train", ["+modl=nano_moe"], ["modl: unknown", "'model'"]),
    "misspelt_option": (
        "train", ["model=nano_mo"], ["model: got 'nano_mo'", "tiny_dense", "'nano_moe'"],
    ),
    "empty_option": ("train", ["model=null"], ["model: got 'null'", "tiny_moe"]),
    "no_value": ("train", ["seed"], ["seed: got it without a value", "key=value"]),
    "unquoted_text": (
        "train", ["train.sample_prompt=def f(x):"], ["train.sample_prompt", "def f(x):", "Write '"],
    ),
    "sweep_without_m": ("train", ["seed=0,1"], ["seed: got several", "seed=0,1", "-m"]),
    "misspelt_key_in_own_yaml": (
        "train", ["--config-dir", "my_conf", "experiment=mine"],
        ["train.stepz: unknown", "'train.steps'", "my_conf/experiment/mine.yaml"],
    ),
    "misspelt_key_in_own_group_yaml": (
        "train", ["--config-dir", "my_conf", "optim=fast"],
        ["optim.learning_rate: unknown", "'optim.lr'", "my_conf/optim/fast.yaml"],
    ),
    "own_yaml_is_not_yaml": (
        "train", ["--config-dir", "my_conf", "experiment=not_yaml"],
        ["my_conf/experiment/not_yaml.yaml, line", "is not YAML", "key: value"],
    ),
    "own_folder_is_missing": (
        "train", ["--config-dir", "nowhere"], ["--config-dir: 'nowhere' does not exist", "Give"],
    ),
    "text_for_a_number": ("train", ["train.steps=many"], ["train.steps: got 'many'", "whole"]),
    "fraction_for_a_number": ("train", ["train.steps=1.5"], ["train.steps: got 1.5", "whole"]),
    "number_for_a_yes_or_no": ("train", ["train.overfit=1"], ["train.overfit: got 1", "true or"]),
    "scalar_for_a_list": (
        "prepare_data", ["data.sources=texts"],
        ["data.sources: got 'texts'", "must be a list", "=[a,b]"],
    ),
    "scalar_for_a_group": ("train", ["++optim=3"], ["optim", "3"]),
    "negative_lr": ("train", ["optim.lr=-1"], ["optim.lr: got -1.0", "above 0"]),
    "lr_is_not_a_number": ("train", ["optim.lr=nan"], ["optim.lr: got nan", "finite number"]),
    "zero_steps": ("train", ["train.steps=0"], ["train.steps: got 0", "at least 1"]),
    "huge_seed": ("train", [f"seed={2**70}"], ["seed: got a number of 71 bits", "at most 63"]),
    "target_is_refused": (
        "train", ["++model._target_=os.system"], ["model._target_: unknown", "never names code"],
    ),
    "target_of_hydra_is_refused": (
        "train", ["++hydra.launcher._target_=os.system"], ["hydra.launcher._target_", "remove it"],
    ),
    "a_pickled_run_is_refused": (
        "train", ["--experimental-rerun=a_file"], ["--experimental-rerun", "pickle", "overrides"],
    ),
    "dashes": (
        "train", ["--lr", "3e-4"], ["--lr: unknown flag", "Write optim.lr=3e-4.", "without dashes"],
    ),
    "dashes_and_equals": ("train", ["--optim.lr=3e-4"], ["--optim.lr", "optim.lr=3e-4"]),
    "unknown_variable": ("train", ["name=${oc.env:NOPE}"], ["NOPE", "not found"]),
    "missing_data": (
        "train", ["paths.data_dir=data/nope"],
        ["paths.data_dir: data/nope does not exist", "prepare_data.py"],
    ),
    "data_folder_of_something_else": (
        "train", ["paths.data_dir=few"], ["few", "manifest.json", "prepare_data.py"],
    ),
    "sequence_longer_than_the_model": (
        "train", ["data.seq_len=8192"], ["data.seq_len: got 8192", "at most 4096", "or less"],
    ),
    "heads_not_divisible": (
        "train", ["model.num_kv_heads=3"],
        ["model.num_kv_heads: got 3", "divide model.num_heads=4", "1, 2, 4"],
    ),
    "experts_not_divisible": (
        "train", ["parallel.engine=deepspeed", "parallel.expert_parallel_size=3"],
        ["parallel.expert_parallel_size: got 3", "model.num_experts=16", "1, 2, 4, 8, 16"],
    ),
    "too_many_chosen": ("train", ["model.top_k=17"], ["model.top_k: got 17", "1 to", "16"]),
    "micro_batch_does_not_divide": (
        "train", ["train.micro_batch_size=3"],
        ["train.micro_batch_size: got 3", "train.batch_size=8", "1, 2, 4, 8"],
    ),
    "run_folder_that_is_a_checkpoint": (
        "train", ["paths.run_dir=runs/a/checkpoints/step_00000004"],
        ["paths.run_dir", "is one checkpoint of a run", "The run is paths.run_dir=runs/a:"],
    ),
    "run_folder_that_holds_checkpoints": (
        "train", ["paths.run_dir=runs/a/checkpoints"],
        ["paths.run_dir", "a run's checkpoints", "The run is paths.run_dir=runs/a:"],
    ),
    "run_folder_with_other_files": (
        "train", ["paths.run_dir=no_run"], ["'no_run'", "no run of ours", "notes.txt", "another"],
    ),
    "run_folder_of_an_empty_variable": (
        "train", ["paths.run_dir="], ["paths.run_dir: got an empty text", "a new folder"],
    ),
    "a_preset_that_would_change_a_run_under_way": (
        "train", ["paths.run_dir=runs/a", "debug=overfit"],
        ["train.overfit: debug=overfit says True", "runs/a has False", "Leave debug=overfit out"],
    ),
    "text_is_chosen_when_it_is_prepared": (
        "train", ["data.sources=[nothing/here]"],
        ["data.sources: got ['nothing/here']", "prepared with ['texts']", "data.name"],
    ),
    "how_much_text_is_chosen_when_it_is_prepared": (
        "train", ["data.max_bytes=10"],
        ["data.max_bytes: got '10'", "would do nothing in launch/train.py", "data.name"],
    ),
    "a_tokenizer_file_is_chosen_when_text_is_prepared": (
        "train", ["tokenizer.model_path=nope.model"],
        ["tokenizer.model_path: got 'nope.model'", "would do nothing", "Leave this key out"],
    ),
    "tolerance_for_text_that_is_prepared": (
        "train", ["data.max_bad_lines=3"],
        ["data.max_bad_lines: got '3'", "would do nothing", "Leave this key out"],
    ),
    "negative_tolerance": (
        "prepare_data", ["data.max_bad_lines=-1"], ["data.max_bad_lines: got -1", "at least 0"],
    ),
    "conversations_as_text": (
        "prepare_data", ["data.sources=[chats.jsonl]"],
        ["chats.jsonl, line 1", "conversation", "plain text", "write its turns"],
    ),
    "table_of_another_program": (
        "prepare_data", ["data.sources=[table.arrow]"], ["table.arrow", "Parquet or JSON lines"],
    ),
    "windows_are_cut_when_they_are_read": (
        "prepare_data", ["data.seq_len=4096"],
        ["data.seq_len: got '4096'", "would do nothing", "launch/train.py"],
    ),
    "one_folder_for_a_whole_sweep": (
        "train", ["-m", "seed=0,1", "paths.run_dir=runs/mine"],
        ["paths.run_dir: got 'runs/mine' with --multirun", "hydra.sweep.dir=FOLDER"],
    ),
    "processes_without_a_launcher": (
        "train", ["launcher.processes_per_node=8"],
        ["launcher.processes_per_node: got '8'", "launcher=local does not use", "torchrun"],
    ),
    "a_scheduler_s_limit_without_it": (
        "train", ["launcher=torchrun", "launcher.time=10:00"],
        ["launcher.time: got '10:00'", "launcher=torchrun does not use", "launcher=slurm"],
    ),
    "a_home_that_nobody_has": (
        "generate", ["run=~nosuch/x", "prompt=a"],
        ["run: got '~nosuch/x'", "no home of '~nosuch'", "whole path"],
    ),
    "a_home_that_nobody_has_for_a_run": (
        "train", ["paths.run_dir='~nosuch/x'"], ["paths.run_dir: got '~nosuch/x'", "no home of"],
    ),
    "a_vocabulary_that_the_data_have_not": (
        "train", ["tokenizer=phi", "tokenizer.vocab_size=32064", "model.vocab_size=32064"],
        ["tokenizer.vocab_size: got 32064", "data/tiny", "prepared with 512", "data.name"],
    ),
    "no_run_given": ("generate", ["prompt=a"], ["run: not given", "run=runs/"]),
    "no_prompt_given": ("generate", ["run=runs/a"], ["prompt: not given", "prompt=-", "chat=true"]),
    "no_terminal_to_chat_on": ("generate", ["run=runs/a", "chat=true"], ["prompt", "no terminal"]),
    "a_run_that_does_not_exist": (
        "generate", ["run=runs/b", "prompt=a"], ["run: 'runs/b' does not exist", "runs/a"],
    ),
    "a_folder_that_is_no_run": (
        "generate", ["run=no_run", "prompt=a"],
        ["run: 'no_run' holds no checkpoint", "checkpoints/step_*", "Here are: "],
    ),
    "impossible_top_p": (
        "generate", ["run=runs/a", "prompt=a", "sampling.top_p=1.5"],
        ["sampling.top_p: got 1.5", "above 0 and at most 1"],
    ),
    "misspelt_sampling_key": (
        "generate", ["run=runs/a", "prompt=a", "sampling.temprature=1"],
        ["sampling.temprature: unknown", "'sampling.temperature'"],
    ),
    "multirun_of_generate": ("generate", ["-m", "run=runs/a", "prompt=a"], ["--multirun", "train"]),
    "unknown_split": (
        "evaluate", ["run=runs/a", "split=test"], ["split: got 'test'", "train, validation"],
    ),
    "output_in_no_folder": (
        "evaluate", ["run=runs/a", "output=nowhere/x.json"],
        ["output: got 'nowhere/x.json'", "a folder that exists"],
    ),
    "no_sources": (
        "prepare_data", ["data=files", "data.sources=[]"], ["data.sources: got an empty", "=[my_"],
    ),
}  # fmt: skip

SLOW = {
    "empty_corpus": ("prepare_data", ["data.sources=[empty]"], ["data.sources", "empty", "Give"]),
    "missing_source": (
        "prepare_data", ["data.sources=[txts]"], ["data.sources: 'txts' does not exist", "Give a"],
    ),
    "undecodable_line": (
        "prepare_data", ["data.sources=[latin.jsonl]"], ["latin.jsonl, line 2", "UTF-8", "save"],
    ),
    "line_that_is_not_json": (
        "prepare_data", ["data.sources=[broken.jsonl]"], ["broken.jsonl, line 2", "is not JSON"],
    ),
    "corpus_too_small_for_the_vocabulary": (
        "prepare_data", ["data.sources=[few]", "tokenizer.vocab_size=4096"],
        ["tokenizer.vocab_size: got 4096", "largest possible", "data.sources"],
    ),
    "data_folder_of_another_configuration": (
        "prepare_data", ["data.sources=[texts]", "data.name=other", "tokenizer.vocab_size=512"],
        ["paths.data_dir", "another configuration", "overwrite=true"],
    ),
    "data_folder_below_a_file": (
        "prepare_data", ["data.sources=[texts]", "paths.data_dir=a_file/x"],
        ["paths.data_dir", "a_file/x cannot be written", "choose a folder", "unchanged"],
    ),
    "vocabulary_larger_than_the_model": (
        "train", ["model.vocab_size=256"],
        ["model.vocab_size: got 256", "512 ids", "model.vocab_size=512 or more"],
    ),
    "sequence_longer_than_the_data": (
        "train",
        ["data.seq_len=900000", "model.max_position=1000000",
         "model.rope.original_max_position=1000000"],
        ["data.seq_len: got 900000", "900001", "or less"],
    ),
    "run_folder_below_a_file": (
        "train", ["paths.run_dir=a_file/run"], ["paths.run_dir", "a_file", "may write"],
    ),
    "resume_with_another_model": (
        "train", ["paths.run_dir=runs/a", "model.num_layers=3"],
        ["runs/a holds another run", "model.num_layers", "has 2", "asks for 3", "paths.run_dir"],
    ),
    "resume_with_another_seed": (
        "train", ["paths.run_dir=runs/a", "seed=5"],
        ["seed", "has 0", "asks for 5", "Leave out what differs"],
    ),
    "resume_with_other_data": (
        "train", ["paths.run_dir=runs/a", "data.name=other"],
        ["data/other", "not those of this run", "paths.run_dir"],
    ),
    "resume_never_on_a_used_folder": (
        "train", ["paths.run_dir=runs/a", "train.resume=never"],
        ["runs/a", "train.resume=never", "another paths.run_dir"],
    ),
    "every_checkpoint_is_damaged": (
        "train", ["paths.run_dir=runs/damaged", "train.steps=8"],
        ["runs/damaged/checkpoints", "not one of 2 checkpoints is good", "model.safetensors"],
    ),
    "generate_from_damaged_checkpoints": (
        "generate", ["run=runs/damaged", "prompt=a"],
        ["not one of 2 checkpoints is good", "model.safetensors", "SHA-256"],
    ),
    "generate_from_one_damaged_checkpoint": (
        "generate", ["run=runs/damaged/checkpoints/step_00000002", "prompt=a"],
        ["step_00000002", "model.safetensors", "SHA-256", "Restore"],
    ),
    "sample_prompt_too_long": (
        "train", ["train.sample_prompt=" + "word_" * 6000, "train.sample_tokens=5"],
        ["train.sample_prompt: got a text of", "takes 4096 at most", "train.sample_tokens=0"],
    ),
    "kernels_of_a_gpu_on_a_cpu": (
        "train", ["experts=triton"],
        ["experts.backend: got 'triton'", "on a CPU", "Use experts=auto"],
    ),
    "a_model_larger_than_the_machine": (
        "train", ["model=phi35_moe", "data.seq_len=64", "train.batch_size=1",
                  "train.micro_batch_size=1", "model.vocab_size=32064"],
        ["model: phi35_moe needs", "parameters 155.", "this machine has free", "--dry-run"],
    ),
    "stop_ids_that_the_model_has_not": (
        "generate", ["run=runs/a", "prompt=a", "stop_ids=[-5,999999]"],
        ["stop_ids: got -5", "the ids 0 to", "null for the model's own"],
    ),
    "prompt_too_long": (
        "generate", ["run=runs/a", "prompt=" + "word " * 6000], ["tokens", "takes 4096", "Shorten"],
    ),
    "message_too_long": (
        "generate", ["run=runs/a", "chat=true", "prompt=" + "word " * 6000],
        ["prompt", "takes 4096", "sampling.max_new_tokens"],
    ),
    "no_such_device": (
        "generate", ["run=runs/a", "prompt=a", "device=cuda"], ["device: got 'cuda'", "cpu, auto"],
    ),
    "data_of_another_tokenizer": (
        "evaluate", ["run=runs/a", "paths.data_dir=data/other"],
        ["paths.data_dir", "another tokenizer", "tokenizer.model_path="],
    ),
    "evaluated_sequence_too_long": (
        "evaluate", ["run=runs/a", "seq_len=5000"], ["seq_len: got 5000", "4096"],
    ),
}  # fmt: skip

_NEW_RUN = "paths.run_dir=runs/new"


def _arguments(place, name: str, arguments: list[str]) -> list[str]:
    if name != "train":
        return arguments
    usual = [
        "experiment=nano", "parallel=plain", "data.name=tiny", "tokenizer.vocab_size=512",
        "train.steps=4", "train.save_every=2", "train.evaluate_every=4", "train.precision=float32",
        "optim.warmup_steps=2", _NEW_RUN,
    ]  # fmt: skip
    keys = {a.lstrip("+~").partition("=")[0] for a in arguments}
    return [a for a in usual if a.partition("=")[0] not in keys] + arguments


@pytest.mark.parametrize("case", QUICK)
def test_a_quick_mistake_is_answered_before_torch_is_imported(
    case, command, environment, mistakes_place, poison, hashes
):
    name, arguments, words = QUICK[case]
    before = hashes(mistakes_place)
    path = os.pathsep.join((str(poison), environment["PYTHONPATH"]))
    done = command(
        name, *_arguments(mistakes_place, name, arguments), cwd=mistakes_place,
        env={"PYTHONPATH": path},
    )  # fmt: skip
    expect_refusal(done, words)
    assert hashes(mistakes_place) == before


@pytest.mark.parametrize("case", SLOW)
def test_a_mistake_that_only_the_files_show(case, command, mistakes_place, hashes):
    name, arguments, words = SLOW[case]
    before = _without_stamps(hashes(mistakes_place))
    done = command(name, *_arguments(mistakes_place, name, arguments), cwd=mistakes_place)
    expect_refusal(done, words)
    assert _without_stamps(hashes(mistakes_place)) == before


def _without_stamps(found: dict[str, str]) -> dict[str, str]:
    """Without the note that data were verified, which a copy of them does not have yet."""
    return {name: what for name, what in found.items() if not name.endswith("/verified.json")}


def test_a_misspelt_key_costs_less_than_two_seconds_of_a_processor(command, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    expect_refusal(command("train", "train.stepz=3", cwd=tmp_path), ["train.stepz"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 2.0


@pytest.mark.parametrize(
    ("variables", "arguments", "words"),
    [
        (
            {"WORLD_SIZE": "3", "RANK": "0"},
            ["parallel=deepspeed"],
            ["train.batch_size: got 8", "3 ranks", "multiple of"],
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["train.micro_batch_size=4"],
         ["parallel.engine: got 'plain' with 2 processes", "parallel=deepspeed"]),
        ({"WORLD_SIZE": "2", "RANK": "2"}, [], ["RANK: got 2", "torchrun"]),
        ({"WORLD_SIZE": "two"}, [], ["WORLD_SIZE: got 'two'", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["-m"], ["--multirun", "one process"]),
    ],
    ids=["batch_over_ranks", "plain_engine_on_two", "rank_too_high", "no_number", "multirun"],
)  # fmt: skip
def test_processes_that_do_not_fit_are_refused_before_they_wait_for_each_other(
    variables, arguments, words, command, environment, mistakes_place, poison, hashes
):
    before = hashes(mistakes_place)
    path = os.pathsep.join((str(poison), environment["PYTHONPATH"]))
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": path} | variables
    done = command(
        "train", *_arguments(mistakes_place, "train", arguments), cwd=mistakes_place,
        env=variables, timeout=60,
    )  # fmt: skip
    expect_refusal(done, words)
    assert hashes(mistakes_place) == before


def test_processes_started_by_hand_without_an_address_are_refused(command, mistakes_place):
    arguments = _arguments(mistakes_place, "train", ["parallel=deepspeed", "train.batch_size=16"])
    done = command("train", *arguments, cwd=mistakes_place, env={"WORLD_SIZE": "2", "RANK": "0"})
    expect_refusal(done, ["MASTER_ADDR: not set", "torchrun"])


def test_wandb_online_without_a_key_is_refused_without_touching_the_run(
    command, workplace, tmp_path, hashes
):
    place = workplace.copy(tmp_path).folder
    before = hashes(place / "runs" / "a" / "checkpoints")
    done = command(
        "train", *workplace.train, "logging=online", "paths.run_dir=runs/a", "train.steps=8",
        cwd=place, env={"HOME": str(tmp_path)},
    )  # fmt: skip
    expect_refusal(done, ["logging.wandb: got 'online'", "WANDB_API_KEY", "logging.wandb=offline"])
    assert hashes(place / "runs" / "a" / "checkpoints") == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is Linux's")
def test_a_run_folder_on_a_read_only_file_system_is_refused(command, workplace):
    done = command("train", *workplace.train, "paths.run_dir=/sys/phimoe/run", cwd=workplace.folder)
    expect_refusal(done, ["paths.run_dir: cannot write /sys/phimoe", "may write"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_permission_is_refused(command, workplace, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = command("train", *workplace.train, f"paths.run_dir={locked}/a", cwd=workplace.folder)
    expect_refusal(done, ["paths.run_dir: cannot write", "Permission denied", "may write"])


@pytest.mark.slow
def test_a_disk_that_is_full_while_saving_keeps_the_checkpoint_before(
    command, workplace, tmp_path, hashes
):
    place = workplace.copy(tmp_path).folder
    checkpoints = place / "runs" / "a" / "checkpoints"
    before = hashes(checkpoints)

    def little_space() -> None:
        # larger than the model's file, smaller than the optimiser's: the save breaks in the middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**20, 3 * 2**20))

    sizes = {path.name: path.stat().st_size for path in (checkpoints / "step_00000004").iterdir()}
    assert sizes["model.safetensors"] < 3 * 2**20 < sizes["optimizer.safetensors"]
    done = command(
        "train", *workplace.train, "train.steps=8", "paths.run_dir=runs/a", cwd=place,
        preexec_fn=little_space,
    )  # fmt: skip
    expect_refusal(done, ["runs/a/checkpoints", "File too large"])
    assert hashes(checkpoints) == before
    found = find_checkpoint(checkpoints, on_skip=pytest.fail)
    assert found is not None
    assert found.step == 4
    found.tensors("optimizer")
    again = command("train", *workplace.train, "train.steps=8", "paths.run_dir=runs/a", cwd=place)
    assert again.returncode == 0, again.stderr
    assert "step 4 of 8" in again.stdout


def test_a_mistake_in_an_empty_folder_leaves_it_empty_and_there(command, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("train", "prepare_data", "generate", "evaluate"):
        expect_refusal(command(name, "nonsense=1", cwd=empty), ["nonsense: unknown key"])
    expect_refusal(command("train", cwd=empty), ["paths.data_dir", "prepare_data.py"])
    assert list(empty.iterdir()) == []


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_one_line_and_a_save(workplace, tmp_path, environment):
    place = workplace.copy(tmp_path).folder
    arguments = [*workplace.train, "train.steps=100000", "paths.run_dir=runs/a"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments], cwd=place, text=True,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        try:
            said, complained = process.communicate(timeout=60)
        finally:
            process.kill()
    done = subprocess.CompletedProcess(arguments, process.returncode, said, complained)
    expect_refusal(
        done, ["stopped by SIGINT after step", "which is saved", "same paths.run_dir"], code=130
    )


@pytest.mark.parametrize(
    ("statement", "word", "code"),
    [
        ("raise KeyboardInterrupt", "interrupted", 130),
        ("import os; os.kill(os.getpid(), 15)", "ended by SIGTERM", -signal.SIGTERM),
    ],
    ids=["ctrl_c", "sigterm"],
)
@pytest.mark.parametrize("name", ["train", "prepare_data", "plan"])
def test_a_signal_while_a_command_is_imported_is_one_line(
    name, statement, word, code, environment, tmp_path
):
    """In the place of hydra, which takes most of the first second, a module that is ended."""
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra/__init__.py").write_text(statement)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py")], cwd=tmp_path, text=True,
        env=environment | {"PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}"},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    expect_refusal(done, [word], code=code)


def test_a_path_at_home_is_one_place_for_every_command(command, workplace, environment, tmp_path):
    place = workplace.copy(tmp_path / "home").folder
    (tmp_path / "elsewhere").mkdir()
    arguments = [a for a in workplace.train if not a.startswith("data.name")]
    done = command(
        "train", *arguments, "paths.data_dir='~/data/tiny'", "paths.run_dir='~/runs/a'",
        cwd=tmp_path / "elsewhere", env={"HOME": str(place)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"resume: {place / 'runs/a/checkpoints'}" in done.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["train", "prepare_data", "generate", "evaluate"])
def test_help_shows_usage_groups_and_examples_at_once(name, command, environment, poison, tmp_path):
    done = command(
        name, "--help", cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join((str(poison), environment["PYTHONPATH"]))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"usage: python launch/{name}.py" in done.stdout
    assert done.stdout.count(f"  python launch/{name}.py") >= 3
    if name == "train":
        listed = " ".join(done.stdout.split())
        assert " model grin_moe, grin_moe_tiny, micro_dense_active, " in listed
        assert ", phi3_small_8k_tiny, tiny_dense, [tiny_moe] optim " in listed
        assert max(map(len, done.stdout.splitlines())) <= 100
        assert f"  train.steps={TrainConfig().train.steps}" in done.stdout
        assert "--multirun" in done.stdout
    elif name != "prepare_data":
        assert "  device=auto" in done.stdout
        assert "--multirun" not in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "lines"),
    [
        ("train", ["experiment=nano"], ["  num_experts: 16", "  steps: 40", "  seq_len: 64"]),
        ("prepare_data", ["data.name=x"], ["  data_dir: data/${data.name}", "  name: x"]),
        ("generate", ["sampling.top_k=5"], ["  top_k: 5", "device: auto"]),
        ("evaluate", [], ["split: validation"]),
    ],
)
def test_cfg_job_prints_the_whole_configuration_and_runs_nothing(
    name, arguments, lines, command, tmp_path
):
    done = command(name, "--cfg", "job", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line in done.stdout.splitlines() for line in lines), done.stdout
    assert list(tmp_path.iterdir()) == []
