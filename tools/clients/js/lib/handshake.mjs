// The initiator's handshake, without I/O: bytes in, bytes out, at last two cipher states (spec 01, sections 4 and 5).

import { concat, equal, toBase32, u16be, u64be, utf8 } from "./bytes.mjs";
import { HandshakeError, ProtocolError } from "./errors.mjs";
import { isHonestKey, peerIdOf, verify } from "./identity.mjs";
import * as msgpack from "./msgpack.mjs";
import { HandshakeState, keyPair, XX, XX_PSK } from "./noise.mjs";

const MAGIC = utf8("PTLT");
const MAJOR = 1;
const MAX_MESSAGE = 1_200;
const CERTIFICATE_SECONDS = 86_400;
const ISSUE_SECONDS = 43_200;
const SKEW_SECONDS = 600;
const SMALLEST_MESSAGE_2 = 96;

/** @typedef {import("./noise.mjs").CipherState} CipherState */
/** @typedef {(count: number) => Uint8Array} Random */

/** Send `output()`, give what arrives to `receive`, until `result` is there. */
export class Initiator {
  /**
   * @param {{ identity: import("./identity.mjs").Identity, network: string, psk?: Uint8Array, expected: Uint8Array,
   *   now: number, random: Random }} options `now`: unix seconds; `random` gives the static, then the ephemeral key
   */
  constructor({ identity, network, psk, expected, now, random }) {
    this.identity = identity;
    this.network = utf8(network);
    if (this.network.length < 1 || this.network.length > 64) throw new TypeError("a network id has 1 to 64 bytes");
    this.expected = expected;
    this.now = now;
    const preamble = concat(MAGIC, Uint8Array.of(MAJOR, psk ? 2 : 1));
    this.noise = new HandshakeState({
      pattern: psk ? XX_PSK : XX,
      initiator: true,
      prologue: concat(preamble, Uint8Array.of(this.network.length), this.network),
      s: keyPair(random(32)),
      e: keyPair(random(32)),
      psk,
    });
    /** @type {Uint8Array} */
    this.input = new Uint8Array(0);
    this.pending = concat(preamble, this.framed(new Uint8Array(0)));
    /** @type {{ encrypt: CipherState, decrypt: CipherState, rest: Uint8Array } | null} */
    this.result = null;
  }

  /** @param {Uint8Array} payload */
  framed(payload) {
    const message = this.noise.writeMessage(payload);
    return concat(u16be(message.length), message);
  }

  /** The bytes that are due, each once. */
  output() {
    const bytes = this.pending;
    this.pending = new Uint8Array(0);
    return bytes;
  }

  /** @param {Uint8Array} bytes @throws {HandshakeError} */
  receive(bytes) {
    this.input = concat(this.input, bytes);
    if (this.input.length < 2) return;
    const size = (this.input[0] << 8) | this.input[1];
    if (size === 0x5054) return this.refused(); // PT-TRN-017: "PT" is no length
    if (size < SMALLEST_MESSAGE_2 || size > MAX_MESSAGE) throw new HandshakeError(`a message 2 of ${size} bytes`);
    if (this.input.length < 2 + size) return;
    this.checkCertificate(this.noise.readMessage(this.input.subarray(2, 2 + size)));
    this.pending = this.framed(this.certificate());
    const [encrypt, decrypt] = this.noise.split();
    this.result = { encrypt, decrypt, rest: this.input.slice(2 + size) };
  }

  refused() {
    if (this.input.length < 6) return;
    if (!equal(this.input.subarray(0, 4), MAGIC) || this.input[5] !== 0xff)
      throw new HandshakeError("no petalite peer");
    throw new HandshakeError(`the peer speaks version ${this.input[4]}, this client ${MAJOR}`);
  }

  /** @param {Uint8Array} staticKey @param {bigint} notAfter what a certificate's signature covers (spec 01, 5.1) */
  signed(staticKey, notAfter) {
    const purpose = utf8("petalite noise static key v1\0");
    return concat(purpose, u16be(this.network.length), this.network, staticKey, u64be(notAfter));
  }

  certificate() {
    const x = this.now + ISSUE_SECONDS;
    const s = this.identity.sign(this.signed(this.noise.s.publicKey, BigInt(x)));
    return msgpack.encode({ k: this.identity.publicKey, x, s });
  }

  /** PT-TRN-032, in its order. @param {Uint8Array} payload */
  checkCertificate(payload) {
    const { k, x, s } = certificateFields(payload);
    if (!isHonestKey(k)) throw new HandshakeError("certificate: an impossible key");
    if (x < this.now || x > this.now + CERTIFICATE_SECONDS + SKEW_SECONDS) {
      throw new HandshakeError("certificate: outside of its time; is one of the two clocks wrong?");
    }
    const staticKey = /** @type {Uint8Array} */ (this.noise.rs);
    if (!verify(k, s, this.signed(staticKey, BigInt(x)))) throw new HandshakeError("certificate: wrong signature");
    if (!equal(peerIdOf(k), this.expected)) {
      throw new HandshakeError(`peer id mismatch: reached ${toBase32(peerIdOf(k))}`);
    }
  }
}

/** Steps 1 and 2 of PT-TRN-032, and PT-TRN-033. @param {Uint8Array} payload */
function certificateFields(payload) {
  let fields;
  try {
    fields = msgpack.decode(payload, 1_024);
  } catch (error) {
    if (error instanceof ProtocolError) throw new HandshakeError(`certificate: ${error.message}`);
    throw error;
  }
  if (!(fields instanceof Map) || [...fields.keys()].some((key) => key.startsWith("!"))) {
    throw new HandshakeError("certificate: not a map that is understood here");
  }
  const [k, x, s] = ["k", "x", "s"].map((key) => fields.get(key));
  const isInteger = typeof x === "bigint" || typeof x === "number";
  if (
    !(k instanceof Uint8Array && k.length === 32) ||
    !(s instanceof Uint8Array && s.length === 64) ||
    !isInteger ||
    x < 0
  ) {
    throw new HandshakeError("certificate: a field is missing or of a wrong type");
  }
  return { k, x, s };
}
