"""Every setting of every program, typed. A docstring under a field is its help text and names its unit.
What a run is stands in run.py, what several share in section.py.

RlConfig     = model + lora + output_dir + [trainer] + [inference] + [run]   `graftwork rl`
ServeConfig  = the same without a run                                      `graftwork serve`
TrainerConfig, InferenceConfig                                       one program each
SubmitConfig                                                         `graftwork submit`: what RunConfig is made from
RunConfig                                                            `control/orch.toml`: a run's whole configuration
SftConfig                                                            `graftwork sft`
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from graftwork.config.run import AdapterConfig, EnvironmentConfig, NamedRun, OptimizerConfig
from graftwork.config.section import (
    LoraConfig,
    ModelConfig,
    NotNegative,
    Positive,
    PositiveFloat,
    ProgramSection,
    Section,
)


class TrainerSection(ProgramSection):
    slots: Positive = 1
    """Runs that train at the same time; more wait in line."""
    init_adapter_path: str | None = None
    """The trainer's own door: every fresh run starts from this saved adapter."""
    tokens_per_micro_batch: Positive = 16384
    """Most tokens in one forward and backward pass, what sequences share counted once (but they may be four times as
    many with it counted in each); a longer single sequence is refused."""
    logprob_chunk_tokens: Positive = 2048
    """Loss positions whose logits exist at the same time."""
    share_prompts: bool = True
    """Compute the prompt that several answers of a micro-batch begin with once, not once an answer: equal to rounding.
    Both ways a run is the same beside other runs as alone, and resumes to the bit."""
    publish_probes: bool | None = None
    """Publish probe.json with each version, which costs a forward pass of 160 tokens: what a server that cannot name
    what it holds is asked. Not given: yes, unless `rl` or `serve` start the embedded engine, which can."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Most of a GPU's memory that the trainer takes. Not given: all, or what a vLLM on the same GPU leaves."""
    poll_interval_seconds: PositiveFloat = 0.02
    """Sleep of a pass that found nothing to do."""
    exit_when_done: bool = False
    """End when every run is finished, failed or evicted. `graftwork rl` sets it."""
    ranks: Positive = 1
    """Processes that train together, under torchrun on this machine. Started by torchrun itself: its number counts."""
    base_placement: Literal["sharded", "replicated"] = "sharded"
    """With several ranks. sharded: each holds its part of the base (FSDP2) and gathers a layer when it computes it.
    replicated: each holds the whole base, and only adapters' masters and moments are cut."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the layer again there: less memory, about a third
    more arithmetic, the same bits."""
    compile_layers: bool = False
    """torch.compile for what lies between the adapted products of a layer. Equal to rounding, not to the bit: a resume
    and isolation = "exact" are then bit-equal only as far as the compiler is."""
    rank_timeout_seconds: PositiveFloat = 300.0
    """With several ranks: how long one may lag behind the others, or be silent, before the job ends."""
    max_restarts: NotNegative = 3
    """With several ranks: how often the job is started again after one of them died; every run then goes on from its
    newest checkpoint."""


class TrainerConfig(TrainerSection):
    """`graftwork trainer`."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    output_dir: str = "outputs"
    """The tree that is watched for `run_*` folders."""


class VllmSection(Section):
    """[inference.vllm]: vLLM's server as a program of ours."""

    python: str | None = None
    """Interpreter of the environment that vLLM is installed in. Not given: the one that runs graftwork."""
    gpus: str | None = None
    """CUDA_VISIBLE_DEVICES of vLLM, such as "1" or "2,3". Not given: it shares the trainer's GPU."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of a GPU's memory that vLLM takes at its start (its --gpu-memory-utilization)."""
    start_timeout_seconds: PositiveFloat = 900.0
    """How long it may take to come up."""
    arguments: tuple[str, ...] = ()
    """More of vLLM's own flags, such as ["--tensor-parallel-size", "2"]. Those that Graftwork sets itself are
    refused."""


class InferenceSection(ProgramSection):
    engine: Literal["embedded", "vllm"] = "embedded"
    """What samples. vllm: a vLLM server, started by us."""
    base_url: str | None = None
    """Root of a server that is running already, of either kind, and has the base model's path as its name: none is
    started. It must see the run folders under the same paths."""
    vllm: VllmSection = VllmSection()
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port. 0: any free one (`graftwork rl` tells the others)."""
    max_adapters: Positive = 4
    """Adapters that are loaded at the same time."""
    max_sequences: Positive = 512
    """Sequences that are decoded at the same time; the KV cache is made for these."""
    ready_file: str | None = None
    """Written as JSON {"url", "pid"} when the server answers; removed by nobody."""
    max_model_len: Positive = 1024
    """Longest prompt and answer together, in tokens."""


class InferenceConfig(InferenceSection):
    """`graftwork inference`."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()


GPU_MEMORY_SPARE = 0.05
"""Share of a GPU that trainer and vLLM leave together: what their CUDA contexts take is in neither's account."""


TRAINER_SHARE_MIN = 0.1
"""Less of a GPU than this is of no use to a trainer that takes what vLLM leaves."""


def shares_gpu(model: ModelConfig, inference: InferenceSection) -> bool:
    """Whether trainer and a vLLM of ours may find themselves on one GPU."""
    ours = inference.engine == "vllm" and inference.base_url is None
    return ours and model.device != "cpu" and inference.vllm.gpus is None


