"""Files that somebody else has made: nothing in them is run, and memory stays bounded."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from t5_factory import pemt_config, tiny_t5

import pemt_fast
from pemt_fast import checkpoint, safe_files

GOLDEN = Path(__file__).parent / "golden" / "pemt" / "A"
RAN = Path("ran")


class Payload:
    """Touches a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (RAN,)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not RAN.exists(), "code of the file was run"


@pytest.fixture(autouse=True)
def _memory() -> Any:
    """A limit that reading any of these files must stay far below: 1.5 GiB more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 3 * 2**29, before[1])
    )
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _saved(method: str = "lora") -> Path:
    config: Any = {
        "lora": pemt_fast.LoraConfig(num_tasks=1, r=2),
        "pemt": pemt_config(),
        "c_poly": pemt_fast.CPolyConfig(num_tasks=2),
        "peml": pemt_fast.PemlConfig(num_tasks=1, prefix_length=3),
        "prompt_tuning": pemt_fast.PromptTuningConfig(num_tasks=1, prompt_length=3),
    }[method]
    pemt_fast.get_model(tiny_t5(), config).save_pretrained("saved")
    return Path("saved")


def _change_config(folder: Path, **changes: object) -> None:
    """With the digest of the new text, as somebody who wants to be believed would write it."""
    path, weights = folder / checkpoint.CONFIG_FILE, folder / checkpoint.WEIGHTS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    tensors, _ = safe_files.read_tensors(weights)
    save_file(tensors, weights, {"pemt_fast_config": checkpoint._digest(path.read_text())})


HUGE = 10**12
# Fields that decide how much is built, at sizes that pass for counts and at absurd ones.
SIZES = [
    ("lora", {"r": 60_000}),
    ("lora", {"r": HUGE}),
    ("lora", {"num_tasks": HUGE}),
    ("pemt", {"source_rank": HUGE}),
    ("pemt", {"target_bottleneck": 60_000_000}),
    ("pemt", {"prompt_length": HUGE}),
    ("pemt", {"source_prompt_lengths": [HUGE, 1, 1]}),
    ("c_poly", {"num_tasks": 65_000, "num_common": 65_000}),
    ("c_poly", {"num_specific": HUGE}),
    ("peml", {"prefix_width": 65_000, "prefix_length": 65_000}),
    ("peml", {"prefix_depth": HUGE}),
    ("prompt_tuning", {"prompt_length": 500, "num_tasks": 65_000}),
]


@pytest.mark.parametrize(("method", "changes"), SIZES)
def test_sizes_that_the_tensors_do_not_have(method: str, changes: dict[str, Any]) -> None:
    folder, t5 = _saved(method), tiny_t5()
    before = {name: id(module) for name, module in t5.named_modules()}
    _change_config(folder, **changes)
    wanted = "is no size of the tensors beside it|far larger than its tensors|must have shape"
    with pytest.raises(ValueError, match=wanted) as error:
        pemt_fast.load(t5, folder)
    assert "saved" in str(error.value)
    assert {name: id(module) for name, module in t5.named_modules()} == before
    assert not getattr(t5, "_pemt_fast_attached", False)


def test_a_config_of_the_right_sizes_is_read() -> None:
    folder = _saved("lora")
    _change_config(folder, dropout=0.5)
    assert pemt_fast.load(tiny_t5(), folder).adapter_config.dropout == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"method": "lora", "format": 1, "r": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\ud800".encode("utf-16", "surrogatepass"), "not valid JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        (" " * (2**24 + 1), "must have at most 16777216 bytes"),
        ('{"format": 1, "method": "os.system"}', "method must be one of"),
        ('{"format": 1, "method": ["lora"]}', "method must be one of"),
        ('{"format": 1, "method": "lora", "num_tasks": "many"}', "num_tasks must be an integer"),
    ],
)
def test_configs_that_are_none(text: str | bytes, message: str) -> None:
    folder = _saved()
    raw = text.encode() if isinstance(text, str) else text
    (folder / checkpoint.CONFIG_FILE).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        pemt_fast.load(tiny_t5(), folder)


def _header(values: dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x00" * 7,
        _header({}, length=2**62),
        _header({"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}),
        _header({"x": {"dtype": "F32", "shape": [2**63], "data_offsets": [0, 4]}}, b"\0" * 4),
        _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
        pickle.dumps(Payload()),
    ],
)
def test_safetensors_that_are_none(blob: bytes) -> None:
    folder = _saved()
    (folder / checkpoint.WEIGHTS_FILE).write_bytes(blob)
    with pytest.raises(ValueError, match="truncated or damaged"):
        pemt_fast.load(tiny_t5(), folder)


def _payload(path: Path) -> None:
    torch.save({"task_shared": torch.zeros(2, 2), "x": Payload()}, path)


def _plain_payload(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def _payload_of_old(path: Path) -> None:
    torch.save({"x": Payload()}, path, _use_new_zipfile_serialization=False)


def _bomb(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"task_shared": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(
                record.filename, data + b"\0" * 2**28 if "data/0" in record.filename else data
            )
    assert path.stat().st_size < 2**22


def _old_file_of_huge_size(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"task_shared": torch.zeros(60_001)}, buffer, _use_new_zipfile_serialization=False)
    small = struct.pack("<H", 60_001)  # BININT2
    assert b"M" + small in buffer.getvalue()
    large = b"J" + struct.pack("<i", 2**31 - 1)  # BININT
    path.write_bytes(buffer.getvalue().replace(b"M" + small, large))


def _shown_as_many(path: Path) -> None:
    torch.save({"task_shared": torch.zeros(1, 1).expand(HUGE, 32)}, path)


def _sparse(path: Path) -> None:
    torch.save({"task_shared": torch.sparse_coo_tensor([[0]], [1.0], (HUGE,))}, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


PICKLES: list[tuple[Callable[[Path], None], str]] = [
    (_payload, "holds objects besides tensors"),
    (_plain_payload, "holds objects besides|truncated, damaged"),
    (_payload_of_old, "holds objects besides tensors"),
    (_bomb, "compressed or larger than the file"),
    (_old_file_of_huge_size, "states a size of 2147483647: refused"),
    (_shown_as_many, "must be dense and in the file as a whole"),
    (_sparse, "must be dense and in the file as a whole"),
    (_cut, "truncated, damaged"),
]


@pytest.mark.parametrize(("damage", "message"), PICKLES)
@pytest.mark.parametrize("name", ["task_embedding.pt", "adapter.pt", "sources/qqp/lora.pt"])
def test_published_pickles(damage: Callable[[Path], None], message: str, name: str) -> None:
    from transformers import T5ForConditionalGeneration

    folder = Path(shutil.copytree(GOLDEN, "A"))
    damage(folder / name)
    t5 = T5ForConditionalGeneration.from_pretrained(folder)
    sources = [folder / "sources" / source for source in ("mnli", "qnli", "qqp")]
    with pytest.raises(ValueError, match=message) as error:
        pemt_fast.load_published_pemt(
            t5, sources, target=folder, extra=folder / "gates_and_norms.safetensors"
        )
    assert name in str(error.value)
    assert not getattr(t5, "_pemt_fast_attached", False)


@pytest.mark.parametrize(("damage", "message"), PICKLES)
def test_pickles_of_mttl(damage: Callable[[Path], None], message: str) -> None:
    path = Path("last.ckpt")
    torch.save({"x": torch.zeros(3)}, path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        pemt_fast.load_mttl(tiny_t5(), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": HUGE}, "r = 1000000000000 is no size"),
        ({"r": 50_000}, "does not fit its tensors"),
        ({"r": -1}, "r must be an integer of at least 1"),
        ({"r": True}, "r must be an integer of at least 1"),
        ({"peft_type": "POLY", "n_tasks": HUGE}, "n_tasks = 1000000000000 is no size"),
        ({"peft_type": "POLY", "n_tasks": 60_000, "n_skills": 60_000, "n_splits": 1},
         "far larger than its tensors"),
        ({"peft_type": "POLY"}, "n_tasks must be an integer of at least 1, got None"),
        ({"rank_pattern": {"(x+)+y": 2}}, "must map names of layers to numbers"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"target_modules": HUGE}, "is no size"),
    ],
)  # fmt: skip
def test_peft_configs(changes: dict[str, Any], message: str) -> None:
    model = pemt_fast.get_model(tiny_t5(), pemt_fast.LoraConfig(r=2))
    pemt_fast.export_peft_lora(model, "peft")
    path = Path("peft/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    t5 = tiny_t5()
    with pytest.raises(ValueError, match=message):
        pemt_fast.load_peft(t5, "peft")
    assert not getattr(t5, "_pemt_fast_attached", False)


def test_old_files_of_tensors_are_read() -> None:
    tensors = {"a": torch.arange(70_000.0), "b": torch.ones(3, 2).half()}
    torch.save(tensors, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(tensors, "new.pt")
    for name in ("old.pt", "new.pt"):
        found = safe_files.read_pickle(Path(name))
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_files_under_each_others_names() -> None:
    folder = _saved()
    torch.save({"x": torch.zeros(2)}, folder / checkpoint.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="truncated or damaged"):
        pemt_fast.load(tiny_t5(), folder)
    golden = Path(shutil.copytree(GOLDEN, "A"))
    source = golden / "sources" / "qqp"
    os.replace(source / "lora.pt", source / "adapter.pt")
    with pytest.raises(ValueError, match="expected the adapters of one task"):
        pemt_fast.load_published_pemt(tiny_t5(), [source])


def test_the_limit_counts_what_is_made() -> None:
    with safe_files.allocate_at_most(0, 0, "here"):
        torch.zeros(2**20 - 3)
        with pytest.raises(ValueError, match="here: what its config describes"):
            torch.empty(2, 2)
