// Frames: one msgpack array a record (spec 02).

import { GOAWAY, ProtocolError } from "./errors.mjs";
import * as msgpack from "./msgpack.mjs";

export const TYPE = Object.freeze({
  HELLO: 0,
  REQ: 1,
  RES: 2,
  DATA: 3,
  ERR: 4,
  CANCEL: 5,
  PING: 6,
  PONG: 7,
  GOAWAY: 8,
  PROGRESS: 16,
});

export const MAX_FRAME = 65_519;
export const MAX_FRAME_BEFORE_HELLO = 4_096;
export const MAX_DATA = 65_000;
const MAX_HEAD_FRAME = 16_384;
const MAX_METHOD = 64;
const END = 1;

/** @typedef {{ type: number, stream: number, end: boolean, fields: any[] }} Frame */

/** @param {any} value */
const isMap = (value) => value instanceof Map;
/** @param {any} value */
const isStr = (value) => typeof value === "string";
/** @param {any} value */
const isMethod = (value) => isStr(value) && [...value].length <= MAX_METHOD;
/** @param {any} value */
const isCode = (value) => Number.isInteger(value) && value >= 0 && value < 2 ** 32;
/** @param {any} value */
const isStream = (value) => Number.isSafeInteger(value) && value > 0;
/** @param {any} value */
const isFlags = (value) => value === 0 || value === END;
/** @param {any} value */
const isBody = (value) => value instanceof Uint8Array && value.length <= MAX_DATA;
/** @param {any} value */
const isPing = (value) => value instanceof Uint8Array && value.length === 8;

/** What stands behind the type, in order. @type {Record<number, ((value: any) => boolean)[]>} */
const LAYOUT = {
  [TYPE.HELLO]: [isMap],
  [TYPE.REQ]: [isStream, isFlags, isMethod, isMap],
  [TYPE.RES]: [isStream, isFlags, isMap],
  [TYPE.DATA]: [isStream, isFlags, isBody],
  [TYPE.ERR]: [isStream, isCode, isStr, isMap],
  [TYPE.CANCEL]: [isStream],
  [TYPE.PING]: [isPing],
  [TYPE.PONG]: [isPing],
  [TYPE.GOAWAY]: [isCode, (value) => Number.isSafeInteger(value) && value >= 0, isStr],
  [TYPE.PROGRESS]: [isStream, isMap],
};

/** @param {number} type @param {...any} fields @returns {Uint8Array} */
export const encode = (type, ...fields) => msgpack.encode([type, ...fields]);

/**
 * @param {Uint8Array} plain the plaintext of one record
 * @returns {Frame | null} null for a frame of an unknown type that may be ignored
 * @throws {ProtocolError} `frame` for whatever is malformed, `protocol` for an unknown type that may not be ignored
 */
export function decode(plain) {
  const values = msgpack.decode(plain, MAX_FRAME, MAX_FRAME);
  if (!Array.isArray(values) || !Number.isInteger(values[0])) {
    throw new ProtocolError("a frame is an array that begins with its type", GOAWAY.frame);
  }
  const [type, ...fields] = values;
  const layout = LAYOUT[type];
  if (layout === undefined) {
    if (type >= 16 && type < 32) return null;
    throw new ProtocolError(`unknown frame type ${type}`);
  }
  const free = type === TYPE.DATA || type === TYPE.ERR;
  if (!free && plain.length > MAX_HEAD_FRAME) throw new ProtocolError("a frame too long", GOAWAY.frame);
  if (fields.length !== layout.length) throw new ProtocolError(`frame ${type} of a wrong length`, GOAWAY.frame);
  for (const [i, fits] of layout.entries()) {
    if (fits(fields[i])) continue;
    throw new ProtocolError(
      `frame ${type}: element ${i + 1} is wrong`,
      fits === isStream ? GOAWAY.protocol : GOAWAY.frame,
    );
  }
  const [stream, flags] = layout[0] === isStream ? fields : [0, 0];
  return { type, stream, end: layout[1] === isFlags && flags === END, fields };
}
