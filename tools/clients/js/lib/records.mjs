// Records: u16 length and one encrypted frame each (spec 01, section 6).

import { concat, u16be } from "./bytes.mjs";
import { GOAWAY, ProtocolError } from "./errors.mjs";

const EMPTY = new Uint8Array(0);
const TAG = 16;
const REKEY_RECORDS = 65_536n;

/** @typedef {import("./noise.mjs").CipherState} CipherState */

/** PT-TRN-063: after each 65,536 records a new key; n goes on. @param {CipherState} cipher */
const turn = (cipher) => {
  if (cipher.n % REKEY_RECORDS === 0n) cipher.rekey();
};

/** @param {CipherState} cipher @param {Uint8Array} frame @returns {Uint8Array} the record */
export function seal(cipher, frame) {
  const ciphertext = cipher.encryptWithAd(EMPTY, frame);
  turn(cipher);
  return concat(u16be(ciphertext.length), ciphertext);
}

/** Cuts what arrives into frames. */
export class RecordReader {
  /** @param {CipherState} cipher @param {Uint8Array} rest bytes that came behind the handshake */
  constructor(cipher, rest) {
    this.cipher = cipher;
    this.chunks = [rest];
    this.have = rest.length;
  }

  /** @param {Uint8Array} bytes */
  push(bytes) {
    this.chunks.push(bytes);
    this.have += bytes.length;
  }

  /** @returns {Uint8Array | null} the next frame, null when more bytes are needed @throws {ProtocolError} */
  next() {
    if (this.have < 2) return null;
    const head = this.peek(2);
    const size = (head[0] << 8) | head[1];
    if (size <= TAG) throw new ProtocolError(`a record of ${size} bytes`, GOAWAY.frame);
    if (this.have < 2 + size) return null;
    const ciphertext = this.peek(2 + size).subarray(2, 2 + size);
    this.chunks[0] = this.chunks[0].subarray(2 + size);
    this.have -= 2 + size;
    let frame;
    try {
      frame = this.cipher.decryptWithAd(EMPTY, ciphertext);
    } catch {
      throw new ProtocolError("a record that does not decrypt", GOAWAY.decrypt);
    }
    turn(this.cipher);
    return frame;
  }

  /** The first chunk, joined with those behind it until it holds `count` bytes. @param {number} count */
  peek(count) {
    if (this.chunks[0].length < count) {
      let taken = 1;
      for (let size = this.chunks[0].length; size < count; taken++) size += this.chunks[taken].length;
      this.chunks.splice(0, taken, concat(...this.chunks.slice(0, taken)));
    }
    return this.chunks[0];
  }
}
