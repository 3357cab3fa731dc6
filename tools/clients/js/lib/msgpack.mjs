// Strict msgpack (spec 04). Values: null, boolean, number or (beyond 2^53) bigint, string, Uint8Array, Array, Map.

import { fromUtf8, utf8 } from "./bytes.mjs";
import { GOAWAY, ProtocolError } from "./errors.mjs";

const MAX_VALUE = 65_519;
const MAX_NESTING = 16;
const MAX_ELEMENTS = 4_096;
const MAX_KEY = 64;
const MAX_STR = 4_096;

/** @param {string} text @returns {never} */
const refuse = (text) => {
  throw new ProtocolError(`bad msgpack: ${text}`, GOAWAY.frame);
};

/**
 * The one value that `bytes` hold. A bin is a view of `bytes`.
 * @param {Uint8Array} bytes
 * @param {number} [limit] most bytes
 * @param {number} [longest] most bytes of a str
 * @returns {any}
 * @throws {ProtocolError} with the code `frame`, for whatever PT-MSG-001 to PT-MSG-022 forbid
 */
export function decode(bytes, limit = MAX_VALUE, longest = MAX_STR) {
  if (bytes.length > limit) refuse(`${bytes.length} bytes, at most ${limit} allowed`);
  const reader = new Reader(bytes, longest);
  const value = reader.value(1);
  if (reader.at !== bytes.length) refuse("bytes behind the value");
  return value;
}

class Reader {
  /** @param {Uint8Array} bytes @param {number} longest */
  constructor(bytes, longest) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.longest = longest;
    this.at = 0;
    this.elements = 0;
  }

  /** @param {number} count @returns {number} where these bytes begin */
  skip(count) {
    const start = this.at;
    if (count > this.bytes.length - start) refuse("ends early");
    this.at = start + count;
    return start;
  }

  /** @param {number} width an unsigned integer of 1, 2 or 4 bytes */
  unsigned(width) {
    const at = this.skip(width);
    if (width === 1) return this.view.getUint8(at);
    return width === 2 ? this.view.getUint16(at) : this.view.getUint32(at);
  }

  /** @param {number} width 1, 2 or 4 */
  signed(width) {
    const at = this.skip(width);
    if (width === 1) return this.view.getInt8(at);
    return width === 2 ? this.view.getInt16(at) : this.view.getInt32(at);
  }

  /** @param {number} depth of this value, were it a container @returns {any} */
  value(depth) {
    const tag = this.unsigned(1);
    if (tag <= 0x7f) return tag;
    if (tag >= 0xe0) return tag - 0x100;
    if (tag <= 0x8f) return this.map(tag & 0x0f, depth);
    if (tag <= 0x9f) return this.array(tag & 0x0f, depth);
    if (tag <= 0xbf) return this.str(tag & 0x1f);
    switch (tag) {
      case 0xc0:
        return null;
      case 0xc2:
        return false;
      case 0xc3:
        return true;
      case 0xc4:
      case 0xc5:
      case 0xc6:
        return this.bin(this.unsigned(WIDTHS[tag - 0xc4]));
      case 0xcc:
      case 0xcd:
      case 0xce:
        return this.unsigned(WIDTHS[tag - 0xcc]);
      case 0xcf:
        return plain(this.view.getBigUint64(this.skip(8)));
      case 0xd0:
      case 0xd1:
      case 0xd2:
        return this.signed(WIDTHS[tag - 0xd0]);
      case 0xd3:
        return plain(this.view.getBigInt64(this.skip(8)));
      case 0xd9:
      case 0xda:
      case 0xdb:
        return this.str(this.unsigned(WIDTHS[tag - 0xd9]));
      case 0xdc:
        return this.array(this.unsigned(2), depth);
      case 0xdd:
        return this.array(this.unsigned(4), depth);
      case 0xde:
        return this.map(this.unsigned(2), depth);
      case 0xdf:
        return this.map(this.unsigned(4), depth);
      default:
        return refuse(`type 0x${tag.toString(16)}`); // 0xc1, floats, extension types
    }
  }

  /** @param {number} size */
  bin(size) {
    const start = this.skip(size);
    return this.bytes.subarray(start, this.at);
  }

  /** @param {number} size */
  str(size) {
    if (size > this.longest) refuse(`a str of ${size} bytes`);
    const start = this.skip(size);
    try {
      return fromUtf8(this.bytes.subarray(start, this.at));
    } catch {
      return refuse("a str that is not UTF-8");
    }
  }

  /** @param {number} count @param {number} depth */
  enter(count, depth) {
    if (depth > MAX_NESTING) refuse(`nested more than ${MAX_NESTING} deep`);
    this.elements += count;
    if (this.elements > MAX_ELEMENTS) refuse(`more than ${MAX_ELEMENTS} elements`);
  }

  /** @param {number} count @param {number} depth */
  array(count, depth) {
    this.enter(count, depth);
    const made = [];
    for (let i = 0; i < count; i++) made.push(this.value(depth + 1));
    return made;
  }

  /** @param {number} count @param {number} depth */
  map(count, depth) {
    this.enter(count, depth);
    const made = new Map();
    for (let i = 0; i < count; i++) {
      const start = this.at;
      const key = this.value(depth + 1);
      if (typeof key !== "string") refuse("a key that is no str");
      if (this.at - start > MAX_KEY && utf8(key).length > MAX_KEY) refuse(`a key of more than ${MAX_KEY} bytes`);
      if (made.has(key)) refuse("a key twice");
      made.set(key, this.value(depth + 1));
    }
    return made;
  }
}

