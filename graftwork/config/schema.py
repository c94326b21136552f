"""Every setting of every program, typed. A docstring under a field is its help text and names its unit.

RlConfig     = model + lora + output_dir + [trainer] + [inference] + [run]   `graftwork rl`
ServeConfig  = the same without a run                                      `graftwork serve`
TrainerConfig, InferenceConfig                                       one program each
SubmitConfig                                                         `graftwork submit`: what RunConfig is made from
RunConfig                                                            `control/orch.toml`: a run's whole configuration
SftConfig                                                            `graftwork sft`
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

VERIFIERS = "verifiers:"
"""What the names of the environments of the package verifiers begin with."""
ALL_LINEAR = ("all-linear",)
"""Every linear layer of the base but its head, and its experts."""

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of a TOML file: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Section):
    path: str
    """Folder of the base model (Hugging Face layout, safetensors), or a hub id; relative to the working directory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the frozen base. auto: bfloat16 on a GPU and on a CPU that multiplies it fast, else float32."""
    device: str = "auto"
    """torch device. auto: the first GPU if there is one, else the CPU."""


class EnvironmentConfig(Section):
    name: str = "reverse_text"
    """A built-in environment, `module:factory` of yours, or `verifiers:module` for one of the package verifiers."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to the environment's factory as keyword arguments; of a verifiers environment, its [env] table."""
    timeout_seconds: PositiveFloat | None = None
    """Longest time that one rollout may take before it has failed. Waiting for the model counts in a verifiers
    environment, and not in others, whose rollouts wait for one another. Not given: no limit."""
    max_concurrent: Positive = 64
    """Rollouts that are played at the same time. Of verifiers environments only: others play a whole batch together."""
    max_branches: Positive = 8
    """Sequences that one rollout may become, where its conversation branches; one that has more has failed. Of
    verifiers environments only: a rollout of others is always one sequence."""

    @property
    def is_verifiers(self) -> bool:
        return self.name.startswith(VERIFIERS)

    @property
    def sequences_max(self) -> int:
        """Most sequences that a rollout can be in a batch."""
        return self.max_branches if self.is_verifiers else 1


class SamplingConfig(Section):
    prompts_per_step: Positive = 64
    """Prompts in a batch."""
    samples_per_prompt: Positive = 8
    """Answers a prompt: one group, whose mean reward is the baseline."""
    max_tokens: Positive = 32
    """Longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Softmax temperature; the trainer divides its logits by the same number."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the sampler's log-probs are those of the cut distribution."""
    skip_equal_groups: bool = True
    """Leave groups whose rewards are all equal out of the batch. They are counted, and stay in the reward curve."""
    max_rounds: Positive = 1
    """Rounds of sampling a batch, at most. Above 1: other tasks are sampled in place of groups that were left out."""

    @model_validator(mode="after")
    def _rounds_replace_something(self) -> SamplingConfig:
        if self.max_rounds > 1 and not self.skip_equal_groups:
            raise ValueError(
                "max_rounds above 1 samples in place of groups that are left out: skip_equal_groups = true"
            )
        return self


class AdapterConfig(Section):
    rank: Positive | None = None
    """Rank of the run's adapter. Not given: the starting adapter's, else the trainer's max_rank."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Scale = alpha / rank. Not given: the scale is the starting adapter's, else alpha is 2 * rank."""
    allow_lossy: bool = False
    """A starting adapter of higher rank is cut to `rank` by SVD. It then computes another function; the report of the
    import says how much was kept. false: it is refused."""
    ignore: tuple[str, ...] = ()
    """What to leave out of the starting adapter: modules, or fields of adapter_config.json that hold full copies
    (modules_to_save). The function is then another, and the report says so."""
    adapter_name: str | None = None
    """Which adapter is meant, where the starting adapter's file holds several."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Last parts of the names of the layers that the run trains, a subset of the trainer's; the others stay as they are
    in the base, and are in no file of the run. Not given: all that the trainer has."""


