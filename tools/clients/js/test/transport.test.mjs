// Identities, Noise, handshake, records: against chapter 01's examples and other implementations' vectors.

import assert from "node:assert/strict";
import test from "node:test";
import { concat, fromHex, toBase32, toHex, utf8 } from "../lib/bytes.mjs";
import { HandshakeError, ProtocolError } from "../lib/errors.mjs";
import { Initiator } from "../lib/handshake.mjs";
import { Identity, isHonestKey, parseAddress, parsePeerId, SwarmKey, verify } from "../lib/identity.mjs";
import * as msgpack from "../lib/msgpack.mjs";
import { CipherState, HandshakeState, keyPair, PATTERNS, XX } from "../lib/noise.mjs";
import { RecordReader, seal } from "../lib/records.mjs";
import { example, json } from "./spec.mjs";

const NOW = 1_700_000_000;
const bytes = (value, count = 32) => new Uint8Array(count).fill(value);
const SWARM = new SwarmKey(bytes(7));
const MODES = { public: { network: "petalite" }, private: { network: SWARM.networkId, psk: SWARM.psk } };

function initiator(mode, changes = {}) {
  const keys = [bytes(0x11), bytes(0x12)];
  const identity = new Identity(bytes(1));
  const expected = example("responder peer id");
  return new Initiator({ identity, expected, now: NOW, random: () => keys.shift(), ...MODES[mode], ...changes });
}

test("peer ids, swarm keys and addresses are those of the chapter", () => {
  const identity = new Identity(bytes(1));
  assert.deepEqual(identity.publicKey, example("initiator public key"));
  assert.deepEqual(identity.peerId, example("initiator peer id"));
  const text = toBase32(identity.peerId);
  assert.equal(text, "2low5anaag3que3ap5x3xm5rfh7tm4qw7qpy4oxfhzrzo27voora");
  assert.deepEqual(parsePeerId(text), identity.peerId);
  assert.deepEqual(SWARM.psk, example("psk"));
  assert.equal(SWARM.networkId, "private-cwatgxznptzmtw5qbt3u5bl7dsgi373u");
  const address = parseAddress(`petalite://${text}@[2001:db8::1]:31337`);
  assert.deepEqual(address, { peer: identity.peerId, host: "2001:db8::1", port: 31337 });
  for (const bad of [`${text}@h:1`, `petalite://${text}@h`, `petalite://${text}@h:0`, `petalite://${text}@h:65536`]) {
    assert.throws(() => parseAddress(bad), TypeError);
  }
  for (const bad of [text.slice(1), `${text.slice(0, -1)}b`, text.toUpperCase()]) {
    assert.throws(() => parsePeerId(bad), TypeError);
  }
});

test("keys that name no honest peer are refused", () => {
  for (const y of ["00".repeat(32), `01${"00".repeat(31)}`, `ed${"ff".repeat(30)}7f`, `f0${"ff".repeat(30)}7f`]) {
    const key = fromHex(y);
    assert.equal(isHonestKey(key), false);
    key[31] |= 0x80;
    assert.equal(isHonestKey(key), false);
  }
  // the identity point as key: R = identity, S = 0 would verify for any message
  assert.equal(verify(concat(bytes(1, 1), bytes(0, 31)), concat(bytes(1, 1), bytes(0, 63)), utf8("anything")), false);
});

for (const mode of ["public", "private"]) {
  test(`a ${mode} handshake and its first records are the chapter's bytes`, () => {
    const handshake = initiator(mode);
    assert.equal(toHex(handshake.output()), toHex(concat(example(`${mode} preamble`), example(`${mode} message 1`))));
    const answer = concat(example(`${mode} message 2`), example(`${mode} responder record 0`));
    for (const byte of answer.subarray(0, -5)) if (!handshake.result) handshake.receive(Uint8Array.of(byte));
    assert.equal(toHex(handshake.output()), toHex(example(`${mode} message 3`)));
    const { encrypt, decrypt, rest } = handshake.result;
    const frame = fromHex("920501");
    assert.equal(toHex(seal(encrypt, frame)), toHex(example(`${mode} initiator record 0`)));
    const reader = new RecordReader(decrypt, rest);
    reader.push(answer.subarray(answer.length - 21));
    assert.deepEqual(reader.next(), frame);
    assert.equal(reader.next(), null);
  });

  test(`a ${mode} handshake with any byte of message 2 changed fails`, () => {
    const message = example(`${mode} message 2`);
    for (let at = 2; at < message.length; at += 7) {
      const changed = Uint8Array.from(message);
      changed[at] ^= 1;
      assert.throws(() => initiator(mode).receive(changed), HandshakeError, `byte ${at}`);
    }
  });
}

