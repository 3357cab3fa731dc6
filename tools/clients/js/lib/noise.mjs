// Noise (revision 34), XX and XXpsk0+psk3, by the names of its specification. A pattern is a list of tokens.

import { chacha20poly1305 } from "@noble/ciphers/chacha.js";
import { x25519 } from "@noble/curves/ed25519.js";
import { hkdf } from "@noble/hashes/hkdf.js";
import { sha256 } from "@noble/hashes/sha2.js";
import { concat, utf8 } from "./bytes.mjs";
import { HandshakeError } from "./errors.mjs";

const EMPTY = new Uint8Array(0);
const MAX_NONCE = 2n ** 64n - 1n;

export const XX = "Noise_XX_25519_ChaChaPoly_SHA256";
export const XX_PSK = "Noise_XXpsk0+psk3_25519_ChaChaPoly_SHA256";

/** @type {Record<string, string[][]>} */
export const PATTERNS = {
  [XX]: [["e"], ["e", "ee", "s", "es"], ["s", "se"]],
  [XX_PSK]: [
    ["psk", "e"],
    ["e", "ee", "s", "es"],
    ["s", "se", "psk"],
  ],
};

/** Section 5.1. */
export class CipherState {
  /** @param {Uint8Array | null} k */
  constructor(k = null) {
    this.k = k;
    this.n = 0n;
  }

  /** @param {bigint} n */
  nonce(n) {
    const bytes = new Uint8Array(12);
    new DataView(bytes.buffer).setBigUint64(4, n, true);
    return bytes;
  }

  /** @param {Uint8Array} ad @param {Uint8Array} plaintext */
  encryptWithAd(ad, plaintext) {
    if (this.k === null) return plaintext;
    if (this.n === MAX_NONCE) throw new Error("the nonces of this key are used up");
    return chacha20poly1305(this.k, this.nonce(this.n++), ad).encrypt(plaintext);
  }

  /** Throws when the tag is wrong; n stays then. @param {Uint8Array} ad @param {Uint8Array} ciphertext */
  decryptWithAd(ad, ciphertext) {
    if (this.k === null) return ciphertext;
    if (this.n === MAX_NONCE) throw new Error("the nonces of this key are used up");
    const plaintext = chacha20poly1305(this.k, this.nonce(this.n), ad).decrypt(ciphertext);
    this.n++;
    return plaintext;
  }

  /** Section 4.2: n goes on. */
  rekey() {
    if (this.k === null) throw new Error("no key yet");
    this.k = chacha20poly1305(this.k, this.nonce(MAX_NONCE), EMPTY).encrypt(new Uint8Array(32)).subarray(0, 32);
  }
}

/** Section 5.2. */
class SymmetricState {
  /** @param {string} protocolName */
  constructor(protocolName) {
    const name = utf8(protocolName);
    this.h = name.length <= 32 ? concat(name, new Uint8Array(32 - name.length)) : sha256(name);
    this.ck = this.h;
    this.cipher = new CipherState();
  }

  /** @param {Uint8Array} ikm @param {number} count @returns {Uint8Array[]} HKDF of section 4.3 */
  hkdf(ikm, count) {
    const okm = hkdf(sha256, ikm, this.ck, EMPTY, 32 * count);
    return Array.from({ length: count }, (_, i) => okm.slice(32 * i, 32 * i + 32));
  }

  /** @param {Uint8Array} ikm */
  mixKey(ikm) {
    const [ck, k] = this.hkdf(ikm, 2);
    this.ck = ck;
    this.cipher = new CipherState(k);
  }

  /** @param {Uint8Array} data */
  mixHash(data) {
    this.h = sha256(concat(this.h, data));
  }

  /** @param {Uint8Array} ikm */
  mixKeyAndHash(ikm) {
    const [ck, h, k] = this.hkdf(ikm, 3);
    this.ck = ck;
    this.mixHash(h);
    this.cipher = new CipherState(k);
  }

