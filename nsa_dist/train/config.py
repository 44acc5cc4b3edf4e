"""What one training run is: every key of a configuration file but the launcher's own, typed and checked.

A field's name occurs in one section only, so a launcher may accept `resume=true` for `run.resume=true`. Rules between
sections are checked here as well; what depends on the number of processes is `TrainConfig.data_parallel_size`.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nsa_dist.rope_scaling import Rotary
from nsa_dist.train.refused import Refused
from nsa_dist.train.sections.data import LEAST_TASK_LENGTH, DataSection
from nsa_dist.train.sections.model import ModelSection
from nsa_dist.train.sections.nsa import NSASection
from nsa_dist.train.sections.parallel import ParallelSection
from nsa_dist.train.sections.section import Section, named
from nsa_kernels.common.sizes import round_up

VOCAB_SIZE = 256  # a token is a byte
END_OF_DOCUMENT = 0  # a byte that text does not contain


class OptimizerSection(Section):
    """AdamW with a warmup and a decay, counted in steps."""

    lr: float = Field(default=3e-3, gt=0, description="learning rate after the warmup, the highest")
    min_lr: float = Field(default=3e-4, ge=0, description="learning rate at the last step")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="of the way from lr to min_lr; constant stays at lr"
    )
    warmup_steps: int = Field(default=10, ge=0, description="steps in which the learning rate rises to lr")
    weight_decay: float = Field(default=0.1, ge=0, description="of matrices, in each step times the learning rate")
    clip_grad: float = Field(default=1.0, ge=0, description="largest norm of all gradients; 0 turns clipping off")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients, a step")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the mean of their squares, a step")
    adam_eps: float = Field(default=1e-8, gt=0, description="added to the root of the mean of squares")

    @model_validator(mode="after")
    def _check_rates(self) -> "OptimizerSection":
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr={self.min_lr:g} must be at most lr={self.lr:g}, because the schedule decays from one to the "
                f"other; take min_lr={self.lr / 10:g}"
            )
        return self


class RunSection(Section):
    """Lengths, intervals and places of one run."""

    output_dir: Path = Field(description="folder of all that the run writes", examples=["runs/my-run"])
    steps: int = Field(default=300, ge=1, description="optimizer steps of the whole run")
    sequence_length: int = Field(
        default=4096, ge=1, description="tokens of a sample; a token is a byte, or as data.tokens has them"
    )
    micro_batch_size: int = Field(default=1, ge=1, description="samples in one forward of one replica")
    global_batch_size: int = Field(default=1, ge=1, description="samples of a step, over all replicas")
    seed: int = Field(default=1234, ge=0, description="of the initial weights and of the order of samples")
    start_from: Path | None = Field(
        default=None,
        description="where the first weights come from: another run's output_dir, or a folder that nsa-dist convert or "
        "export wrote; null: they are drawn",
    )
    resume: bool = Field(default=False, description="go on from the last checkpoint in output_dir")
    overwrite: bool = Field(default=False, description="start afresh in an output_dir that holds a run, removing it")
    eval_interval: int = Field(default=50, ge=1, description="steps from one evaluation to the next")
    eval_batches: int = Field(default=4, ge=1, description="global batches of one evaluation")
    eval_far_context: int | None = Field(
        default=None,
        ge=1,
        description="evaluations also say what far context is worth: the loss of the last so many tokens of documents "
        "of three times as many, as they are and with all that is twice as far back scrambled; null: not asked",
    )
    checkpoint_interval: int = Field(default=100, ge=1, description="steps from one checkpoint to the next")
    keep_checkpoints: int = Field(default=2, ge=1, description="the newest so many; older ones are removed")
    log_interval: int = Field(default=1, ge=1, description="steps from one record of metrics to the next")
    not_finite: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="at a loss or gradient norm that is not finite: end the run; leave the step's samples out; or go "
        "back to the last checkpoint and leave them out",
    )
    not_finite_limit: int = Field(default=10, ge=1, description="steps in a row that are skipped before the run stops")
    health_interval: int = Field(default=100, ge=1, description="steps from one record of health to the next")
    replica_check_interval: int = Field(
        default=100, ge=1, description="steps from one comparison of all replicas' weights to the next"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of weights and activations; bf16 keeps fp32 weights in the optimizer"
    )

    @field_validator("output_dir", "start_from", mode="before")
    @classmethod
    def _check_folder(cls, folder: Any) -> Any:
        return None if folder is None else named(folder)

    @model_validator(mode="after")
    def _check_instructions(self) -> "RunSection":
        if self.resume and self.overwrite:
            raise ValueError(
                "resume=true goes on with the run in output_dir and overwrite=true removes it, so not both can be "
                "done; leave one of them out (in a file that has it, set it to false)"
            )
        return self


class TrainConfig(Section):
    """One whole run. Raises ValueError (pydantic's ValidationError) that says what to change."""

    run: RunSection
    model: ModelSection = ModelSection()
    nsa: NSASection = NSASection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()

    @model_validator(mode="after")
    def _check_sections_together(self) -> "TrainConfig":
        _check_sequence(self)
        _check_mtp(self)
        _check_pack_order(self)
        _check_positions(self)
        _check_task_lengths(self)
        _check_far_context(self)
        _check_model_parallel(self)
        _check_warmup(self)
        return self

    @property
    def no_rope(self) -> list[int] | None:
        """1 for each layer without positions, else 0; None where all have them."""
        freq, layers = self.nsa.no_rope_freq, self.model.num_layers
        if freq is None or isinstance(freq, list):
            return freq
        return [int(layer % freq == 0) for layer in range(1, layers + 1)]

    @property
    def task_lengths(self) -> list[int]:
        """Bytes of a task's text, the longest first; none without tasks."""
        if not self.data.tasks:
            return []
        longest = self.run.sequence_length
        given = self.data.task_lengths or [n for n in (longest >> k for k in range(4)) if n >= LEAST_TASK_LENGTH]
        return sorted(set(given), reverse=True)

    def resuming(self) -> "TrainConfig":
        """A copy that goes on from the last checkpoint if there is one: what every attempt but the first needs."""
        run = self.run.model_copy(update={"resume": True, "overwrite": False})
        return self.model_copy(update={"run": run})

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas that `world_size` processes make. ValueError when they do not come out whole."""
        per_replica = self.parallel.model_parallel_size
        if world_size % per_replica:
            raise Refused(
                f"{world_size} processes must be a multiple of tensor * pipeline * context parallel size = "
                f"{per_replica}, so that every replica of the model is whole; "
                f"start {round_up(world_size, per_replica)} processes"
            )
        replicas = world_size // per_replica
        samples = replicas * self.run.micro_batch_size
        if self.run.global_batch_size % samples:
            raise Refused(
                f"global_batch_size={self.run.global_batch_size} must be a multiple of data parallel replicas * "
                f"micro_batch_size = {replicas} * {self.run.micro_batch_size} = {samples}, so that every replica "
                f"takes as many samples; take global_batch_size={round_up(self.run.global_batch_size, samples)}"
            )
        return replicas


def _check_sequence(config: TrainConfig) -> None:
    length, size, block = config.run.sequence_length, config.parallel.context_parallel_size, config.nsa.slc_block_len
    chunks = 2 * size if config.parallel.layout == "zigzag" else size
    if length % (chunks * block):
        formula = "2 * context_parallel_size" if config.parallel.layout == "zigzag" else "context_parallel_size"
        raise ValueError(
            f"sequence_length={length} must be a multiple of {formula} * slc_block_len = {chunks} * {block} = "
            f"{chunks * block}, so that every rank holds whole selection blocks; "
            f"take sequence_length={round_up(length, chunks * block)}"
        )


def _check_mtp(config: TrainConfig) -> None:
    depths, length = config.model.num_mtp_layers, config.run.sequence_length
    if depths >= length:
        raise ValueError(
            f"mtp_num_layers={depths} must be below sequence_length={length}, because the last of these layers "
            f"predicts the token so many behind the next one, which no sample has; take mtp_num_layers=1"
        )


def _check_pack_order(config: TrainConfig) -> None:
    parallel = config.parallel
    if parallel.pack_order == "sequence":
        return
    if not config.data.is_packed or parallel.layout != "zigzag":
        raise ValueError(
            f"pack_order=documents with documents={config.data.documents} and layout={parallel.layout}: it makes a "
            f"zigzag of each packed document, and there is none; leave it out, or take documents=packed and "
            f"layout=zigzag"
        )
    if parallel.pipeline_model_parallel_size > 1 and parallel.context_parallel_size > 1:
        raise ValueError(
            f"pack_order=documents with pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}: every "
            f"micro-batch has another length with the padding of its documents, and stages hand on one length; take "
            f"pack_order=sequence"
        )


def _check_positions(config: TrainConfig) -> None:
    freq, layers, nsa = config.nsa.no_rope_freq, config.model.num_layers, config.nsa
    wrong = (freq < 1 or layers % freq) if isinstance(freq, int) else freq is not None and len(freq) != layers
    if wrong or (isinstance(freq, list) and not set(freq) <= {0, 1}):
        raise ValueError(
            f"no_rope_freq={freq} must be a divisor of num_layers={layers}, or a list of {layers} numbers, 0 or 1, one "
            f"for each layer; take no_rope_freq={layers}, and the last layer has no positions"
        )
    Rotary(nsa.rotary_base, nsa.rotary_percent).turned(config.model.head_dim)


def _check_task_lengths(config: TrainConfig) -> None:
    if not config.data.tasks:
        return
    least, most = LEAST_TASK_LENGTH, config.run.sequence_length
    wrong = [length for length in config.data.task_lengths or [most] if not least <= length <= most]
    if wrong or config.data.task_lengths == []:
        raise ValueError(
            f"task_lengths={config.data.task_lengths} with sequence_length={most}: the text of a task is {least} bytes "
            f"at least, as questions take some, and lies in one sequence; give lengths from {least} to "
            f"sequence_length, or a longer sequence_length"
        )


def _check_far_context(config: TrainConfig) -> None:
    kept, length = config.run.eval_far_context, config.run.sequence_length
    if kept is not None and 3 * kept > length:
        raise ValueError(
            f"eval_far_context={kept} with sequence_length={length}: the last {kept} tokens are judged, the {kept} "
            f"before them stay, and as many at least must lie further back; take {length // 3} at most, or a longer "
            f"sequence_length"
        )


def _check_model_parallel(config: TrainConfig) -> None:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if model.num_query_groups % tensor:
        raise ValueError(
            f"num_query_groups={model.num_query_groups} must be a multiple of tensor_model_parallel_size={tensor}, "
            f"because a key/value head is never split; take num_query_groups="
            f"{round_up(model.num_query_groups, tensor)} or a smaller tensor_model_parallel_size"
        )
    if model.ffn_hidden_size % tensor:
        raise ValueError(
            f"ffn_hidden_size={model.ffn_hidden_size} must be a multiple of tensor_model_parallel_size={tensor}, so "
            f"that every rank holds as many columns; take ffn_hidden_size={round_up(model.ffn_hidden_size, tensor)}"
        )
    _check_experts_parallel(model, tensor, parallel.sequence_parallel)
    if model.num_layers % pipeline:
        raise ValueError(
            f"num_layers={model.num_layers} must be a multiple of pipeline_model_parallel_size={pipeline}, so that "
            f"every stage holds as many layers; take num_layers={round_up(model.num_layers, pipeline)}"
        )
    if model.has_dense and parallel.context_parallel_size > 1:
        raise ValueError(
            f"attention={model.attention} has dense layers and context_parallel_size={parallel.context_parallel_size}, "
            f"but a dense layer needs all keys on every rank, which it does not gather; take context_parallel_size=1, "
            f"or attention=nsa"
        )
    if parallel.sequence_parallel and tensor == 1:
        raise ValueError(
            "sequence_parallel=true needs tensor_model_parallel_size above 1, because it shares the tokens among "
            "tensor parallel ranks; set sequence_parallel=false"
        )


def _check_experts_parallel(model: ModelSection, tensor: int, sequence_parallel: bool) -> None:
    if not model.has_experts or tensor == 1:
        return
    widths = {
        "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size or 0,
    }
    for name, width in widths.items():
        if width % tensor:
            raise ValueError(
                f"{name}={width} must be a multiple of tensor_model_parallel_size={tensor}, so that every rank holds "
                f"as many columns of each expert; take {name}={round_up(width, tensor)}"
            )
    if not sequence_parallel:
        raise ValueError(
            f"num_experts={model.num_experts} with tensor_model_parallel_size={tensor} needs sequence_parallel=true, "
            f"because Megatron-core trains experts over tensor-parallel ranks only where these share the tokens; set "
            f"sequence_parallel=true"
        )


def _check_warmup(config: TrainConfig) -> None:
    warmup, steps = config.optimizer.warmup_steps, config.run.steps
    if warmup >= steps:
        raise ValueError(
            f"warmup_steps={warmup} must be below steps={steps}, so that the decay has a length; "
            f"take warmup_steps={steps // 10}"
        )