class OptimizerConfig(Section):
    """torch.optim.AdamW over the run's own slot."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    """Step size after warm-up."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment, per step."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment, per step."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Fraction = 0.0
    """Decoupled weight decay, per step, times the learning rate."""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """The gradient's L2 norm is cut to this."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Linear and cosine fall from the first step on, times the warm-up, and reach 0 after decay_steps."""
    warmup_steps: NotNegative = 0
    """Steps of linear growth from 0 to learning_rate."""
    decay_steps: Positive | None = None
    """Steps that linear or cosine take to 0. It never depends on max_steps: stopping changes no curve."""

    @model_validator(mode="after")
    def _decay_is_set(self) -> OptimizerConfig:
        if (self.schedule != "constant") != (self.decay_steps is not None):
            raise ValueError("decay_steps belongs to schedule = 'linear' or 'cosine', and those need it")
        return self


class LossConfig(Section):
    normaliser: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """What the summed token losses are divided by; docs/algorithms.md has the formulas and papers."""
    constant_tokens: Positive | None = None
    """normaliser = "constant": the divisor, in tokens a sequence."""
    ratio: Literal["truncate", "mask"] = "truncate"
    """Importance ratio above ratio_max: cut to it, or the token is left out."""
    ratio_max: Annotated[float, Field(gt=0, le=1e6)] = 2.0
    """Bound on trainer probability / sampler probability of a token."""
    kl_coefficient: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of the KL divergence from the run's own starting adapter."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the run's starting adapter."""
        return self.kl_coefficient > 0

    @model_validator(mode="after")
    def _constant_is_set(self) -> LossConfig:
        if (self.normaliser == "constant") != (self.constant_tokens is not None):
            raise ValueError("constant_tokens belongs to normaliser = 'constant', which needs it")
        return self


class RetentionConfig(Section):
    """What a run keeps on disk. Batches and versions that a resume or a reader can still need are always kept."""

    checkpoints: Positive = 5
    """Newest checkpoints that are kept."""
    history: bool = False
    """Keep every batch and every published version too: for replaying and auditing the whole run."""


class EvaluationConfig(Section):
    """Held-out tasks of the run's environment, in evals.jsonl: always the same ones, one answer each."""

    interval_steps: Positive | None = None
    """Evaluate the version that the run starts from, every version whose step this divides, and the last. Not given:
    none."""
    prompts: Positive = 64
    """Tasks."""


class RunSection(Section):
    """What one run is, wherever it is written down."""

    seed: NotNegative = 0
    """Of everything random in the run: prompts, sampling, the initialisation of a fresh adapter."""
    max_steps: Positive = 20
    """The run is finished after this step. Nothing else depends on it."""
    init_adapter_path: str | None = None
    """A saved adapter (PEFT folder) that step_0 is made from: a warm start."""
    resume: bool = False
    """Go on from a checkpoint of the run's own; without one the run fails."""
    resume_step: NotNegative | None = None
    """With resume: the checkpoint to go on from. Not given: the newest."""
    environment: EnvironmentConfig = EnvironmentConfig()
    sampling: SamplingConfig = SamplingConfig()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    lag_steps: NotNegative = 0
    """Batch k is sampled from version k - 1 - lag_steps. 0 is lockstep: on-policy and reproducible end to end."""
    max_staleness_steps: NotNegative = 8
    """Rollouts of batch k with a token from a version older than k - 1 - this are dropped; if all are, it is stale."""
    checkpoint_interval_steps: Positive = 10
    """A checkpoint every this many steps, and one at the end."""
    retention: RetentionConfig = RetentionConfig()
    isolation: Literal["exact", "mixed"] = "exact"
    """exact: a micro-batch holds this run alone; bit-equal to training alone. mixed: it may share micro-batches with
    other mixed runs, which is faster for small batches; equal to rounding, and still nobody's NaN touches another."""
    stop: bool = False
    """Set by `graftwork stop`: the trainer checkpoints the run and gives its slot back."""
    max_batch_wait_seconds: PositiveFloat = 3600.0
    """Longest wait for the run's next batch before it is evicted."""
    evaluation: EvaluationConfig = EvaluationConfig()
    max_failed_share: Fraction = 0.5
    """Share of a batch's rollouts that may fail (their environment raised) before the run is ended with the reason."""
    max_mismatch: PositiveFloat | None = None
    """Largest mean difference, over a step's tokens, of trainer's and sampler's log-prob before the run is evicted. Not
    given: any."""
    max_skipped_steps: Positive = 3
    """Steps in a row whose gradient is not finite before the run is evicted."""
    inference_url: str = "http://127.0.0.1:8000"
    """Root of the OpenAI-compatible server that samples."""
    request_timeout_seconds: PositiveFloat = 1800.0
    """Longest wait for one answer of the inference server."""
    probe_tolerance: PositiveFloat | None = None
    """In nats. A server that cannot name the adapter that it holds (vLLM) is asked for the log-probs of a few tokens;
    by so much they may differ from the trainer's. Not given: 0.03 for a base in float32, else 0.3."""

    @model_validator(mode="after")
    def _settings_agree(self) -> RunSection:
        if self.resume_step is not None and not self.resume:
            raise ValueError("resume_step needs resume = true")
        if self.lag_steps > self.max_staleness_steps:
            raise ValueError("lag_steps is above max_staleness_steps: every batch would be stale")
        return self


