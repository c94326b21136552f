"""Adapter folders made to break their reader: each is a named error, at once, and leaves no trace on disk."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import random_adapter

from graftwork.adapters.convert import convert_adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.errors import AdapterError, UnreadableAdapter, UnsupportedAdapter
from graftwork.store.disk import Disk

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 8), "model.layers.0.self_attn.v_proj": (4, 8)}
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Break = Callable[[Path], object]


def good_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, data in write_peft(random_adapter(SHAPES, 2), AdapterFacts("base")).items():
        (folder / name).write_bytes(data)
    return folder


# --- ways to break a folder -------------------------------------------------------------------------------------------


def config_bytes(data: bytes) -> Break:
    return lambda folder: (folder / CONFIG).write_bytes(data)


def config(**fields: Any) -> Break:
    """Set fields of adapter_config.json; a value of `...` removes the field."""

    def apply(folder: Path) -> None:
        about = {**json.loads((folder / CONFIG).read_bytes()), **fields}
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))

    return apply


def config_text(old: str, new: str) -> Break:
    def apply(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))

    return apply


def tensors_bytes(data: bytes) -> Break:
    return lambda folder: (folder / TENSORS).write_bytes(data)


def split(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def header(change: Callable[[dict[str, Any]], object], extra: bytes = b"") -> Break:
    """Change the header's JSON; `extra` is appended to the file."""

    def apply(folder: Path) -> None:
        about, body = split(folder)
        change(about)
        (folder / TENSORS).write_bytes(joined(json.dumps(about).encode(), body + extra))

    return apply


def entry(**fields: Any) -> Break:
    return header(lambda about: about[Q_A].update(fields))


def renamed(old: str, new: str) -> Break:
    return header(lambda about: about.update({new: about.pop(old)}))


def added(name: str, shape: list[int], dtype: str = "F32") -> Break:
    """One more tensor, whole and at the end."""
    count = torch.Size(shape).numel() * {"F32": 4, "F64": 8, "I8": 1}[dtype]

    def change(about: dict[str, Any]) -> None:
        end = max(value["data_offsets"][1] for key, value in about.items() if key != "__metadata__")
        about[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}

    return header(change, bytes(count))


def number(value: float) -> Break:
    """Write `value` into the first number of the last tensor in the file."""

    def apply(folder: Path) -> None:
        about, body = split(folder)
        about.pop("__metadata__")
        start, _ = max(entry["data_offsets"] for entry in about.values())
        data = (folder / TENSORS).read_bytes()
        at = len(data) - len(body) + start
        (folder / TENSORS).write_bytes(data[:at] + struct.pack("<f", value) + data[at + 4 :])

    return apply


