"""HELLO: the first frame each way (spec 02): version, capabilities, limits, and what each sees of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from petalite import limits
from petalite.wire import packing

MINOR = 0
INLINE = "inline"  # capability: a small body may travel in the frame of its head


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """`capabilities` maps names to parameters; `time` is unix seconds; `observed` is where we see the peer."""

    minor: int = MINOR
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    max_body: int = limits.MAX_BODY
    max_streams: int = limits.MAX_STREAMS
    agent: str = ""
    time: int = 0
    observed: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {
            "v": self.minor,
            "caps": dict(self.capabilities),
            "limits": {"body": self.max_body, "streams": self.max_streams},
            "agent": self.agent,
            "time": self.time,
            "observed": self.observed,
        }

    @classmethod
    def from_wire(cls, head: Mapping[str, Any]) -> Hello:
        """Raises RequestError naming the field; unknown keys and capabilities are ignored."""
        packing.refuse_critical(head)
        bounds = packing.field(head, "limits", packing.Map(), {})
        return cls(
            minor=packing.field(head, "v", packing.Int(0, 2**32 - 1)),
            capabilities=packing.field(head, "caps", packing.Map(), {}),
            max_body=packing.field(bounds, "body", packing.Int(0), limits.MAX_BODY),
            max_streams=packing.field(bounds, "streams", packing.Int(1), limits.MAX_STREAMS),
            agent=packing.field(head, "agent", packing.Str(high=limits.MAX_AGENT), ""),
            time=packing.field(head, "time", packing.Int(0), 0),
            observed=packing.field(head, "observed", packing.Str(high=limits.MAX_OBSERVED), ""),
        )
