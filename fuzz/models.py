"""The target that needs torch, which takes seconds to load."""

from __future__ import annotations

from fuzz.decoders import Target, check
from petalite.bloom.manifest import Manifest, ManifestError


def fuzz_manifest(data: bytes) -> None:
    try:
        manifest = Manifest.parse(data)
    except ManifestError:
        return
    check(manifest.encoded == data, "a manifest that is not canonical")


TARGETS: dict[str, Target] = {"manifest": fuzz_manifest}
