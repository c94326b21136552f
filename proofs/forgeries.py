"""Forgeries of a run's folder, each of which `graftwork runs verify` must find and name.

A forgery takes the folder of a good run and that of another (of as many steps), changes the first, and returns the file
or folder that a finding must name. The forger knows the formats: where a manifest would give a change away, it is made
anew. The run needs two batches, three broadcasts and two checkpoints after the first line of its chain.

Not among them, as no chain can tell: other moments of AdamW under a manifest that fits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save

from graftwork.store.chain import Link, read_chain
from graftwork.store.checkpoint import WEIGHT, Cursor
from graftwork.store.files import MANIFEST, FileFacts, Manifest, dump_json, json_line
from graftwork.store.layout import RunTree, stable_steps, step_folder

ADAPTER = "adapter_model.safetensors"
MASTERS = "trainer/rank_0.safetensors"
STATE = "trainer/state.json"


class Forgery(NamedTuple):
    """plant(tree, other) changes `tree`, and returns what a finding must name."""

    name: str
    plant: Callable[[RunTree, RunTree], Path]


# --- a forger's tools -------------------------------------------------------------------------------------------------


def steps_of(tree: RunTree, parent: Path) -> list[int]:
    """Steps that are there and have a line with a batch, ascending."""
    lines = {link.step for link in read_chain(tree)[1:]}
    return [step for step in stable_steps(parent) if step in lines]


def middle(steps: list[int]) -> int:
    return steps[len(steps) // 2]


def remake(folder: Path, **facts: Any) -> None:
    """Write the manifest of `folder` anew, so that all its hashes fit, with some of its facts changed."""
    old = Manifest.read(folder)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST]
    files = {name: FileFacts.of(folder / name) for name in sorted(names)}
    (folder / MANIFEST).write_bytes(Manifest(old.kind, {**old.facts, **facts}, files).to_bytes())


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(dump_json(value))


def write_chain(tree: RunTree, links: list[Link]) -> Path:
    tree.chain_jsonl.write_text("".join(json_line(asdict(link)) + "\n" for link in links))
    return tree.chain_jsonl


def rehash(links: list[Link], start: int) -> list[Link]:
    """The chain hashes of `links` made to fit from index `start` on."""
    made = links[:start]
    for link in links[start:]:
        assert link.batch is not None
        made.append(replace(link, chain=Cursor(made[-1].step, made[-1].chain).after(link.batch).chain))
    return made


def put_in_place(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def flip(path: Path, mask: int = 1) -> None:
    """Change the last byte; in a file of little-endian floats, 0x80 changes the sign of the last."""
    data = bytearray(path.read_bytes())
    data[-1] ^= mask
    path.write_bytes(data)


# --- batches ----------------------------------------------------------------------------------------------------------


def byte_of_a_batch(tree: RunTree, other: RunTree) -> Path:
    path = tree.batch(middle(steps_of(tree, tree.rollouts))) / "batch.safetensors"
    flip(path)
    return path


def batch_of_another_version(tree: RunTree, other: RunTree) -> Path:
    """It says that it was sampled from the version of step 0 of the chain."""
    folder, first = tree.batch(steps_of(tree, tree.rollouts)[-1]), read_chain(tree)[0]

    def change(batch: Any) -> None:
        batch["versions"][0].update(name=f"{tree.id}@{first.step}-{first.digest[:8]}", digest=first.digest)

    edit_json(folder / "batch.json", change)
    remake(folder)
    return folder


def rewards_of_a_batch(tree: RunTree, other: RunTree) -> Path:
    folder = tree.batch(middle(steps_of(tree, tree.rollouts)))
    columns = load_file(folder / "batch.safetensors")
    columns["rewards"] = np.ones_like(columns["rewards"])
    (folder / "batch.safetensors").write_bytes(save(columns))
    remake(folder)
    return folder


def swapped_batches(tree: RunTree, other: RunTree) -> Path:
    older, newer = steps_of(tree, tree.rollouts)[-2:]
    exchange(tree.batch(older), tree.batch(newer))
    return tree.batch(newer)


def renumbered_batches(tree: RunTree, other: RunTree) -> Path:
    """Swapped, and each told that it is the other."""
    older, newer = steps_of(tree, tree.rollouts)[-2:]
    exchange(tree.batch(older), tree.batch(newer))
    for step in (older, newer):
        edit_json(tree.batch(step) / "batch.json", lambda batch, step=step: batch.update(step=step))  # type: ignore[misc]
        remake(tree.batch(step), step=step)
    return tree.batch(newer)


def batch_of_another_run(tree: RunTree, other: RunTree) -> Path:
    step = steps_of(tree, tree.rollouts)[-1]
    put_in_place(other.batch(step), tree.batch(step))
    return tree.batch(step)


def renamed_batch_of_another_run(tree: RunTree, other: RunTree) -> Path:
    folder = batch_of_another_run(tree, other)
    edit_json(folder / "batch.json", lambda batch: batch.update(run=str(tree.id)))
    remake(folder, run=str(tree.id))
    return folder


def missing_batch(tree: RunTree, other: RunTree) -> Path:
    folder = tree.batch(middle(steps_of(tree, tree.rollouts)))
    shutil.rmtree(folder)
    return folder


def pending_batch_of_another_run(tree: RunTree, other: RunTree) -> Path:
    step = steps_of(tree, tree.rollouts)[-1]
    shutil.copytree(other.batch(step), tree.batch(read_chain(tree)[-1].step + 1))
    return tree.batch(read_chain(tree)[-1].step + 1)


# --- broadcasts -------------------------------------------------------------------------------------------------------


def swapped_broadcasts(tree: RunTree, other: RunTree) -> Path:
    """Each manifest says what the chain says of the step."""
    older, newer = steps_of(tree, tree.broadcasts)[-2:]
    facts = {step: Manifest.read(tree.broadcast(step)).facts for step in (older, newer)}
    exchange(tree.broadcast(older), tree.broadcast(newer))
    for step, said in facts.items():
        remake(tree.broadcast(step), **said)
    return tree.broadcast(newer)


def renumbered_broadcast(tree: RunTree, other: RunTree) -> Path:
    """An older version in the place of a newer; its manifest has the step changed and its own digest."""
    older, newer = steps_of(tree, tree.broadcasts)[-2:]
    put_in_place(tree.broadcast(older), tree.broadcast(newer))
    remake(tree.broadcast(newer), step=newer)
    return tree.broadcast(newer)


def tensors_of_a_broadcast(tree: RunTree, other: RunTree) -> Path:
    folder = tree.broadcast(middle(steps_of(tree, tree.broadcasts)))
    flip(folder / ADAPTER, 0x80)
    remake(folder)
    return folder


def scale_of_a_broadcast(tree: RunTree, other: RunTree) -> Path:
    folder = tree.broadcast(middle(steps_of(tree, tree.broadcasts)))
    edit_json(folder / "adapter_config.json", lambda config: config.update(lora_alpha=config["lora_alpha"] + 1))
    remake(folder)
    return folder


def missing_broadcast(tree: RunTree, other: RunTree) -> Path:
    folder = tree.broadcast(middle(steps_of(tree, tree.broadcasts)))
    shutil.rmtree(folder)
    return folder


def invented_broadcast(tree: RunTree, other: RunTree) -> Path:
    """A version after the last, of no batch."""
    last = read_chain(tree)[-1].step
    shutil.copytree(tree.broadcast(last), tree.broadcast(last + 1))
    remake(tree.broadcast(last + 1), step=last + 1)
    return tree.broadcast(last + 1)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def newest(tree: RunTree) -> Path:
    return tree.checkpoint(steps_of(tree, tree.checkpoints)[-1])


def checkpoint_of_another_run(tree: RunTree, other: RunTree) -> Path:
    put_in_place(step_folder(other.checkpoints, steps_of(tree, tree.checkpoints)[-1]), newest(tree))
    return newest(tree)


def renamed_checkpoint(tree: RunTree, other: RunTree) -> Path:
    """An older one under a newer step, in its manifests too."""
    older = steps_of(tree, tree.checkpoints)[-2]
    target = newest(tree)
    step = int(target.name.removeprefix("step_"))
    put_in_place(tree.checkpoint(older), target)
    remake(target / WEIGHT, step=step)
    remake(target, step=step)
    return target


def renumbered_checkpoint(tree: RunTree, other: RunTree) -> Path:
    """The same, and its trainer's state says so as well."""
    target = renamed_checkpoint(tree, other)
    step = int(target.name.removeprefix("step_"))

    def change(state: Any) -> None:
        state["step"] = state["cursor"]["step"] = step

    edit_json(target / STATE, change)
    remake(target)
    return target


