"""What can be configured of a run: frozen dataclasses, their defaults and their checks.

A default lives here and nowhere else; the YAML files under conf/ say only what differs. Every
mistake raises ConfigError with the key's path, the value, what is allowed, and the fix. Standard
library only, so that a wrong key is reported before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath

from moe.config_checks import (
    DEVICE_NAMES,
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
    check_seed,
    divisors,
)
from moe.errors import ConfigError
from moe.launcher_config import LauncherConfig
from moe.model_config import ModelConfig
from moe.watch_config import WatchConfig

ROUTER_NAMES = ("sparsemixer", "topk")
EXPERT_BACKEND_NAMES = ("auto", "cpu", "grouped_mm", "megablocks", "reference", "triton")
ENGINE_NAMES = ("deepspeed", "plain")
SCHEDULE_NAMES = ("constant", "cosine", "wsd")
PRECISION_NAMES = ("auto", "bfloat16", "float32")
WANDB_MODES = ("disabled", "offline", "online")
# decided when the data are prepared; training reads what came of them
PREPARED_KEYS = (
    "data.sources", "data.text_key", "data.max_bad_lines", "data.max_bytes",
    "data.validation_fraction", "tokenizer.model_path", "tokenizer.train_bytes",
)  # fmt: skip
# formats in moe/data/chat_template.py
CHAT_TEMPLATE_NAMES = ("phi35", "phi3", "phi3_april", "phi3_medium", "phi3_small", "grin")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, and the losses on that choice."""

    name: str = "sparsemixer"
    mask_threshold: float = 0.01  # "router_jitter_noise" in config.json; it adds no noise
    input_jitter: float = 0.01  # training only: x * U(1 - jitter, 1 + jitter)
    renormalise: bool = False  # topk only: weights divided by their sum
    balance_coef: float = 0.01
    balance: str = "per_layer"  # or "pooled": all layers together, as in transformers
    # load counted over a rank's micro-batch, or "global": over those of all ranks in one pass.
    # Neither counts over accumulation, so train.micro_batch_size and the number of ranks change
    # this loss: of fewer tokens it is larger (2.09 of 1 window, 2.03 of 8, at a first step)
    balance_scope: str = "local"
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        check_one_of("router.name", self.name, ROUTER_NAMES)
        check_one_of("router.balance", self.balance, ("per_layer", "pooled"))
        check_one_of("router.balance_scope", self.balance_scope, ("local", "global"))
        for name in ("mask_threshold", "input_jitter"):
            check_fraction(f"router.{name}", getattr(self, name))
        for name in ("balance_coef", "z_coef"):
            check_at_least(f"router.{name}", getattr(self, name), 0.0)
        if self.renormalise and self.name == "sparsemixer":
            raise ConfigError(
                "router.renormalise: got true with router.name=sparsemixer; SparseMixer-v2 never "
                "divides its weights by their sum. Set it to false, or use router=topk."
            )


@dataclass(frozen=True)
class ExpertsConfig:
    """Which code multiplies rows by expert weights; chosen once, when the model is built."""

    backend: str = "auto"
    recompute: bool = False  # keep the layer's input only; the pre-activation is computed again

    def __post_init__(self) -> None:
        check_one_of("experts.backend", self.backend, EXPERT_BACKEND_NAMES)


@dataclass(frozen=True)
class TokenizerConfig:
    """A SentencePiece BPE, trained from the corpus or loaded, or a loaded tiktoken ranks file."""

    vocab_size: int = 4096  # with the special tokens and the padding to a multiple of 64
    model_path: str | None = None  # a tokenizer.model or *.tiktoken to load instead of training one
    train_bytes: int = 6_000_000  # of text that the trainer reads
    chat_template: str = "phi35"  # how a conversation is written

    def __post_init__(self) -> None:
        check_at_least("tokenizer.vocab_size", self.vocab_size, 512)
        check_at_least("tokenizer.train_bytes", self.train_bytes, 1000)
        check_one_of("tokenizer.chat_template", self.chat_template, CHAT_TEMPLATE_NAMES)