def link(name: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return apply


def replaced(name: str, make: Callable[[Path], object]) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def drop_b(about: dict[str, Any]) -> None:
    """The last tensor's entry vanishes; its bytes are cut by `half_a_pair`."""
    last = max((k for k in about if k != "__metadata__"), key=lambda k: about[k]["data_offsets"])
    del about[last]


def half_a_pair(folder: Path) -> None:
    header(drop_b)(folder)
    about, body = split(folder)
    end = max(value["data_offsets"][1] for key, value in about.items() if key != "__metadata__")
    (folder / TENSORS).write_bytes(joined(json.dumps(about).encode(), body[:end]))


def empty_file(folder: Path) -> None:
    (folder / TENSORS).write_bytes(joined(b"{}", b""))


def many_tensors(folder: Path) -> None:
    one = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    text = "{" + ",".join(f'"t{i}":{{{one}}}' for i in range(150_000)) + "}"
    (folder / TENSORS).write_bytes(joined(text.encode(), b""))


def twice_in_header(folder: Path) -> None:
    about, body = split(folder)
    text = json.dumps(about)
    (folder / TENSORS).write_bytes(joined(f'{text[:-1]}, "{Q_A}": {json.dumps(about[Q_A])}}}'.encode(), body))


def only_pickle(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/graftwork_was_here'\ntR.")


def cut_last_byte(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])


def one_byte_more(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes() + b"\0")


def swapped_shapes(about: dict[str, Any]) -> None:
    about[Q_A]["shape"], about[Q_B]["shape"] = about[Q_B]["shape"], about[Q_A]["shape"]


def both(one: Break, other: Break) -> Break:
    def spoil(folder: Path) -> None:
        one(folder)
        other(folder)

    return spoil


def added_tensors(shapes: Mapping[str, list[int]]) -> Break:
    """More tensors, of zeros, at the end of the file."""

    def spoil(folder: Path) -> None:
        for name, shape in shapes.items():
            added(f"base_model.model.{name}", shape)(folder)

    return spoil


def pair_of(path: str, a: list[int], b: list[int]) -> dict[str, list[int]]:
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def expert(number: int) -> Break:
    return added_tensors(pair_of(f"x.experts.{number}.up_proj", [2, 8], [6, 2]))


def two_experts(first: list[int], second: list[int]) -> Break:
    one, two = pair_of("x.experts.0.up_proj", first, [6, 2]), pair_of("x.experts.1.up_proj", second, [6, 2])
    return added_tensors({**one, **two})


def added_pair(*paths: str) -> Break:
    return added_tensors({name: shape for path in paths for name, shape in pair_of(path, [2, 8], [6, 2]).items()})


def stack(a: list[int], b: list[int], part: str = "up_proj") -> Break:
    return added_tensors(pair_of(f"x.experts.{part}", a, b))


def flat(a: list[int], b: list[int], *, inner: bool = True) -> Break:
    return added_tensors(pair_of("x.experts.base_layer" if inner else "x.experts", a, b))


U, S = UnreadableAdapter, UnsupportedAdapter
LONG = 10**5
CASES: list[tuple[str, Break, type[AdapterError], str]] = [
    # adapter_config.json as a file
    ("config missing", lambda f: (f / CONFIG).unlink(), U, "is missing"),
    ("config empty", config_bytes(b""), U, "is not JSON"),
    ("config cut short", config_bytes(b'{"r": 2, "lora'), U, "is not JSON"),
    ("config utf-16", config_bytes('{"r": 2}'.encode("utf-16")), U, "is not JSON"),
    ("config is a list", config_bytes(b"[1, 2]"), U, "expected an object"),
    ("config is random bytes", config_bytes(bytes(range(256)) * 100), U, "is not JSON"),
    ("config 2 MiB", config_bytes(b" " * 2**21), U, "at most 1048576"),
    ("config nested 100000 deep", config_bytes(b'{"a":' * LONG + b"1" + b"}" * LONG), U, "nested more than"),
    ("config nested 20 deep", config_bytes(b'{"a":' * 20 + b"1" + b"}" * 20), U, "nested more than 16"),
    ("config lists nested", config_bytes(b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}"), U, "nested more than"),
    ("config is a symlink", link(CONFIG), U, "symbolic link"),
    ("config is a broken symlink", replaced(CONFIG, lambda p: p.symlink_to("/nowhere")), U, "symbolic link"),
    ("config is a pipe", replaced(CONFIG, os.mkfifo), U, "not a plain file"),
    ("config is a folder", replaced(CONFIG, Path.mkdir), U, "not a plain file"),
    ("config is a device", replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), U, "symbolic link"),
    ("r twice", config_text('"r": 2', '"r": 2, "r": 4'), U, "'r' stands there twice"),
    ("r missing", config(r=...), U, "r is None"),
    ("r is a text", config(r="2"), U, "r is '2'"),
    ("r is true", config(r=True), U, "r is True"),
    ("r is zero", config(r=0), U, "r is 0"),
    ("r is huge", config(r=10**30), U, "r is 1000"),
    ("r is not the tensors'", config(r=4), U, "so rank 2; adapter_config.json says r = 4"),
    ("alpha missing", config(lora_alpha=...), U, "lora_alpha is None"),
    ("alpha zero", config(lora_alpha=0), U, "lora_alpha is 0"),
    ("alpha negative", config(lora_alpha=-16), U, "lora_alpha is -16"),
    ("alpha NaN", config_text('"lora_alpha": 4', '"lora_alpha": NaN'), U, "NaN is not a JSON number"),
    ("alpha overflows", config_text('"lora_alpha": 4', '"lora_alpha": 1e999'), U, "lora_alpha is inf"),
    ("alpha of 5000 digits", config_text('"lora_alpha": 4', '"lora_alpha": ' + "9" * 5000), U, "is not JSON"),
    ("alpha of 400 digits", config_text('"lora_alpha": 4', '"lora_alpha": ' + "9" * 400), U, "lora_alpha is 999"),
    ("rslora is a text", config(use_rslora="no"), U, "use_rslora is 'no'"),
    ("base is a list", config(base_model_name_or_path=["a"]), U, "base_model_name_or_path is a list"),
    ("no type", config(peft_type=...), U, "peft_type is missing"),
    ("another type", config(peft_type="IA3"), S, "peft_type = 'IA3'"),
    ("dora", config(use_dora=True), S, "use_dora = True: DoRA"),
    ("saved modules", config(modules_to_save=["lm_head"]), S, "modules_to_save"),
    ("token indices", config(trainable_token_indices=[1]), S, "trainable_token_indices"),
    ("tied weights", config(ensure_weight_tying=True), S, "ensure_weight_tying"),
    ("replicated layers", config(layer_replication=[[0, 2]]), S, "layer_replication"),
    ("activated lora", config(alora_invocation_tokens=[1]), S, "alora_invocation_tokens"),
    ("qalora", config(use_qalora=True), S, "use_qalora"),
    ("bdlora", config(use_bdlora={"nblocks": 2}), S, "use_bdlora"),
    ("arrow", config(arrow_config={"top_k": 3}), S, "arrow_config"),
    ("kasa", config(kasa_config={"x": 1}), S, "kasa_config"),
    ("montecarlo", config(monteclora_config={"x": 1}), S, "monteclora_config"),
    ("transposed", config(fan_in_fan_out=True), S, "fan_in_fan_out"),
    ("pissa", config(init_lora_weights="pissa_niter_4"), S, "init_lora_weights = 'pissa_niter_4'"),
    ("olora", config(init_lora_weights="olora"), S, "init_lora_weights = 'olora'"),
    ("corda", config(init_lora_weights="corda"), S, "init_lora_weights"),
    ("loftq", config(init_lora_weights="loftq"), S, "init_lora_weights"),
    ("lora_ga", config(init_lora_weights="lora_ga"), S, "init_lora_weights"),
    ("unknown init", config(init_lora_weights={"a": 1}), S, "init_lora_weights = a dict"),
    (
        "alpha pattern with a regular expression",
        config(alpha_pattern={"(a+)+$": 4}),
        S,
        "'(a+)+$', a regular expression",
    ),
    ("alpha pattern a list", config(alpha_pattern=[1]), U, "alpha_pattern is a list"),
    ("alpha pattern of a text", config(alpha_pattern={"q_proj": "4"}), U, "alpha_pattern['q_proj'] is '4'"),
    ("rank pattern of zero", config(rank_pattern={"q_proj": 0}), U, "rank_pattern['q_proj'] is 0"),
    (
        "rank pattern against the tensors",
        config(rank_pattern={"q_proj": 4}),
        U,
        "so rank 2; adapter_config.json says r = 4",
    ),
    ("rank pattern of 1000000", config(rank_pattern={"(a+)+$": 10**6}), U, "is 1000000"),
    ("target parameters a text", config(target_parameters="experts.down_proj"), U, "target_parameters is 'experts"),
    ("unknown kind of bias", config(bias="some"), S, "bias = 'some'"),
    ("unknown field", config(use_mystery=True), S, "use_mystery = True"),
    ("terminal codes", config(**{"\x1b[2J": "\x1b[31m"}), S, "'\\x1b[2J' = '\\x1b[31m'"),
    ("lone surrogate", config_text('"r": 2', '"r": 2, "\\ud800": 1'), S, "'\\ud800' = 1"),
    # adapter_model.safetensors as a file
    ("tensors missing", lambda f: (f / TENSORS).unlink(), U, "is missing"),
    ("only a pickle", only_pickle, S, "a pickle, which is never opened"),
    ("tensors are a symlink", link(TENSORS), U, "symbolic link"),
    ("tensors are a pipe", replaced(TENSORS, os.mkfifo), U, "not a plain file"),
    ("tensors are a folder", replaced(TENSORS, Path.mkdir), U, "not a plain file"),
    ("tensors empty", tensors_bytes(b""), U, "too few"),
    ("7 bytes", tensors_bytes(b"1234567"), U, "too few"),
    ("header of 2^63 bytes", tensors_bytes(struct.pack("<Q", 2**63) + b"{}"), U, "cut short or not safetensors"),
    ("header past the end", tensors_bytes(struct.pack("<Q", 100) + b"{}"), U, "cut short or not safetensors"),
    ("no header", tensors_bytes(struct.pack("<Q", 0) + b"{}"), U, "does not start with"),
    ("a pickle", tensors_bytes(b"\x80\x04\x95" + b"\0" * 100), U, "cut short or not safetensors"),
    ("header not JSON", tensors_bytes(joined(b"{nonsense", b"")), U, "is not JSON"),
    ("header nested", tensors_bytes(joined(b'{"a":' * 900 + b"1" + b"}" * 900, b"")), U, "nested more than 3"),
    ("header nested deep", tensors_bytes(joined(b'{"a":' * 90_000 + b"1" + b"}" * 90_000, b"")), U, "nested more"),
    ("header of commas", tensors_bytes(joined(b'{"a":[' + b"1," * 2**21 + b"1]}", b"")), U, "more than the 100000"),
    ("150000 tensors", many_tensors, U, "more than the 100000 tensors"),
    ("cut short", cut_last_byte, U, "the file at"),
    ("one byte more", one_byte_more, U, "1 bytes follow the last tensor"),
    ("metadata of numbers", header(lambda h: h.update({"__metadata__": {"a": 1}})), U, "__metadata__"),
    ("metadata a list", header(lambda h: h.update({"__metadata__": [1]})), U, "__metadata__"),
    ("false fingerprint", header(lambda h: h["__metadata__"].update(graftwork_base_fingerprint="x")), U, "'x'"),
    ("a tensor twice", twice_in_header, U, "stands there twice"),
    ("entry a number", header(lambda h: h.update({Q_A: 1})), U, "must give dtype, shape"),
    ("entry without dtype", header(lambda h: h[Q_A].pop("dtype")), U, "must give dtype, shape"),
    ("entry with more", entry(path="/etc/passwd"), U, "nothing else"),
    ("unknown dtype", entry(dtype="F31"), U, "unknown dtype 'F31'"),
    ("dtype a list", entry(dtype=["F32"]), U, "unknown dtype a list"),
    ("dtype F64", entry(dtype="F64"), S, "has dtype F64"),
    ("dtype F16 of F32's bytes", entry(dtype="F16"), U, "needs 32 bytes, its data_offsets hold 64"),
    ("shape of floats", entry(shape=[2.0, 8]), U, "its shape is not a list"),
    ("shape of booleans", entry(shape=[True, 16]), U, "its shape is not a list"),
    ("shape negative", entry(shape=[-2, -8]), U, "its shape is not a list"),
    ("shape overflows", entry(shape=[2**62, 2**62]), U, "needs"),
    ("shape of 2^70", entry(shape=[2**70]), U, "its shape is not a list"),
    ("shape of 9 axes", entry(shape=[1] * 9), U, "its shape is not a list"),
    ("shape a text", entry(shape="2,8"), U, "its shape is not a list"),
    ("vector", entry(shape=[16]), S, "only matrices"),
    ("cube", entry(shape=[2, 4, 2]), S, "only matrices"),
    ("number", entry(shape=[], data_offsets=[0, 4]), U, ""),
    ("offsets past the end", entry(data_offsets=[10**9, 10**9 + 64]), U, "gap before it"),
    ("offsets negative", entry(data_offsets=[-64, 0]), U, "data_offsets are not two whole numbers"),
    ("offsets backwards", entry(data_offsets=[64, 0]), U, "data_offsets hold -64"),
    ("offsets three", entry(data_offsets=[0, 64, 64]), U, "data_offsets are not two"),
    ("overlap", header(lambda h: h[Q_A].update(data_offsets=h[Q_B]["data_offsets"], shape=[2, 6])), U, "tensor"),
    ("A and B swapped", header(swapped_shapes), U, "needs"),
    ("no tensor at all", empty_file, U, "holds no tensor"),
    ("half a pair", half_a_pair, U, "half of a pair is missing: model.layers.0.self_attn.v_proj.lora_B"),
    ("empty tensor", added("base_model.model.x.lora_A.weight", [2, 0]), U, "x.lora_B"),
    ("unknown tensor", added("base_model.model.lm_head.weight", [2, 2]), S, "lm_head.weight is no LoRA factor"),
    ("int8 tensor", added("base_model.model.x.lora_A.weight", [2, 2], "I8"), S, "has dtype I8"),
    ("path out of the folder", renamed(Q_A, "base_model.model.../../etc.lora_A.weight"), S, "is no LoRA factor"),
    ("name with a slash", renamed(Q_A, "base_model.model./etc/passwd.lora_A.weight"), S, "is no LoRA factor"),
    ("name empty", renamed(Q_A, ""), U, "not a name that a module can have"),
    ("name not ASCII", renamed(Q_A, Q_A.replace("q_proj", "q\u202eproj")), U, "not a name that a module can have"),
    ("name with terminal codes", renamed(Q_A, "\x1b[2J"), U, "'\\x1b[2J': not a name"),
    ("name of 10000 characters", renamed(Q_A, "a" * 10_000), U, "not a name that a module can have"),
    ("two adapter names", renamed(Q_A, Q_A.replace("lora_A.", "lora_A.other.")), S, "several adapters"),
    ("embedding", added("base_model.model.e.lora_embedding_A", [2, 2]), S, "LoRA on embeddings"),
    ("dora's magnitudes", added("base_model.model.x.lora_magnitude_vector", [2]), S, "DoRA"),
    ("bias of B", both(added("base_model.model.x.lora_B.bias", [2]), number(1.0)), S, "a trained bias"),
    (
        "half of the experts' pair",
        added("base_model.model.experts.base_layer.lora_A.weight", [2, 2]),
        U,
        "half of a pair",
    ),
    (
        "nested wrappers",
        added("base_model.model.experts.base_layer.base_layer.lora_A.weight", [2, 2]),
        S,
        "more than two",
    ),
    ("expert 10^9", expert(10**9), S, "at most 4096 experts"),
    ("experts of other shapes", two_experts([2, 8], [2, 9]), U, "experts of one layer are alike"),
    ("expert 1 twice", added_pair("x.experts.1.up_proj", "x.experts.01.up_proj"), U, "are the same factor"),
    ("a stack without a count", stack([2, 8], [6, 2]), S, "how many there are is unknown"),
    ("a stack of two counts", stack([3, 2, 8], [4, 6, 2]), U, "A is of 3 experts, B of 4"),
    ("gate above up of odd height", stack([3, 2, 8], [3, 7, 2], "gate_up_proj"), U, "even number"),
    ("flat experts of no whole number", flat([5, 8], [6, 5]), U, "no number of experts x rank"),
    ("flat experts of two counts", flat([6, 8], [6, 8]), U, "differ in experts x rank"),
    ("flat experts of an unnamed parameter", flat([6, 8], [6, 6], inner=False), S, "must say which"),
    ("NaN", number(float("nan")), U, "lora_B.weight[0, 0] is nan"),
    ("infinity", number(float("inf")), U, "lora_B.weight[0, 0] is inf"),
    ("minus infinity", number(float("-inf")), U, "lora_B.weight[0, 0] is -inf"),
]


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*")}


@pytest.mark.parametrize(("spoil", "kind", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_hostile_folder_is_a_named_error_at_once_and_leaves_no_trace(
    tmp_path: Path, spoil: Break, kind: type[AdapterError], says: str
) -> None:
    folder = good_folder(tmp_path / "adapter")
    spoil(folder)
    before = tree(tmp_path)
    started = time.thread_time()
    with pytest.raises(AdapterError) as caught:
        convert_adapter(Disk(), folder, tmp_path / "outputs" / "run_x")
    assert time.thread_time() - started < 1, "seconds of work; a wait ends with the test's own limit"
    assert type(caught.value) is kind
    message = str(caught.value)
    assert says in message
    assert str(folder) in message
    assert len(message) < 1500 and message.isprintable()
    assert tree(tmp_path) == before


def test_a_folder_that_is_not_there_is_never_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UnreadableAdapter, match="no folder at"):
        read_peft(tmp_path / "someone" / "some-adapter")


def test_patterns_names_and_addresses_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the file was followed")

    monkeypatch.setattr(socket, "socket", no_network)
    folder = good_folder(tmp_path / "adapter")
    expected = read_peft(folder).adapter.digest()
    config(
        target_modules="(a+)+$" * 100,
        exclude_modules="(x|x)*y",
        layers_pattern=["(a+)+"],
        base_model_name_or_path="http://127.0.0.1:1/../../etc/passwd",
        revision="../..",
        auto_mapping={"base_model_class": "os", "parent_library": "graftwork_absent_module"},
        megatron_core="graftwork_absent_module",
        runtime_config={"ephemeral_gpu_offload": True},
    )(folder)
    assert read_peft(folder).adapter.digest() == expected


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.adapters.formats import pieces

    folder = good_folder(tmp_path / "adapter")
    original = pieces._matrix

    def cut_then_check(*args: Any) -> Any:
        os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size - 1)
        return original(*args)

    monkeypatch.setattr(pieces, "_matrix", cut_then_check)
    with pytest.raises(UnreadableAdapter, match="the file ended"):
        read_peft(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_adapter_or_an_adapter_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        good_folder(folder)
    files = write_peft(random_adapter(SHAPES, 2), AdapterFacts("base"))
    name = data.draw(st.sampled_from(sorted(files)))
    spoilt = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    spoilt = spoilt[: data.draw(st.integers(0, len(spoilt)))] if data.draw(st.booleans()) else spoilt
    for other, content in files.items():
        (folder / other).write_bytes(bytes(spoilt) if other == name else content)
    try:
        found = read_peft(folder)
    except AdapterError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(found, InMemory)
