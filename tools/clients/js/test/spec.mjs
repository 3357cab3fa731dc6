// Reads the examples of spec/ from its own text, so that chapter and client cannot drift apart.

import { readFileSync } from "node:fs";
import { fromHex } from "../lib/bytes.mjs";

const SPEC = new URL("../../../../spec/", import.meta.url);

/** @param {string} name */
export const chapter = (name) => readFileSync(new URL(name, SPEC), "utf8");

/** @param {string} name */
export const json = (name) => JSON.parse(chapter(name));

const TRANSPORT = chapter("01-transport.md");

/** The bytes of a line `name = hex` of chapter 01. @param {string} name */
export function example(name) {
  const found = new RegExp(`^${name} = ([0-9a-f]+)$`, "m").exec(TRANSPORT);
  if (!found) throw new Error(`chapter 01 has no example ${name}`);
  return fromHex(found[1]);
}
