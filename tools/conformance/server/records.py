"""Records: lengths, tags, counting, cutting (spec/01, section 6)."""

from __future__ import annotations

import functools
import time
from typing import Any

from tools.conformance.bench import Bench
from tools.conformance.codec import pack
from tools.conformance.constants import CANCEL, END, GOAWAY, PING, REQ
from tools.conformance.link import WAIT
from tools.conformance.peer import Peer, hello_frame
from tools.conformance.registry import case
from tools.conformance.verdicts import require


def _short_record(number: int, length: int) -> None:
    def run(bench: Bench) -> None:
        peer = bench.peer()
        peer.link.send_raw(length.to_bytes(2, "big") + bytes(length))
        seen = peer.link.expect_close({"frame"})
        bench.should(seen, "GOAWAY(frame) before the end")

    case(f"records/{number:03}", "PT-TRN-061", title=f"A record of {length} bytes: GOAWAY(frame)")(run)


_short_record(1, 0)
_short_record(2, 1)
_short_record(3, 15)


@case("records/004", "PT-TRN-061 PT-TRN-060")
def empty_plaintext(bench: Bench) -> None:
    """A record of 16 bytes, rightly sealed over nothing: GOAWAY(frame)"""
    bench.reacts(b"", {"frame"})


@case("records/005", "PT-TRN-064")
def flipped_bit(bench: Bench) -> None:
    """A record with one bit flipped, in the text and in the tag: closed, and not acted on"""
    for at in (2, 9, -1):
        peer = bench.peer()
        record = bytearray(peer.link.seal(pack([REQ, 1, END, "info", {}])))
        record[at] ^= 1
        peer.link.send_raw(bytes(record))
        _ends_unanswered(bench, peer)


def _ends_unanswered(bench: Bench, peer: Peer) -> None:
    """GOAWAY(decrypt) or just the end, and nothing else before it."""
    peer.expect(1)
    seen = peer.link.expect_close({"decrypt"})
    bench.should(seen, "GOAWAY(decrypt) before the end")


@case("records/006", "PT-TRN-062 PT-TRN-064")
def replayed(bench: Bench) -> None:
    """The same record twice: the second does not decrypt, so the connection ends"""
    peer = bench.peer()
    answer = peer.expect(1)
    record = peer.link.seal(pack([REQ, 1, END, "info", {"max": 1 << 20}]))
    peer.link.send_raw(record)
    peer.wait(answer)
    peer.link.send_raw(record)
    _ends_unanswered(bench, peer)


@case("records/007", "PT-TRN-062 PT-TRN-064")
def reflected(bench: Bench) -> None:
    """A record of the server sent back to it: closed, since each direction has its own key"""
    link = bench.link()
    link.send(hello_frame())
    deadline = time.monotonic() + WAIT
    size = link.read_exactly(2, deadline)
    record = size + link.read_exactly(int.from_bytes(size, "big"), deadline)
    cipher = link.recv_cipher
    require(cipher is not None and cipher.decrypt(record[2:]), "no record to reflect")
    link.send_raw(record)
    seen = link.expect_close({"decrypt"})
    bench.should(seen, "GOAWAY(decrypt) before the end")


@case("records/008", "PT-TRN-062 PT-TRN-064")
def skipped_record(bench: Bench) -> None:
    """A record left out: the next does not decrypt, so the connection ends"""
    peer = bench.peer()
    peer.link.seal(pack([PING, bytes(8)]))
    peer.link.send([PING, bytes(8)])
    _ends_unanswered(bench, peer)


@case("records/009", "PT-TRN-060 PT-TRN-064")
def plaintext_goaway(bench: Bench) -> None:
    """A GOAWAY in clear after the handshake is no record: closed"""
    peer = bench.peer()
    plain = pack([GOAWAY, 0, 0, "not encrypted at all"])
    peer.link.send_raw(len(plain).to_bytes(2, "big") + plain)
    _ends_unanswered(bench, peer)


