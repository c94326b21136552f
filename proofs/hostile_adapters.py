"""Adapter folders made to break their reader, and what the reader does with each.

`run_all` tries them in one process of its own (`python -m proofs.hostile_adapters FOLDER`, a line of JSON each), under
an audit hook: what is opened, imported, run or written while a folder is read is recorded, and so are the seconds of
work and the most memory. A folder is broken by a function, so a case says in a line what is wrong with it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.convert import convert_adapter, export_adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.formats.rank_files import has_rank_files, rank_file
from graftwork.adapters.formats.tensor_file import HEADER_BYTES_MAX, MEMBER_CHARACTERS_MAX, TENSORS_MAX
from graftwork.adapters.formats.untrusted import VALUES_MAX, listed
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import AdapterError, UnreadableAdapter, UnsupportedAdapter
from graftwork.store.disk import Disk

MEMORY_BYTES_MAX = 2 * HEADER_BYTES_MAX
SECONDS_MAX = 1.0
MESSAGE_CHARACTERS_MAX = 1500
"""What a refusal may take."""
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 8), "model.layers.0.self_attn.v_proj": (4, 8)}
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
CONFIG, TENSORS, RANK_0 = "adapter_config.json", "adapter_model.safetensors", "trainer/rank_0.pt"
CONFIG_BYTES = 2**20
"""What an adapter_config.json may have."""
Break = Callable[[Path], object]
Items = Callable[[], Iterator[str]]
"""Of a list or table in JSON, made anew each time."""


@dataclass(frozen=True)
class Hostile:
    """One broken folder. error, says: what is raised, and words of its message."""

    name: str
    spoil: Break
    error: type[AdapterError]
    says: str


@dataclass(frozen=True)
class Finding:
    """What happened when one was read.

    folder            where it was
    error, message    what was raised; None and "" when the folder was taken for an adapter
    seconds           of work, waiting not counted
    python_bytes      the most that Python had allocated at once, beyond what it had before
    resident_bytes    the most that the process had in memory, beyond what it had before; None where Linux does not say
    outside           files opened, and folders listed, that are not in the broken folder
    imported          modules
    ran               code, commands, connections
    changed           files and folders that were made, changed or removed
    """

    name: str
    folder: str
    error: str | None
    message: str
    seconds: float
    python_bytes: int
    resident_bytes: int | None
    outside: tuple[str, ...]
    imported: tuple[str, ...]
    ran: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        return max(self.python_bytes, self.resident_bytes or 0)

    def wrong(self, seconds_max: float = SECONDS_MAX) -> list[str]:
        """Where it fell short; empty for a refusal as it should be."""
        case = next(case for case in CASES if case.name == self.name)
        held = {
            f"{self.error}, expected {case.error.__name__}": self.error == case.error.__name__,
            f"the message does not say {case.says!r}": case.says in self.message,
            "the message does not name the folder": self.folder in self.message,
            "the message could steer a terminal": self.message.isprintable(),
            f"the message has {len(self.message)} characters": len(self.message) < MESSAGE_CHARACTERS_MAX,
            f"{self.seconds:.2f} s of work": self.seconds < seconds_max,
            f"{self.memory_bytes} bytes of memory": self.memory_bytes < MEMORY_BYTES_MAX,
            f"opened elsewhere: {listed(self.outside)}": not self.outside,
            f"imported: {listed(self.imported)}": not self.imported,
            f"ran: {listed(self.ran)}": not self.ran,
            f"changed: {listed(self.changed)}": not self.changed,
        }
        return [what for what, held_up in held.items() if not held_up]

    @staticmethod
    def of_line(line: str) -> Finding:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(line).items()
        }
        return Finding(**fields)


def run_all(folder: Path) -> list[Finding]:
    """What happens with each of CASES, in a fresh process; `folder` is made and filled with them."""
    done = subprocess.run(
        [sys.executable, "-m", "proofs.hostile_adapters", str(folder.absolute())],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", **MEMORY_IS_GIVEN_BACK},
        stdout=subprocess.PIPE, text=True, timeout=300, check=True,
    )  # fmt: skip
    return [Finding.of_line(line) for line in done.stdout.splitlines()]


MEMORY_IS_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""So that a case's memory is not hidden in what the case before it left."""


# --- good folders -----------------------------------------------------------------------------------------------------


def adapter(shapes: Mapping[str, tuple[int, int]] = SHAPES, rank: int = 2) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    return Adapter({
        path: LoraPair(torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), 2.0)
        for path, (out, width) in shapes.items()
    })  # fmt: skip


FILES = write_peft(adapter(), AdapterFacts("base"))


def good_folder(folder: Path) -> Path:
    """A PEFT adapter."""
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def as_checkpoint(folder: Path) -> None:
    """Make the folder of a PEFT adapter a checkpoint of an older trainer, with the adapter in `weight/`."""
    (folder / "weight").mkdir()
    for name in FILES:
        (folder / name).rename(folder / "weight" / name)
    (folder / "trainer").mkdir()
    (folder / RANK_0).write_bytes(rank_file(adapter(), 0, 1))
    (folder / "STABLE").touch()


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
        moved = (folder / name).rename(folder.parent / Path(name).name)
        (folder / name).symlink_to(moved)

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


def cut(name: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / name, size)


def beside(name: str, data: bytes) -> Break:
    """One more file."""
    return lambda folder: (folder / name).write_bytes(data)


