// TCP under Node, behind the two methods that lib/connection.mjs asks for. A browser brings its own transport.

import net from "node:net";
import { once } from "node:events";
import { PeerLost } from "./lib/errors.mjs";

const GOODBYE_MS = 1_000;

/**
 * @param {string} host
 * @param {number} port
 * @returns {Promise<import("./lib/connection.mjs").Transport>}
 */
export async function dial(host, port) {
  const socket = net.connect({ host, port, noDelay: true });
  try {
    await once(socket, "connect");
  } catch (error) {
    throw new PeerLost(`${host}:${port}: ${/** @type {Error} */ (error).message}`);
  }
  const chunks = socket[Symbol.asyncIterator]();
  socket.on("error", () => {}); // read() tells it
  return {
    async read() {
      try {
        const { done, value } = await chunks.next();
        return done ? null : new Uint8Array(value);
      } catch (error) {
        throw new PeerLost(/** @type {Error} */ (error).message);
      }
    },
    async write(bytes) {
      if (bytes === null) {
        // PT-FRM-045: a socket closed with unread bytes in it would be reset, and the reset can overtake our last frame
        socket.end();
        setTimeout(() => socket.destroy(), GOODBYE_MS).unref();
      } else if (!socket.write(bytes)) await Promise.race([once(socket, "drain"), once(socket, "close")]);
    },
  };
}
