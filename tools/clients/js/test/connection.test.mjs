// The connection and the session against a peer played by this file, over a transport in memory.

import assert from "node:assert/strict";
import test from "node:test";
import { Connection } from "../lib/connection.mjs";
import { ERR, PeerLost, ProtocolError, RequestError } from "../lib/errors.mjs";
import * as frames from "../lib/frames.mjs";
import { CipherState } from "../lib/noise.mjs";
import { RecordReader, seal } from "../lib/records.mjs";
import { checkModel, plan, Session } from "../lib/session.mjs";
import { encode, encodedSize } from "../lib/tensors.mjs";

const { TYPE } = frames;
const EMPTY = new Uint8Array(0);
const cipher = (value) => new CipherState(new Uint8Array(32).fill(value));

/** A connection, and the peer's end of it: `next()` is the next frame that arrived there, `send` answers. */
async function pair({ greet = true } = {}) {
  const toClient = [];
  const toPeer = [];
  let wake = () => {};
  let heard = () => {};
  const transport = {
    async read() {
      while (!toClient.length) await new Promise((resolve) => (wake = resolve));
      return toClient.shift();
    },
    async write(bytes) {
      toPeer.push(bytes);
      if (bytes === null) (toClient.push(null), wake());
      heard();
    },
  };
  const reader = new RecordReader(cipher(1), EMPTY);
  const sending = cipher(2);
  const peer = {
    raw(bytes) {
      (toClient.push(bytes), wake());
    },
    send(type, ...fields) {
      peer.raw(seal(sending, frames.encode(type, ...fields)));
    },
    async next() {
      for (;;) {
        const plain = reader.next();
        if (plain) return frames.decode(plain);
        while (!toPeer.length) await new Promise((resolve) => (heard = resolve));
        const bytes = toPeer.shift();
        if (bytes === null) return null;
        reader.push(bytes);
      }
    },
    close() {
      peer.raw(null);
    },
  };
  const connection = new Connection(transport, { encrypt: cipher(1), decrypt: cipher(2), rest: EMPTY });
  assert.equal((await peer.next()).type, TYPE.HELLO);
  if (greet) peer.send(TYPE.HELLO, { v: 0 });
  return { connection, peer };
}

test("a request and its reply, bodies in pieces", async () => {
  const { connection, peer } = await pair();
  const asked = connection.request("step", { a: 1 }, new Uint8Array(70_000).fill(7), { most: 6 });
  const req = await peer.next();
  assert.deepEqual(req.fields.slice(0, 3), [1, 0, "step"]);
  assert.deepEqual(
    [...req.fields[3]],
    [
      ["a", 1],
      ["size", 70_000],
      ["max", 6],
    ],
  );
  const sizes = [await peer.next(), await peer.next()].map(({ end, fields }) => [fields[2].length, end]);
  assert.deepEqual(sizes, [
    [65_000, false],
    [5_000, true],
  ]);
  peer.send(TYPE.PROGRESS, 1, { s: "running" });
  peer.send(TYPE.RES, 1, 0, { ok: true, size: 6 });
  peer.send(TYPE.DATA, 1, 0, Uint8Array.of(1, 2, 3, 4));
  peer.send(TYPE.DATA, 1, 1, Uint8Array.of(5, 6));
  const { head, body } = await asked;
  assert.equal(head.get("ok"), true);
  assert.deepEqual([...body], [1, 2, 3, 4, 5, 6]);
  await connection.close();
});

test("pings are answered, unknown frames ignored, requests of the peer refused", async () => {
  const { connection, peer } = await pair();
  peer.send(TYPE.PING, new Uint8Array(8).fill(3));
  assert.deepEqual((await peer.next()).fields, [new Uint8Array(8).fill(3)]);
  peer.send(20, "a newer frame");
  peer.send(TYPE.REQ, 2, 1, "info", {});
  const refusal = await peer.next();
  assert.deepEqual([refusal.type, refusal.stream, refusal.fields[1]], [TYPE.ERR, 2, ERR.unsupported]);
  await connection.close();
});

