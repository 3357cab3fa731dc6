// An inference session over a chain of servers that is given and stays as it is (spec 07).

import { equal } from "./bytes.mjs";
import { PeerLost } from "./errors.mjs";
import { decode, encode, encodedSize, toWire } from "./tensors.mjs";

const PREFILL_TOKENS = 256;
const PREFILL_BYTES = 2 * 2 ** 20;

/** @typedef {import("./connection.mjs").Connection} Connection */
/** @typedef {{ connection: Connection, blocks: [number, number], sid: Uint8Array }} Hop */
/** How activations travel. @typedef {{ dtype: "f32" | "f16" | "bf16", codec: "raw" | "i8b64" }} Wire */

/**
 * What a server says that it serves.
 * @param {Connection} connection
 * @param {AbortSignal} [signal]
 */
export async function info(connection, signal) {
  const { head } = await connection.request("info", {}, undefined, { signal });
  const blocks = head.get("blocks");
  const model = head.get("model");
  if (!Array.isArray(blocks) || !(model instanceof Uint8Array))
    throw new PeerLost("info without its blocks or its model");
  return { model, blocks: /** @type {[number, number]} */ (blocks), maxLen: head.get("max_len") };
}

/**
 * Cut the servers' blocks into a chain over [0, layers): at each block the server that reaches furthest from there.
 * @param {{ connection: Connection, blocks: [number, number] }[]} servers
 * @param {number} layers
 * @param {() => Uint8Array} newSid
 * @returns {Hop[]}
 */
export function plan(servers, layers, newSid) {
  const hops = [];
  for (let at = 0; at < layers; at = hops[hops.length - 1].blocks[1]) {
    const [best] = servers
      .filter(({ blocks: [start, end] }) => start <= at && end > at)
      .sort((one, other) => other.blocks[1] - one.blocks[1]);
    if (best === undefined) throw new PeerLost(`no server given holds block ${at}`);
    hops.push({
      connection: best.connection,
      blocks: /** @type {[number, number]} */ ([at, best.blocks[1]]),
      sid: newSid(),
    });
  }
  return hops;
}

/** One row of tokens; the servers hold its KV cache. */
export class Session {
  /** @param {Hop[]} hops @param {{ model: Uint8Array, hidden: number, maxLen: number, wire: Wire }} options */
  constructor(hops, { model, hidden, maxLen, wire }) {
    this.hops = hops;
    this.model = model;
    this.hidden = hidden;
    this.maxLen = maxLen;
    this.wire = wire;
    this.n = 0;
    this.position = 0;
    this.piece = Math.min(PREFILL_TOKENS, Math.max(1, Math.floor(PREFILL_BYTES / encodedSize(this.descriptor(1)))));
  }

  /** @param {number} tokens */
  descriptor(tokens) {
    return { name: "h", shape: [1, tokens, this.hidden], ...this.wire };
  }

  /** Reserve the cache on every server. @param {AbortSignal} [signal] */
  async open(signal) {
    for (const { connection, blocks, sid } of this.hops) {
      const head = { sid, model: this.model, blocks, max_len: this.maxLen, batch: 1, ...this.wire };
      await connection.request("open", head, undefined, { signal });
    }
  }

  /**
   * @param {Float32Array} hidden (T, C), the input of block 0
   * @param {AbortSignal} [signal]
   * @returns {Promise<Float32Array>} (C,), what the last block gave for the last token
   */
  async step(hidden, signal) {
    /** @type {Float32Array} */
    let output = new Float32Array(0);
    for (let at = 0; at < hidden.length; at += this.piece * this.hidden) {
      output = hidden.subarray(at, at + this.piece * this.hidden);
      for (const hop of this.hops) output = await this.stepAt(hop, output, signal);
      this.n += 1;
      this.position += output.length / this.hidden;
    }
    return output.slice(-this.hidden);
  }

  /** @param {Hop} hop @param {Float32Array} hidden @param {AbortSignal} [signal] */
  async stepAt(hop, hidden, signal) {
    const descriptor = this.descriptor(hidden.length / this.hidden);
    const head = { sid: hop.sid, n: this.n, pos: this.position, t: [toWire(descriptor)] };
    const most = encodedSize(descriptor);
    const reply = await hop.connection.request("step", head, encode(descriptor, hidden), { most, signal });
    const [tensor] = reply.head.get("t") ?? [];
    const expected = [this.n, this.position + descriptor.shape[1], ...Object.values(toWire(descriptor)).flat()];
    const answered = [
      reply.head.get("n"),
      reply.head.get("pos"),
      ...["n", "d", "s", "c"].flatMap((key) => tensor?.get(key)),
    ];
    // PT-SES-029
    if (expected.join() !== answered.join()) throw new PeerLost(`answered ${answered}, expected ${expected}`);
    return decode(descriptor, reply.body);
  }

  /** The servers may forget; those that are gone forget by themselves. */
  async close() {
    await Promise.allSettled(this.hops.map(({ connection, sid }) => connection.request("close", { sid })));
  }
}

/** PT-SES-005. @param {{ model: Uint8Array }} served @param {Uint8Array} wanted */
export function checkModel(served, wanted) {
  if (!equal(served.model, wanted)) throw new PeerLost("the server serves another model");
}
