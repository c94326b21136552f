"""What one run is: `control/orch.toml` (RunConfig), read by its orchestrator and by the trainer; `[run]` of rl.toml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graftwork.config.section import Fraction, ModelConfig, NotNegative, Positive, PositiveFloat, Section

VERIFIERS = "verifiers:"
"""What the names of the environments of the package verifiers begin with."""


class EnvironmentConfig(Section):
    name: str = "reverse_text"
    """`reverse_text`, `prompts` (a file or a data set), `reasoning_gym:TASK`, `module:factory` of yours, or
    `verifiers:module` for one of the package verifiers."""
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