def refuse_crowded_gpu(model: ModelConfig, trainer: TrainerSection, inference: InferenceSection) -> None:
    """Raises ValueError when both together ask for more memory than a GPU that they share has."""
    if not shares_gpu(model, inference):
        return
    least = trainer.gpu_memory_fraction or TRAINER_SHARE_MIN
    given = "" if trainer.gpu_memory_fraction else " (at least)"
    total = least + inference.vllm.gpu_memory_fraction
    if total > 1 - GPU_MEMORY_SPARE + 1e-9:
        raise ValueError(
            f"trainer.gpu_memory_fraction {least:g}{given} and inference.vllm.gpu_memory_fraction "
            f"{inference.vllm.gpu_memory_fraction:g} are {total:g} of one GPU, which has room for "
            f"{1 - GPU_MEMORY_SPARE:g}; lower one, or give vLLM a GPU of its own (inference.vllm.gpus)"
        )


def trainer_share(model: ModelConfig, trainer: TrainerSection, inference: InferenceSection) -> float | None:
    """The trainer's share of its GPU's memory: its own setting, or what a vLLM on the same GPU leaves."""
    if trainer.gpu_memory_fraction is not None or not shares_gpu(model, inference):
        return trainer.gpu_memory_fraction
    return round(1 - GPU_MEMORY_SPARE - inference.vllm.gpu_memory_fraction, 6)


def wants_probes(trainer: TrainerSection, inference: InferenceSection) -> bool:
    """Whether versions are published with a probe: as the trainer's setting says, else where vLLM, or a server that is
    not ours, may serve them."""
    ours_can_say = inference.engine == "embedded" and inference.base_url is None
    return not ours_can_say if trainer.publish_probes is None else trainer.publish_probes


class RlConfig(Section):
    """`graftwork rl`: one run with a trainer and an inference server of its own."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    output_dir: str = "outputs"
    """The tree that holds run_<id>."""
    trainer: TrainerSection = TrainerSection()
    inference: InferenceSection = InferenceSection(port=0)
    run: NamedRun

    @model_validator(mode="after")
    def _fits_the_slots(self) -> RlConfig:
        if (rank := self.run.adapter.rank) is not None and rank > self.lora.max_rank:
            raise ValueError(f"run.adapter.rank is {rank}, and lora.max_rank {self.lora.max_rank}: raise that")
        return self

    @model_validator(mode="after")
    def _fits_the_gpu(self) -> RlConfig:
        refuse_crowded_gpu(self.model, self.trainer, self.inference)
        return self


class ServeConfig(Section):
    """`graftwork serve`: one trainer and one inference server that stay up for runs that come and go."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    output_dir: str = "outputs"
    """The tree that is watched for `run_*` folders."""
    trainer: TrainerSection = TrainerSection(slots=8)
    inference: InferenceSection = InferenceSection(port=0, max_adapters=16)

    @model_validator(mode="after")
    def _room_for_every_run(self) -> ServeConfig:
        if self.inference.max_adapters < self.trainer.slots:
            raise ValueError(
                f"inference.max_adapters is {self.inference.max_adapters}, trainer.slots {self.trainer.slots}: every "
                "run that trains needs its adapter in the sampler"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_gpu(self) -> ServeConfig:
        refuse_crowded_gpu(self.model, self.trainer, self.inference)
        return self


class SftDataConfig(Section):
    environment: EnvironmentConfig | None = EnvironmentConfig()
    """Take prompts and right answers from an environment that has answers."""
    path: str | None = None
    """Or a JSONL file; each line holds {"messages": [{"role": ..., "content": ...}, ...]}."""
    dataset: str | None = None
    """Or what the package datasets reads (graftwork[datasets]): a local folder or file, or a hub id."""
    split: str = "train"
    """Of data.dataset."""
    revision: str | None = None
    """Of data.dataset on the hub: branch, tag or commit. Not given: the newest, which may change under a resume."""
    messages_column: str = "messages"
    """Of data.path or data.dataset: where the conversation is."""

    @model_validator(mode="after")
    def _one_source(self) -> SftDataConfig:
        given = [name for name in ("environment", "path", "dataset") if getattr(self, name) is not None]
        chosen = [name for name in given if name != "environment" or name in self.model_fields_set]
        if len(chosen) > 1 or not given:
            raise ValueError("give one of data.environment, data.path and data.dataset")
        if self.dataset is None and self.model_fields_set & {"split", "revision"}:
            raise ValueError("split and revision belong to data.dataset")
        return self


class SftConfig(ProgramSection):
    """`graftwork sft`: supervised fine-tuning, a run with one slot and another loss."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    output_dir: str = "outputs/sft"
    """Holds adapter/, checkpoints/, metrics.jsonl, loss.png."""
    seed: NotNegative = 0
    """Of the data order and of the fresh adapter."""
    data: SftDataConfig = SftDataConfig()
    max_steps: Positive = 100
    """Optimizer steps."""
    batch_size: Positive = 64
    """Conversations a step."""
    init_adapter_path: str | None = None
    """A saved adapter to start from."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir."""
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_interval_steps: Positive = 50
    """A checkpoint every this many steps, and one at the end."""
    tokens_per_micro_batch: Positive = 16384
    """Most tokens in one forward and backward pass."""
    logprob_chunk_tokens: Positive = 2048
    """Loss positions whose logits exist at the same time."""
