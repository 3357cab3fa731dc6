// One connection after its handshake: requests out, replies in (spec 02 and 03). It serves no method itself.

import { ERR, GOAWAY, PeerLost, ProtocolError, readable, RequestError } from "./errors.mjs";
import * as frames from "./frames.mjs";
import { Initiator } from "./handshake.mjs";
import { checkHello, HELLO, MAX_BODY, MAX_STREAMS } from "./hello.mjs";
import { Outbox } from "./outbox.mjs";
import { RecordReader, seal } from "./records.mjs";

const { TYPE } = frames;
const HANDSHAKE_MS = 10_000;
const STALL_MS = 10_000;
const BODY_PROGRESS = 16_384;
const PING_AFTER_MS = 500;
const DEAD_AFTER_MS = 2_000;
const TICK_MS = 100;
const NOTHING = new Uint8Array(0);

/**
 * Anything that carries bytes. `read` gives the next bytes, null at the end; `write(null)` ends our direction, and the
 * transport closes when the other has ended too, or a second later. Both may throw PeerLost.
 * @typedef {{ read(): Promise<Uint8Array | null>, write(bytes: Uint8Array | null): Promise<void> }} Transport
 */
/** @typedef {{ head: Map<string, any>, body: Uint8Array }} Reply */
/**
 * @typedef {object} Request
 * @property {number} most largest reply body taken
 * @property {number} frames of the request
 * @property {Map<string, any> | null} head of the reply, once RES has come
 * @property {Uint8Array} body
 * @property {number} filled
 * @property {number} marked bytes of the body at the last progress
 * @property {number} progressAt
 * @property {(reply: Reply) => void} resolve
 * @property {(error: Error) => void} reject
 */

/** @template T @param {number} ms @param {string} text @param {Promise<T>} promise @returns {Promise<T>} */
async function within(ms, text, promise) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new PeerLost(text)), ms);
  });
  try {
    return await /** @type {Promise<T>} */ (Promise.race([promise, late]));
  } finally {
    clearTimeout(timer);
  }
}

/**
 * The handshake over `transport`, then a connection. `options` as of `Initiator`; closes the transport on failure.
 * @param {Transport} transport
 * @param {ConstructorParameters<typeof Initiator>[0]} options
 */
export async function connect(transport, options) {
  try {
    return new Connection(transport, await within(HANDSHAKE_MS, "no handshake in 10 s", handshake(transport, options)));
  } catch (error) {
    await transport.write(null);
    throw error;
  }
}

/** @param {Transport} transport @param {ConstructorParameters<typeof Initiator>[0]} options */
async function handshake(transport, options) {
  const state = new Initiator(options);
  await transport.write(state.output());
  while (state.result === null) {
    const bytes = await transport.read();
    if (bytes === null) throw new PeerLost("the peer closed during the handshake: other network or other key?");
    state.receive(bytes);
  }
  await transport.write(state.output());
  return state.result;
}

export class Connection {
  /** @param {Transport} transport @param {NonNullable<Initiator["result"]>} keys */
  constructor(transport, { encrypt, decrypt, rest }) {
    this.transport = transport;
    this.reader = new RecordReader(decrypt, rest);
    this.outbox = new Outbox(async (plain) => {
      await within(STALL_MS, "the peer takes no bytes", transport.write(seal(encrypt, plain))); // PT-STR-029
      this.aliveAt = Date.now();
    });
    /** @type {Map<number, Request>} */
    this.open = new Map();
    this.nextStream = 1; // the initiator's are odd
    this.lastPeerStream = 0;
    this.greeted = false;
    this.peerLeft = false;
    /** @type {Error | null} why no request is taken any more */
    this.over = null;
    this.maxBody = MAX_BODY;
    this.maxStreams = MAX_STREAMS;
    this.aliveAt = this.tickedAt = Date.now();
    this.pinged = false;
    /** @type {ReturnType<typeof setInterval> | undefined} */
    this.clock = undefined;
    this.control(TYPE.HELLO, HELLO);
    this.reading = this.run();
  }

