// One connection after its handshake: requests out, replies in (spec 02 and 03). It serves no method itself.

import { ERR, GOAWAY, PeerLost, ProtocolError, RequestError } from "./errors.mjs";
import * as frames from "./frames.mjs";
import { Initiator } from "./handshake.mjs";
import { RecordReader, seal } from "./records.mjs";

const { TYPE } = frames;
const MAX_BODY = 64 * 2 ** 20;
const MAX_STREAMS = 256;

/**
 * Anything that carries bytes. `read` gives the next bytes, null at the end; `write(null)` closes. Both may throw
 * PeerLost.
 * @typedef {{ read(): Promise<Uint8Array | null>, write(bytes: Uint8Array | null): Promise<void> }} Transport
 */
/** @typedef {{ head: Map<string, any>, body: Uint8Array }} Reply */
/**
 * @typedef {object} Request
 * @property {number} most largest reply body taken
 * @property {Map<string, any> | null} head of the reply, once RES has come
 * @property {Uint8Array} body
 * @property {number} filled
 * @property {(reply: Reply) => void} resolve
 * @property {(error: Error) => void} reject
 */

/**
 * The handshake over `transport`, then a connection. `options` as of `Initiator`; closes the transport on failure.
 * @param {Transport} transport
 * @param {ConstructorParameters<typeof Initiator>[0]} options
 */
export async function connect(transport, options) {
  const handshake = new Initiator(options);
  try {
    await transport.write(handshake.output());
    while (handshake.result === null) {
      const bytes = await transport.read();
      if (bytes === null) throw new PeerLost("the peer closed during the handshake: other network or other key?");
      handshake.receive(bytes);
    }
    await transport.write(handshake.output());
  } catch (error) {
    await transport.write(null);
    throw error;
  }
  return new Connection(transport, handshake.result);
}

export class Connection {
  /** @param {Transport} transport @param {NonNullable<Initiator["result"]>} keys */
  constructor(transport, { encrypt, decrypt, rest }) {
    this.transport = transport;
    this.encrypt = encrypt;
    this.reader = new RecordReader(decrypt, rest);
    /** @type {Map<number, Request>} */
    this.open = new Map();
    this.nextStream = 1; // the initiator's are odd
    this.lastPeerStream = 0;
    this.greeted = false;
    /** @type {Error | null} why no request is taken any more */
    this.over = null;
    this.maxBody = MAX_BODY;
    this.maxStreams = MAX_STREAMS;
    this.writing = Promise.resolve();
    this.send(TYPE.HELLO, { v: 0, caps: {}, limits: { body: MAX_BODY, streams: MAX_STREAMS }, agent: "petalite-js" });
    this.reading = this.run();
  }

  /**
   * @param {string} method
   * @param {Record<string, any>} head
   * @param {Uint8Array} [body]
   * @param {{ most?: number, signal?: AbortSignal }} [options] `most`: largest reply body taken
   * @returns {Promise<Reply>} rejects with RequestError, PeerLost, or the signal's reason
   */
  request(method, head, body = new Uint8Array(0), { most = 0, signal } = {}) {
    if (this.over) return Promise.reject(this.over);
    if (body.length > this.maxBody) return Promise.reject(new TypeError(`the peer takes ${this.maxBody} bytes`));
    if (this.open.size >= this.maxStreams) return Promise.reject(new TypeError("too many requests at once"));
    const stream = this.nextStream;
    this.nextStream += 2;
    const answered = new Promise((resolve, reject) => {
      this.open.set(stream, { most, head: null, body: new Uint8Array(0), filled: 0, resolve, reject });
    });
    const given = () => this.cancel(stream, /** @type {AbortSignal} */ (signal).reason);
    signal?.addEventListener("abort", given, { once: true });
    this.send(TYPE.REQ, stream, body.length ? 0 : 1, method, { ...head, size: body.length, max: most });
    for (let at = 0; at < body.length; at += frames.MAX_DATA) {
      const end = Math.min(at + frames.MAX_DATA, body.length);
      this.send(TYPE.DATA, stream, end === body.length ? 1 : 0, body.subarray(at, end));
    }
    return answered.finally(() => signal?.removeEventListener("abort", given));
  }

  /** Says goodbye and closes; open requests fail. */
  async close() {
    this.leave(GOAWAY.normal, "");
    await this.end(new PeerLost("closed here"));
    await this.reading;
  }

  /** @param {number} type @param {...any} fields */
  send(type, ...fields) {
    const record = seal(this.encrypt, frames.encode(type, ...fields));
    // a failed write shows as the end of the reading side too
    this.writing = this.writing.then(() => this.transport.write(record)).catch(() => {});
  }

  /** @param {number} code @param {string} text */
  leave(code, text) {
    this.send(TYPE.GOAWAY, code, this.lastPeerStream, text.slice(0, 256));
  }

  async run() {
    /** @type {Error} */
    let why = new PeerLost("the peer closed the connection");
    try {
      for (;;) {
        for (let plain; (plain = this.reader.next());) this.receive(plain);
        const bytes = await this.transport.read();
        if (bytes === null) break;
        this.reader.push(bytes);
      }
    } catch (error) {
      if (!(error instanceof ProtocolError) && !(error instanceof PeerLost)) throw error;
      why = error;
      if (error instanceof ProtocolError) this.leave(error.code, error.message);
    } finally {
      await this.end(why);
    }
  }

