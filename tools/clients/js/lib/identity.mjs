// Who a peer is, where it is, and the key of a private swarm (spec 01, section 3).

import { ed25519 } from "@noble/curves/ed25519.js";
import { hkdf } from "@noble/hashes/hkdf.js";
import { sha256 } from "@noble/hashes/sha2.js";
import { concat, fromBase32, fromHex, toBase32, toHex, utf8 } from "./bytes.mjs";

/** PT-IDN-004. @param {Uint8Array} publicKey Ed25519, 32 bytes @returns {Uint8Array} the peer id, 32 bytes */
export const peerIdOf = (publicKey) => sha256(concat(Uint8Array.of(1), publicKey));

/** PT-IDN-005. @param {string} text @returns {Uint8Array} */
export function parsePeerId(text) {
  if (text.length !== 52) throw new TypeError(`a peer id has 52 characters, not ${text.length}`);
  return fromBase32(text);
}

/** An Ed25519 key pair. */
export class Identity {
  /** @param {Uint8Array} seed 32 bytes (RFC 8032) */
  constructor(seed) {
    this.seed = seed;
    this.publicKey = ed25519.getPublicKey(seed);
    this.peerId = peerIdOf(this.publicKey);
  }

  /** @param {Uint8Array} message */
  sign(message) {
    return ed25519.sign(message, this.seed);
  }
}

// PT-IDN-006: y coordinates of points of small order, little endian, sign bit cleared.
const SMALL_ORDER = new Set([
  "00".repeat(32),
  `01${"00".repeat(31)}`,
  "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
  "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
  `ec${"ff".repeat(30)}7f`,
  `ed${"ff".repeat(30)}7f`,
  `ee${"ff".repeat(30)}7f`,
]);

/** PT-IDN-006, PT-IDN-007. @param {Uint8Array} publicKey 32 bytes */
export function isHonestKey(publicKey) {
  const y = Uint8Array.from(publicKey);
  y[31] &= 0x7f;
  const beyond = y[31] === 0x7f && y.subarray(1, 31).every((byte) => byte === 0xff) && y[0] >= 0xed;
  return !beyond && !SMALL_ORDER.has(toHex(y));
}

/** @param {Uint8Array} publicKey @param {Uint8Array} signature @param {Uint8Array} message */
export function verify(publicKey, signature, message) {
  try {
    // not by ZIP 215: an S beyond the group order and a key in non-canonical form are refused (PT-IDN-007, 008)
    return isHonestKey(publicKey) && ed25519.verify(signature, message, publicKey, { zip215: false });
  } catch {
    return false; // the library throws for bytes that are no point
  }
}

/** What is derived from the 32 bytes that every member of a private swarm holds (PT-IDN-021, 022). */
export class SwarmKey {
  /** @param {Uint8Array} key */
  constructor(key) {
    /** @param {string} info @param {number} length */
    const derive = (info, length) => hkdf(sha256, key, undefined, utf8(info), length);
    this.psk = derive("petalite swarm psk v1", 32);
    this.networkId = `private-${toBase32(derive("petalite swarm network id v1", 20))}`;
  }

  /** Read the text of a swarm key file (PT-IDN-010). @param {string} text */
  static parse(text) {
    const lines = text.split("\n").map((line) => line.trim());
    const body = lines.slice(1).filter((line) => line && !line.startsWith("#"));
    if (
      text.length > 4_096 ||
      lines[0] !== "petalite swarm key v1" ||
      !/^[0-9a-f]{64}$/.test(body[0]) ||
      body.length !== 1
    ) {
      throw new TypeError("not a swarm key file"); // never with its content (PT-IDN-011)
    }
    return new SwarmKey(fromHex(body[0]));
  }
}

const ADDRESS = /^petalite:\/\/([^@]+)@(?:\[([0-9a-fA-F:.]+(?:%[A-Za-z0-9_.-]+)?)\]|([^:\[\]]+)):([0-9]{1,5})$/;
const LABEL = /^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$/i;
const BYTE = /^(0|[1-9][0-9]{0,2})$/;

/** An IPv4 address, or a name that cannot be mistaken for one. @param {string} host */
function isHost(host) {
  const labels = host.replace(/\.$/, "").split(".");
  if (!/^[0-9]+$/.test(labels[labels.length - 1]))
    return host.length <= 253 && labels.every((label) => LABEL.test(label));
  return !host.endsWith(".") && labels.length === 4 && labels.every((byte) => BYTE.test(byte) && Number(byte) < 256);
}

/** PT-IDN-030. @param {string} text @returns {{ peer: Uint8Array, host: string, port: number }} */
export function parseAddress(text) {
  const parts = ADDRESS.exec(text);
  const port = Number(parts?.[4]);
  if (!parts || port < 1 || port > 65_535 || (parts[3] && !isHost(parts[3]))) {
    throw new TypeError(`not petalite://PEER_ID@HOST:PORT: ${text}`);
  }
  return { peer: parsePeerId(parts[1]), host: parts[2] ?? parts[3], port };
}
