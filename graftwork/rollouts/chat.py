"""Tokens and chat templates without torch: `tokenizers` and a sandboxed jinja2, nothing of transformers.

The oracle in the tests is transformers' `apply_chat_template` on the same folder: same text, same tokens.

Tokens in, tokens out. In a conversation of several turns an answer is never tokenised again: the tokens that were
sampled stay as they are, and only the template's text between the answer and the next one is encoded
(`continuation`). So what is trained on is what was sampled, whatever the tokenizer would make of the answer's text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Message

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, "config.json", "generation_config.json", "special_tokens_map.json")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
STAND_IN = "ANSWER"
"""Rendered in an answer's place to find where the template goes on after it."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A base model's tokenizer and chat template."""

    source: Path
    tokenizer: Tokenizer
    template: jinja2.Template
    named_tokens: dict[str, str]
    """bos_token, eos_token, ...: what a template may use by name."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a turn: those of generation_config.json, config.json and tokenizer_config.json together."""

    @staticmethod
    def load(base: str | Path) -> ChatTokenizer:
        """From a base model's folder, or from a hub id that was downloaded before or can be.

        Raises ConfigError, naming the file, when the tokenizer, the template or an end-of-sequence token is missing.
        """
        folder = _folder(base)
        if not _read_settings(folder / TOKENIZER):
            raise ConfigError(
                f"{folder / TOKENIZER} is missing or empty; save the base with a fast tokenizer (transformers'"
                " AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
            )
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _read_settings(folder / TOKENIZER_CONFIG)
        named = _named_tokens({**_read_settings(folder / "special_tokens_map.json"), **settings})
        template = _compile(_template_text(folder, settings), folder)
        return ChatTokenizer(folder, tokenizer, template, named, _eos_token_ids(folder, tokenizer, named))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands: nothing is put before or after it; names of special tokens become those."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises ConfigError when the template refuses it (a role it does not know, say)."""
        try:
            return self.template.render(
                messages=[dict(message) for message in messages], tools=None, documents=None,
                add_generation_prompt=add_generation_prompt, **self.named_tokens,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = [message.get("role") for message in messages]
            raise ConfigError(
                f"the chat template of {self.source} refused messages with roles {roles}: {error};"
                " change what the environment sends, or the template"
            ) from None

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """Token ids of the rendered conversation; with `add_generation_prompt` the next token is the model's."""
        return self.encode(self.render(messages, add_generation_prompt))

    def continuation(self, messages: Sequence[Message], new_messages: Sequence[Message], ended: bool) -> list[int]:
        """The tokens between an answer and the next one: the answer's end of turn, `new_messages`, the next prompt.

        `messages` is the conversation before the answer. `ended`: the answer's last token is an end token of its own,
        which then stands for the template's. Raises ConfigError for a template that writes the prompt before an
        answer differently once more messages follow: for such a base, conversations of several turns cannot be
        tokens in, tokens out.
        """
        before = self.render(messages, True) + STAND_IN
        whole = self.render([*messages, {"role": "assistant", "content": STAND_IN}, *new_messages], True)
        if not whole.startswith(before):
            raise ConfigError(
                f"the chat template of {self.source} rewrites earlier turns when messages are added (after"
                f" {_difference(before, whole)}); use a template that only appends, or ask once a task"
            )
        token_ids = self.encode(whole[len(before) :])
        return token_ids[1:] if ended and token_ids and token_ids[0] in self.eos_token_ids else token_ids

    def encode_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """(token_ids [T], loss_mask [T]) of a finished conversation: True on answers and their end tokens.

        What the template writes after an end token (a line break, say) carries no loss: the sampler never draws it.
        Raises ConfigError if there is no answer, or if the tokens up to an answer are not the whole's first tokens.
        """
        token_ids = self.encode_chat(messages, False)
        loss_mask = [False] * len(token_ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._prefix(messages[:i], True, token_ids)
                end = self._prefix(messages[: i + 1], False, token_ids)
                ends = [t + 1 for t in range(start, end) if token_ids[t] in self.eos_token_ids]
                end = ends[-1] if ends else end
                loss_mask[start:end] = [True] * (end - start)
        if not any(loss_mask):
            raise ConfigError(f"nothing to learn from a conversation without an assistant's message: {messages[:1]}")
        return token_ids, loss_mask

    def _prefix(self, messages: Sequence[Message], add_generation_prompt: bool, whole: list[int]) -> int:
        """How many tokens of `whole` the first messages take. Raises ConfigError if they are not its beginning."""
        part = self.encode_chat(messages, add_generation_prompt)
        if whole[: len(part)] != part:
            agreed = _difference(self.decode(part, False), self.decode(whole, False))
            raise ConfigError(
                f"the chat template of {self.source}: the tokens of the first {len(messages)} messages are not the"
                f" first tokens of the whole conversation (after {agreed}), so which tokens are the answer cannot be"
                " told; use a template that only appends"
            )
        return len(part)


def _difference(expected: str, found: str) -> str:
    """The last characters on which two texts agree."""
    pairs = enumerate(zip(expected, found, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    return repr(expected[max(0, same - 30) : same])


# --- reading a folder -----------------------------------------------------------------------------------------------


def _folder(base: str | Path) -> Path:
    """The folder of a base; a name that is no folder is looked up as a hub id. Raises ConfigError."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download  # only for hub ids: it is slow to import

    try:
        return Path(snapshot_download(str(base), allow_patterns=list(FILES)))
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ConfigError(f"model.path = {str(base)!r} is no folder here and not on the hub ({error})") from None


def _read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an absent file reads as empty. Raises ConfigError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in NAMED_TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _eos_token_ids(folder: Path, tokenizer: Tokenizer, named: dict[str, str]) -> tuple[int, ...]:
    """Raises ConfigError when no file names one: answers would never end."""
    found: list[int] = []
    config = _read_settings(folder / "config.json")
    nested = config.get("text_config")
    for settings in (_read_settings(folder / "generation_config.json"), config, nested):
        value = settings.get("eos_token_id") if isinstance(settings, dict) else None
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    if "eos_token" in named and (token_id := tokenizer.token_to_id(named["eos_token"])) is not None:
        found.append(token_id)
    if not found:
        raise ConfigError(
            f"{folder} names no end-of-sequence token; set eos_token_id in generation_config.json or config.json, or"
            " eos_token in tokenizer_config.json"
        )
    return tuple(dict.fromkeys(found))


def _template_text(folder: Path, settings: dict[str, Any]) -> str:
    """chat_template.jinja, else chat_template of tokenizer_config.json (its "default" where there are several)."""
    if (path := folder / TEMPLATE).is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ConfigError(
            f"{folder} has no chat template, so messages cannot be turned into tokens; put the template that the model"
            f" was trained with into {path} (the model's instruct version has one)"
        )
    return template


# --- jinja, as transformers sets it up ------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks an answer for other trainers; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(text: str, folder: Path) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {folder} is not a template: line {error.lineno}: {error}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter writes < and > as HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
