"""What identifies a base: its configuration and a sample of its weights. Not a proof against forgery."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from graftwork.parallel.parts import local, own_part
from graftwork.parallel.ranks import Ranks

SAMPLES = 4096
"""About as many numbers of each tensor are looked at."""

ARCHITECTURE = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def fingerprint(model: PreTrainedModel, ranks: Ranks) -> str:
    """sha256 over the architecture's numbers and evenly spaced elements of every tensor: cheap for any size, and the
    same whether the base was loaded in float32 or bfloat16, whole or cut over ranks. All ranks take part."""
    tensors = sorted(model.state_dict().items())
    samples = [_own_sample(tensor).numpy().tobytes() for _, tensor in tensors if _is_ours(tensor, ranks)]
    lengths = iter(len(sample) for sample in samples)
    own = [next(lengths) if _is_ours(tensor, ranks) else 0 for _, tensor in tensors]
    counts, parts = ranks.gather(own), [memoryview(part) for part in ranks.gather_bytes(b"".join(samples))]
    digest = hashlib.sha256(json.dumps({k: getattr(model.config, k, None) for k in ARCHITECTURE}).encode())
    for index, (name, tensor) in enumerate(tensors):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for rank, part in enumerate(parts):
            count = counts[rank][index]
            digest.update(part[:count])
            parts[rank] = part[count:]
    return digest.hexdigest()


def _is_ours(tensor: Tensor, ranks: Ranks) -> bool:
    """Of a tensor that every rank holds as a whole, rank 0 speaks."""
    return ranks.leads or isinstance(tensor, DTensor)


def _own_sample(tensor: Tensor) -> Tensor:
    """This rank's part of the elements flat[::step], which are rounded to bfloat16; as int16, on the CPU. Rows that
    are cut along the first axis follow one another in the flat tensor."""
    step = max(1, tensor.numel() // SAMPLES)
    flat = local(tensor).reshape(-1)
    first = own_part(tensor)[0].start * (tensor.numel() // tensor.shape[0]) if isinstance(tensor, DTensor) else 0
    return flat[-first % step :: step].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