  /** @param {Error} why */
  async end(why) {
    this.over ??= why;
    for (const stream of [...this.open.keys()]) this.finish(stream).reject(why);
    await this.writing;
    await this.transport.write(null);
  }

  /** @param {number} stream @returns {Request} which is open no more */
  finish(stream) {
    const request = /** @type {Request} */ (this.open.get(stream));
    this.open.delete(stream);
    return request;
  }

  /** No reply is wanted any more. @param {number} stream @param {Error} why */
  cancel(stream, why) {
    if (!this.open.has(stream)) return;
    this.send(TYPE.CANCEL, stream);
    this.finish(stream).reject(why);
  }

  /** @param {Uint8Array} plain */
  receive(plain) {
    if (!this.greeted && plain.length > frames.MAX_FRAME_BEFORE_HELLO) {
      throw new ProtocolError("a long frame before HELLO", GOAWAY.frame);
    }
    const frame = frames.decode(plain);
    const type = frame?.type;
    if ((type === TYPE.HELLO) === this.greeted && type !== TYPE.GOAWAY) {
      throw new ProtocolError("HELLO is the first frame, and no other");
    }
    if (frame === null) return;
    if (type === TYPE.HELLO) this.onHello(frame.fields[0]);
    else if (type === TYPE.PING) this.send(TYPE.PONG, frame.fields[0]);
    else if (type === TYPE.GOAWAY) this.onGoaway(frame.fields[1], frame.fields[2]);
    else if (type !== TYPE.PONG) this.onStream(frame);
  }

  /** @param {Map<string, any>} head */
  onHello(head) {
    const limits = head.get("limits");
    if (!Number.isInteger(head.get("v"))) throw new ProtocolError("HELLO without its version");
    if ([...head.keys()].some((key) => key.startsWith("!")))
      throw new ProtocolError("HELLO with an unknown critical key");
    if (limits instanceof Map) {
      this.maxBody = Math.min(this.maxBody, limits.get("body") ?? MAX_BODY);
      this.maxStreams = Math.min(this.maxStreams, limits.get("streams") ?? MAX_STREAMS);
    }
    this.greeted = true;
  }

  /** @param {number} last @param {string} text */
  onGoaway(last, text) {
    this.over ??= new PeerLost(`the peer is leaving: ${text}`);
    for (const stream of [...this.open.keys()].filter((each) => each > last)) this.finish(stream).reject(this.over);
  }

  /** @param {frames.Frame} frame */
  onStream(frame) {
    const { type, stream } = frame;
    if (stream % 2 === 0) return this.onPeerStream(frame);
    if (stream >= this.nextStream || type === TYPE.REQ)
      throw new ProtocolError(`frame on stream ${stream}, never opened`);
    const request = this.open.get(stream);
    if (request === undefined) return; // it crossed with our CANCEL
    if (type === TYPE.RES) this.onReply(frame, request);
    else if (type === TYPE.DATA) this.onBody(frame, request);
    else if (type === TYPE.ERR)
      this.finish(stream).reject(new RequestError(frame.fields[1], frame.fields[2], frame.fields[3]));
    else if (type === TYPE.CANCEL) this.finish(stream).reject(new PeerLost("the peer cancelled the request"));
  }

  /** @param {frames.Frame} frame a request to us: this client serves nothing */
  onPeerStream({ type, stream }) {
    if (type === TYPE.REQ) {
      if (stream <= this.lastPeerStream) throw new ProtocolError(`stream ${stream} is not a new one`);
      this.lastPeerStream = stream;
      this.send(TYPE.ERR, stream, ERR.unsupported, "this client serves nothing", {});
    } else if (stream > this.lastPeerStream) throw new ProtocolError(`frame on stream ${stream}, never opened`);
  }

  /** @param {frames.Frame} frame @param {Request} request */
  onReply({ stream, end, fields }, request) {
    if (request.head) throw new ProtocolError(`a second RES on stream ${stream}`);
    request.head = /** @type {Map<string, any>} */ (fields[2]);
    const size = request.head.get("size") ?? 0;
    const critical = [...request.head.keys()].find((key) => key.startsWith("!"));
    if (critical !== undefined)
      return this.cancel(stream, new RequestError(ERR.unsupported, `critical key ${critical}`));
    if (!Number.isSafeInteger(size) || size < 0 || end !== (size === 0) || size > request.most) {
      return this.cancel(stream, new RequestError(ERR.badRequest, `a reply that announces ${size} bytes`));
    }
    request.body = new Uint8Array(size);
    if (end) this.finish(stream).resolve({ head: request.head, body: request.body });
  }

  /** @param {frames.Frame} frame @param {Request} request */
  onBody({ stream, end, fields }, request) {
    if (!request.head) throw new ProtocolError(`DATA before RES on stream ${stream}`);
    /** @type {Uint8Array} */
    const piece = fields[2];
    const filled = request.filled + piece.length;
    if (filled > request.body.length || end !== (filled === request.body.length)) {
      return this.cancel(stream, new RequestError(ERR.tensor, "a body of another size than announced"));
    }
    request.body.set(piece, request.filled);
    request.filled = filled;
    if (end) this.finish(stream).resolve({ head: request.head, body: request.body });
  }
}
