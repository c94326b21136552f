"""The `graftwork` command: one short function a command, in the order in which a story uses them.

Programs are imported inside the commands: `graftwork --help` and `graftwork orchestrator` never load torch.
Exit codes: 0 done, 1 a GraftworkError (one line on stderr, no traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graftwork import logs
from graftwork.cli_adapter import (
    Alpha,
    Base,
    Format,
    Ignore,
    Json,
    Lossy,
    Name,
    Rank,
    Seed,
    Targets,
    adapter_app,
    import_options,
)
from graftwork.config.load import load
from graftwork.config.run import SubmitConfig
from graftwork.config.schema import InferenceConfig, RlConfig, ServeConfig, SftConfig, TrainerConfig
from graftwork.errors import ConfigError, GraftworkError, RankLost
from graftwork.programs.loading import loading
from graftwork.programs.processes import end_with_parent

THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}
"""Idle OpenMP threads sleep instead of spinning: three programs share the cores, and spinning can cost 10x. GNU's spin
for some 0.1 ms first, as between two operations of a pass: to be woken for each can cost half of a pass's speed."""

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""A command with these takes every setting of its file as a flag as well."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train LoRA adapters with reinforcement learning: many adapters on one frozen base model.",
    epilog="After FILE, any of its settings can be given as --key value; `graftwork config rl` lists them.",
)

app.add_typer(adapter_app, name="adapter")
runs_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(runs_app, name="runs")

File = Annotated[Path, typer.Argument(help="Configuration (TOML). Settings follow it as --key value.")]
Steps = Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after this step.")]
Engine = Annotated[
    str | None, typer.Option("--inference", help="What samples (inference.engine): embedded or vllm.", metavar="ENGINE")
]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes of the trainer (trainer.ranks).")]


def _choose_log_format(value: str | None) -> None:
    if value is not None:
        os.environ[logs.VARIABLE] = value
        logs.set_up(anew=True)


LogFormat = Annotated[
    str | None,
    typer.Option(
        callback=_choose_log_format,
        help="text, or json: one object a line. Also of what this starts. Default: $GRAFTWORK_LOG_FORMAT, or text.",
    ),
]


