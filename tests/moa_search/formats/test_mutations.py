"""Damaged files load to what was written or end in one clear line; never in another plan or profile."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from moa_search.errors import FileFormatError
from moa_search.formats import Plan, Profile
from moa_search.formats.profile import METADATA_KEY

MUTATIONS_PER_FORMAT = 1000

Mutation = Callable[[random.Random, bytes], bytes]


def flip_a_bit(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]


def flip_a_bit_near_the_start(rng: random.Random, raw: bytes) -> bytes:
    return flip_a_bit(rng, raw[:300]) + raw[300:]


def change_a_byte(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.choice([b'"', b"{", b"}", b",", b"0", b"-", b"\\", b"\n", b"\0", b"\xff"]) + raw[at + 1 :]


def change_a_digit(rng: random.Random, raw: bytes) -> bytes:
    at = rng.choice([i for i, byte in enumerate(raw) if chr(byte).isdigit()])
    return raw[:at] + b"%d" % rng.randrange(10) + raw[at + 1 :]


def truncate(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.choice([rng.randrange(len(raw)), rng.randrange(20), len(raw) - 1 - rng.randrange(5)])]


def cut_out(rng: random.Random, raw: bytes) -> bytes:
    start, end = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:start] + raw[end:]


def repeat_a_part(rng: random.Random, raw: bytes) -> bytes:
    start = rng.randrange(len(raw))
    end = start + rng.randrange(100)
    return raw[:end] + raw[start:]


def append(rng: random.Random, raw: bytes) -> bytes:
    return raw + rng.choice([b"\n", b"\0", b"x", raw])


def insert_a_literal(rng: random.Random, raw: bytes) -> bytes:
    at = rng.choice([i for i, byte in enumerate(raw) if chr(byte).isdigit()])
    literal = rng.choice(
        [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"1e", b"9" * 5000, b"\xc3\x28", b"[" * 500]
    )
    return raw[:at] + literal + raw[at + 1 :]


def foreign_file(rng: random.Random, raw: bytes) -> bytes:
    deep = b"[" * 100_000
    nested = b'{"schema": "moa-plan/1", "model": {"rope": ' + b'{"a": ' * 300 + b"1" + b"}" * 302
    files: list[bytes] = [
        b"",
        b"\n",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"[1, 2, 3]",
        b'"moa-plan/1"',
        b"{}",
        b'{"schema": ["moa-plan/1"]}',
        b'{"schema": "moa-plan/999"}',
        b'{"schema": "moa-plan/1"}',
        deep,
        nested,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**40) + raw,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", len(deep)) + deep,
        b"\xff\xfe" + raw,
        save({"weight": np.zeros((2, 2), np.float32)}),
        save({"weight": np.zeros(2, np.float32)}, metadata={"format": "pt"}),
        save({"weight": np.zeros(2, np.float32)}, metadata={METADATA_KEY: deep.decode()}),
        save({"weight": np.zeros(2, np.float32)}, metadata={METADATA_KEY: nested.decode()}),
        save({"weight": np.zeros(2, np.float32)}, metadata={METADATA_KEY: '{"schema": "moa-profile/1"}'}),
    ]
    return rng.choice(files)


ANY_FILE: list[Mutation] = [
    flip_a_bit,
    flip_a_bit_near_the_start,
    change_a_byte,
    change_a_digit,
    truncate,
    cut_out,
    repeat_a_part,
    append,
    insert_a_literal,
    foreign_file,
]


def objects_in(value: Any) -> list[dict[str, Any]]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [item for part in inside for item in objects_in(part)]
    return [value, *found] if isinstance(value, dict) and value else found


def mutate_an_object(rng: random.Random, content: dict[str, Any]) -> None:
    """Rename, drop, add or exchange something in one object of ``content``; leaves the checksum there."""
    target = rng.choice(objects_in(content))
    key, other = rng.choice(list(target)), rng.choice(list(target))
    kind = rng.randrange(5)
    if kind == 0:
        target[rng.choice([key.upper(), key + "_", "", "\n", "schema"])] = target.pop(key)
    elif kind == 1 and key != "checksum":
        del target[key]
    elif kind == 2:
        target[key], target[other] = target[other], target[key]
    elif kind == 3:
        target[key] = rng.choice([None, True, -1, 0.5, 2**70, "x", "\ud800", [], {}, [[]], {"a": 1}])
    else:
        target[rng.choice(["extra", "kind", "anchor", "a\nb"])] = rng.choice([1, "prompt", target[key]])


def mutate_plan_content(rng: random.Random, raw: bytes) -> bytes:
    content = json.loads(raw)
    mutate_an_object(rng, content)
    return json.dumps(content).encode()


def swap_patterns(rng: random.Random, raw: bytes) -> bytes:
    content = json.loads(raw)
    layers = content["patterns"]
    a, b = rng.choice(layers), rng.choice(layers)
    i, j = rng.randrange(len(a)), rng.randrange(len(b))
    a[i], b[j] = b[j], a[i]
    return json.dumps(content).encode()


def duplicate_a_line(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return b"".join(lines)


def duplicate_a_key(rng: random.Random, raw: bytes) -> bytes:
    content = json.loads(raw)
    key = rng.choice(list(content))
    return raw.rstrip()[:-1] + f', "{key}": {json.dumps(content[rng.choice([key, "sink"])])}}}'.encode()


def swap_lines(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: dict[str, Any] | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def repack(tensors: dict[str, Any], raw: bytes) -> bytes:
    """A safetensors file of ``tensors`` with the metadata of ``raw``."""
    packed: bytes = save(tensors, metadata=split(raw)[0]["__metadata__"])
    return packed


def mutate_profile_content(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    content = json.loads(header["__metadata__"][METADATA_KEY])
    mutate_an_object(rng, content)
    header["__metadata__"][METADATA_KEY] = json.dumps(content)
    return join(header, data)


def damage_profile_content(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    text = header["__metadata__"][METADATA_KEY].encode()
    damage = rng.choice([change_a_byte, change_a_digit, truncate, insert_a_literal, repeat_a_part])
    header["__metadata__"][METADATA_KEY] = damage(rng, text).decode(errors="replace")
    return join(header, data)


def mutate_tensor_table(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    mutate_an_object(rng, header)
    return join(header, data)


def duplicate_a_tensor(rng: random.Random, raw: bytes) -> bytes:
    header, data = split(raw)
    name = rng.choice(list(header))
    entry = rng.choice([header[name], rng.choice(list(header.values()))])
    return join(json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}", data)


def swap_heads(rng: random.Random, raw: bytes) -> bytes:
    tensors = load(raw)
    name = rng.choice([name for name, tensor in tensors.items() if tensor.ndim > 1])
    tensor = tensors[name] = tensors[name].copy()
    axis = tensor.ndim - 4 + rng.randrange(2) if tensor.ndim >= 4 else tensor.ndim - 1
    tensors[name] = np.ascontiguousarray(np.flip(tensor, axis))
    return repack(tensors, raw)


def swap_tensors(rng: random.Random, raw: bytes) -> bytes:
    tensors = load(raw)
    a, b = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return repack(tensors, raw)


def change_a_tensor(rng: random.Random, raw: bytes) -> bytes:
    tensors = load(raw)
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    changed = rng.choice([tensor.astype(np.float64), tensor.astype(np.int8), tensor[..., :-1], tensor * np.nan])
    tensors[rng.choice([name, name, f"{name}_", "1/loss"])] = np.ascontiguousarray(changed)
    return repack(tensors, raw)


PLAN_FILE: list[Mutation] = [
    mutate_plan_content, swap_patterns, duplicate_a_line, duplicate_a_key, swap_lines
]  # fmt: skip
PROFILE_FILE: list[Mutation] = [
    mutate_profile_content, damage_profile_content, mutate_tensor_table, duplicate_a_tensor, swap_heads,
    swap_tensors, change_a_tensor,
]  # fmt: skip


def check_mutations(original: Path, load_file: Callable[[Path], object], mutations: list[Mutation]) -> tuple[int, int]:
    """Numbers of mutated files that were refused and that loaded equal; anything else fails."""
    raw, expected = original.read_bytes(), load_file(original)
    mutated = original.with_name("mutated")
    refused = 0
    for number in range(MUTATIONS_PER_FORMAT):
        mutation = mutations[number % len(mutations)]
        mutated.write_bytes(mutation(random.Random(number), raw))
        where = f"{mutation.__name__}, seed {number}"
        try:
            loaded = load_file(mutated)
        except FileFormatError as error:
            message = str(error)
            assert message.startswith(f"{mutated}: "), where
            assert message.isprintable(), where
            assert len(message) < 1000, where
            refused += 1
        except BaseException as error:
            pytest.fail(f"{where}: {error!r}")
        else:
            assert loaded == expected, where
    return refused, MUTATIONS_PER_FORMAT - refused


def test_plan_files(tiny_plan: Plan, tmp_path: Path) -> None:
    original = tmp_path / "plan.json"
    tiny_plan.save(original)
    refused, equal = check_mutations(original, Plan.load, [*ANY_FILE, *PLAN_FILE])
    assert refused > 10 * equal > 0


def test_profile_files(tiny_profile: Profile, tmp_path: Path) -> None:
    original = tmp_path / "profile.safetensors"
    tiny_profile.save(original)
    refused, equal = check_mutations(original, Profile.load, [*ANY_FILE, *PROFILE_FILE])
    assert refused > 10 * equal > 0
