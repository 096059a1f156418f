"""How long a training is, how large its batches, and what is due after which step."""

from typing import Literal

from pydantic import Field, field_validator

from ssl_vit.config import Config
from ssl_vit.data.loader import ProcessShard
from ssl_vit.errors import ExitCode, ExitError
from ssl_vit.runtime import Precision
from ssl_vit.train.anomalies import Spike
from ssl_vit.train.launch import LaunchSettings
from ssl_vit.train.logger import TrackerName
from ssl_vit.train.prepare import Attention

PICTURES_PER_RUN = 20  # pictures a run, where it is not said how often


class TrainConfig(Config):
    """How long, how large, how often."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch: int = Field(default=256, ge=1, description="global images an optimizer step")
    micro_batch: int | None = Field(
        default=None, ge=1, description="images a process takes at once (none: all its share)"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of weights, order, crops and masks")
    log_every: int = Field(default=50, ge=1, description="steps between rows of metrics")
    save_every: int = Field(default=1000, ge=1, description="steps between checkpoints")
    eval_every: int | None = Field(default=None, ge=1, description="steps between evaluations (none: at the end)")
    keep: int = Field(default=2, ge=1, description="checkpoints kept")
    precision: Precision = Field(
        default="auto",
        description="auto is bf16 on a GPU, fp32 on CPU; bf16 is autocast, weights and what blocks add to stay fp32; "
        "bf16_residual has blocks add in bf16 too; on a CPU bf16 is compared with fp32 before the first step",
    )
    attention: Attention = Field(
        default="auto",
        description="the kernel on a GPU: auto is flash, then efficient, then math",
    )
    compile: bool | None = Field(
        default=None, description="torch.compile the encoder's blocks (none: on a GPU, but not under ZeRO-3)"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only each block's input and compute the rest again: less memory, slower",
    )
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop", description="where a checkpoint cannot be written; the last one stays, the next is tried anyway"
    )
    replica_check_every: int = Field(
        default=100,
        ge=1,
        description="steps between comparisons of the weights of all processes (and with checkpoints)",
    )
    verify_step: bool = Field(
        default=False, description="compute the first micro batch twice and stop where a bit differs"
    )
    on_loss_spike: Spike = Field(
        default="warn", description="of a loss that jumps by more than 6 sigma: say so, or go back and leave it out"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Polyak averaging of the weights, such as 0.9999 (none: the last weights)"
    )
    best: str | None = Field(
        default=None, description="of which evaluated value the best checkpoint is kept, and is the result (none: last)"
    )
    timeout: float = Field(
        default=600, gt=0, description="seconds that processes wait for one another before all end, naming the missing"
    )
    visualize_every: int | None = Field(
        default=None, ge=1, description="steps between pictures of fixed images (none: twenty times a run)"
    )
    tracker: TrackerName = Field(
        default="tensorboard",
        description="where metrics go beside metrics.jsonl: files in the run; or wandb, which sends, and mlflow",
    )
    quiet: bool = Field(default=False, description="no progress; warnings stay")
    profile: bool = Field(
        default=False, description="trace a few steps: a table and a trace for ui.perfetto.dev in the run's profile/"
    )

    @field_validator("best")
    @classmethod
    def _check_best(cls, name: str | None) -> str | None:
        if name is not None and not name.startswith("val_"):
            raise ValueError("names of evaluated values begin with val_, such as val_loss or val_top1")
        return name

    def local_micro_batch(self, world: int) -> int:
        """Images a process takes at once."""
        return self.micro_batch or self.batch // world

    def launch_settings(self, clip: float | None, world: int) -> LaunchSettings:
        """What a launch file must not contradict."""
        micro = process_shard(self, 0, world).micro_batch
        values = self.precision, self.activation_checkpointing, self.timeout
        return LaunchSettings(self.batch, micro, self.batch // world // micro, clip, *values)


def process_shard(config: TrainConfig, rank: int, world: int) -> ProcessShard:
    """A process's part of a batch; raises ExitError(USAGE) where processes or micro batches do not divide it."""
    if config.batch % world:
        allowed = ", ".join(str(n) for n in range(1, config.batch + 1) if config.batch % n == 0 and n <= 4 * world)
        raise ExitError(
            ExitCode.USAGE, f"batch={config.batch} cannot be shared by {world} processes; these can: {allowed}"
        )
    micro = config.local_micro_batch(world)
    if (config.batch // world) % micro:
        text = f"micro_batch={micro} does not divide the {config.batch // world} images"
        text += f" that each of {world} processes takes"
        raise ExitError(ExitCode.USAGE, text)
    return ProcessShard(rank, world, micro)


def should_evaluate(config: TrainConfig, step: int) -> bool:
    """Whether a step is followed by an evaluation."""
    return step == config.steps or (config.eval_every is not None and step % config.eval_every == 0)


def should_log(config: TrainConfig, step: int) -> bool:
    """Whether a step is followed by a row of metrics."""
    return should_evaluate(config, step) or step % config.log_every == 0


def should_visualize(config: TrainConfig, step: int) -> bool:
    """Whether a step is followed by a picture."""
    return (
        step == config.steps
        or step % (config.visualize_every or max(config.log_every, -(-config.steps // PICTURES_PER_RUN))) == 0
    )
