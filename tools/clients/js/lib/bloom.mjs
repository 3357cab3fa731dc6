// The client's share of BLOOM: config, model id, embeddings, head (spec 06). Sums are taken in float64.

import { sha256 } from "@noble/hashes/sha2.js";
import { toHex, utf8 } from "./bytes.mjs";
import { values } from "./safetensors.mjs";

/**
 * @typedef {object} Config
 * @property {number} hidden
 * @property {number} heads
 * @property {number} layers
 * @property {number} vocabulary
 * @property {number} epsilon
 * @property {boolean} postNorm apply_residual_connection_post_layernorm
 * @property {boolean} tied
 */
/** @typedef {import("./safetensors.mjs").Tensor} Tensor */

/** The table of section 6.2. @param {Record<string, any>} json of config.json @returns {Config} */
export function readConfig(json) {
  const config = {
    hidden: json.n_embed ?? json.hidden_size,
    heads: json.num_attention_heads ?? json.n_head,
    layers: json.num_hidden_layers ?? json.n_layer,
    vocabulary: json.vocab_size,
    epsilon: json.layer_norm_epsilon ?? 1e-5,
    postNorm: json.apply_residual_connection_post_layernorm ?? false,
    tied: json.tie_word_embeddings ?? true,
  };
  const { hidden, heads, layers, vocabulary } = config;
  /** @type {[number, number][]} */
  const bounds = [
    [hidden, 2 ** 20],
    [heads, 2 ** 20],
    [layers, 4_096],
    [vocabulary, 2 ** 24],
  ];
  const inside = bounds.every(([value, most]) => Number.isInteger(value) && value >= 1 && value <= most);
  if (!inside || hidden % heads || !(config.epsilon > 0 && config.epsilon < 1))
    throw new TypeError("config.json: not a BLOOM's");
  return config;
}

/** Names and shapes of PT-MDL-001. @param {Config} config @returns {Map<string, number[]>} */
export function tensorShapes({ hidden: C, layers, vocabulary: V, tied }) {
  /** @type {[string, number[]][]} */
  const all = [["word_embeddings.weight", [V, C]]];
  /** @param {string} name @param {number} out @param {number} [from] */
  const pair = (name, out, from) => {
    all.push([`${name}.weight`, from ? [out, from] : [out]], [`${name}.bias`, [out]]);
  };
  pair("word_embeddings_layernorm", C);
  for (let i = 0; i < layers; i++) {
    pair(`h.${i}.input_layernorm`, C);
    pair(`h.${i}.self_attention.query_key_value`, 3 * C, C);
    pair(`h.${i}.self_attention.dense`, C, C);
    pair(`h.${i}.post_attention_layernorm`, C);
    pair(`h.${i}.mlp.dense_h_to_4h`, 4 * C, C);
    pair(`h.${i}.mlp.dense_4h_to_h`, C, 4 * C);
  }
  pair("ln_f", C);
  if (!tied) all.push(["lm_head.weight", [V, C]]);
  return new Map(all);
}

/**
 * The canonical manifest of section 6.7.
 * @param {Config} config
 * @param {Map<string, Tensor>} tensors all of the model
 * @returns {Uint8Array}
 */
export function makeManifest(config, tensors) {
  const epsilon = new Uint8Array(8);
  new DataView(epsilon.buffer).setFloat64(0, config.epsilon);
  const names = [...tensorShapes(config).keys()].sort();
  const entries = names.map((name) => {
    const { dtype, shape, bytes } = named(tensors, name, config);
    return [name, [dtype, shape, toHex(sha256(bytes))]];
  });
  return utf8(
    JSON.stringify({
      config: {
        apply_residual_connection_post_layernorm: config.postNorm,
        hidden_size: config.hidden,
        layer_norm_epsilon_bits: toHex(epsilon),
        model_type: "bloom",
        n_head: config.heads,
        n_layer: config.layers,
        tie_word_embeddings: config.tied,
        vocab_size: config.vocabulary,
      },
      format: "petalite-manifest-1",
      tensors: Object.fromEntries(entries),
    }),
  );
}

/** PT-MDL-003. @param {Map<string, Tensor>} tensors @param {string} name @param {Config} config @returns {Tensor} */
function named(tensors, name, config) {
  const tensor = tensors.get(name);
  const shape = tensorShapes(config).get(name) ?? [];
  if (tensor === undefined) throw new TypeError(`${name}: missing`);
  if (tensor.shape.join() !== shape.join()) throw new TypeError(`${name}: shape ${tensor.shape}, expected ${shape}`);
  return tensor;
}

/** Embeddings and head of one model. */
export class ClientModel {
  /** @param {Config} config @param {Map<string, Tensor>} tensors those of the whole model */
  constructor(config, tensors) {
    /** @param {string} name */
    const load = (name) => values(named(tensors, name, config));
    this.config = config;
    this.modelId = sha256(makeManifest(config, tensors));
    this.embeddings = load("word_embeddings.weight");
    this.first = { weight: load("word_embeddings_layernorm.weight"), bias: load("word_embeddings_layernorm.bias") };
    this.last = { weight: load("ln_f.weight"), bias: load("ln_f.bias") };
    this.head = config.tied ? this.embeddings : load("lm_head.weight");
  }

  /** PT-MDL-010. @param {Float32Array} x one token @param {{ weight: Float32Array, bias: Float32Array }} layer */
  norm(x, { weight, bias }) {
    const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
    const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
    const scale = 1 / Math.sqrt(variance + this.config.epsilon);
    return x.map((value, i) => (value - mean) * scale * weight[i] + bias[i]);
  }

  /** PT-MDL-011. @param {number[]} ids @returns {Float32Array} (T, C) */
  embed(ids) {
    const { hidden: C, vocabulary } = this.config;
    const made = new Float32Array(ids.length * C);
    for (const [t, id] of ids.entries()) {
      if (!Number.isInteger(id) || id < 0 || id >= vocabulary)
        throw new RangeError(`token id ${id} is not in 0..${vocabulary - 1}`);
      made.set(this.norm(this.embeddings.subarray(id * C, (id + 1) * C), this.first), t * C);
    }
    return made;
  }

  /** PT-MDL-040. @param {Float32Array} z (C,), the last block's output for one token @returns {Float64Array} (V,) */
  logits(z) {
    const { hidden: C, vocabulary } = this.config;
    const x = this.norm(z, this.last);
    const made = new Float64Array(vocabulary);
    for (let v = 0, at = 0; v < vocabulary; v++) {
      let sum = 0;
      for (let i = 0; i < C; i++) sum += this.head[at++] * x[i];
      made[v] = sum;
    }
    return made;
  }
}

/**
 * The best token, and how far the second is behind.
 * @param {Float64Array} logits
 * @returns {[token: number, margin: number]}
 */
export function greedy(logits) {
  let [best, first, second] = [0, -Infinity, -Infinity];
  for (const [token, logit] of logits.entries()) {
    if (logit > first) [best, first, second] = [token, logit, first];
    else if (logit > second) second = logit;
  }
  return [best, first - second];
}