  /**
   * @param {string} method
   * @param {Record<string, any>} head
   * @param {Uint8Array} [body]
   * @param {{ most?: number, signal?: AbortSignal }} [options] `most`: largest reply body taken
   * @returns {Promise<Reply>} rejects with RequestError, PeerLost, or the signal's reason
   */
  async request(method, head, body = NOTHING, { most = 0, signal } = {}) {
    if (this.over) throw this.over;
    if (body.length > this.maxBody) throw new TypeError(`the peer takes bodies of ${this.maxBody} bytes`);
    if (this.open.size >= this.maxStreams) throw new TypeError("too many requests at once");
    const stream = this.nextStream;
    this.nextStream += 2;
    const fields = { ...head, size: body.length, max: most };
    const plains = [frames.encode(TYPE.REQ, stream, body.length ? 0 : 1, method, fields), ...dataFrames(stream, body)];
    const answered = new Promise((resolve, reject) => this.enter(stream, most, plains.length, resolve, reject));
    const given = () => this.cancel(stream, /** @type {AbortSignal} */ (signal).reason);
    signal?.addEventListener("abort", given, { once: true });
    this.outbox.message(stream, plains);
    return answered.finally(() => signal?.removeEventListener("abort", given));
  }

  /**
   * @param {number} stream
   * @param {number} most
   * @param {number} count of the request's frames
   * @param {(reply: Reply) => void} resolve
   * @param {(error: Error) => void} reject
   */
  enter(stream, most, count, resolve, reject) {
    const now = Date.now();
    if (!this.open.size) {
      [this.aliveAt, this.tickedAt, this.pinged] = [now, now, false];
      this.clock = setInterval(() => this.tick(Date.now()), TICK_MS);
    }
    const body = NOTHING;
    this.open.set(stream, {
      most,
      frames: count,
      head: null,
      body,
      filled: 0,
      marked: 0,
      progressAt: now,
      resolve,
      reject,
    });
  }

  /** @param {number} stream @returns {Request} which is open no more */
  finish(stream) {
    const request = /** @type {Request} */ (this.open.get(stream));
    this.open.delete(stream);
    if (!this.open.size) clearInterval(this.clock);
    return request;
  }

  /** No reply is wanted any more; what was not written is forgotten. @param {number} stream @param {Error} why */
  cancel(stream, why) {
    if (!this.open.has(stream)) return;
    const request = this.finish(stream);
    if (this.outbox.drop(stream, request.frames).begun) this.control(TYPE.CANCEL, stream);
    request.reject(why);
  }

  /** Says goodbye and closes; open requests fail. */
  async close() {
    this.control(TYPE.GOAWAY, GOAWAY.normal, this.lastPeerStream, "");
    await this.end(new PeerLost("closed here"));
    await this.reading;
  }

  /** @param {number} type @param {...any} fields */
  control(type, ...fields) {
    this.outbox.urgent(frames.encode(type, ...fields));
  }

