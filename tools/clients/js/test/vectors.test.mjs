// Every vector of spec/vectors that concerns a client.

import assert from "node:assert/strict";
import test from "node:test";
import { fromHex, toBase32, toHex } from "../lib/bytes.mjs";
import { ERR, GOAWAY, ProtocolError } from "../lib/errors.mjs";
import * as frames from "../lib/frames.mjs";
import { Initiator } from "../lib/handshake.mjs";
import { Identity, isHonestKey, parsePeerId, peerIdOf, SwarmKey } from "../lib/identity.mjs";
import * as msgpack from "../lib/msgpack.mjs";
import { CipherState } from "../lib/noise.mjs";
import { RecordReader, seal } from "../lib/records.mjs";
import * as tensors from "../lib/tensors.mjs";
import { json } from "./spec.mjs";

const vectors = (name) => json(`vectors/${name}.json`);
const refused = (goaway) => (error) => error instanceof ProtocolError && error.code === GOAWAY[goaway];

/** A decoded value as the vectors show it. */
function shown(value) {
  if (value instanceof Uint8Array) return { bin: toHex(value) };
  if (value instanceof Map) return Object.fromEntries([...value].map(([key, item]) => [key, shown(item)]));
  return Array.isArray(value) ? value.map(shown) : value;
}

test("strict_msgpack", () => {
  const { valid, invalid } = vectors("strict_msgpack");
  for (const { name, hex, shortest, value } of valid) {
    const decoded = msgpack.decode(fromHex(hex));
    if (typeof decoded !== "bigint") assert.deepEqual(shown(decoded), value, name); // JSON has no such numbers
    assert.equal(toHex(msgpack.encode(decoded)), shortest, name);
  }
  for (const { name, hex } of invalid) assert.throws(() => msgpack.decode(fromHex(hex)), refused("frame"), name);
});

test("frames", () => {
  const { valid, invalid } = vectors("frames");
  for (const { name, hex, frame } of valid) {
    if (frame.body !== undefined && frame.type !== "Data") {
      assert.throws(() => frames.decode(fromHex(hex)), refused("frame"), name); // `inline`, which is not offered here
      continue;
    }
    const made = frames.decode(fromHex(hex));
    if (frame.type === "Ignorable") assert.equal(made, null, name);
    else {
      assert.equal(made.type, frames.TYPE[frame.type.toUpperCase()], name);
      assert.deepEqual([made.stream, made.end], [frame.stream ?? 0, frame.end ?? false], name);
    }
  }
  for (const { name, hex, goaway } of invalid) {
    assert.throws(() => frames.decode(fromHex(hex)), refused(goaway), name);
  }
});

test("peer_ids", () => {
  const { peer_ids, refused_keys, refused_texts } = vectors("peer_ids");
  for (const { seed, public_key, peer_id, text } of peer_ids) {
    const identity = new Identity(fromHex(seed));
    assert.deepEqual([identity.publicKey, identity.peerId], [fromHex(public_key), fromHex(peer_id)]);
    assert.deepEqual([toBase32(peerIdOf(identity.publicKey)), parsePeerId(text)], [text, fromHex(peer_id)]);
  }
  for (const { name, public_key } of refused_keys) assert.equal(isHonestKey(fromHex(public_key)), false, name);
  for (const { name, text } of refused_texts) assert.throws(() => parsePeerId(text), TypeError, name);
});

for (const given of vectors("handshake").handshakes) {
  test(`handshake: ${given.name}`, () => {
    const { now, frame } = vectors("handshake");
    const key = given.swarm_key && new SwarmKey(fromHex(given.swarm_key));
    if (key) assert.equal(key.networkId, given.network);
    const keys = [given.initiator.static, given.initiator.ephemeral].map(fromHex);
    const handshake = new Initiator({
      identity: new Identity(fromHex(given.initiator.seed)),
      network: given.network,
      psk: key?.psk,
      expected: parsePeerId(given.responder.peer),
      now,
      random: () => keys.shift(),
    });
    const [first, second, third, ...records] = given.bytes;
    assert.equal(toHex(handshake.output()), first.hex);
    handshake.receive(fromHex(second.hex));
    const { encrypt, decrypt, rest } = handshake.result;
    const sent = toHex(handshake.output());
    const reader = new RecordReader(decrypt, rest);
    for (const { from, hex } of records) {
      if (from === "initiator") assert.equal(toHex(seal(encrypt, fromHex(frame))), hex);
      else {
        reader.push(fromHex(hex));
        assert.equal(toHex(reader.next()), frame);
      }
    }
    assert.equal(sent, third.hex);
  });
}

test("records", () => {
  const { key, frame, records, refused: bad } = vectors("records");
  for (const { n, key: under, record } of records) {
    const sending = new CipherState(fromHex(under));
    sending.n = BigInt(n);
    assert.equal(toHex(seal(sending, fromHex(frame))), record);
    const receiving = new CipherState(fromHex(under));
    receiving.n = BigInt(n);
    assert.equal(toHex(new RecordReader(receiving, fromHex(record)).next()), frame);
  }
  for (const { name, stream, goaway } of bad) {
    const reader = new RecordReader(new CipherState(fromHex(key)), fromHex(stream));
    const all = () => {
      while (reader.next());
    };
    assert.throws(all, refused(goaway), name);
  }
});

/** Values given as bits, as float32; null for the types that this client does not compute with. */
function floats(dtype, hex) {
  const bytes = fromHex(hex);
  const view = new DataView(bytes.buffer);
  if (dtype === "f32") return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  if (dtype !== "f16" && dtype !== "bf16") return null;
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => tensors.widen(dtype, view.getUint16(2 * i, true)));
}

test("tensors", () => {
  const { good, bad_bodies } = vectors("tensors");
  let count = 0;
  for (const { name, descriptor, values, body, decoded } of good) {
    const { n, d: dtype, s: shape, c: codec } = descriptor;
    const mine = { name: n, dtype, shape, codec };
    const given = floats(dtype, values);
    if (given === null) continue;
    count += 1;
    assert.equal(toHex(tensors.encode(mine, given)), body, name);
    assert.deepEqual(tensors.decode(mine, fromHex(body)), floats(dtype, decoded), name);
  }
  assert.ok(count >= 8);
  for (const { name, descriptor, body, error } of bad_bodies) {
    const { n, d: dtype, s: shape, c: codec } = descriptor;
    if (floats(dtype, "") === null) continue;
    assert.throws(() => tensors.decode({ name: n, dtype, shape, codec }, fromHex(body)), { code: ERR[error] }, name);
  }
});

test("messages", () => {
  const { good } = vectors("messages");
  for (const { name, hex } of good) {
    const decoded = msgpack.decode(fromHex(hex));
    assert.deepEqual(msgpack.decode(msgpack.encode(decoded)), decoded, name);
  }
});