test("what a responder may not do ends the handshake", () => {
  const message = example("public message 2");
  assert.throws(() => initiator("public", { network: "other" }).receive(message), HandshakeError);
  assert.throws(() => initiator("public", { expected: bytes(5) }).receive(message), /peer id mismatch/);
  assert.throws(() => initiator("public", { now: NOW + 43_201 }).receive(message), /clock/);
  assert.throws(() => initiator("public", { now: NOW - 43_801 }).receive(message), /clock/);
  const refusal = concat(utf8("PTLT"), Uint8Array.of(2, 255));
  initiator("public").receive(refusal.subarray(0, 5)); // not all of it yet
  assert.throws(() => initiator("public").receive(refusal), /version 2/);
  assert.throws(() => initiator("public").receive(utf8("HTTP/1")), HandshakeError);
  assert.throws(() => initiator("public").receive(Uint8Array.of(0, 95)), HandshakeError);
  assert.throws(() => initiator("public").receive(Uint8Array.of(4, 177)), HandshakeError);
});

test("a certificate that breaks a rule is refused", () => {
  const fields = { k: bytes(9), x: NOW, s: bytes(1, 64) };
  const cases = [
    [{ ...fields, k: bytes(9, 31) }, /field/],
    [{ ...fields, x: -1 }, /field/],
    [{ ...fields, s: undefined }, /field/],
    [{ ...fields, "!new": 1 }, /understood/],
    [[1], /understood/],
    [{ ...fields, k: bytes(0) }, /key/],
    [{ ...fields, pad: bytes(0, 1000) }, /allowed/],
    [fields, /signature/],
  ];
  const handshake = initiator("public");
  handshake.noise.rs = bytes(3);
  for (const [payload, why] of cases) assert.throws(() => handshake.checkCertificate(msgpack.encode(payload)), why);
});

test("Noise agrees with the vectors of other implementations", () => {
  PATTERNS.Noise_XXpsk3_25519_ChaChaPoly_SHA256 = [["e"], ["e", "ee", "s", "es"], ["s", "se", "psk"]];
  const vectors = json("vectors/noise.json").vectors.filter(({ protocol_name }) => protocol_name in PATTERNS);
  assert.ok(vectors.length >= 4);
  for (const vector of vectors) {
    const sides = ["init", "resp"].map(
      (side) =>
        new HandshakeState({
          pattern: vector.protocol_name,
          initiator: side === "init",
          prologue: fromHex(vector[`${side}_prologue`] ?? ""),
          s: keyPair(fromHex(vector[`${side}_static`])),
          e: keyPair(fromHex(vector[`${side}_ephemeral`])),
          psk: vector[`${side}_psks`]?.length ? fromHex(vector[`${side}_psks`][0]) : undefined,
        }),
    );
    for (const [i, { payload, ciphertext }] of vector.messages.slice(0, 3).entries()) {
      const message = sides[i % 2].writeMessage(fromHex(payload));
      assert.equal(toHex(message), ciphertext);
      assert.equal(toHex(sides[(i + 1) % 2].readMessage(message)), payload);
    }
    const states = sides[1].split();
    for (const [i, { payload, ciphertext }] of vector.messages.slice(3).entries()) {
      const cipher = states[(i + 1) % 2];
      assert.equal(toHex(cipher.encryptWithAd(new Uint8Array(0), fromHex(payload))), ciphertext);
    }
  }
});

test("a key lasts 65,536 records", () => {
  const cipher = new CipherState(Uint8Array.from({ length: 32 }, (_, i) => i));
  cipher.n = 65_535n;
  const frame = fromHex("920501");
  assert.deepEqual(seal(cipher, frame).subarray(2), example("ciphertext 65535"));
  assert.deepEqual(cipher.k, example("key after rekey"));
  assert.deepEqual(seal(cipher, frame).subarray(2), example("ciphertext 65536"));
});

test("a record that is too short or does not decrypt is the peer's fault", () => {
  const reader = () => new RecordReader(new CipherState(bytes(1)), new Uint8Array(0));
  for (const [record, code] of [
    [concat(Uint8Array.of(0, 16), bytes(0, 16)), 2],
    [concat(Uint8Array.of(0, 17), bytes(0, 17)), 3],
  ]) {
    const one = reader();
    one.push(record);
    assert.throws(
      () => one.next(),
      (error) => error instanceof ProtocolError && error.code === code,
    );
  }
});

test("an all-zero Diffie-Hellman result ends the handshake", () => {
  const fresh = new HandshakeState({
    pattern: XX,
    initiator: true,
    prologue: bytes(0, 0),
    s: keyPair(bytes(1)),
    e: keyPair(bytes(2)),
  });
  fresh.writeMessage(bytes(0, 0));
  assert.throws(() => fresh.readMessage(concat(bytes(0), bytes(0, 96))), HandshakeError);
});