for (const [name, act, fault] of [
  [
    "an unknown error",
    (peer) => peer.send(TYPE.ERR, 1, 99, "\x1b[2J", {}),
    { code: ERR.internal, message: "\\u{1b}[2J" },
  ],
  ["a cancel", (peer) => peer.send(TYPE.CANCEL, 1), { code: ERR.cancelled }],
  ["an error", (peer) => peer.send(TYPE.ERR, 1, 3, "no such session", {}), { name: "RequestError", code: 3 }],
  ["a reply larger than asked for", (peer) => peer.send(TYPE.RES, 1, 0, { size: 5 }), RequestError],
  ["a reply with END and a body", (peer) => peer.send(TYPE.RES, 1, 1, { size: 4 }), RequestError],
  ["a critical key in the reply", (peer) => peer.send(TYPE.RES, 1, 1, { "!x": 1 }), { code: ERR.unsupported }],
  [
    "a body that is too long",
    (peer) => {
      peer.send(TYPE.RES, 1, 0, { size: 4 });
      peer.send(TYPE.DATA, 1, 1, new Uint8Array(5));
    },
    { code: ERR.tensor },
  ],
  [
    "a body that ends early",
    (peer) => {
      peer.send(TYPE.RES, 1, 0, { size: 4 });
      peer.send(TYPE.DATA, 1, 1, new Uint8Array(3));
    },
    { code: ERR.tensor },
  ],
]) {
  test(`${name} costs its request, not the connection`, async () => {
    const { connection, peer } = await pair();
    const asked = connection.request("step", {}, EMPTY, { most: 4 });
    await peer.next();
    act(peer);
    await assert.rejects(asked, fault);
    const second = connection.request("info", {});
    peer.send(TYPE.RES, 3, 1, {});
    await second;
    await connection.close();
  });
}

for (const [name, act, code] of [
  ["HELLO twice", (peer) => peer.send(TYPE.HELLO, { v: 0 }), 1],
  ["DATA before RES", (peer) => peer.send(TYPE.DATA, 1, 1, EMPTY), 1],
  ["a frame on a stream never opened", (peer) => peer.send(TYPE.RES, 9, 1, {}), 1],
  ["a request with our parity", (peer) => peer.send(TYPE.REQ, 1, 1, "info", {}), 1],
  ["a malformed frame", (peer) => peer.send(TYPE.PING, EMPTY), 2],
  ["a record that does not decrypt", (peer) => peer.raw(Uint8Array.of(0, 20, ...new Uint8Array(20))), 3],
]) {
  test(`${name} costs the connection`, async () => {
    const { connection, peer } = await pair();
    const asked = connection.request("step", {}, EMPTY, { most: 4 });
    assert.equal((await peer.next()).type, TYPE.REQ);
    const failed = assert.rejects(asked, ProtocolError);
    act(peer);
    const goodbye = await peer.next();
    assert.deepEqual([goodbye.type, goodbye.fields[0]], [TYPE.GOAWAY, code]);
    assert.equal(await peer.next(), null);
    await failed;
    await assert.rejects(connection.request("info", {}));
  });
}

test("a frame before HELLO costs the connection", async () => {
  const { connection, peer } = await pair({ greet: false });
  peer.send(TYPE.PING, new Uint8Array(8));
  assert.equal((await peer.next()).type, TYPE.GOAWAY);
  await connection.reading;
});

test("control frames overtake waiting bodies, and what was not written is not sent after a cancel", async () => {
  const { connection, peer } = await pair();
  await connection.outbox.pumping;
  const gone = new AbortController();
  const first = connection.request("step", {}, new Uint8Array(200_000), { signal: gone.signal });
  const second = connection.request("info", {}, EMPTY, { signal: gone.signal });
  connection.control(TYPE.PING, new Uint8Array(8)); // while the outbox is busy with the first frame
  gone.abort(new Error("enough"));
  await assert.rejects(first, /enough/);
  await assert.rejects(second, /enough/);
  const seen = [await peer.next(), await peer.next(), await peer.next()].map(({ type, stream }) => [type, stream]);
  assert.deepEqual(seen, [
    [TYPE.REQ, 1],
    [TYPE.PING, 0],
    [TYPE.CANCEL, 1],
  ]); // and nothing of stream 3
  await connection.close();
});

test("after its GOAWAY a peer may not ask", async () => {
  const { connection, peer } = await pair();
  peer.send(TYPE.GOAWAY, 0, 0, "bye");
  peer.send(TYPE.REQ, 2, 1, "info", {});
  assert.deepEqual((await peer.next()).fields[0], 1);
  await connection.reading;
});

for (const hello of [
  {},
  { v: "0" },
  { v: 2 ** 32 },
  { v: 0, caps: [] },
  { v: 0, agent: "x".repeat(129) },
  { v: 0, "!x": 1 },
  { v: 0, limits: { streams: 0 } },
]) {
  test(`HELLO ${JSON.stringify(hello).slice(0, 40)} is refused`, async () => {
    const { connection, peer } = await pair({ greet: false });
    peer.send(TYPE.HELLO, hello);
    assert.deepEqual((await peer.next()).fields[0], 1);
    await connection.reading;
  });
}