def linked(name: str, data: bytes = b"{}") -> Break:
    """A link to a file outside of the folder."""

    def spoil(folder: Path) -> None:
        (folder.parent / Path(name).name).write_bytes(data)
        (folder / name).symlink_to(folder.parent / Path(name).name)

    return spoil


def sparse(name: str, size: int) -> Break:
    """A file of `size` bytes that takes no room on disk."""

    def spoil(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return spoil


def filled(start: str, items: Iterator[str], end: str, size: int) -> bytes:
    """JSON with as many items as `size` bytes hold."""
    text = io.StringIO()
    text.write(start)
    separator = ""
    for item in items:
        if text.tell() + len(separator) + len(item) + len(end) > size:
            break
        text.write(separator + item)
        separator = ","
    return (text.getvalue() + end).encode()


def large_config(start: str, items: Items, end: str) -> Break:
    """As large as a configuration may be. What is wrong with it comes late: a number of the tensors is not one."""

    def spoil(folder: Path) -> None:
        rest = (folder / CONFIG).read_text().strip().removesuffix("}")
        (folder / CONFIG).write_bytes(filled(f"{rest},{start}", items(), end + "}", CONFIG_BYTES))
        number(float("nan"))(folder)

    return spoil


def large_header(start: str, items: Items, end: str) -> Break:
    """As large as a header may be."""
    return lambda folder: (folder / TENSORS).write_bytes(joined(filled(start, items(), end, HEADER_BYTES_MAX), b""))


def one_text(characters: str, size: int) -> Items:
    return lambda: iter(['"' + characters * (size // len(characters.encode()) - 1) + '"'])


def repeated(text: str) -> Items:
    return lambda: itertools.repeat(text)


def by_key(form: str, count: int) -> Items:
    """`form` with a short key for its %s, another one each time."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
    return lambda: (form % "".join(key) for key in itertools.islice(itertools.product(letters, repeat=3), count))


def entries(count: int) -> Iterator[str]:
    """As a large mixture of experts has them, one after the other."""
    for index in range(count):
        name = f"base_model.model.model.layers.{index // 400}.mlp.experts.{index % 400}.down_proj.lora_A.weight"
        offsets = f"[{index * 24576},{index * 24576 + 24576}]"
        yield f'"{name}":{{"dtype":"BF16","shape":[16,768],"data_offsets":{offsets}}}'


class Command:
    """A pickle of it runs a command when it is opened without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def touching(folder: Path) -> Command:
    return Command(f"touch {folder.parent / 'ran'}")


def saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def rank_0(content: Callable[[Path], bytes]) -> Break:
    """A checkpoint whose rank_0.pt is these bytes."""

    def spoil(folder: Path) -> None:
        as_checkpoint(folder)
        (folder / RANK_0).write_bytes(content(folder))

    return spoil


def state(**tensors: Any) -> Break:
    """A checkpoint with the state dict of one layer, changed; `__` in a name is a dot."""
    factors = {"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(6, 2)}
    changed = {**factors, **{name.replace("__", "."): value for name, value in tensors.items()}}
    content = {"model": {name: value for name, value in changed.items() if value is not ...}}
    return rank_0(lambda _: saved(content))


def patterns(field: str, form: str, count: int, start: str = "{", end: str = "}") -> Break:
    """A thousand modules, and a configuration full of patterns to compare them with."""

    def spoil(folder: Path) -> None:
        modules = adapter({f"model.layers.{index}.q_proj": (1, 1) for index in range(1000)}, 1)
        for name, data in write_peft(modules, AdapterFacts()).items():
            (folder / name).write_bytes(data)
        config(**{field: ...})(folder)
        large_config(f'"{field}":{start}', by_key(form, count), end)(folder)

    return spoil


def all_filled(folder: Path) -> None:
    """Modules of zeros, and the header says that none of them is the adapter's."""
    files = write_peft(adapter({"m": (2, 2)}, 1), AdapterFacts())
    for name, data in files.items():
        (folder / name).write_bytes(data)
    about, body = split(folder)
    about["__metadata__"]["graftwork_filled"] = "m"
    (folder / TENSORS).write_bytes(joined(json.dumps(about).encode(), bytes(len(body))))


def deflated(numbers: int) -> bytes:
    """A state dict of zeros, a hundred times as large as its file."""
    content = {"model": {"x.lora_A.weight": torch.zeros(2, numbers // 2), "x.lora_B.weight": torch.zeros(6, 2)}}
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(content))) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in plain.infolist():
            out.writestr(member.filename, plain.read(member))
    return packed.getvalue()


def moved_away(part: str) -> Break:
    """A folder of the checkpoint is elsewhere, and a link in its place."""

    def spoil(folder: Path) -> None:
        as_checkpoint(folder)
        (folder / part).rename(folder.parent / f"other_{part}")
        (folder / part).symlink_to(folder.parent / f"other_{part}")

    return spoil


def checkpoint(then: Break) -> Break:
    return both(as_checkpoint, then)


def cut_places() -> Iterator[tuple[int, str]]:
    """(bytes that are left, words of the error): the tensors' file, cut wherever something ends in it."""
    data = FILES[TENSORS]
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    ends = {8 + length + offset for name in table if name != "__metadata__" for offset in table[name]["data_offsets"]}
    places = {0, 1, 7, 8, 9, *(8 + length * quarter // 4 for quarter in (1, 2, 3)), 7 + length, len(data) - 1}
    for place in sorted(places | {end + near for end in ends for near in (-1, 0, 1)}):
        if place < 8:
            yield place, "too few"
        elif place < len(data):
            yield place, "cut short or not safetensors" if place < 8 + length else f"the file at {place}"


def pickle_beside(name: str) -> Break:
    """A pickle that would run a command."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(touching(folder)))


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../outside", "text")
    return buffer.getvalue()


U, S = UnreadableAdapter, UnsupportedAdapter
LONG = 10**5
TOO_LONG = f"a piece of it has more than {MEMBER_CHARACTERS_MAX} characters"
NO_PLAIN_VALUES = "cannot be read as tensors and plain values"
NO_SAVE = "is no file of torch.save"
ONE = "base_model.model."
MANY_FIELDS = filled("{", by_key('"%s":0', 10**6)(), "}", CONFIG_BYTES)
MANY_LISTS = filled('{"a":[', repeated("[]")(), "]}", CONFIG_BYTES)
ZIP = zipped()
NOTHING: Items = lambda: iter(())  # noqa: E731

CASES: list[Hostile] = [
    # adapter_config.json as a file
    Hostile("config missing", lambda f: (f / CONFIG).unlink(), U, "is missing"),
    Hostile("config empty", config_bytes(b""), U, "is not JSON"),
    Hostile("config cut short", config_bytes(b'{"r": 2, "lora'), U, "is not JSON"),
    Hostile("config utf-16", config_bytes('{"r": 2}'.encode("utf-16")), U, "is not JSON"),
    Hostile("config is a list", config_bytes(b"[1, 2]"), U, "expected an object"),
    Hostile("config is random bytes", config_bytes(bytes(range(256)) * 100), U, "is not JSON"),
    Hostile("config 2 MiB", config_bytes(b" " * 2**21), U, "at most 1048576"),
    Hostile("config nested 100000 deep", config_bytes(b'{"a":' * LONG + b"1" + b"}" * LONG), U, "holds more than"),
    Hostile("config nested 10000 deep", config_bytes(b'{"a":' * 10**4 + b"1" + b"}" * 10**4), U, "nested more than 16"),
    Hostile("config nested 20 deep", config_bytes(b'{"a":' * 20 + b"1" + b"}" * 20), U, "nested more than 16"),
    Hostile(
        "config lists nested", config_bytes(b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"), U, "nested more than"
    ),
    Hostile("config is a symlink", link(CONFIG), U, "symbolic link"),
    Hostile("config is a broken symlink", replaced(CONFIG, lambda p: p.symlink_to("/nowhere")), U, "symbolic link"),
    Hostile("config is a pipe", replaced(CONFIG, os.mkfifo), U, "not a plain file"),
    Hostile("config is a folder", replaced(CONFIG, Path.mkdir), U, "not a plain file"),
    Hostile("config is a device", replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), U, "symbolic link"),
    Hostile("r twice", config_text('"r": 2', '"r": 2, "r": 4'), U, "'r' stands there twice"),
    Hostile("r missing", config(r=...), U, "r is None"),
    Hostile("r is a text", config(r="2"), U, "r is '2'"),
    Hostile("r is true", config(r=True), U, "r is True"),
    Hostile("r is zero", config(r=0), U, "r is 0"),
    Hostile("r is huge", config(r=10**30), U, "r is 1000"),
    Hostile("r is not the tensors'", config(r=4), U, "so rank 2; adapter_config.json says r = 4"),
    Hostile("alpha missing", config(lora_alpha=...), U, "lora_alpha is None"),
    Hostile("alpha zero", config(lora_alpha=0), U, "lora_alpha is 0"),
    Hostile("alpha negative", config(lora_alpha=-16), U, "lora_alpha is -16"),
    Hostile("alpha NaN", config_text('"lora_alpha": 4', '"lora_alpha": NaN'), U, "NaN is not a JSON number"),
    Hostile("alpha overflows", config_text('"lora_alpha": 4', '"lora_alpha": 1e999'), U, "lora_alpha is inf"),
    Hostile("alpha of 5000 digits", config_text('"lora_alpha": 4', '"lora_alpha": ' + "9" * 5000), U, "is not JSON"),
    Hostile(
        "alpha of 400 digits", config_text('"lora_alpha": 4', '"lora_alpha": ' + "9" * 400), U, "lora_alpha is 999"
    ),
    Hostile("rslora is a text", config(use_rslora="no"), U, "use_rslora is 'no'"),
    Hostile("base is a list", config(base_model_name_or_path=["a"]), U, "base_model_name_or_path is a list"),
    Hostile("no type", config(peft_type=...), U, "peft_type is missing"),
    Hostile("another type", config(peft_type="IA3"), S, "peft_type = 'IA3'"),
    Hostile("dora", config(use_dora=True), S, "use_dora = True: DoRA"),
    Hostile("saved modules", config(modules_to_save=["lm_head"]), S, "modules_to_save"),
    Hostile("token indices", config(trainable_token_indices=[1]), S, "trainable_token_indices"),
    Hostile("tied weights", config(ensure_weight_tying=True), S, "ensure_weight_tying"),
    Hostile("replicated layers", config(layer_replication=[[0, 2]]), S, "layer_replication"),
    Hostile("activated lora", config(alora_invocation_tokens=[1]), S, "alora_invocation_tokens"),
    Hostile("qalora", config(use_qalora=True), S, "use_qalora"),
    Hostile("bdlora", config(use_bdlora={"nblocks": 2}), S, "use_bdlora"),
    Hostile("arrow", config(arrow_config={"top_k": 3}), S, "arrow_config"),
    Hostile("kasa", config(kasa_config={"x": 1}), S, "kasa_config"),
    Hostile("montecarlo", config(monteclora_config={"x": 1}), S, "monteclora_config"),
    Hostile("transposed", config(fan_in_fan_out=True), S, "fan_in_fan_out"),
    Hostile("pissa", config(init_lora_weights="pissa_niter_4"), S, "init_lora_weights = 'pissa_niter_4'"),
    Hostile("olora", config(init_lora_weights="olora"), S, "init_lora_weights = 'olora'"),
    Hostile("corda", config(init_lora_weights="corda"), S, "init_lora_weights"),
    Hostile("loftq", config(init_lora_weights="loftq"), S, "init_lora_weights"),
    Hostile("lora_ga", config(init_lora_weights="lora_ga"), S, "init_lora_weights"),
    Hostile("unknown init", config(init_lora_weights={"a": 1}), S, "init_lora_weights = a dict"),
    Hostile(
        "alpha pattern with a regular expression",
        config(alpha_pattern={"(a+)+$": 4}),
        S,
        "'(a+)+$', a regular expression",
    ),
    Hostile("alpha pattern a list", config(alpha_pattern=[1]), U, "alpha_pattern is a list"),
    Hostile("alpha pattern of a text", config(alpha_pattern={"q_proj": "4"}), U, "alpha_pattern['q_proj'] is '4'"),
    Hostile("rank pattern of zero", config(rank_pattern={"q_proj": 0}), U, "rank_pattern['q_proj'] is 0"),
    Hostile(
        "rank pattern against the tensors",
        config(rank_pattern={"q_proj": 4}),
        U,
        "so rank 2; adapter_config.json says r = 4",
    ),
    Hostile("rank pattern of 1000000", config(rank_pattern={"(a+)+$": 10**6}), U, "is 1000000"),
    Hostile(
        "target parameters a text", config(target_parameters="experts.down_proj"), U, "target_parameters is 'experts"
    ),
    Hostile("unknown kind of bias", config(bias="some"), S, "bias = 'some'"),
    Hostile("unknown field", config(use_mystery=True), S, "use_mystery = True"),
    Hostile("terminal codes", config(**{"\x1b[2J": "\x1b[31m"}), S, "'\\x1b[2J' = '\\x1b[31m'"),
    Hostile("lone surrogate", config_text('"r": 2', '"r": 2, "\\ud800": 1'), S, "'\\ud800' = 1"),
    # adapter_model.safetensors as a file
    Hostile("tensors missing", lambda f: (f / TENSORS).unlink(), U, "is missing"),
    Hostile("only a pickle", only_pickle, S, "a pickle, which is never opened"),
    Hostile("tensors are a symlink", link(TENSORS), U, "symbolic link"),
    Hostile("tensors are a pipe", replaced(TENSORS, os.mkfifo), U, "not a plain file"),
    Hostile("tensors are a folder", replaced(TENSORS, Path.mkdir), U, "not a plain file"),
    Hostile("tensors empty", tensors_bytes(b""), U, "too few"),
    Hostile("7 bytes", tensors_bytes(b"1234567"), U, "too few"),
    Hostile("header of 2^63 bytes", tensors_bytes(struct.pack("<Q", 2**63) + b"{}"), U, "cut short or not safetensors"),
    Hostile("header past the end", tensors_bytes(struct.pack("<Q", 100) + b"{}"), U, "cut short or not safetensors"),
    Hostile("no header", tensors_bytes(struct.pack("<Q", 0) + b"{}"), U, "does not start with"),
    Hostile("a pickle", tensors_bytes(b"\x80\x04\x95" + b"\0" * 100), U, "cut short or not safetensors"),
    Hostile("header not JSON", tensors_bytes(joined(b"{nonsense", b"")), U, "is not JSON"),
    Hostile(
        "header nested", tensors_bytes(joined(b'{"a":' * 900 + b"1" + b"}" * 900, b"")), U, "must give dtype, shape"
    ),
    Hostile(
        "header nested deep", tensors_bytes(joined(b'{"a":' * 90_000 + b"1" + b"}" * 90_000, b"")), U, "nested more"
    ),
    Hostile("header of commas", tensors_bytes(joined(b'{"a":[' + b"1," * 2**21 + b"1]}", b"")), U, TOO_LONG),
    Hostile("150000 tensors", many_tensors, U, "more than the 100000 tensors"),
    Hostile("cut short", cut_last_byte, U, "the file at"),
    Hostile("one byte more", one_byte_more, U, "1 bytes follow the last tensor"),
    Hostile("metadata of numbers", header(lambda h: h.update({"__metadata__": {"a": 1}})), U, "__metadata__"),
    Hostile("metadata a list", header(lambda h: h.update({"__metadata__": [1]})), U, "__metadata__"),
    Hostile("false fingerprint", header(lambda h: h["__metadata__"].update(graftwork_base_fingerprint="x")), U, "'x'"),
    Hostile("a tensor twice", twice_in_header, U, "stands there twice"),
    Hostile("entry a number", header(lambda h: h.update({Q_A: 1})), U, "must give dtype, shape"),
    Hostile("entry without dtype", header(lambda h: h[Q_A].pop("dtype")), U, "must give dtype, shape"),
    Hostile("entry with more", entry(path="/etc/passwd"), U, "nothing else"),
    Hostile("unknown dtype", entry(dtype="F31"), U, "unknown dtype 'F31'"),
    Hostile("dtype a list", entry(dtype=["F32"]), U, "unknown dtype a list"),
    Hostile("dtype F64", entry(dtype="F64"), S, "has dtype F64"),
    Hostile("dtype F16 of F32's bytes", entry(dtype="F16"), U, "needs 32 bytes, its data_offsets hold 64"),
    Hostile("shape of floats", entry(shape=[2.0, 8]), U, "its shape is not a list"),
    Hostile("shape of booleans", entry(shape=[True, 16]), U, "its shape is not a list"),
    Hostile("shape negative", entry(shape=[-2, -8]), U, "its shape is not a list"),
    Hostile("shape overflows", entry(shape=[2**62, 2**62]), U, "needs"),
    Hostile("shape of 2^70", entry(shape=[2**70]), U, "its shape is not a list"),
    Hostile("shape of 9 axes", entry(shape=[1] * 9), U, "its shape is not a list"),
    Hostile("shape a text", entry(shape="2,8"), U, "its shape is not a list"),
    Hostile("vector", entry(shape=[16]), S, "only matrices"),
    Hostile("cube", entry(shape=[2, 4, 2]), S, "only matrices"),
    Hostile("number", entry(shape=[], data_offsets=[0, 4]), U, ""),
    Hostile("offsets past the end", entry(data_offsets=[10**9, 10**9 + 64]), U, "gap before it"),
    Hostile("offsets negative", entry(data_offsets=[-64, 0]), U, "data_offsets are not two whole numbers"),
    Hostile("offsets backwards", entry(data_offsets=[64, 0]), U, "data_offsets hold -64"),
    Hostile("offsets three", entry(data_offsets=[0, 64, 64]), U, "data_offsets are not two"),
    Hostile("overlap", header(lambda h: h[Q_A].update(data_offsets=h[Q_B]["data_offsets"], shape=[2, 6])), U, "tensor"),
    Hostile("A and B swapped", header(swapped_shapes), U, "needs"),
    Hostile("no tensor at all", empty_file, U, "holds no tensor"),
    Hostile("half a pair", half_a_pair, U, "half of a pair is missing: model.layers.0.self_attn.v_proj.lora_B"),
    Hostile("empty tensor", added("base_model.model.x.lora_A.weight", [2, 0]), U, "x.lora_B"),
    Hostile("unknown tensor", added("base_model.model.lm_head.weight", [2, 2]), S, "lm_head.weight is no LoRA factor"),
    Hostile("int8 tensor", added("base_model.model.x.lora_A.weight", [2, 2], "I8"), S, "has dtype I8"),
    Hostile("path out of the folder", renamed(Q_A, "base_model.model.../../etc.lora_A.weight"), S, "is no LoRA factor"),
    Hostile("name with a slash", renamed(Q_A, "base_model.model./etc/passwd.lora_A.weight"), S, "is no LoRA factor"),
    Hostile("name empty", renamed(Q_A, ""), U, "not a name that a module can have"),
    Hostile(
        "name not ASCII", renamed(Q_A, Q_A.replace("q_proj", "q\u202eproj")), U, "not a name that a module can have"
    ),
    Hostile("name with terminal codes", renamed(Q_A, "\x1b[2J"), U, "'\\x1b[2J': not a name"),
    Hostile("name of 10000 characters", renamed(Q_A, "a" * 10_000), U, "not a name that a module can have"),
    Hostile("two adapter names", renamed(Q_A, Q_A.replace("lora_A.", "lora_A.other.")), S, "several adapters"),
    Hostile("embedding", added("base_model.model.e.lora_embedding_A", [2, 2]), S, "LoRA on embeddings"),
    Hostile("dora's magnitudes", added("base_model.model.x.lora_magnitude_vector", [2]), S, "DoRA"),
    Hostile("bias of B", both(added("base_model.model.x.lora_B.bias", [2]), number(1.0)), S, "a trained bias"),
    Hostile(
        "half of the experts' pair",
        added("base_model.model.experts.base_layer.lora_A.weight", [2, 2]),
        U,
        "half of a pair",
    ),
    Hostile(
        "nested wrappers",
        added("base_model.model.experts.base_layer.base_layer.lora_A.weight", [2, 2]),
        S,
        "more than two",
    ),
    Hostile("expert 10^9", expert(10**9), S, "at most 4096 experts"),
    Hostile("experts of other shapes", two_experts([2, 8], [2, 9]), U, "experts of one layer are alike"),
    Hostile("expert 1 twice", added_pair("x.experts.1.up_proj", "x.experts.01.up_proj"), U, "are the same factor"),
    Hostile("a stack without a count", stack([2, 8], [6, 2]), S, "how many there are is unknown"),
    Hostile("a stack of two counts", stack([3, 2, 8], [4, 6, 2]), U, "A is of 3 experts, B of 4"),
    Hostile("gate above up of odd height", stack([3, 2, 8], [3, 7, 2], "gate_up_proj"), U, "even number"),
    Hostile("flat experts of no whole number", flat([5, 8], [6, 5]), U, "no number of experts x rank"),
    Hostile("flat experts of two counts", flat([6, 8], [6, 8]), U, "differ in experts x rank"),
    Hostile("flat experts of an unnamed parameter", flat([6, 8], [6, 6], inner=False), S, "must say which"),
    Hostile("NaN", number(float("nan")), U, "lora_B.weight[0, 0] is nan"),
    Hostile("infinity", number(float("inf")), U, "lora_B.weight[0, 0] is inf"),
    Hostile("minus infinity", number(float("-inf")), U, "lora_B.weight[0, 0] is -inf"),
    # cut short at every boundary
    *(Hostile(f"tensors cut to {place} bytes", cut(TENSORS, place), U, says) for place, says in cut_places()),
    *(
        Hostile(f"config cut to {part}/4", cut(CONFIG, len(FILES[CONFIG]) * part // 4), U, "is not JSON")
        for part in (1, 2, 3)
    ),
    # as large as may be
    Hostile("a header of one text", large_header('{"a":', one_text("a", HEADER_BYTES_MAX - 10), "}"), U, TOO_LONG),
    Hostile(
        "a header of one text in four bytes a letter",
        large_header('{"a":', one_text("\U0001f600", HEADER_BYTES_MAX - 10), "}"),
        U,
        TOO_LONG,
    ),
    Hostile("a name of 16 MiB", large_header("{", one_text("a", HEADER_BYTES_MAX - 10), ":1}"), U, TOO_LONG),
    Hostile("a header of spaces", large_header("{" + " " * (HEADER_BYTES_MAX - 10), NOTHING, "}"), U, TOO_LONG),
    Hostile("a header of lists", large_header('{"a":[', repeated("[[],[[]]]"), "]}"), U, TOO_LONG),
    Hostile("a header of nested lists", large_header('{"a":' + "[" * 2**23, NOTHING, "]" * 2**22), U, "nested more"),
    Hostile("a header of nested tables", large_header('{"a":' * 2**21, NOTHING, "}" * 2**21), U, "nested more"),
    Hostile("a header of escapes", large_header('{"a":"' + r"\"" * 2**22, NOTHING, '"}'), U, TOO_LONG),
    Hostile(
        "metadata of many texts",
        large_header('{"__metadata__":{', by_key('"%s":""', 26_000), "}}"),
        U,
        "holds no tensor",
    ),
    Hostile(
        "metadata of 16 MiB",
        large_header('{"__metadata__":{', by_key('"%s":"' + "a" * 1000 + '"', 10**5), "}}"),
        U,
        TOO_LONG,
    ),
    Hostile(
        "the last of 100000 entries is none",
        large_header("{", lambda: itertools.chain(entries(TENSORS_MAX - 1), ['"x":1']), "}"),
        U,
        "must give dtype, shape",
    ),
    Hostile("100000 entries and no bytes", large_header("{", lambda: entries(TENSORS_MAX), "}"), U, "the file at"),
    Hostile("a config of one text", large_config('"revision":', one_text("a", CONFIG_BYTES - 2000), ""), U, "is nan"),
    Hostile(
        "a config of one text in four bytes a letter",
        large_config('"revision":', one_text("\U0001f600", CONFIG_BYTES - 4000), ""),
        U,
        "is nan",
    ),
    Hostile("a config of many fields", config_bytes(MANY_FIELDS), U, f"more than the {VALUES_MAX} values"),
    Hostile("a config of empty lists", config_bytes(MANY_LISTS), U, f"more than the {VALUES_MAX} values"),
    Hostile(
        "a config of many fields that are off",
        large_config('"m":0,', by_key('"%s":0', 60_000), ""),
        U,
        "is nan",
    ),
    Hostile(
        "a config of many ranks",
        both(config(rank_pattern=...), large_config('"rank_pattern":{', by_key('"%s":2', 60_000), "}")),
        U,
        "is nan",
    ),
    # beside the adapter
    Hostile("chat template a link to outside", linked("chat_template.jinja"), U, "symbolic link"),
    Hostile("tokenizer a link to outside", linked("tokenizer.json"), U, "symbolic link"),
    Hostile("tokenizer a link to nowhere", lambda f: (f / "tokenizer.json").symlink_to("/no"), U, "symbolic link"),
    Hostile("tokenizer a link to a device", lambda f: (f / "tokenizer.json").symlink_to("/dev/zero"), U, "symbolic"),
    Hostile("tokenizer a pipe", lambda f: os.mkfifo(f / "tokenizer.json"), U, "not a plain file"),
    Hostile("tokenizer a folder", lambda f: (f / "tokenizer.json").mkdir(), U, "not a plain file"),
    Hostile("tokenizer of 1 GiB", sparse("tokenizer.json", 2**30), U, "a tokenizer's file has at most 67108864"),
    Hostile("chat template of 1 TiB", sparse("chat_template.jinja", 2**40), U, "at most 67108864"),
    Hostile("a pickle beside", both(pickle_beside("adapter_model.bin"), number(float("nan"))), U, "is nan"),
    Hostile("code beside", both(beside("adapter.py", b"import nothing"), number(float("nan"))), U, "is nan"),
    # what leads elsewhere
    Hostile("a pickle of torch in disguise", lambda f: (f / TENSORS).write_bytes(saved({})), U, "not safetensors"),
    Hostile(
        "a pickle of torch of old in disguise",
        lambda f: (f / TENSORS).write_bytes(saved(touching(f), zipped=False)),
        U,
        "not safetensors",
    ),
    Hostile("a zip in disguise", tensors_bytes(ZIP), U, "not safetensors"),
    Hostile("config a pickle", lambda f: (f / CONFIG).write_bytes(pickle.dumps(touching(f))), U, "is not JSON"),
    Hostile("name an absolute path", renamed(Q_A, "/etc/passwd"), S, "is no LoRA factor"),
    Hostile("name an absolute path and a side", renamed(Q_A, "/etc/passwd.lora_A.weight"), S, "is no LoRA factor"),
    Hostile("name with a zero byte", renamed(Q_A, "x\0.lora_A.weight"), U, "not a name that a module can have"),
    *(
        Hostile(f"base at {base}", both(config(base_model_name_or_path=base), number(float("nan"))), U, "is nan")
        for base in ("/etc/passwd", "../../base", "http://127.0.0.1:9/base", "file:///etc/passwd", "https://[", "\0")
    ),
    Hostile(
        "modules to import",
        both(
            config(
                auto_mapping={"base_model_class": "Popen", "parent_library": "antigravity"},
                megatron_core="this",
                revision="../..",
                runtime_config={"ephemeral_gpu_offload": True},
            ),
            number(float("nan")),
        ),
        U,
        "is nan",
    ),
    Hostile("regular rank_pattern, many modules", patterns("rank_pattern", '"%s(a+)+$":1', 60_000), U, "is nan"),
    Hostile("target_parameters, many modules", patterns("target_parameters", '"%s"', 60_000, "[", "]"), U, "is nan"),
    Hostile(
        "filled says one name often",
        header(lambda h: h["__metadata__"].update(graftwork_filled="m " * 10**5)),
        U,
        "which is no module of zeros",
    ),
    Hostile("filled names everything", all_filled, U, "names every module"),
    Hostile("one factor for 4096 experts", stack([2, 2**18], [4096, 1, 2]), S, "it is 2147483648 numbers a factor"),
    # trainer/rank_N.pt
    Hostile("rank file runs a command", rank_0(lambda f: saved({"model": touching(f)})), U, NO_PLAIN_VALUES),
    Hostile("rank file of old runs a command", rank_0(lambda f: saved(touching(f), zipped=False)), U, NO_SAVE),
    Hostile("rank file a bare pickle", rank_0(lambda f: pickle.dumps(touching(f), protocol=2)), U, NO_SAVE),
    Hostile("rank file a pickle of marks", rank_0(lambda _: b"\x80\x02" + b"(" * 2_000_000 + b"t."), U, NO_SAVE),
    Hostile("rank file empty", rank_0(lambda _: b""), U, NO_SAVE),
    Hostile("rank file of random bytes", rank_0(lambda _: bytes(range(1, 256)) * 100), U, NO_SAVE),
    Hostile("rank file a zip of something", rank_0(lambda _: ZIP), U, NO_PLAIN_VALUES),
    Hostile("rank file compressed", rank_0(lambda _: deflated(2**22)), U, "is compressed"),
    Hostile("rank file expanded", state(x__lora_A__weight=torch.zeros(1).expand(2, 2**28)), U, "is no tensor of"),
    Hostile("rank file sparse", state(x__lora_A__weight=torch.ones(2, 8).to_sparse()), U, "is no tensor of"),
    Hostile("rank file on no device", state(x__lora_A__weight=torch.ones(2, 8, device="meta")), U, "is no tensor of"),
    Hostile("rank file of float8", state(x__lora_A__weight=torch.ones(2, 8).to(torch.float8_e5m2)), U, "is no tensor"),
    Hostile("rank file of float64", state(x__lora_A__weight=torch.ones(2, 8).double()), U, "is no tensor of"),
    Hostile("rank file of no directions", state(x__lora_A__weight=torch.ones(0, 8)), U, "do not"),
    Hostile("rank file of a long name", state(**{"x" * 100_000 + "__lora_A__weight": torch.ones(2, 8)}), U, "xxx..."),
    Hostile("rank file of many prefixes", state(**{ONE * 60_000 + "x__lora_A__weight": torch.ones(2, 8)}), U, "..."),
    Hostile("rank file twice", state(**{ONE.replace(".", "__") + "x__lora_A__weight": torch.ones(2, 8)}), U, "second"),
    Hostile("rank file 999999 alone", checkpoint(beside("trainer/rank_999999.pt", b"")), U, "rank_1.pt is"),
    Hostile("rank files behind a link", moved_away("trainer"), U, "symbolic link"),
    Hostile("scale behind a link", moved_away("weight"), U, "symbolic link"),
    *(
        Hostile(
            f"rank file cut to {part}/4",
            checkpoint(cut(RANK_0, len(rank_file(adapter(), 0, 1)) * part // 4)),
            U,
            NO_SAVE,
        )
        for part in (1, 2, 3)
    ),
    Hostile("rank file a list", rank_0(lambda _: saved([1, 2])), U, "holds no table of tensors"),
    Hostile("rank file of no tensor", rank_0(lambda _: saved({"model": {}})), U, "holds no table of tensors"),
    Hostile("rank file of texts", state(x__lora_A__weight="a"), U, "is no tensor of"),
    Hostile("rank file of whole numbers", state(x__lora_A__weight=torch.ones(2, 8).long()), U, "is no tensor of"),
    Hostile("rank file of complex numbers", state(x__lora_A__weight=torch.ones(2, 8) * 1j), U, "is no tensor of"),
    Hostile("rank file with NaN", state(x__lora_B__weight=torch.full((6, 2), torch.nan)), U, "is not finite"),
    Hostile("rank file with infinity", state(x__lora_B__weight=torch.full((6, 2), torch.inf)), U, "is not finite"),
    Hostile("rank file with another weight", state(lm_head__weight=torch.ones(2, 2)), S, "is no LoRA factor"),
    Hostile("rank file with a path", state(**{"../../x__lora_A__weight": torch.ones(2, 2)}), S, "is no LoRA factor"),
    Hostile("rank file with half a pair", state(x__lora_B__weight=...), U, "half of the pair of x is missing"),
    Hostile("rank file of a vector", state(x__lora_A__weight=torch.ones(8)), U, "is no tensor of"),
    Hostile("rank file of two ranks", state(x__lora_A__weight=torch.ones(3, 8)), U, "do not belong together"),
    Hostile("rank file a link", checkpoint(link(RANK_0)), U, "symbolic link"),
    Hostile("rank file a pipe", checkpoint(replaced(RANK_0, os.mkfifo)), U, "not a plain file"),
    Hostile("rank file a folder", checkpoint(replaced(RANK_0, Path.mkdir)), U, "not a plain file"),
    Hostile(
        "rank file 1 missing", checkpoint(beside("trainer/rank_2.pt", rank_file(adapter(), 0, 1))), U, "rank_1.pt is"
    ),
    Hostile("rank file without STABLE", checkpoint(lambda f: (f / "STABLE").unlink()), U, "has no STABLE file"),
    Hostile("rank file without a scale", checkpoint(lambda f: shutil.rmtree(f / "weight")), S, "nothing in it says"),
    Hostile("rank file beside a config of nonsense", checkpoint(beside(f"weight/{CONFIG}", b"{")), U, "is not JSON"),
    Hostile("rank file beside a linked tokenizer", checkpoint(linked("weight/tokenizer.json")), U, "symbolic link"),
]


# --- one after the other, watched ---------------------------------------------------------------------------------


Event = tuple[str, tuple[Any, ...]]
"""Of sys.addaudithook."""


class Watch:
    """Records what a block does. Its audit hook stays in the process for good."""

    LISTS = frozenset({"os.listdir", "os.scandir", "glob.glob", "glob.glob/2"})
    RUNS = frozenset({"exec", "compile", "code.__new__", "os.system", "os.exec", "os.fork", "os.forkpty"})
    RUNS |= {"os.posix_spawn", "os.spawn", "os.putenv", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen"}
    CHANGES = re.compile(r"os\.(mkdir|rename|remove|rmdir|link|symlink|truncate|chmod|chown|utime)|shutil\..*")

    def __init__(self) -> None:
        self.events: list[Event] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is not None:
            self.events.append((event, arguments))

    @contextmanager
    def recording(self) -> Iterator[list[Event]]:
        self.events = found = list[Event]()
        try:
            yield found
        finally:
            self.events = None


def outside(events: Iterable[Event], folder: Path) -> Iterator[str]:
    """What was opened or listed elsewhere. A link in the folder that was followed out of it counts."""
    root = os.path.realpath(folder)
    for event, arguments in events:
        if (event == "open" or event in Watch.LISTS) and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100
            followed = not (event == "open" and (arguments[2] or 0) & os.O_NOFOLLOW)
            parent, name = os.path.split(path)
            real = os.path.realpath(path) if followed else os.path.join(os.path.realpath(parent), name)  # noqa: PTH118
            if os.path.commonpath([root, real]) != root:
                yield f"{event} {path}"


def tree(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in root.rglob("*")}


def runs(event: str) -> bool:
    """Whether code, a command or the network is meant."""
    return event in Watch.RUNS or event.startswith(("socket.", "urllib.", "http."))


def resident(field: str) -> int:
    """VmRSS, what the process has in memory now, or VmHWM, the most since `forget_highest`; 0 on other than Linux."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def forget_highest() -> bool:
    """Whether this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def attempt(folder: Path) -> tuple[str | None, str]:
    """(error, message) of taking it for an adapter; nothing of it stays in memory."""
    outputs = folder.parent / "outputs"
    try:
        if has_rank_files(folder):
            export_adapter(Disk(), folder, outputs / "adapter", "peft", older=True)
        else:
            convert_adapter(Disk(), folder, outputs / "run_x")
    except Exception as error:  # noqa: BLE001 - any other than an AdapterError is what is looked for
        return type(error).__name__, str(error)
    return None, ""


def examine(case: Hostile, place: Path, watch: Watch) -> Finding:
    """Twice: watched, and with every allocation counted, which takes longer."""
    folder = good_folder(place / "adapter")
    case.spoil(folder)
    before = tree(place)
    counted = forget_highest()
    resident_before, started = resident("VmRSS"), time.thread_time()
    with watch.recording() as events:
        error, message = attempt(folder)
    seconds, highest = time.thread_time() - started, resident("VmHWM")
    tracemalloc.start()
    attempt(folder)
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    after = tree(place)
    return Finding(
        case.name, str(folder), error, message, seconds, python_bytes,
        max(0, highest - resident_before) if counted else None,
        outside=tuple(outside(events, folder)),
        imported=tuple(str(arguments[0]) for event, arguments in events if event == "import"),
        ran=tuple(f"{event} {arguments}" for event, arguments in events if runs(event)),
        changed=tuple(sorted(
            [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
            + [f"{event} {arguments}" for event, arguments in events if Watch.CHANGES.fullmatch(event)]
        )),
    )  # fmt: skip


def main(folder: Path) -> None:
    """Print a Finding a case. Good adapters first: what Python and torch load on first use is loaded then."""
    "".encode("cp437")  # names in zip files
    watch = Watch()
    for name, make in (("peft", good_folder), ("checkpoint", lambda at: as_checkpoint(good_folder(at)))):
        make(folder / name / "adapter")
        if (outcome := attempt(folder / name / "adapter"))[0] is not None:
            raise AssertionError(f"the good {name} is refused: {outcome}")
    for number, case in enumerate(CASES):
        place = folder / str(number)
        print(json.dumps(asdict(examine(case, place, watch))), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
