"""`control/orch.toml`, which says all that a run is, and the status that answers to it."""

from __future__ import annotations

from graftwork.config.load import build, digest, dump, parse_toml
from graftwork.config.run import RunConfig
from graftwork.errors import ConfigError, Damaged
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import TERMINAL, Status, read_status


def read_orch_toml(tree: RunTree) -> tuple[RunConfig, str]:
    """The run's configuration, and the digest that names this state of the file. Raises ConfigError."""
    try:
        data = tree.orch_toml.read_bytes()
        text = data.decode()
    except FileNotFoundError:
        raise ConfigError(
            f"run {tree.id}: it has no {tree.orch_toml}; `graftwork submit FILE --id {tree.id}` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run {tree.id}: cannot read {tree.orch_toml}: {error}") from None
    return build(RunConfig, parse_toml(text, str(tree.orch_toml)), source=str(tree.orch_toml)), digest(data)


def asks_to_stop(tree: RunTree) -> bool:
    """Whether the orch.toml of now has stop = true; one that cannot be read asks for nothing."""
    try:
        return read_orch_toml(tree)[0].stop
    except ConfigError:
        return False


def publish_orch_toml(disk: Disk, tree: RunTree, config: RunConfig) -> str:
    """Publish control/orch.toml; return its digest, by which everyone knows this start.

    The status of an earlier start under the very same bytes is set aside first: it would settle this one too.
    """
    data = dump(config)
    status = status_of(tree)
    if status is not None and status.orch_digest == digest(data):
        disk.quarantine(tree.status_json, tree.trash)
    disk.publish_file(tree.orch_toml, data)
    return digest(data)


def is_settled(tree: RunTree) -> bool:
    """Whether the run ended under the orch.toml that is there now."""
    status = status_of(tree)
    if status is None or status.state not in TERMINAL:
        return False
    try:
        return status.orch_digest == digest(tree.orch_toml.read_bytes())
    except FileNotFoundError:  # removed meanwhile: nothing asks for anything
        return True


def is_wanted(tree: RunTree) -> bool:
    """Whether an orch.toml is there that asks a trainer for something: to train the run, or to stop it."""
    return tree.orch_toml.exists() and not is_settled(tree)


def status_of(tree: RunTree) -> Status | None:
    """A run's status; None while there is none that can be read."""
    try:
        return read_status(tree)
    except Damaged:
        return None