@dataclass(frozen=True)
class DataConfig:
    """Which text, how it is split, and how it is cut into windows."""

    name: str = "python"
    sources: tuple[str, ...] = ("builtin:python",)  # folders, files, or builtin:python
    text_key: str = "text"  # of records: the field or column that holds the text
    max_bad_lines: int = 0  # records that cannot be read and are left out before it is an error
    max_bytes: int = 0  # of text, 0 for all; each domain is cut in proportion
    validation_fraction: float = 0.05  # of each domain's documents, whole documents
    seq_len: int = 256
    num_workers: int = 0  # reader processes of a training rank
    verify: bool = True  # hash what no verified.json vouches for, before training

    def __post_init__(self) -> None:
        parts = PurePath(self.name).parts
        if not parts or ".." in parts or PurePath(self.name).is_absolute():
            raise ConfigError(
                f"data.name: got {self.name!r}; it names a folder below data/, e.g. "
                "data.name=mine. For a folder elsewhere give paths.data_dir=FOLDER."
            )
        if not self.sources:
            raise ConfigError(
                "data.sources: got an empty list; give folders, text files, files of records such "
                "as .jsonl, or builtin:python, e.g. data.sources=[my_texts]."
            )
        if not self.text_key:
            raise ConfigError("data.text_key: got an empty text; give the name of a field.")
        check_at_least("data.max_bad_lines", self.max_bad_lines, 0)
        check_at_least("data.max_bytes", self.max_bytes, 0)
        check_positive("data.validation_fraction", self.validation_fraction)
        check_fraction("data.validation_fraction", self.validation_fraction)
        check_at_least("data.seq_len", self.seq_len, 2)
        check_at_least("data.num_workers", self.num_workers, 0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule, a pure function of the step."""

    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; not norms, biases, embeddings or the router
    grad_clip: float = 1.0  # global norm; 0 turns it off
    schedule: str = "cosine"
    warmup_steps: int = 40
    decay_fraction: float = 0.2  # wsd: the last part of the run, decayed linearly
    final_lr_ratio: float = 0.1  # cosine and wsd end at lr times this

    def __post_init__(self) -> None:
        check_positive("optim.lr", self.lr)
        check_fraction("optim.beta1", self.beta1)
        check_fraction("optim.beta2", self.beta2)
        check_positive("optim.eps", self.eps)
        check_at_least("optim.weight_decay", self.weight_decay, 0.0)
        check_at_least("optim.grad_clip", self.grad_clip, 0.0)
        check_one_of("optim.schedule", self.schedule, SCHEDULE_NAMES)
        check_at_least("optim.warmup_steps", self.warmup_steps, 0)
        check_fraction("optim.decay_fraction", self.decay_fraction)
        check_fraction("optim.final_lr_ratio", self.final_lr_ratio)


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes share the work; the process count itself comes from the launcher."""

    engine: str = "deepspeed"
    zero_stage: int = 0  # 1: optimiser states partitioned, 2: gradients too, 3: parameters too
    expert_parallel_size: int = 1  # ranks in a row that together hold every expert once
    bf16_parameters: bool = False  # parameters in bfloat16, updated in float32 (ZeRO 1 to 3)
    offload_optimizer: bool = False  # optimiser states and updates on the CPU (ZeRO 1 to 3)
    device: str = "auto"  # cuda: refuse to start without; auto: CUDA where every rank has it

    def __post_init__(self) -> None:
        check_one_of("parallel.engine", self.engine, ENGINE_NAMES)
        check_one_of("parallel.device", self.device, DEVICE_NAMES)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"parallel.zero_stage: got {self.zero_stage}; allowed: 0, 1, 2, 3.")
        check_at_least("parallel.expert_parallel_size", self.expert_parallel_size, 1)
        if self.engine == "plain":
            for name, default in (("zero_stage", 0), ("expert_parallel_size", 1)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"parallel.{name}: got {getattr(self, name)} with parallel.engine='plain', "
                        f"which runs on one process; allowed there: {default}. "
                        "Use parallel=deepspeed."
                    )
        for name in ("bf16_parameters", "offload_optimizer"):
            if getattr(self, name) and self.zero_stage == 0:
                raise ConfigError(
                    f"parallel.{name}: got true with parallel.zero_stage=0, which keeps no "
                    "optimiser state apart from the parameters. Set parallel.zero_stage to 1, 2 or "
                    "3, or this key to false."
                )


