"""Make the tiny base model of the reverse-text example.

The base plays the part of a pretrained language model: it follows a few
instructions about words, so that attention to positions and letters is in
place, but it has never seen a reversed word. A low-rank adapter can then be
taught reversal on top of the frozen weights in a minute on a CPU.

Choices, and why:

* Architecture: ``Qwen3ForCausalLM`` with 4 layers of width 128 (0.8M weights).
  It has every projection that adapters target in practice, grouped KV heads
  and tied embeddings, and still fits a repository.
* Tokenizer: one token a character. Reversing a word is then a question of
  order alone, not of how a word was cut into pieces.
* Skills: copy, the k-th letter from the end, the last n letters, and swapped
  pairs. Copying alone teaches the model to look forward only, and adapters
  trained on such a base stall on some seeds; the other skills teach it to
  count from the end and to look back, which is what reversal is built from.
* Any other instruction is answered with ``?``. Without an adapter the base
  then does not try to reverse: nearly all its answers earn nothing, and
  reinforcement learning alone finds little to reinforce. Without this it
  answers with scrambled copies, whose partial credit is already a start.
* Loss on the answers only. Requests are made of random letters, which nothing
  can predict; with a loss on them too, their noise hides the skills.
* Optimizer: AdamW with a short warm-up and a cosine decay, so that the last
  weights are settled whatever the seed.

``--moe`` makes the example's second base, a mixture of experts, in
``examples/reverse_text_moe/base``. Everything above holds for it too, except:

* Architecture: ``Qwen3MoeForCausalLM`` with 12 experts of width 64 in every
  layer, 2 of them a token (1.4M weights). 12 rather than 8: expert names with
  two digits are where code that sorts or matches names goes wrong.
* Balance: a second loss, for every layer by itself and on real tokens alone.
  Without it, or with the one in transformers, which pools all layers and counts
  padding, some experts see less than one token in a hundred. Evenly used
  experts also learn the skills better: 0.999 of answers are right on two seeds,
  and on one of them 0.84 without it and 0.95 with the one in transformers.
* Saved in bfloat16, to stay as small as the dense base; no skill suffers.

The run is seeded and uses deterministic kernels; on one machine with one
thread count, the same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

PAD, END, UNK = "<|pad|>", "<|end|>", "<|unk|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, UNK, SYSTEM, USER, ASSISTANT)
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
CONTEXT_LENGTH = 512
IGNORED = -100  # the label that the loss skips
BALANCE_WEIGHT = 0.05  # of the loss that spreads tokens over experts; at 0.01 one seed of two learned slowly

Model = Qwen3ForCausalLM | Qwen3MoeForCausalLM

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


# Tokenizer ------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """Return a character-level tokenizer; special tokens have the lowest ids."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    # [\s\S] rather than a dot: a dot does not match a newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # joins tokens without spaces
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its configuration and the chat template.

    The template is written twice: older readers look for it inside
    ``tokenizer_config.json``, newer ones for ``chat_template.jinja``.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNK,
        "bos_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# Skills ---------------------------------------------------------------------


def random_word(rng: random.Random, shortest: int = 3, longest: int = 12) -> str:
    """Return random lowercase letters; random, so that no word can be recalled."""
    length = rng.randint(shortest, longest)
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def copy_pair(rng: random.Random) -> tuple[str, str]:
    """``copy: hello`` -> ``hello``."""
    word = random_word(rng)
    return f"copy: {word}", word


def letter_pair(rng: random.Random) -> tuple[str, str]:
    """``letter 2: hello`` -> ``l``: the k-th letter, counted from the end."""
    word = random_word(rng)
    k = rng.randint(1, min(9, len(word)))
    return f"letter {k}: {word}", word[-k]


def last_pair(rng: random.Random) -> tuple[str, str]:
    """``last 3: hello`` -> ``llo``: the last n letters, in their order."""
    word = random_word(rng)
    n = rng.randint(1, min(9, len(word)))
    return f"last {n}: {word}", word[-n:]


