// What this implementation makes of many inputs, for comparing it with another: lines "frame HEX", "certificate HEX",
// "address TEXT", "body DTYPE CODEC SHAPE HEX" on stdin, a verdict a line on stdout.

import { createInterface } from "node:readline";
import { fromHex, toHex } from "../lib/bytes.mjs";
import { HandshakeError, ProtocolError, RequestError } from "../lib/errors.mjs";
import * as frames from "../lib/frames.mjs";
import { Initiator } from "../lib/handshake.mjs";
import { checkHello } from "../lib/hello.mjs";
import { Identity, parseAddress } from "../lib/identity.mjs";
import * as msgpack from "../lib/msgpack.mjs";
import { decode as decodeTensor } from "../lib/tensors.mjs";

const handshake = new Initiator({
  identity: new Identity(new Uint8Array(32)),
  network: "petalite",
  expected: new Identity(new Uint8Array(32)).peerId,
  now: 1_700_000_000,
  random: (count) => new Uint8Array(count).fill(1),
});
handshake.noise.rs = Uint8Array.from({ length: 32 }, (_, i) => i);

/** @type {Record<string, (...words: string[]) => string>} */
const JUDGES = {
  frame(hex) {
    const frame = frames.decode(fromHex(hex ?? ""));
    return frame === null ? "ignored" : `frame ${frame.type} ${toHex(msgpack.encode([frame.type, ...frame.fields]))}`;
  },
  hello(hex) {
    const { body, streams } = checkHello(frames.decode(fromHex(hex ?? ""))?.fields[0]);
    return `hello ${body} ${streams}`;
  },
  certificate(hex) {
    handshake.checkCertificate(fromHex(hex ?? ""));
    return "certificate";
  },
  address(hex) {
    return `port ${parseAddress(new TextDecoder().decode(fromHex(hex ?? ""))).port}`;
  },
  body(dtype, codec, shape, hex) {
    const values = decodeTensor({ name: "h", dtype, codec, shape: shape.split("x").map(Number) }, fromHex(hex ?? ""));
    return `values ${toHex(new Uint8Array(values.buffer))}`;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [kind, ...words] = line.split(" ");
  try {
    console.log(JUDGES[kind](...words));
  } catch (error) {
    if (error instanceof ProtocolError) console.log(`refused ${error.code}`);
    else if (error instanceof RequestError) console.log(`refused ${error.code}`);
    else if (error instanceof HandshakeError || error instanceof TypeError) console.log("refused");
    else throw error;
  }
}