@dataclass(frozen=True)
class LoggingConfig:
    """Where numbers go besides the terminal and metrics.jsonl."""

    wandb: str = "offline"  # online needs WANDB_API_KEY in the environment; never in a file
    project: str = "phimoe"
    group: str | None = None  # runs that W&B shows together: of a sweep, of a comparison
    job_type: str = "train"  # what a run is inside its group; in a comparison, its arm
    tags: tuple[str, ...] = ()
    upload_trace_mib: int = 64  # a finished run's routing/ up to this size is sent too; 0: never

    def __post_init__(self) -> None:
        check_one_of("logging.wandb", self.wandb, WANDB_MODES)
        check_at_least("logging.upload_trace_mib", self.upload_trace_mib, 0)
        for name, texts, most in (
            ("project", (self.project,), 128), ("group", (self.group or "x",), 128),
            ("job_type", (self.job_type,), 64), ("tags", self.tags, 64),
        ):  # fmt: skip
            for text in texts:
                if not 1 <= len(text) <= most:
                    raise ConfigError(
                        f"logging.{name}: got a text of {len(text)} characters; "
                        f"W&B takes 1 to {most}. Give another one."
                    )


@dataclass(frozen=True)
class LoopConfig:
    """The training loop: how long, how much at once, and what happens every so many steps."""

    steps: int = 1500
    batch_size: int = 8  # windows per optimiser step, over all ranks
    micro_batch_size: int = 8  # windows per forward pass of one rank; see router.balance_scope
    precision: str = "auto"  # bfloat16 autocast where it is measured to be faster
    activation_checkpointing: bool = False
    log_every: int = 1
    evaluate_every: int = 375  # 0: only at the end
    evaluate_tokens: int = 100_000  # whole documents up to about this many tokens; 0 for all
    save_every: int = 375  # 0: only at the end
    keep_last: int = 2  # newest checkpoints; the rules below keep others beside them
    keep_every: int = 0  # those of steps that are a multiple of this; 0: none
    keep_best: bool = False  # the one with the lowest validation loss at its step
    save_in_background: bool = True  # training goes on while a checkpoint is written
    init_from: str | None = None  # a run, checkpoint or converted model whose weights to start from
    upcycle: bool = False  # init_from is dense: every expert starts as a copy of its layer's block
    resume: str = "auto"  # auto: go on if the run folder has a checkpoint; never: refuse to
    max_skips: int = 5  # consecutive non-finite steps before the run stops
    sample_prompt: str = "def "
    sample_tokens: int = 120
    sample_temperature: float = 0.7
    overfit: bool = False  # debug: every step sees the batch of step 0
    profile: bool = False  # debug: write a torch profiler trace of steps 3 to 5
    trace_every: int = 0  # record the routing of every so many steps in routing/; 0: never
    trace_logits: bool = False  # every expert's router logit too

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "log_every", "keep_last"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("evaluate_every", "evaluate_tokens", "save_every", "sample_tokens"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        check_at_least("train.keep_every", self.keep_every, 0)
        self._check_retention()
        check_at_least("train.trace_every", self.trace_every, 0)
        check_at_least("train.max_skips", self.max_skips, 1)
        check_at_least("train.sample_temperature", self.sample_temperature, 0.0)
        if self.precision in ("float16", "fp16", "half", "16"):
            raise ConfigError(
                f"train.precision: got {self.precision!r}; float16 needs its losses scaled, which "
                "nothing here does. Write train.precision=bfloat16."
            )
        check_one_of("train.precision", self.precision, PRECISION_NAMES)
        if self.init_from == "":
            raise ConfigError(
                "train.init_from: got an empty text; give the folder of a run, a checkpoint or a "
                "converted model, or null to start from random weights."
            )
        if self.upcycle and self.init_from is None:
            raise ConfigError(
                "train.upcycle: got true without train.init_from. Give the dense model to start "
                "from there (a run, a checkpoint or a converted model), or set train.upcycle=false."
            )
        check_one_of("train.resume", self.resume, ("auto", "never"))

    def _check_retention(self) -> None:
        """Refuse rules that would keep nothing, or what nobody expects."""
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ConfigError(
                f"train.keep_every: got {self.keep_every}, and checkpoints are saved every "
                f"train.save_every={self.save_every} steps; it must be a multiple of that, which "
                "is above 0."
            )
        intervals = sorted((self.save_every, self.evaluate_every))
        if self.keep_best and (not intervals[0] or intervals[1] % intervals[0]):
            raise ConfigError(
                f"train.keep_best: got true with train.save_every={self.save_every} and "
                f"train.evaluate_every={self.evaluate_every}. A checkpoint is compared by the "
                "evaluation of its own step: both must be above 0, and one a multiple of the other."
            )


@dataclass(frozen=True)
class PathsConfig:
    """Where prepared data and runs live; relative paths start at the working directory."""

    data_dir: str = "data/python"
    run_dir: str = "runs/default"


@dataclass(frozen=True)
class PrepareConfig:
    """launch/prepare_data.py: text to token shards."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    num_processes: int = 0  # 0: one for each core
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_at_least("num_processes", self.num_processes, 0)


@dataclass(frozen=True)
class TrainConfig:
    """launch/train.py: everything that defines a run."""

    name: str = "tiny_moe"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.data.seq_len > self.model.usable_length:
            raise ConfigError(
                f"data.seq_len: got {self.data.seq_len}; model {self.model.name} takes at most "
                f"{self.model.usable_length} positions (model.max_position, and "
                "model.rope.original_max_position while model.rope.long_factor is not given). "
                f"Set data.seq_len={self.model.usable_length} or less."
            )
        if self.train.batch_size % self.train.micro_batch_size:
            raise ConfigError(
                f"train.micro_batch_size: got {self.train.micro_batch_size}; it must divide "
                f"train.batch_size={self.train.batch_size}. "
                f"Allowed: {divisors(self.train.batch_size)}."
            )
        if self.optim.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optim.warmup_steps: got {self.optim.warmup_steps}; it must be at most "
                f"train.steps={self.train.steps}."
            )
        if self.model.is_sparse and self.router.name == "sparsemixer" and self.model.top_k != 2:
            raise ConfigError(
                f"model.top_k: got {self.model.top_k}; SparseMixer-v2 is defined for 2. "
                "Use model.top_k=2 or router=topk."
            )
        if self.train.trace_every and not self.model.is_sparse:
            raise ConfigError(
                f"train.trace_every: got {self.train.trace_every} with model {self.model.name}, "
                "which has no experts, so there is no routing to record. Set it to 0."
            )
        if self.train.upcycle and not self.model.is_sparse:
            raise ConfigError(
                f"train.upcycle: got true with model {self.model.name}, which has no experts to "
                "fill. Set model.num_experts above 0, or train.upcycle=false to start a dense "
                "model from a dense one."
            )
        size = self.parallel.expert_parallel_size
        if size > 1 and not self.model.is_sparse:
            raise ConfigError(
                f"parallel.expert_parallel_size: got {size} with model {self.model.name}, which "
                "has no experts. Set it to 1."
            )
        if self.model.is_sparse and self.model.num_experts % size:
            raise ConfigError(
                f"parallel.expert_parallel_size: got {size}; it must divide "
                f"model.num_experts={self.model.num_experts}. "
                f"Allowed: {divisors(self.model.num_experts)}."
            )
        if self.parallel.bf16_parameters and self.train.precision == "float32":
            raise ConfigError(
                "parallel.bf16_parameters: got true with train.precision=float32; parameters of "
                "8 bits do not compute in 24. Set train.precision=bfloat16, or this key to false."
            )

    def num_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank in one optimiser step."""
        per_round = self.train.micro_batch_size * world_size
        if self.train.batch_size % per_round:
            raise ConfigError(
                f"train.batch_size: got {self.train.batch_size}; it must be a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size} times {world_size} ranks."
            )
        return self.train.batch_size // per_round

    def check_processes(self, world_size: int) -> None:
        """Raise ConfigError where this run cannot be shared by so many processes."""
        if self.parallel.engine == "plain" and world_size > 1:
            raise ConfigError(
                f"parallel.engine: got 'plain' with {world_size} processes; it runs on one. "
                "Use parallel=deepspeed, or start one process."
            )
        size = self.parallel.expert_parallel_size
        if world_size % size:
            fitting = [
                d for d in range(1, world_size + 1)
                if world_size % d == 0 and self.model.num_experts % d == 0
            ]  # fmt: skip
            raise ConfigError(
                f"parallel.expert_parallel_size: got {size} with {world_size} process(es), which "
                f"it does not divide; allowed here: {', '.join(map(str, fitting))}. Choose one of "
                "these, or start another number of processes."
            )
        self.num_accumulation_steps(world_size)