  /** @param {Uint8Array} plaintext */
  encryptAndHash(plaintext) {
    const ciphertext = this.cipher.encryptWithAd(this.h, plaintext);
    this.mixHash(ciphertext);
    return ciphertext;
  }

  /** @param {Uint8Array} ciphertext */
  decryptAndHash(ciphertext) {
    const plaintext = this.cipher.decryptWithAd(this.h, ciphertext);
    this.mixHash(ciphertext);
    return plaintext;
  }

  split() {
    return this.hkdf(EMPTY, 2).map((k) => new CipherState(k));
  }
}

/** @typedef {{ privateKey: Uint8Array, publicKey: Uint8Array }} KeyPair */

/** @param {Uint8Array} privateKey 32 bytes, before clamping @returns {KeyPair} */
export const keyPair = (privateKey) => ({ privateKey, publicKey: x25519.getPublicKey(privateKey) });

/** Section 5.3. */
export class HandshakeState {
  /**
   * @param {{ pattern: string, initiator: boolean, prologue: Uint8Array, s: KeyPair, e: KeyPair, psk?: Uint8Array }} of
   *   `e` is what GENERATE_KEYPAIR() gives; `psk` serves both psk tokens
   */
  constructor({ pattern, initiator, prologue, s, e, psk }) {
    this.symmetric = new SymmetricState(pattern);
    this.symmetric.mixHash(prologue);
    this.messages = PATTERNS[pattern].map((tokens) => [...tokens]);
    this.withPsk = psk !== undefined;
    this.initiator = initiator;
    this.s = s;
    this.e = e;
    this.psk = psk;
    /** @type {Uint8Array | undefined} */
    this.rs = undefined;
    /** @type {Uint8Array | undefined} */
    this.re = undefined;
  }

  /** @param {Uint8Array} payload @returns {Uint8Array} the message */
  writeMessage(payload) {
    const parts = [];
    for (const token of this.messages.shift() ?? []) {
      if (token === "e") {
        parts.push(this.e.publicKey);
        this.mixEphemeral(this.e.publicKey);
      } else if (token === "s") parts.push(this.symmetric.encryptAndHash(this.s.publicKey));
      else this.mixToken(token);
    }
    return concat(...parts, this.symmetric.encryptAndHash(payload));
  }

  /** @param {Uint8Array} message @returns {Uint8Array} the payload @throws {HandshakeError} */
  readMessage(message) {
    try {
      let at = 0;
      for (const token of this.messages.shift() ?? []) {
        if (token === "e") {
          this.re = message.slice(at, (at += 32));
          this.mixEphemeral(this.re);
        } else if (token === "s") {
          const size = this.symmetric.cipher.k === null ? 32 : 48;
          this.rs = this.symmetric.decryptAndHash(message.subarray(at, (at += size)));
        } else this.mixToken(token);
      }
      return this.symmetric.decryptAndHash(message.subarray(at));
    } catch {
      // a wrong tag or an all-zero Diffie-Hellman result (PT-TRN-041); one verdict for both (PT-TRN-042)
      throw new HandshakeError("other network or other key");
    }
  }

  /** @param {Uint8Array} publicKey */
  mixEphemeral(publicKey) {
    this.symmetric.mixHash(publicKey);
    if (this.withPsk) this.symmetric.mixKey(publicKey); // section 9.2
  }

  /** @param {string} token */
  mixToken(token) {
    if (token === "psk") return this.symmetric.mixKeyAndHash(/** @type {Uint8Array} */ (this.psk));
    // the first letter is the initiator's key, the second the responder's
    const [mine, theirs] = this.initiator ? token : [...token].reverse();
    const own = mine === "e" ? this.e : this.s;
    const other = /** @type {Uint8Array} */ (theirs === "e" ? this.re : this.rs);
    return this.symmetric.mixKey(x25519.getSharedSecret(own.privateKey, other)); // throws on all zero
  }

  /** @returns {CipherState[]} the initiator's sending state, then the responder's */
  split() {
    return this.symmetric.split();
  }
}
