// A safetensors file: u64 length of a JSON header, the header, the tensors' bytes (spec 06, section 6.2).

import { widen } from "./tensors.mjs";
import { fromUtf8 } from "./bytes.mjs";

const MAX_HEADER = 100_000_000;
/** @type {Record<string, number>} */
const WIDTH = { F32: 4, F16: 2, BF16: 2 };

/** @typedef {{ dtype: string, shape: number[], bytes: Uint8Array }} Tensor */

/**
 * @param {Uint8Array} file
 * @returns {Map<string, Tensor>} by canonical name (PT-MDL-002); tensors of other types are left out
 */
export function readSafetensors(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const length = file.length < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (length > Math.min(MAX_HEADER, file.length - 8)) throw new TypeError("not a safetensors file");
  const header = JSON.parse(fromUtf8(file.subarray(8, 8 + length)));
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: range }] of Object.entries(header)) {
    if (name === "__metadata__" || !(dtype in WIDTH)) continue;
    const [start, end] = range;
    const size = shape.reduce(
      (/** @type {number} */ product, /** @type {number} */ each) => product * each,
      WIDTH[dtype],
    );
    if (start < 0 || end - start !== size || 8 + length + end > file.length)
      throw new TypeError(`${name}: claims bytes that are not there`);
    tensors.set(name.replace(/^transformer\./, ""), {
      dtype,
      shape,
      bytes: file.subarray(8 + length + start, 8 + length + end),
    });
  }
  return tensors;
}

/** All values, exact in float32. @param {Tensor} tensor @returns {Float32Array} */
export function values({ dtype, bytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const made = new Float32Array(bytes.length / WIDTH[dtype]);
  const narrow = dtype.toLowerCase();
  for (let i = 0; i < made.length; i++) {
    made[i] = dtype === "F32" ? view.getFloat32(4 * i, true) : widen(narrow, view.getUint16(2 * i, true));
  }
  return made;
}