def main() -> None:
    """Entry point of `graftwork` and of `python -m graftwork`."""
    for name, value in {**THREAD_ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    end_with_parent()
    try:
        logs.set_up()
        app(prog_name="graftwork")
    except (GraftworkError, RankLost) as error:
        logs.say_error(error)
        sys.exit(1)


@app.command(context_settings=SETTINGS)
def sft(
    ctx: typer.Context,
    file: File,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in output_dir.")] = False,
    max_steps: Steps = None,
    log_format: LogFormat = None,
) -> None:
    """Fine-tune an adapter on right answers."""
    given = [*(["--resume", "true"] if resume else []), *(["--max_steps", str(max_steps)] if max_steps else [])]
    config = load(SftConfig, _file(file), [*given, *ctx.args])
    with loading():
        from graftwork.programs import sft as program

    program.main(config)


@app.command(context_settings=SETTINGS)
def rl(
    ctx: typer.Context,
    file: File,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    resume_step: Annotated[int | None, typer.Option(min=0, help="Go on from here; later steps go to .trash.")] = None,
    max_steps: Steps = None,
    ranks: Ranks = None,
    inference: Engine = None,
    log_format: LogFormat = None,
) -> None:
    """Improve an adapter by reinforcement learning: starts inference, trainer and orchestrator, and watches them."""
    given = [*(["--run.max_steps", str(max_steps)] if max_steps else []), *_shortcuts(ranks, inference)]
    config = load(RlConfig, _file(file), [*given, *ctx.args])
    from graftwork.programs import rl as program

    program.main(config, resume=resume, resume_step=resume_step)


def _shortcuts(ranks: int | None, engine: str | None) -> list[str]:
    """Short flags, as the settings that they stand for."""
    pairs = {"--trainer.ranks": ranks, "--inference.engine": engine}
    return [word for flag, value in pairs.items() if value is not None for word in (flag, str(value))]


@app.command(context_settings=SETTINGS)
def serve(
    ctx: typer.Context, file: File, ranks: Ranks = None, inference: Engine = None, log_format: LogFormat = None
) -> None:
    """Keep a trainer and an inference server up for runs that come and go."""
    config = load(ServeConfig, _file(file), [*_shortcuts(ranks, inference), *ctx.args])
    from graftwork.programs import serve as program

    program.main(config)


Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Of the runs: the part after run_ of their folders.")]
OutputDir = Annotated[str, typer.Option("--output-dir", help="The tree that `graftwork serve` watches.")]
AnyOutputDir = Annotated[str | None, typer.Option("--output-dir", help="The tree of the runs. Default: outputs.")]


@app.command(context_settings=SETTINGS)
def submit(
    ctx: typer.Context,
    file: File,
    id: Annotated[list[str], typer.Option("--id", help="Of the run. Repeatable: as many runs of the same settings.")],
    output_dir: AnyOutputDir = None,
    log_format: LogFormat = None,
) -> None:
    """Make runs of FILE's settings for a trainer that is up, and start their orchestrators."""
    given = [] if output_dir is None else ["--output_dir", output_dir]
    config = load(SubmitConfig, _file(file), [*given, *ctx.args])
    from graftwork.programs import submit as program

    program.submit(config, id)


@app.command()
def stop(
    ids: Ids,
    output_dir: OutputDir = "outputs",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until the runs have stopped. 0: do not.")] = 60,
) -> None:
    """Have runs checkpointed and their slots given back; `graftwork resume` takes them on."""
    from graftwork.programs import submit as program

    program.stop(output_dir, ids, wait)


@app.command()
def resume(
    ids: Ids,
    output_dir: OutputDir = "outputs",
    max_steps: Annotated[int | None, typer.Option(min=1, help="A new last step. Default: as it was.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Go back to this checkpoint. Default: the newest.")] = None,
    log_format: LogFormat = None,
) -> None:
    """Take runs on that were stopped, failed, were evicted, or are finished (with a higher --max-steps)."""
    from graftwork.programs import submit as program

    program.resume(output_dir, ids, max_steps, step)


@app.command(context_settings=SETTINGS)
def trainer(ctx: typer.Context, file: File, log_format: LogFormat = None) -> None:
    """Train every run in output_dir that has a control/orch.toml."""
    config = load(TrainerConfig, _file(file), ctx.args)
    with loading():
        from graftwork.programs import trainer as program

    program.main(config)


@app.command(context_settings=SETTINGS)
def inference(ctx: typer.Context, file: File, log_format: LogFormat = None) -> None:
    """Serve the base model and its adapters over HTTP (OpenAI-compatible)."""
    config = load(InferenceConfig, _file(file), ctx.args)
    if config.base_url is not None:
        raise ConfigError(f"base_url says that a server runs at {config.base_url} already: there is nothing to start")
    if config.engine == "vllm":
        from graftwork.programs import vllm

        return vllm.main(config)
    with loading():
        from graftwork.programs import inference as program

    return program.main(config)


@app.command()
def orchestrator(
    run_dir: Annotated[Path, typer.Argument(help="outputs/run_<id>, which holds control/orch.toml.")],
    log_format: LogFormat = None,
) -> None:
    """Sample the batches of one run."""
    from graftwork.programs import orchestrator as program

    program.main(run_dir)


@runs_app.callback()
def runs(
    ctx: typer.Context,
    output_dir: OutputDir = "outputs",
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Which runs there are, how they do, and why those wait that wait."""
    ctx.obj = output_dir
    if ctx.invoked_subcommand is None:
        from graftwork.programs import runs as program

        program.main(output_dir, watch=watch, as_json=as_json)


@runs_app.command(name="export")
def runs_export(
    ctx: typer.Context,
    id: Annotated[str, typer.Argument(metavar="ID")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    step: Annotated[int | None, typer.Option(min=0, help="Of the adapter. Default: the newest that is there.")] = None,
    format: Format = "peft",
    output_dir: AnyOutputDir = None,
) -> None:
    """Write a run's adapter after a step as a PEFT folder."""
    from graftwork.programs.runs import adapter_of, run_of

    step, folder = adapter_of(run_of(output_dir or ctx.obj, id), step)
    from graftwork.programs import adapter as program

    print("\n".join([*program.export(folder, out, format), f"run {id}: the adapter after step {step}"]))


@runs_app.command(name="verify")
def runs_verify(ctx: typer.Context, ids: Ids, output_dir: AnyOutputDir = None, as_json: Json = False) -> None:
    """Recompute what the runs' files must hold, and compare. Exit code 1: something is not as it should be."""
    from graftwork.programs.runs import run_of, verify_lines
    from graftwork.programs.verify import verify_run

    found = [asdict(verify_run(run_of(output_dir or ctx.obj, id))) for id in ids]
    print(json.dumps(found) if as_json else "\n".join(verify_lines(found)))
    raise typer.Exit(any(report["findings"] for report in found))


Logs = Annotated[
    list[str], typer.Argument(metavar="RUN", help="The run's id, or the path of its folder or of a metrics.jsonl.")
]


@app.command()
def plot(
    runs: Logs,
    output_dir: OutputDir = "outputs",
    out: Annotated[
        Path | None, typer.Option(help="A .png. Default: plot.png beside the run's logs; of several, in --output-dir.")
    ] = None,
) -> None:
    """Draw the curves of a run, or of several in one picture."""
    from graftwork.programs import plot as program

    print(program.main(output_dir, runs, out))


@app.command()
def monitor(
    runs: Logs,
    to: Annotated[str, typer.Option(help="tensorboard, wandb (offline) or trackio (local).")],
    output_dir: OutputDir = "outputs",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the runs have ended, or Ctrl-C.")] = False,
) -> None:
    """Forward the metrics of runs to TensorBoard, W&B or trackio."""
    from graftwork.programs import monitor as program

    program.main(output_dir, runs, to, follow=follow)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A saved adapter (PEFT), or a trainer's checkpoint.")],
    target: Annotated[Path, typer.Argument(help="outputs/run_<id>, which gets checkpoints/step_0; or ADAPTER_DIR.")],
    base: Base = None,
    trainer_json: Annotated[
        Path | None, typer.Option(help="Describes the slots. Default: trainer.json beside RUN_DIR, if there is one.")
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    targets: Targets = None,
    allow_lossy: Lossy = False,
    ignore: Ignore = None,
    adapter: Name = None,
    seed: Seed = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Files that the trainer's state is cut into.")] = 1,
    rank_format: Annotated[
        str, typer.Option(help="safetensors, or pt: for trainers of the older kind.")
    ] = "safetensors",
    format: Format = "peft",
    as_json: Json = False,
) -> None:
    """Make a run's step_0 from a saved adapter; or an adapter from a checkpoint."""
    beside = target.absolute().parent / "trainer.json"
    if trainer_json is not None and not trainer_json.is_file():
        raise ConfigError(f"--trainer-json: no file at {trainer_json}")
    if rank_format not in ("safetensors", "pt"):
        raise ConfigError(f"--rank-format {rank_format} is not known; safetensors or pt")
    from graftwork.programs import adapter as program

    options = import_options(base, rank, alpha, targets, allow_lossy, ignore, adapter, seed)
    slots = trainer_json or (beside if beside.is_file() else None)
    done = program.convert(source, target, options, slots, ranks, rank_format, format)  # type: ignore[arg-type]
    about = {"folder": str(target), "format": format}
    report = {**about, "said": done} if isinstance(done, list) else {**done.report, "folder": str(done.folder)}
    lines = done if isinstance(done, list) else done.lines()
    print(json.dumps(report) if as_json else "\n".join(lines))


@app.command(name="eval", context_settings=SETTINGS)
def evaluate(
    ctx: typer.Context,
    file: File,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a saved adapter. Not given: the bare base.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts, one answer each.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts and of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")] = False,
) -> None:
    """Mean reward on held-out prompts, sampled as FILE's [run] says."""
    config = load(RlConfig, _file(file), ctx.args)
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"--adapter: no folder at {adapter}")
    with loading():
        from graftwork.programs import evaluate as program

    reward = program.main(config, adapter, prompts, seed)
    if as_json:
        about = {"adapter": str(adapter) if adapter else None, "prompts": prompts, "seed": seed}
        print(json.dumps({**about, "reward": reward}))
    else:
        print(f"mean reward {reward:.4f} of {adapter or 'the bare base'} on {prompts} held-out prompts (seed {seed})")


@app.command(name="config")
def list_settings(
    section: Annotated[str, typer.Argument(help="sft, rl, serve, submit, trainer, inference, or run (orch.toml).")],
) -> None:
    """List every setting of a configuration file: type, default, meaning, unit."""
    from graftwork.programs.settings import describe_section

    print("\n".join(describe_section(section)))


def _file(path: Path) -> Path:
    """FILE itself, refused when a flag stands in its place."""
    if str(path).startswith("-"):
        raise ConfigError(f"{path} stands where the configuration file belongs: FILE first, then --key value")
    return path
