"""The published vectors of chapters 09 and 10: spec/vectors/dht.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from petalite.dht.ids import bucket_index, distance, model_key, models_key, number, puzzle_bits
from petalite.dht.records import RecordError, StoreCode, read_record
from petalite.dht.store import RecordStore
from petalite.identity import peer_id_of

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).resolve().parent.parent.parent / "spec" / "vectors" / "dht.json").read_text()
)


def test_ids_distances_and_keys() -> None:
    for one in VECTORS["ids"]:
        key = bytes.fromhex(one["public_key"])
        assert (peer_id_of(key).hex(), puzzle_bits(key)) == (one["id"], one["puzzle_bits"])
    for one in VECTORS["distances"]:
        a, b = bytes.fromhex(one["a"]), bytes.fromhex(one["b"])
        assert (distance(a, b), bucket_index(number(a), number(b))) == (int(one["distance"], 16), one["bucket"])
    for one in VECTORS["keys"]:
        assert model_key(one["network"], bytes.fromhex(one["model"])).hex() == one["model_key"]
        assert models_key(one["network"]).hex() == one["models_key"]


@pytest.mark.parametrize("one", VECTORS["records"], ids=lambda one: str(one["why"]))
def test_record(one: dict[str, Any]) -> None:
    try:
        record = read_record(bytes.fromhex(one["record"]), "petalite")
        code = RecordStore(0).put(record, b"", one["now_ms"])
    except RecordError as error:
        code = error.code
    else:
        assert record.publisher.hex() == one["publisher"]
        assert (record.seq, record.exp, record.val) == (one["seq"], one["exp"], one["val"])
    assert code is StoreCode[one["code"].upper()]