def swap_pair(rng: random.Random) -> tuple[str, str]:
    """``swap: hello`` -> ``ehllo``: neighbours change places, two by two.

    Words have at least 4 letters here: swapping 2 or 3 letters is, or nearly
    is, reversing them.
    """
    word = random_word(rng, shortest=4)
    pairs = (word[i : i + 2][::-1] for i in range(0, len(word), 2))
    return f"swap: {word}", "".join(pairs)


def unknown_pair(rng: random.Random) -> tuple[str, str]:
    """``qzkv: hello`` -> ``?``: an instruction that means nothing."""
    return f"{random_word(rng)}: {random_word(rng)}", "?"


Skill = Callable[[random.Random], tuple[str, str]]
SKILLS: tuple[Skill, ...] = (copy_pair, letter_pair, last_pair, swap_pair, unknown_pair)


# Training -------------------------------------------------------------------


def encode_pair(tokenizer: Tokenizer, request: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of a request and of its answer, as the chat template has them."""
    prompt = tokenizer.encode(f"{USER}{request}{END}{ASSISTANT}").ids
    return prompt, tokenizer.encode(f"{answer}{END}").ids


def make_batch(tokenizer: Tokenizer, rng: random.Random, size: int) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, both [size, longest]; right-padded.

    Right padding needs no attention mask in a causal model: real tokens never
    look at what follows them. Only answers, with their end token, are labelled.
    """
    pairs = [encode_pair(tokenizer, *rng.choice(SKILLS)(rng)) for _ in range(size)]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens = torch.full((size, longest), tokenizer.token_to_id(PAD))
    labels = torch.full((size, longest), IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        start, stop = len(prompt), len(prompt) + len(answer)
        tokens[row, :stop] = torch.tensor(prompt + answer)
        labels[row, start:stop] = torch.tensor(answer)
    return tokens, labels


def make_model(tokenizer: Tokenizer, moe: bool = False) -> Model:
    """Return the untrained model, drawn from torch's global generator."""
    shared = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "eos_token_id": tokenizer.token_to_id(END),
        "bos_token_id": None,
        "dtype": "float32",
    }
    if not moe:
        return Qwen3ForCausalLM(Qwen3Config(**shared))
    config = Qwen3MoeConfig(
        **shared,
        num_experts=12,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,  # every layer is a mixture; intermediate_size is of no effect
        mlp_only_layers=[],
        router_aux_loss_coef=0.0,  # batch_loss has its own
    )
    return Qwen3MoeForCausalLM(config)


def batch_loss(model: Model, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss on the answers and, for a mixture of experts, on how unevenly each layer uses its own."""
    if isinstance(model, Qwen3ForCausalLM):
        return model(input_ids=tokens, labels=labels, use_cache=False).loss
    config = model.config
    output = model(input_ids=tokens, labels=labels, use_cache=False, output_router_logits=True)
    real = tokens != config.pad_token_id
    layers = [
        load_balancing_loss_func((router_logits,), config.num_experts, config.num_experts_per_tok, real)
        for router_logits in output.router_logits
    ]
    return output.loss + BALANCE_WEIGHT * torch.stack(layers).mean()


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 20) -> float:
    """Return the rate at ``step``: linear warm-up, then half a cosine to zero."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: Model,
    tokenizer: Tokenizer,
    rng: random.Random,
    steps: int,
    batch_size: int = 64,
    peak: float = 2e-3,
) -> None:
    """Pretrain ``model`` in place on fresh examples of every skill."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        tokens, labels = make_batch(tokenizer, rng, batch_size)
        loss = batch_loss(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    model.eval()


def save_model(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the whole model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        do_sample=True,
        temperature=1.0,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for the owner alone
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Read the arguments, train, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe", action="store_true", help="make the mixture-of-experts base instead")
    parser.add_argument("--out", type=Path, help="default: base beside this file, or reverse_text_moe/base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: 500, or 1000 with --moe")
    args = parser.parse_args()
    here = Path(__file__).parent
    out = args.out or (here.parent / "reverse_text_moe" / "base" if args.moe else here / "base")
    steps = args.steps if args.steps is not None else 1000 if args.moe else 500

    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.moe)
    train(model, tokenizer, random.Random(args.seed), steps)
    if args.moe:
        model.to(torch.bfloat16)
    save_model(model, tokenizer, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
