// Generate greedily over a given chain: node generate.mjs --model DIR --peer ADDRESS... --ids 1,2,3 [options]

import { readFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { ClientModel, greedy, readConfig } from "./lib/bloom.mjs";
import { connect } from "./lib/connection.mjs";
import { HandshakeError, PeerLost, ProtocolError, RequestError } from "./lib/errors.mjs";
import { Identity, parseAddress, SwarmKey } from "./lib/identity.mjs";
import { readSafetensors } from "./lib/safetensors.mjs";
import { checkModel, info, plan, Session } from "./lib/session.mjs";
import { dial } from "./tcp.mjs";

const USAGE = `usage: node generate.mjs --model DIR --peer ADDRESS [--peer ADDRESS...] --ids 1,2,3
         [--max-new-tokens 100] [--wire f32|f16|bf16|int8] [--network NAME] [--swarm-key FILE] [--json]`;
const STEP_MS = 120_000;

/** @type {Record<string, import("./lib/session.mjs").Wire>} */
const WIRES = {
  f32: { dtype: "f32", codec: "raw" },
  f16: { dtype: "f16", codec: "raw" },
  bf16: { dtype: "bf16", codec: "raw" },
  int8: { dtype: "f16", codec: "i8b64" },
};

/** @param {number} count */
const random = (count) => crypto.getRandomValues(new Uint8Array(count));
const deadline = () => AbortSignal.timeout(STEP_MS);

/** @param {string} directory */
async function loadModel(directory) {
  const config = readConfig(JSON.parse(await readFile(path.join(directory, "config.json"), "utf8")));
  return new ClientModel(config, readSafetensors(await readFile(path.join(directory, "model.safetensors"))));
}

/** @param {string[]} peers @param {ClientModel} model @param {{ network?: string, "swarm-key"?: string }} swarm */
async function join(peers, model, swarm) {
  const key = swarm["swarm-key"] === undefined ? null : SwarmKey.parse(await readFile(swarm["swarm-key"], "utf8"));
  const identity = new Identity(random(32));
  const servers = [];
  for (const { peer, host, port } of peers.map(parseAddress)) {
    const network = swarm.network ?? key?.networkId ?? "petalite";
    const now = Math.floor(Date.now() / 1000);
    const connection = await connect(await dial(host, port), {
      identity,
      network,
      psk: key?.psk,
      expected: peer,
      now,
      random,
    });
    const served = await info(connection, deadline());
    checkModel(served, model.modelId);
    servers.push({ connection, blocks: served.blocks });
  }
  return servers;
}

/** @param {ClientModel} model @param {Session} session @param {number[]} prompt @param {number} count */
async function generate(model, session, prompt, count) {
  const started = performance.now();
  /** @type {number[]} */
  const tokens = [];
  const margins = [];
  await session.open(deadline());
  for (let hidden = model.embed(prompt); ; hidden = model.embed(tokens.slice(-1))) {
    const [token, margin] = greedy(model.logits(await session.step(hidden, deadline())));
    tokens.push(token);
    margins.push(margin);
    if (tokens.length === count) break;
  }
  await session.close();
  return { token_ids: tokens, margins, tokens_per_second: (1000 * count) / (performance.now() - started) };
}

async function main() {
  const { values: given } = parseArgs({
    options: {
      model: { type: "string" },
      peer: { type: "string", multiple: true },
      ids: { type: "string" },
      "max-new-tokens": { type: "string", default: "100" },
      wire: { type: "string", default: "f16" },
      network: { type: "string" },
      "swarm-key": { type: "string" },
      json: { type: "boolean", default: false },
    },
  });
  const count = Number(given["max-new-tokens"]);
  const prompt = (given.ids ?? "").split(",").map(Number);
  const wire = WIRES[given.wire];
  if (!given.model || !given.peer || !given.ids || !wire || !(count >= 1)) throw new SyntaxError(USAGE);
  const model = await loadModel(given.model);
  const servers = await join(given.peer, model, given);
  try {
    const options = { model: model.modelId, hidden: model.config.hidden, maxLen: prompt.length + count, wire };
    const hops = plan(servers, model.config.layers, () => random(16));
    const made = await generate(model, new Session(hops, options), prompt, count);
    console.log(given.json ? JSON.stringify(made) : made.token_ids.join(" "));
  } finally {
    await Promise.all(servers.map(({ connection }) => connection.close()));
  }
}

const EXPECTED = [HandshakeError, PeerLost, ProtocolError, RequestError, TypeError, RangeError, SyntaxError];
try {
  await main();
} catch (error) {
  if (!EXPECTED.some((kind) => error instanceof kind)) throw error;
  console.error(String(/** @type {Error} */ (error).message));
  process.exitCode = error instanceof SyntaxError ? 2 : 1;
}
