// Tensors as bytes: a descriptor in the head, little-endian values in the body (spec 05). Values here are Float32Array.

import { ERR, RequestError } from "./errors.mjs";

const BLOCK = 64;
const MAX_BODY = 64 * 2 ** 20;
const TINY = 2 ** -118;
const HUGE = 2 ** 127;
/** @type {Record<string, number>} */
const WIDTH = { f32: 4, f16: 2, bf16: 2 };
/** Least bits of a float32 that is no scale (PT-TEN-044). @type {Record<string, number>} */
const BAD_SCALE = { f32: 0x7c000000, bf16: 0x7c000000, f16: 0x4400f800 };

/** @typedef {{ name: string, dtype: string, shape: number[], codec: string }} Descriptor */

/** @param {Descriptor} descriptor */
export const toWire = ({ name, dtype, shape, codec }) => ({ n: name, d: dtype, s: shape, c: codec });

/** @param {number[]} shape @returns {[rows: number, width: number, blocks: number]} */
function layout(shape) {
  const width = shape[shape.length - 1];
  return [shape.slice(0, -1).reduce((product, length) => product * length, 1), width, Math.ceil(width / BLOCK)];
}

/** @param {Descriptor} descriptor @returns {number} bytes in a body */
export function encodedSize({ dtype, shape, codec }) {
  const [rows, width, blocks] = layout(shape);
  return codec === "raw" ? rows * width * WIDTH[dtype] : 4 * rows * blocks + rows * width;
}

/** @param {string} text @returns {never} */
const wrong = (text) => {
  throw new RequestError(ERR.tensor, `tensor: ${text}`);
};

/**
 * @param {Descriptor} descriptor of a float type
 * @param {Float32Array} values
 * @returns {Uint8Array} the body's bytes
 * @throws {RangeError} where a value, rounded to the type, is NaN or infinite (PT-TEN-023, 025)
 */
export function encode(descriptor, values) {
  const { dtype, codec } = descriptor;
  if (encodedSize(descriptor) > MAX_BODY) throw new RangeError("larger than a body");
  if (codec === "i8b64") return encodeInt8(descriptor, dtype === "f32" ? values : narrowed(dtype, values));
  const bytes = new Uint8Array(values.length * WIDTH[dtype]);
  const view = new DataView(bytes.buffer);
  for (const [i, value] of values.entries()) {
    if (!Number.isFinite(value)) throw new RangeError("NaN and infinity are not sent");
    if (dtype === "f32") view.setFloat32(4 * i, value, true);
    else view.setUint16(2 * i, narrow(dtype, value), true);
  }
  return bytes;
}

/**
 * @param {Descriptor} descriptor of a float type
 * @param {Uint8Array} bytes
 * @returns {Float32Array}
 * @throws {RequestError} `tensor`, for bytes that no sender may send
 */
export function decode(descriptor, bytes) {
  const { dtype, codec, shape } = descriptor;
  if (bytes.length !== encodedSize(descriptor)) wrong(`${bytes.length} bytes, not ${encodedSize(descriptor)}`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const values = new Float32Array(shape.reduce((product, length) => product * length, 1));
  if (codec === "i8b64") decodeInt8(descriptor, view, values);
  else if (dtype === "f32") for (let i = 0; i < values.length; i++) values[i] = view.getFloat32(4 * i, true);
  else for (let i = 0; i < values.length; i++) values[i] = widen(dtype, view.getUint16(2 * i, true));
  if (!values.every(Number.isFinite)) wrong("a value that is not finite");
  return values;
}

// ---------------------------------------------------------------------------------------------------------- f16, bf16

const CELL = new DataView(new ArrayBuffer(4));

/** @param {number} value @returns {number} its bits as a float32 */
export function bitsOf(value) {
  CELL.setFloat32(0, value);
  return CELL.getUint32(0);
}

/** @param {number} bits */
export function valueOf(bits) {
  CELL.setUint32(0, bits);
  return CELL.getFloat32(0);
}

/** A narrow float's bits as a value. @param {string} dtype @param {number} bits */
export function widen(dtype, bits) {
  if (dtype === "bf16") return valueOf((bits << 16) >>> 0);
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? Number.NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

/** To nearest, ties to even (PT-TEN-011). @param {string} dtype @param {number} value finite, exact in float32 */
export function narrow(dtype, value) {
  const bits = bitsOf(value);
  const made = dtype === "bf16" ? (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16 : halfOf(bits);
  if ((made & 0x7fff) >= (dtype === "bf16" ? 0x7f80 : 0x7c00)) throw new RangeError(`${value} is beyond ${dtype}`);
  return made;
}

/** @param {number} bits of a float32 @returns {number} bits of the nearest float16 */
function halfOf(bits) {
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 112; // rebased
  const fraction = bits & 0x7fffff;
  if (exponent >= 0x1f) return sign | 0x7c00;
  if (exponent < -10) return sign;
  // the 24 significant bits shifted right, the further the smaller the number is; a carry runs into the exponent
  const [kept, shift] = exponent > 0 ? [(exponent << 23) | fraction, 13] : [0x800000 | fraction, 14 - exponent];
  const half = 1 << (shift - 1);
  const rest = kept & ((1 << shift) - 1);
  const floor = kept >>> shift;
  return sign | (rest > half || (rest === half && floor & 1) ? floor + 1 : floor);
}

/** @param {string} dtype @param {Float32Array} values rounded to the type, as float32 */
const narrowed = (dtype, values) => values.map((value) => widen(dtype, narrow(dtype, value)));

// -------------------------------------------------------------------------------------------------------------- i8b64

/** To the nearest integer, ties to even. @param {number} value */
function rint(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 !== 0) ? floor + 1 : floor;
}

/** The steps of section 5.5, block by block. @param {Descriptor} descriptor @param {Float32Array} values */
function encodeInt8({ shape }, values) {
  const [rows, width, blocks] = layout(shape);
  const bytes = new Uint8Array(4 * rows * blocks + rows * width);
  const view = new DataView(bytes.buffer);
  for (let row = 0, block = 0; row < rows; row++) {
    for (let start = 0; start < width; start += BLOCK, block++) {
      const from = row * width + start;
      const to = row * width + Math.min(start + BLOCK, width);
      let most = 0;
      for (let i = from; i < to; i++) {
        if (!(Math.abs(values[i]) < HUGE)) throw new RangeError("a value beyond i8b64");
        most = Math.max(most, Math.abs(values[i]));
      }
      if (most < TINY) continue;
      const scale = Math.fround(most / 127);
      view.setFloat32(4 * block, scale, true);
      for (let i = from; i < to; i++) view.setInt8(4 * rows * blocks + i, rint(Math.fround(values[i] / scale)));
    }
  }
  return bytes;
}

/** @param {Descriptor} descriptor @param {DataView} view @param {Float32Array} values to fill */
function decodeInt8({ dtype, shape }, view, values) {
  const [rows, width, blocks] = layout(shape);
  for (let i = 0; i < values.length; i++) {
    const block = Math.floor(i / width) * blocks + Math.floor((i % width) / BLOCK);
    const bits = view.getUint32(4 * block, true);
    const code = view.getInt8(4 * rows * blocks + i);
    if (bits >= BAD_SCALE[dtype]) wrong("a scale that is negative, not finite or too large");
    if (code === -128 || (bits === 0 && code !== 0)) wrong("a code that no sender makes");
    values[i] = valueOf(bits) * code;
    if (dtype !== "f32") values[i] = widen(dtype, narrow(dtype, values[i]));
  }
}
