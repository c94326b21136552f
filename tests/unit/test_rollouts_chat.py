"""Tokens and chat templates; the oracle is transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from graftwork.errors import ConfigError
from graftwork.rollouts.chat import ChatTokenizer

SPECIAL = ("<|pad|>", "<|im_end|>", "<|unk|>", "<|im_start|>", "<|stop|>")
CHATML = (
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{{- '\\n' }}{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
KITCHEN_SINK = """
{%- if messages[0].role == 'system' %}
    {%- set start = 1 %}
{{ messages[0].content | tojson }}
{%- else %}
    {%- set start = 0 %}
{%- endif %}
{% for message in messages[start:] %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% if message.role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}
  {{ eos_token }}{{ bos_token if bos_token is defined }} {{ message | tojson(indent=2) }} {{ strftime_now('%') }}
{% endfor %}
{% if tools %}tools{% endif %}{{ documents is none }}
{%- if add_generation_prompt %} go{% endif %}
"""
TALK = [
    {"role": "system", "content": 'Be <kind> & "brief".'},
    {"role": "user", "content": "  hé llo\n"},
    {"role": "assistant", "content": "olleh "},
    {"role": "user", "content": "x" * 20},
]


def make_base(folder: Path, template: str | None, *, in_config: bool = False) -> Path:
    """A folder with a character-level tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    if template is not None and in_config:
        settings["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 1]}))
    return folder


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("template", [CHATML, KITCHEN_SINK])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_same_text_and_tokens_as_transformers(tmp_path, template, in_config, add_generation_prompt):
    base = make_base(tmp_path / "base", template, in_config=in_config)
    ours, theirs = ChatTokenizer.load(base), AutoTokenizer.from_pretrained(base)
    for messages in (TALK, TALK[1:], TALK[1:2]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert ours.render(messages, add_generation_prompt) == text
        expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert ours.encode_chat(messages, add_generation_prompt) == expected
        for skip in (True, False):
            assert ours.decode(expected, skip) == theirs.decode(expected, skip_special_tokens=skip)


def test_the_bundled_base_agrees_with_transformers():
    base = Path(__file__).parents[2] / "examples" / "reverse_text" / "base"
    if not base.is_dir():
        pytest.skip(f"{base} is not there")
    ours, theirs = ChatTokenizer.load(base), AutoTokenizer.from_pretrained(base)
    talk = [{"role": "user", "content": "reverse: hello"}, {"role": "assistant", "content": "olleh"}]
    for messages, prompt in ((talk[:1], True), (talk, False)):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(messages, prompt) == expected
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_plain_text_is_encoded_as_it_stands(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, CHATML))
    text = "longer than the saved truncation <|im_end|>"
    token_ids = tokenizer.encode(text)
    assert token_ids[-1] == 1
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert tokenizer.decode(token_ids) == text.removesuffix("<|im_end|>")
    assert tokenizer.eos_token_ids == (4, 1)


@pytest.mark.parametrize("source", ["config", "nested", "tokenizer"])
def test_end_tokens_are_found_wherever_they_are_named(tmp_path, source):
    base = make_base(tmp_path, CHATML)
    (base / "generation_config.json").unlink()
    named = {"config": {"eos_token_id": 4}, "nested": {"text_config": {"eos_token_id": 4}}}.get(source, {})
    (base / "config.json").write_text(json.dumps(named))
    assert ChatTokenizer.load(base).eos_token_ids == ((1,) if source == "tokenizer" else (4, 1))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        ChatTokenizer.load(make_base(tmp_path / "a", None))
    base = make_base(tmp_path / "b", CHATML)
    (base / "generation_config.json").unlink()
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="end-of-sequence"):
        ChatTokenizer.load(base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ChatTokenizer.load(base)
    with pytest.raises(ConfigError, match="line 1"):
        ChatTokenizer.load(make_base(tmp_path / "c", "{% if %}"))


def test_a_template_that_refuses_is_a_config_error_in_its_own_words(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, KITCHEN_SINK))
    with pytest.raises(ConfigError, match="no tools, please"):
        tokenizer.encode_chat([{"role": "tool", "content": "x"}], True)


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}"))
    with pytest.raises(ConfigError):
        tokenizer.render(TALK, True)


def test_a_continuation_completes_what_transformers_would_render(tmp_path):
    base = make_base(tmp_path, CHATML)
    ours, theirs = ChatTokenizer.load(base), AutoTokenizer.from_pretrained(base)
    held = ours.encode_chat(TALK[:2], True)
    answer = [*ours.encode("olleh "), 1]
    whole = held + answer + ours.continuation(TALK[:2], TALK[3:], ended=True)
    assert whole == theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    cut = held + answer[:-1] + ours.continuation(TALK[:2], TALK[3:], ended=False)
    assert cut == whole


def test_a_continuation_with_another_end_token_keeps_the_sampled_one(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, CHATML))
    token_ids = tokenizer.continuation(TALK[:2], TALK[3:4], ended=True)
    assert tokenizer.decode(token_ids, skip_special_tokens=False).startswith("\n<|im_start|>user")


REWRITES = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, REWRITES))
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        tokenizer.continuation(TALK[:2], TALK[3:], ended=True)
    with pytest.raises(ConfigError, match="first tokens"):
        tokenizer.encode_training(TALK[:3])


def test_training_loss_is_on_answers_and_their_end_tokens(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, CHATML))
    talk = [*TALK, {"role": "assistant", "content": "yes"}]
    token_ids, mask = tokenizer.encode_training(talk)
    assert token_ids == tokenizer.encode_chat(talk, False)
    learnt = [t for t, on in zip(token_ids, mask, strict=True) if on]
    assert tokenizer.decode(learnt, False) == "olleh <|im_end|>yes<|im_end|>"
    with pytest.raises(ConfigError, match="assistant"):
        tokenizer.encode_training(TALK[:2])