  /** The silent are asked, then given up (PT-STR-050, 051); bodies must move (PT-STR-026). @param {number} now */
  tick(now) {
    if (now - this.tickedAt > PING_AFTER_MS) this.aliveAt = now; // it was us who slept
    this.tickedAt = now;
    for (const [stream, request] of this.open) {
      if (request.head && now - request.progressAt >= STALL_MS)
        this.cancel(stream, new PeerLost("the reply has stalled"));
    }
    const silence = now - this.aliveAt;
    if (silence >= DEAD_AFTER_MS) this.end(new PeerLost("the peer has fallen silent"));
    else if (silence >= PING_AFTER_MS && !this.pinged) {
      this.pinged = true;
      this.control(TYPE.PING, new Uint8Array(8));
    }
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
      if (error instanceof ProtocolError) this.control(TYPE.GOAWAY, error.code, this.lastPeerStream, error.message);
    } finally {
      await this.end(why);
    }
  }

  /** @param {Error} why */
  async end(why) {
    this.over ??= why;
    for (const stream of [...this.open.keys()]) {
      this.outbox.drop(stream, 0);
      this.finish(stream).reject(why);
    }
    await this.outbox.pumping;
    await this.transport.write(null);
  }

  /** @param {Uint8Array} plain */
  receive(plain) {
    this.aliveAt = Date.now();
    this.pinged = false;
    if (!this.greeted && plain.length > frames.MAX_FRAME_BEFORE_HELLO) {
      throw new ProtocolError("a long frame before HELLO", GOAWAY.frame);
    }
    const frame = frames.decode(plain);
    const type = frame?.type;
    const early = !this.greeted && !this.peerLeft;
    if (
      early ? type !== TYPE.HELLO && type !== TYPE.GOAWAY : type === TYPE.HELLO || (this.peerLeft && type === TYPE.REQ)
    ) {
      throw new ProtocolError(`frame ${type} out of its turn`); // the table of spec 02, section 7
    }
    if (frame === null) return;
    if (type === TYPE.HELLO) this.onHello(frame.fields[0]);
    else if (type === TYPE.PING) this.control(TYPE.PONG, frame.fields[0]);
    else if (type === TYPE.GOAWAY) this.onGoaway(frame.fields[1], frame.fields[2]);
    else if (type !== TYPE.PONG) this.onStream(frame);
  }

  /** @param {Map<string, any>} head */
  onHello(head) {
    const { body, streams } = checkHello(head);
    this.maxBody = Math.min(MAX_BODY, body);
    this.maxStreams = Math.min(MAX_STREAMS, streams);
    this.greeted = true;
  }

  /** @param {number} last @param {string} text */
  onGoaway(last, text) {
    this.peerLeft = true;
    this.over ??= new PeerLost(`the peer is leaving: ${readable(text)}`);
    for (const stream of [...this.open.keys()].filter((each) => each > last)) {
      this.outbox.drop(stream, 0);
      this.finish(stream).reject(this.over);
    }
  }

  /** @param {frames.Frame} frame */
  onStream(frame) {
    const { type, stream } = frame;
    if (stream % 2 === 0) return this.onPeerStream(frame);
    if (stream >= this.nextStream || type === TYPE.REQ) throw new ProtocolError(`stream ${stream} was never opened`);
    const request = this.open.get(stream);
    if (request === undefined) return; // it crossed with our CANCEL
    if (type === TYPE.RES) this.onReply(frame, request);
    else if (type === TYPE.DATA) this.onBody(frame, request);
    else if (type === TYPE.ERR) this.fail(stream, frame.fields[1], frame.fields[2], frame.fields[3]);
    else if (type === TYPE.CANCEL) this.fail(stream, ERR.cancelled, "the peer cancelled the request");
  }

  /**
   * The peer has ended the stream.
   * @param {number} stream
   * @param {number} code
   * @param {string} text
   * @param {Map<string, any>} [detail]
   */
  fail(stream, code, text, detail) {
    this.outbox.drop(stream, 0);
    this.finish(stream).reject(new RequestError(code, text, detail));
  }

  /** @param {frames.Frame} frame a request to us: this client serves nothing */
  onPeerStream({ type, stream }) {
    if (type === TYPE.REQ) {
      if (stream <= this.lastPeerStream) throw new ProtocolError(`stream ${stream} is not a new one`);
      this.lastPeerStream = stream;
      this.control(TYPE.ERR, stream, ERR.unsupported, "this client serves nothing", {});
    } else if (stream > this.lastPeerStream) throw new ProtocolError(`stream ${stream} was never opened`);
  }

  /** @param {frames.Frame} frame @param {Request} request */
  onReply({ stream, end, fields }, request) {
    if (request.head) throw new ProtocolError(`a second RES on stream ${stream}`);
    const head = /** @type {Map<string, any>} */ (fields[2]);
    const size = head.get("size") ?? 0;
    const critical = [...head.keys()].find((key) => key.startsWith("!"));
    if (critical !== undefined)
      return this.cancel(stream, new RequestError(ERR.unsupported, `critical key ${critical}`));
    if (!Number.isSafeInteger(size) || size < 0 || end !== (size === 0) || size > request.most) {
      return this.cancel(stream, new RequestError(ERR.badRequest, `a reply that announces ${size} bytes`));
    }
    [request.head, request.body, request.progressAt] = [head, new Uint8Array(size), Date.now()];
    if (end) this.finish(stream).resolve({ head, body: request.body });
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
    if (filled - request.marked >= BODY_PROGRESS) [request.marked, request.progressAt] = [filled, Date.now()];
    if (end) this.finish(stream).resolve({ head: request.head, body: request.body });
  }
}

/** @param {number} stream @param {Uint8Array} body */
function dataFrames(stream, body) {
  const made = [];
  for (let at = 0; at < body.length; at += frames.MAX_DATA) {
    const end = Math.min(at + frames.MAX_DATA, body.length);
    made.push(frames.encode(TYPE.DATA, stream, end === body.length ? 1 : 0, body.subarray(at, end)));
  }
  return made;
}
