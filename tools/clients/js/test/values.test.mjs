// msgpack, tensors, frames, model: against the chapters' examples, and against cases that another program made.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { concat, fromHex, toHex, utf8 } from "../lib/bytes.mjs";
import { ClientModel, greedy, makeManifest, readConfig, tensorShapes } from "../lib/bloom.mjs";
import { ERR, GOAWAY, ProtocolError } from "../lib/errors.mjs";
import * as frames from "../lib/frames.mjs";
import * as msgpack from "../lib/msgpack.mjs";
import { readSafetensors, values } from "../lib/safetensors.mjs";
import * as tensors from "../lib/tensors.mjs";
import { sha256 } from "@noble/hashes/sha2.js";
import { chapter, json } from "./spec.mjs";

const refused = (code) => (error) => error instanceof ProtocolError && error.code === code;

test("msgpack decodes and refuses what chapter 04 shows", () => {
  const rows = [...chapter("04-msgpack.md").matchAll(/^\| ((?:`[0-9a-f]+`(?:, )?)+) \| (.*) \|$/gm)];
  assert.ok(rows.length >= 8);
  for (const [, spelled, meaning] of rows) {
    for (const [, hex] of spelled.matchAll(/`([0-9a-f]+)`/g)) {
      if (meaning.includes("refused"))
        assert.throws(() => msgpack.decode(fromHex(hex)), refused(GOAWAY.frame), meaning);
      else msgpack.decode(fromHex(hex));
    }
  }
  const map = msgpack.decode(fromHex("82a3736964c410000102030405060708090a0b0c0d0e0fa16e00"));
  assert.deepEqual([...map.keys()], ["sid", "n"]);
  assert.equal(msgpack.decode(fromHex("cf0000000000000005")), 5);
  assert.equal(msgpack.decode(fromHex("db0000000161")), "a");
});

test("msgpack values survive, and the limits are those of section 4.3", () => {
  const numbers = [
    0,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2 ** 32 - 1,
    2 ** 32,
    -1,
    -32,
    -33,
    -128,
    -129,
    -32_768,
    -32_769,
    -(2 ** 31),
    -(2 ** 31) - 1,
  ];
  for (const value of [
    null,
    true,
    false,
    "",
    "ß",
    "x".repeat(300),
    ...numbers,
    2n ** 64n - 1n,
    -(2n ** 63n),
    [1, ["a"]],
  ]) {
    assert.deepEqual(msgpack.decode(msgpack.encode(value)), value);
  }
  const nested = (depth) => fromHex("91".repeat(depth - 1) + "90");
  msgpack.decode(nested(16));
  assert.throws(() => msgpack.decode(nested(17)), refused(GOAWAY.frame));
  msgpack.decode(msgpack.encode(new Array(4_096).fill(1)));
  assert.throws(() => msgpack.decode(msgpack.encode(new Array(4_097).fill(1))), refused(GOAWAY.frame));
  msgpack.decode(msgpack.encode({ ["k".repeat(64)]: "x".repeat(4_096) }));
  assert.throws(() => msgpack.decode(msgpack.encode({ ["k".repeat(65)]: 1 })), refused(GOAWAY.frame));
  assert.throws(() => msgpack.decode(msgpack.encode("x".repeat(4_097))), refused(GOAWAY.frame));
  assert.throws(() => msgpack.encode(1.5), TypeError);
});

test("numbers of the protocol are those of constants.json", () => {
  const { frames: types, errors, goaways, chapters } = json("constants.json");
  assert.deepEqual({ ...frames.TYPE }, types);
  for (const [name, code] of Object.entries(ERR))
    assert.equal(code, errors[name === "badRequest" ? "bad_request" : name]);
  for (const [name, code] of Object.entries(GOAWAY)) assert.equal(code, goaways[name]);
  const { MAX_FRAME, MAX_FRAME_BEFORE_HELLO, MAX_DATA } = chapters["02"];
  assert.deepEqual(
    [frames.MAX_FRAME, frames.MAX_FRAME_BEFORE_HELLO, frames.MAX_DATA],
    [MAX_FRAME, MAX_FRAME_BEFORE_HELLO, MAX_DATA],
  );
});

test("frames: what is malformed, what is unknown, what is ignored", () => {
  const decode = (...value) => frames.decode(msgpack.encode(value));
  assert.deepEqual(decode(3, 1, 1, utf8("x")), { type: 3, stream: 1, end: true, fields: [1, 1, utf8("x")] });
  assert.equal(decode(31, "whatever"), null);
  for (const [value, code] of [
    [[32], 1],
    [[9], 1],
    [[-1], 1],
    [["0"], 2],
    [[], 2],
    [[3, 1, 2, utf8("")], 2],
    [[3, 0, 0, utf8("")], 1],
    [[1, 1, 1, "info"], 2],
    [[6, utf8("short")], 2],
    [[1, 1, 1, "info", { x: "y".repeat(16_384) }], 2],
    [[2, 1, 0, []], 2],
  ])
    assert.throws(() => decode(...value), refused(code), JSON.stringify(value));
  assert.throws(() => frames.decode(concat(fromHex("94030100c5fde9"), new Uint8Array(65_001))), refused(GOAWAY.frame));
});

const descriptor = (dtype, codec, shape) => ({ name: "h", dtype, codec, shape });

