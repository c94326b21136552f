"""What all settings are made of: the table itself, kinds of numbers, and the tables that several programs share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

ALL_LINEAR = ("all-linear",)
"""Every linear layer of the base but its head, and its experts."""

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
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
