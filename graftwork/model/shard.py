"""The base cut over ranks with FSDP2: each holds its rows of every tensor, and gathers a layer when it computes it.

The model is made without memory, cut, given memory for this rank's parts, and filled from the files: no rank ever
holds more of the base than its parts and the tensor that it is reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from graftwork.errors import ModelError
from graftwork.model.layers import decoder_layers
from graftwork.model.trunk import Trunk
from graftwork.model.weights import ADVICE, Reader, Source, Stored, assign, find_files, stored_tensors
from graftwork.parallel.ranks import Ranks

STACKING = {"MergeModulelist", "Concatenate"}
"""What transformers does to the experts of a file; weights.py does the same."""


def shard(model: PreTrainedModel, trunk: Trunk, path: str, ranks: Ranks, device: torch.device) -> None:
    """Cut `trunk`, the parts of `model`, and read this rank's part of its weights. The model is frozen, without memory.

    path: a folder or a hub id. Raises ModelError, on all ranks alike. All ranks take part.
    """
    assert ranks.mesh is not None
    refuse_unusual(model, trunk, path)
    stored = stored_tensors(_agreed_files(path, ranks))
    names = _names_of_tensors(model)
    shapes = {found[0]: model.state_dict()[found[0]].shape for found in names}
    aliases = {found[0]: found[1:] for found in names}
    ignored = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq")
    sources = assign(shapes, aliases, stored, ignored)
    for layer in decoder_layers(trunk.body):
        fully_shard(layer, mesh=ranks.mesh)
    fully_shard(trunk, mesh=ranks.mesh)
    _take_memory(model, trunk, aliases, device)
    differing = _fill(model, sources, stored)
    if differing := next(filter(None, ranks.gather(differing)), None):
        raise ModelError(
            f"{stored[differing].file}: {differing} should be tied to the embedding, but is another matrix"
        )


def refuse_unusual(model: PreTrainedModel, trunk: Trunk, path: str) -> None:
    """What would not be cut, or not be filled as transformers fills it. Raises ModelError."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{path}: a quantized base cannot be cut over ranks")
    ours = {id(tensor) for tensor in trunk.parameters()}
    if outside := [name for name, tensor in model.named_parameters() if id(tensor) not in ours]:
        raise ModelError(f"{path}: {outside[0]} is outside the decoder and its head; {ADVICE}")
    for transform in get_model_conversion_mapping(model):
        kinds = {type(operation).__name__ for operation in getattr(transform, "operations", ())}
        if kinds - STACKING:
            raise ModelError(f"{path}: its files are laid out otherwise ({', '.join(sorted(kinds))}); {ADVICE}")
    kept = model._keep_in_fp32_modules_strict or ()
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.float32 and any(word in name for word in kept):
            raise ModelError(f"{path}: {name} is kept in float32 by transformers; {ADVICE}")
    for path_of, module in model.named_modules():
        if "RotaryEmbedding" not in type(module).__name__ and (names := _not_in_files(module)):
            raise ModelError(
                f"{path}: nothing is known of the buffer {path_of}.{names[0]}, which no file has; {ADVICE}"
            )


def _not_in_files(module: nn.Module) -> list[str]:
    """A module's own buffers that are not saved."""
    return sorted(set(dict(module.named_buffers(recurse=False))) & module._non_persistent_buffers_set)


def _agreed_files(path: str, ranks: Ranks) -> list[Path]:
    """Looked up, or fetched, by rank 0 alone: the ranks share a machine. Raises ModelError on all."""
    if not ranks.leads:
        said, _ = ranks.hear()
    else:
        try:
            said = {"files": [str(file) for file in find_files(path)]}
        except ModelError as error:
            said = {"refused": str(error)}
        ranks.tell(said)
    if "refused" in said:
        raise ModelError(said["refused"])
    return [Path(file) for file in said["files"]]


def _names_of_tensors(model: PreTrainedModel) -> list[list[str]]:
    """The names of every tensor that files have; of a tied one, several."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return list(found.values())


def _take_memory(model: PreTrainedModel, trunk: Trunk, aliases: Mapping[str, list[str]], device: torch.device) -> None:
    """Memory for this rank's parts, with nothing in it yet, and the buffers that are computed. Raises ModelError."""
    trunk.to_empty(device=device)
    for name, others in aliases.items():  # `to_empty` takes memory once a name
        for other in others:
            path, _, leaf = other.rpartition(".")
            setattr(model.get_submodule(path), leaf, model.get_parameter(name))
    for path, module in model.named_modules():
        names = _not_in_files(module)
        for name in names:
            module.get_buffer(name).fill_(torch.nan)
        if names:
            model._init_weights(module)
        for name in names:
            if module.get_buffer(name).isnan().any():
                raise ModelError(f"{type(model).__name__}: {path}.{name} cannot be computed anew; {ADVICE}")


def _fill(model: PreTrainedModel, sources: Mapping[str, Source], stored: Mapping[str, Stored]) -> str | None:
    """The name of a tensor that should be the same as another and is not, if there is one."""
    targets: dict[str, Tensor] = model.state_dict()
    with Reader(stored) as reader:
        found = [reader.fill(targets[name], source) for name, source in sources.items()]
    return next(filter(None, found), None)