class RunConfig(RunSection):
    """One run: `control/orch.toml`. The orchestrator and the trainer read the same file."""

    model: ModelConfig

    @property
    def tolerance_of_probes(self) -> float:
        """In nats."""
        if self.probe_tolerance is not None:
            return self.probe_tolerance
        return 0.03 if self.model.dtype == "float32" else 0.3


class SubmitConfig(RunSection):
    """`graftwork submit`: a run for a trainer that is up."""

    output_dir: str = "outputs"
    """The tree that `graftwork serve` watches."""
    model: ModelConfig | None = None
    """Not given: the base that `graftwork serve` serves."""


class NamedRun(RunSection):
    """[run] of rl.toml."""

    id: str
    """The run's folder is output_dir/run_<id>."""


class LoraConfig(Section):
    """What the trainer's and the sampler's slots must have in common."""

    max_rank: Positive = 16
    """Rank of the stacked slots; a run's rank is at most this."""
    target_modules: tuple[str, ...] = ALL_LINEAR
    """Last part of the names of the linear layers that carry an adapter; experts are named like the layers of a dense
    MLP (gate_proj, up_proj, down_proj). ["all-linear"]: every linear layer but the head."""


class ProgramSection(Section):
    threads: NotNegative = 0
    """CPU threads for matrix products. 0: one a core. Bit-equal resume needs the same number."""


class TrainerSection(ProgramSection):
    slots: Positive = 1
    """Runs that train at the same time; more wait in line."""
    init_adapter_path: str | None = None
    """The trainer's own door: every fresh run starts from this saved adapter."""
    tokens_per_micro_batch: Positive = 16384
    """Most tokens in one forward and backward pass; a longer single sequence is refused."""
    logprob_chunk_tokens: Positive = 2048
    """Loss positions whose logits exist at the same time."""
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


def shares_gpu(model: ModelConfig, inference: InferenceSection) -> bool:
    """Whether trainer and a vLLM of ours may find themselves on one GPU."""
    ours = inference.engine == "vllm" and inference.base_url is None
    return ours and model.device != "cpu" and inference.vllm.gpus is None


def refuse_crowded_gpu(model: ModelConfig, trainer: TrainerSection, inference: InferenceSection) -> None:
    """Raises ValueError when both together ask for more memory than a GPU that they share has."""
    if trainer.gpu_memory_fraction is None or not shares_gpu(model, inference):
        return
    total = trainer.gpu_memory_fraction + inference.vllm.gpu_memory_fraction
    if total > 1 - GPU_MEMORY_SPARE + 1e-9:
        raise ValueError(
            f"trainer.gpu_memory_fraction {trainer.gpu_memory_fraction:g} and inference.vllm.gpu_memory_fraction "
            f"{inference.vllm.gpu_memory_fraction:g} are {total:g} of one GPU, which has room for "
            f"{1 - GPU_MEMORY_SPARE:g}; lower one, or give vLLM a GPU of its own (inference.vllm.gpus)"
        )


def trainer_share(model: ModelConfig, trainer: TrainerSection, inference: InferenceSection) -> float | None:
    """The trainer's share of its GPU's memory: its own setting, or what a vLLM on the same GPU leaves."""
    if trainer.gpu_memory_fraction is not None or not shares_gpu(model, inference):
        return trainer.gpu_memory_fraction
    return round(1 - GPU_MEMORY_SPARE - inference.vllm.gpu_memory_fraction, 6)


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