def cursor_of_a_checkpoint(tree: RunTree, other: RunTree) -> Path:
    folder = newest(tree)
    edit_json(folder / STATE, lambda state: state["cursor"].update(chain="0" * 64))
    remake(folder)
    return folder / STATE


def masters_of_a_checkpoint(tree: RunTree, other: RunTree) -> Path:
    folder = newest(tree)
    tensors = load_file(folder / MASTERS)
    name = min(name for name in tensors if name.startswith("adapter."))
    tensors[name] = tensors[name] + np.float32(1)
    (folder / MASTERS).write_bytes(save(tensors))
    remake(folder)
    return folder


def masters_and_weight(tree: RunTree, other: RunTree) -> Path:
    """Those of the other run at the same step, in both places: they agree with one another."""
    folder = newest(tree)
    source = step_folder(other.checkpoints, int(folder.name.removeprefix("step_")))
    shutil.copy(source / MASTERS, folder / MASTERS)
    put_in_place(source / WEIGHT, folder / WEIGHT)
    remake(folder)
    return folder


def weight_of_another_step(tree: RunTree, other: RunTree) -> Path:
    older = steps_of(tree, tree.checkpoints)[-2]
    put_in_place(tree.checkpoint(older) / WEIGHT, newest(tree) / WEIGHT)
    remake(newest(tree))
    return newest(tree)