const WIDTHS = [1, 2, 4];

/** @param {bigint} value */
const plain = (value) => {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
};

/**
 * `value` as msgpack in the shortest forms. A plain object is a map; keys that are undefined are left out.
 * @param {any} value
 * @returns {Uint8Array}
 */
export function encode(value) {
  /** @type {number[]} */
  const out = [];
  write(out, value, 1);
  return Uint8Array.from(out);
}

/** @param {number[]} out @param {any} value @param {number} depth */
function write(out, value, depth) {
  if (value === null) out.push(0xc0);
  else if (typeof value === "boolean") out.push(value ? 0xc3 : 0xc2);
  else if (typeof value === "number" || typeof value === "bigint") writeInteger(out, value);
  else if (typeof value === "string") writeStr(out, value);
  else if (value instanceof Uint8Array) writeBin(out, value);
  else if (depth > MAX_NESTING) throw new TypeError(`nested more than ${MAX_NESTING} deep`);
  else if (Array.isArray(value)) {
    writeLength(out, value.length, [0x90, 15, 0xdc, 0xdd]);
    for (const item of value) write(out, item, depth + 1);
  } else if (typeof value === "object") {
    const pairs = [...(value instanceof Map ? value : Object.entries(value))].filter(([, each]) => each !== undefined);
    writeLength(out, pairs.length, [0x80, 15, 0xde, 0xdf]);
    for (const [key, item] of pairs) {
      writeStr(out, key);
      write(out, item, depth + 1);
    }
  } else throw new TypeError(`msgpack has no ${typeof value} here`);
}

/** @param {number[]} out @param {number} value @param {number} width */
const push = (out, value, width) => {
  for (let shift = 8 * (width - 1); shift >= 0; shift -= 8) out.push((value >>> shift) & 0xff);
};

/** @param {number[]} out @param {number} count @param {number[]} forms [fix, its largest, 16 bit, 32 bit] */
function writeLength(out, count, [fix, most, wide, wider]) {
  if (count <= most) out.push(fix | count);
  else if (count <= 0xffff) push((out.push(wide), out), count, 2);
  else push((out.push(wider), out), count, 4);
}

/** @param {number[]} out @param {string} text */
function writeStr(out, text) {
  const bytes = utf8(text);
  if (bytes.length > 31 && bytes.length <= 0xff) out.push(0xd9, bytes.length);
  else writeLength(out, bytes.length, [0xa0, 31, 0xda, 0xdb]);
  out.push(...bytes);
}

/** @param {number[]} out @param {Uint8Array} bytes */
function writeBin(out, bytes) {
  if (bytes.length <= 0xff) out.push(0xc4, bytes.length);
  else writeLength(out, bytes.length, [0, -1, 0xc5, 0xc6]);
  for (const byte of bytes) out.push(byte);
}

/** @param {number[]} out @param {number | bigint} value */
function writeInteger(out, value) {
  if (typeof value === "number" && !Number.isSafeInteger(value)) throw new TypeError(`${value} is no exact integer`);
  const number = Number(value);
  if (number >= 0 && number <= 0x7f) out.push(number);
  else if (number < 0 && number >= -0x20) out.push(number & 0xff);
  else if (number >= 0 && number <= 0xff) out.push(0xcc, number);
  else if (number >= 0 && number <= 0xffff) push((out.push(0xcd), out), number, 2);
  else if (number >= 0 && number <= 0xffff_ffff) push((out.push(0xce), out), number, 4);
  else if (number < 0 && number >= -0x80) out.push(0xd0, number & 0xff);
  else if (number < 0 && number >= -0x8000) push((out.push(0xd1), out), number, 2);
  else if (number < 0 && number >= -0x8000_0000) push((out.push(0xd2), out), number, 4);
  else writeWide(out, BigInt(value));
}

/** @param {number[]} out @param {bigint} value */
function writeWide(out, value) {
  if (value >= 2n ** 64n || value < -(2n ** 63n)) throw new TypeError(`${value} does not fit 64 bits`);
  out.push(value >= 0n ? 0xcf : 0xd3);
  for (let shift = 56n; shift >= 0n; shift -= 8n) out.push(Number((value >> shift) & 0xffn));
}