test("a peer that falls silent is pinged and then given up", async (t) => {
  t.mock.timers.enable({ apis: ["setInterval", "Date"] });
  const { connection, peer } = await pair();
  const asked = connection.request("info", {});
  assert.equal((await peer.next()).type, TYPE.REQ);
  const lost = assert.rejects(asked, /silent/);
  for (let passed = 0; passed < 600; passed += 100) t.mock.timers.tick(100);
  assert.equal((await peer.next()).type, TYPE.PING);
  for (let passed = 0; passed < 2_000; passed += 100) t.mock.timers.tick(100);
  await lost;
});

test("a reply that stalls is cancelled, though the peer lives", async (t) => {
  t.mock.timers.enable({ apis: ["setInterval", "Date"] });
  const { connection, peer } = await pair();
  const asked = connection.request("info", {}, EMPTY, { most: 100_000 });
  const lost = assert.rejects(asked, /stalled/);
  peer.send(TYPE.RES, 1, 0, { size: 100_000 });
  for (let passed = 0; passed < 10_100; passed += 100) {
    if (passed % 300 === 0) peer.send(TYPE.DATA, 1, 0, Uint8Array.of(1)); // a dribble is no progress
    for (let turn = 0; turn < 10; turn++) await Promise.resolve();
    t.mock.timers.tick(100);
  }
  await lost;
  assert.equal((await peer.next()).type, TYPE.REQ);
  assert.equal((await peer.next()).type, TYPE.CANCEL);
  connection.open.clear();
});

test("GOAWAY fails what was not taken, and nothing new is asked", async () => {
  const { connection, peer } = await pair();
  const [first, second] = [connection.request("info", {}), connection.request("info", {})];
  await peer.next();
  await peer.next();
  peer.send(TYPE.GOAWAY, 4, 1, "idle");
  await assert.rejects(second, PeerLost);
  peer.send(TYPE.RES, 1, 1, { ok: 1 });
  assert.equal((await first).head.get("ok"), 1);
  await assert.rejects(connection.request("info", {}), PeerLost);
  await connection.close();
});

test("an aborted request is cancelled on the wire, and its late reply dropped", async () => {
  const { connection, peer } = await pair();
  const gone = new AbortController();
  const asked = connection.request("step", {}, EMPTY, { signal: gone.signal });
  await peer.next();
  gone.abort(new Error("too slow"));
  await assert.rejects(asked, /too slow/);
  assert.equal((await peer.next()).type, TYPE.CANCEL);
  peer.send(TYPE.RES, 1, 1, {});
  const second = connection.request("info", {});
  peer.send(TYPE.RES, 3, 1, {});
  await second;
  peer.close();
  await assert.rejects(connection.request("info", {}).then(() => connection.request("info", {})));
});

test("a chain is planned over what the servers hold", () => {
  const server = (start, end) => ({ connection: null, blocks: [start, end] });
  const sid = () => new Uint8Array(16);
  assert.deepEqual(
    plan([server(3, 8), server(0, 3), server(1, 5)], 8, sid).map(({ blocks }) => blocks),
    [
      [0, 3],
      [3, 8],
    ],
  );
  assert.deepEqual(
    plan([server(0, 5), server(2, 8)], 8, sid).map(({ blocks }) => blocks),
    [
      [0, 5],
      [5, 8],
    ],
  );
  assert.throws(() => plan([server(0, 3), server(4, 8)], 8, sid), /block 3/);
  assert.throws(() => checkModel({ model: new Uint8Array(32) }, new Uint8Array(32).fill(1)), PeerLost);
});

test("a session numbers its steps, cuts its prefill and checks the answers", async () => {
  const asked = [];
  let fault = null;
  const connection = {
    async request(method, head, body, { most }) {
      asked.push([method, head.n, head.pos, body.length]);
      const answer = {
        n: head.n,
        pos: head.pos + head.t[0].s[1],
        t: [new Map(Object.entries({ ...head.t[0], ...fault }))],
      };
      assert.equal(most, body.length);
      return { head: new Map(Object.entries(answer)), body };
    },
  };
  const wire = { dtype: "f16", codec: "raw" };
  const session = new Session([{ connection, blocks: [0, 8], sid: new Uint8Array(16) }], {
    model: EMPTY,
    hidden: 4,
    maxLen: 600,
    wire,
  });
  const output = await session.step(new Float32Array(300 * 4).fill(0.5));
  assert.deepEqual([...output], [0.5, 0.5, 0.5, 0.5]);
  await session.step(new Float32Array(4));
  assert.deepEqual(asked, [
    ["step", 0, 0, 2_048],
    ["step", 1, 256, 352],
    ["step", 2, 300, 8],
  ]);
  fault = { d: "f32" };
  await assert.rejects(session.step(new Float32Array(4)), PeerLost);
  const token = session.descriptor(1);
  assert.equal(encode(token, new Float32Array(4)).length, encodedSize(token));
});