def optimizer_steps_of_a_checkpoint(tree: RunTree, other: RunTree) -> Path:
    folder = newest(tree)
    edit_json(folder / STATE, lambda state: state.update(optimizer_steps=state["optimizer_steps"] + 7))
    remake(folder)
    return folder / STATE


def reference_of_a_checkpoint(tree: RunTree, other: RunTree) -> Path:
    """Where the loss has a KL term: another adapter to stay close to."""
    folder = newest(tree)
    shutil.copy(folder / WEIGHT / ADAPTER, folder / "reference" / ADAPTER)
    remake(folder)
    return folder / "reference"


# --- the chain --------------------------------------------------------------------------------------------------------


def missing_line(tree: RunTree, other: RunTree) -> Path:
    links = read_chain(tree)
    return write_chain(tree, [*links[:2], *links[3:]])


def missing_last_line(tree: RunTree, other: RunTree) -> Path:
    """What the last line told of is there, and nothing that leads to it."""
    last = read_chain(tree)[-1].step
    write_chain(tree, read_chain(tree)[:-1])
    return tree.checkpoint(last) if last in stable_steps(tree.checkpoints) else tree.status_json


def missing_chain(tree: RunTree, other: RunTree) -> Path:
    tree.chain_jsonl.unlink()
    return tree.chain_jsonl


def later_start(tree: RunTree, other: RunTree) -> Path:
    """The first lines are gone, as if the run had been admitted in the middle; but the line there names a batch."""
    return write_chain(tree, read_chain(tree)[2:])


def batch_of_a_line(tree: RunTree, other: RunTree) -> Path:
    links = read_chain(tree)
    return write_chain(tree, [*links[:-1], replace(links[-1], batch="0" * 64)])


def digest_of_a_line(tree: RunTree, other: RunTree) -> Path:
    links, step = read_chain(tree), steps_of(tree, tree.broadcasts)[-1]
    write_chain(tree, [replace(link, digest="0" * 64) if link.step == step else link for link in links])
    return tree.broadcast(step)


def start_of_the_chain(tree: RunTree, other: RunTree) -> Path:
    """Another hash to begin with, and all that follow made to fit."""
    links = read_chain(tree)
    write_chain(tree, rehash([replace(links[0], chain="0" * 64), *links[1:]], 1))
    return tree.broadcast(links[-1].step)


def extra_batch(tree: RunTree, other: RunTree) -> Path:
    """A line in between, of a batch that nobody saw."""
    links = read_chain(tree)
    return write_chain(tree, [*links[:2], replace(links[2], batch="0" * 64), *links[2:]])


def extra_last_batch(tree: RunTree, other: RunTree) -> Path:
    """One more step at the end, its hash made to fit."""
    links = read_chain(tree)
    last = links[-1]
    write_chain(tree, rehash([*links, replace(last, step=last.step + 1, batch="0" * 64)], len(links)))
    return tree.batch(last.step + 1)


def rewritten_history(tree: RunTree, other: RunTree) -> Path:
    """A batch with other rewards, and every line from it on made to fit."""
    folder = rewards_of_a_batch(tree, other)
    step, digest = int(folder.name.removeprefix("step_")), Manifest.read(folder).sha256
    links = [replace(link, batch=digest) if link.step == step else link for link in read_chain(tree)]
    write_chain(tree, rehash(links, next(index for index, link in enumerate(links) if link.step == step)))
    return tree.broadcast(step)


def chain_of_another_run(tree: RunTree, other: RunTree) -> Path:
    return write_chain(tree, read_chain(other))


# --- the status -------------------------------------------------------------------------------------------------------


def step_of_the_status(tree: RunTree, other: RunTree) -> Path:
    edit_json(tree.status_json, lambda status: status.update(step=status["step"] + 3))
    return tree.status_json


def named(*plants: Callable[[RunTree, RunTree], Path]) -> list[Forgery]:
    return [Forgery(plant.__name__.replace("_", " "), plant) for plant in plants]


FORGERIES = named(
    byte_of_a_batch, batch_of_another_version, rewards_of_a_batch, swapped_batches, renumbered_batches,
    batch_of_another_run, renamed_batch_of_another_run, missing_batch, pending_batch_of_another_run,
    swapped_broadcasts, renumbered_broadcast, tensors_of_a_broadcast, scale_of_a_broadcast, missing_broadcast,
    invented_broadcast, checkpoint_of_another_run, renamed_checkpoint, renumbered_checkpoint,
    cursor_of_a_checkpoint, masters_of_a_checkpoint, masters_and_weight, weight_of_another_step,
    optimizer_steps_of_a_checkpoint, missing_line, missing_last_line, missing_chain, later_start,
    batch_of_a_line, digest_of_a_line, start_of_the_chain, extra_batch, extra_last_batch, rewritten_history,
    chain_of_another_run, step_of_the_status,
)  # fmt: skip
OF_KL_RUNS = named(reference_of_a_checkpoint)
"""For runs whose loss has a KL term."""