@case("records/010", "PT-TRN-067")
def one_segment(bench: Bench) -> None:
    """Forty requests in one segment: all answered"""
    peer = bench.peer()
    answers = [peer.expect(peer.new_stream()) for _ in range(40)]
    peer.link.send(*[[REQ, answer.stream, END, "info", {"max": 4096}] for answer in answers])
    for answer in answers:
        peer.wait(answer)


@case("records/011", "PT-TRN-067")
def byte_by_byte(bench: Bench) -> None:
    """Records cut into segments of one byte: read like whole ones"""
    peer = bench.peer()
    for _ in range(3):
        payload = bench.rng.randbytes(8)
        for byte in peer.link.seal(pack([PING, payload])):
            peer.link.send_raw(bytes([byte]))
        peer.pump(functools.partial(peer.pongs.__contains__, payload), WAIT, "PONG")


@case("records/012", "PT-TRN-060")
def largest_record(bench: Bench) -> None:
    """A record of 65,535 bytes, the largest, with an ignorable frame: taken"""
    peer = bench.peer()
    plain = pack([31, bytes(65_519 - 5)])
    require(len(plain) == 65_519, "the frame is not as long as meant")
    peer.link.send_plain(plain)
    peer.alive()


@case("records/013", "PT-TRN-064")
def cut_off(bench: Bench) -> None:
    """Half a record, half a body, half a HELLO, then a reset or a close: others do not notice"""
    for reset in (True, False):
        link = bench.link()
        link.send_raw(link.seal(pack(hello_frame()))[:20])
        link.close(reset)
        peer = bench.peer()
        peer.link.send([REQ, 1, 0, "step", {"size": 100_000, "max": 100_000}], [3, 1, 0, bytes(5_000)])
        peer.link.send_raw(peer.link.seal(pack([3, 1, 0, bytes(5_000)]))[:200])
        peer.close() if not reset else peer.link.close(reset=True)


@case("records/014", "PT-TRN-063", long=True)
def rekey(bench: Bench) -> None:
    """65,536 records and more in both directions: both sides change keys at the same record"""
    peer = bench.peer()
    count = 0
    while count < 65_600:
        answers = [peer.expect(peer.new_stream()) for _ in range(200)]
        peer.link.send(*[[REQ, answer.stream, END, "no such method", {}] for answer in answers])
        for answer in answers:
            peer.wait(answer, 20)
        count += len(answers)
    peer.alive()


@case("records/015", "PT-TRN-067 PT-TRN-062")
def mixed_segments(bench: Bench) -> None:
    """Records cut at random places, several to a segment: the same result"""
    peer = bench.peer()
    answers = [peer.expect(peer.new_stream()) for _ in range(20)]
    data = b"".join(peer.link.seal(pack([REQ, a.stream, END, "info", {"max": 4096}])) for a in answers)
    while data:
        cut = bench.rng.randrange(1, 40)
        peer.link.send_raw(data[:cut])
        data = data[cut:]
    for answer in answers:
        peer.wait(answer)


@case("records/016", "PT-TRN-064")
def after_failure(bench: Bench) -> None:
    """Right records that follow a broken one in the same segment are not acted on"""
    peer = bench.peer()
    if bench.info is None:
        return
    session = bench.session(peer)
    broken = bytearray(peer.link.seal(pack([PING, bytes(8)])))
    broken[5] ^= 1
    close: list[Any] = [REQ, peer.next_stream, END, "close", {"sid": session.sid}]
    assert peer.link.send_cipher is not None
    peer.link.send_cipher.n -= 1  # as if the broken one had not been: it would decrypt if the failure were forgotten
    peer.link.send_raw(bytes(broken) + peer.link.seal(pack(close)) + peer.link.seal(pack([CANCEL, 1])))
    frames = peer.link.expect_close({"decrypt"})
    bench.should(frames, "GOAWAY(decrypt) before the end")
