// HELLO: the first frame each way (spec 02, section 4).

import { utf8 } from "./bytes.mjs";
import { ProtocolError } from "./errors.mjs";

export const MAX_BODY = 64 * 2 ** 20;
export const MAX_STREAMS = 256;

/** What this client says of itself. */
export const HELLO = { v: 0, caps: {}, limits: { body: MAX_BODY, streams: MAX_STREAMS }, agent: "petalite-js/0.1" };

/** @param {any} value @param {number} low @param {number} [high] */
const isInteger = (value, low, high = Infinity) =>
  (Number.isInteger(value) || typeof value === "bigint") && value >= low && value <= high;
/** @param {any} value @param {number} most bytes */
const isText = (value, most) => typeof value === "string" && utf8(value).length <= most;

/** @type {Record<string, (value: any) => boolean>} */
const RULES = {
  v: (value) => isInteger(value, 0, 2 ** 32 - 1),
  caps: (value) => value instanceof Map,
  limits: (value) => value instanceof Map,
  agent: (value) => isText(value, 128),
  time: (value) => isInteger(value, 0),
  observed: (value) => isText(value, 300),
};

/**
 * PT-FRM-012, PT-FRM-024.
 * @param {Map<string, any>} head
 * @returns {{ body: number, streams: number }} the peer's limits
 * @throws {ProtocolError}
 */
export function checkHello(head) {
  for (const [key, value] of head) {
    if (key.startsWith("!")) throw new ProtocolError(`HELLO with the unknown critical key ${key}`);
    if (value !== null && RULES[key]?.(value) === false) throw new ProtocolError(`HELLO: ${key} is wrong`);
  }
  if ((head.get("v") ?? null) === null) throw new ProtocolError("HELLO without v");
  const limits = head.get("limits") ?? new Map();
  const [body, streams] = [limits.get("body") ?? MAX_BODY, limits.get("streams") ?? MAX_STREAMS];
  if (!isInteger(body, 0) || !isInteger(streams, 1)) throw new ProtocolError("HELLO: limits are wrong");
  return { body: Number(body), streams: Number(streams) };
}