test("tensors: the examples of section 5.7", () => {
  const long = new Float32Array(66);
  long.set([1, -0.5]);
  long.set([3, -3], 64);
  const cases = [
    [descriptor("f16", "raw", [4]), [1, -2, 0.5, 65504], "003c00c00038ff7b"],
    [descriptor("bf16", "raw", [2]), [1, -2], "803f00c0"],
    [descriptor("f32", "i8b64", [1, 4]), [127, -63.5, 0.5, 1.5], "0000803f7fc00002"],
    [descriptor("f32", "i8b64", [1, 66]), long, `0402013c0683c13c7fc0${"00".repeat(62)}7f81`],
  ];
  for (const [each, numbers, hex] of cases) assert.equal(toHex(tensors.encode(each, Float32Array.from(numbers))), hex);
  assert.equal(toHex(msgpack.encode(tensors.toWire(cases[0][0]))), "84a16ea168a164a3663136a1739104a163a3726177");
});

test("tensors: what no sender may send", () => {
  const bad = [
    [descriptor("f32", "raw", [1]), "0000807f"],
    [descriptor("f16", "raw", [1]), "007e"],
    [descriptor("bf16", "raw", [1]), "80ff"],
    [descriptor("f32", "raw", [2]), "00000000"],
    [descriptor("f32", "i8b64", [1]), "0000807b80"],
    [descriptor("f32", "i8b64", [1]), "0000008000"],
    [descriptor("f32", "i8b64", [1]), "0000000001"],
    [descriptor("f16", "i8b64", [1]), "00f8004401"],
    [descriptor("f32", "i8b64", [1]), "0000007c01"],
  ];
  for (const [each, hex] of bad) assert.throws(() => tensors.decode(each, fromHex(hex)), { code: ERR.tensor }, hex);
  for (const value of [NaN, Infinity, 65_520]) {
    assert.throws(() => tensors.encode(descriptor("f16", "raw", [1]), Float32Array.of(value)), RangeError);
  }
});

test(
  "tensors: every f16, and the cases of PETALITE_CODEC_CASES, by bytes",
  { skip: !process.env.PETALITE_CODEC_CASES },
  () => {
    for (let bits = 0; bits < 65_536; bits++) {
      if ((bits & 0x7c00) !== 0x7c00)
        assert.equal(tensors.narrow("f16", tensors.widen("f16", bits)), bits === 0x8000 ? 0x8000 : bits);
    }
    const cases = JSON.parse(readFileSync(process.env.PETALITE_CODEC_CASES, "utf8"));
    for (const { dtype, codec, shape, input, body, output } of cases) {
      const floats = (hex) => new Float32Array(fromHex(hex).buffer);
      const each = descriptor(dtype, codec, shape);
      assert.equal(toHex(tensors.encode(each, floats(input))), body, `${dtype} ${codec} ${shape}`);
      assert.deepEqual(tensors.decode(each, fromHex(body)), floats(output));
    }
  },
);

/** The formula model of section 6.8. */
function formulaModel() {
  const config = readConfig({ hidden_size: 64, n_head: 8, n_layer: 2, vocab_size: 256 });
  const made = new Map();
  for (const [name, shape] of tensorShapes(config)) {
    let seed = 2166136261;
    for (const byte of utf8(name)) seed = Math.imul(seed ^ byte, 16777619) >>> 0;
    const numbers = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => {
      let x = (seed + Math.imul(i, 2654435761)) >>> 0;
      x = Math.imul(x ^ (x >>> 16), 0x7feb352d) >>> 0;
      x = Math.imul(x ^ (x >>> 15), 0x846ca68b) >>> 0;
      const u = (x >>> 24) - 128;
      return /layernorm\.weight$|^ln_f\.weight$/.test(name) ? 1 + Math.floor(u / 4) / 128 : u / 256;
    });
    made.set(name, { dtype: "F32", shape, bytes: new Uint8Array(numbers.buffer) });
  }
  return { config, tensors: made };
}

test("the formula model: elements, model id, embeddings", () => {
  const { config, tensors: all } = formulaModel();
  for (const [, name, i, value] of chapter("06-model.md").matchAll(
    /^\| ([a-z_0-9.]+weight) \| (\d+) \| ([0-9.]+) \|$/gm,
  )) {
    assert.equal(values(all.get(name))[Number(i)], Number(value), name);
  }
  const id = /Its model id is `([0-9a-f]{64})`/.exec(chapter("06-model.md"))[1];
  assert.equal(toHex(sha256(makeManifest(config, all))), id);
  const model = new ClientModel(config, all);
  assert.equal(toHex(model.modelId), id);
  const last = model.embed([80, 101, 116, 97, 108]).slice(-64, -60);
  for (const [i, expected] of [1.060435, 0.383674, -0.090906, -0.336146].entries())
    assert.ok(Math.abs(last[i] - expected) < 1e-6);
  assert.throws(() => model.embed([256]), RangeError);
  assert.equal(model.logits(new Float32Array(64).fill(1)).length, 256);
  assert.deepEqual(greedy(Float64Array.of(1, 5, 4)), [1, 1]);
});

test("safetensors: names with and without prefix, and headers that lie", () => {
  const file = (header, data) => {
    const text = utf8(JSON.stringify(header));
    const length = new Uint8Array(8);
    new DataView(length.buffer).setBigUint64(0, BigInt(text.length), true);
    return concat(length, text, fromHex(data));
  };
  const good = readSafetensors(
    file({ "transformer.a": { dtype: "F16", shape: [2], data_offsets: [0, 4] } }, "003c00c0"),
  );
  assert.deepEqual(values(good.get("a")), Float32Array.of(1, -2));
  assert.throws(
    () => readSafetensors(file({ a: { dtype: "F16", shape: [2], data_offsets: [0, 4] } }, "003c")),
    TypeError,
  );
  assert.throws(
    () => readSafetensors(file({ a: { dtype: "F16", shape: [3], data_offsets: [0, 4] } }, "003c00c0")),
    TypeError,
  );
  assert.throws(() => readSafetensors(fromHex("ffffffffffffff7f")), TypeError);
});
