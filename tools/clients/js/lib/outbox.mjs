// What waits to be written: control frames before all others (PT-STR-030), each encrypted when its turn comes.

/** @typedef {{ stream: number, plain: Uint8Array }} Waiting */

export class Outbox {
  /** @param {(plain: Uint8Array) => Promise<void>} write takes one frame; rejects when no more can be written */
  constructor(write) {
    this.write = write;
    /** @type {Uint8Array[]} */
    this.control = [];
    /** @type {Waiting[]} */
    this.messages = [];
    this.broken = false;
    this.pumping = Promise.resolve();
    this.busy = false;
  }

  /** @param {Uint8Array} plain PING, PONG, CANCEL, ERR, GOAWAY, HELLO */
  urgent(plain) {
    this.control.push(plain);
    this.start();
  }

  /** @param {number} stream @param {Uint8Array[]} plains REQ and DATA of one request */
  message(stream, plains) {
    this.messages.push(...plains.map((plain) => ({ stream, plain })));
    this.start();
  }

  /** Forget what is unwritten of a stream. @param {number} stream @param {number} frames of the whole message */
  drop(stream, frames) {
    const left = this.messages.filter((each) => each.stream === stream).length;
    this.messages = this.messages.filter((each) => each.stream !== stream);
    return { begun: left < frames };
  }

  start() {
    if (!this.busy) this.pumping = this.pump();
  }

  async pump() {
    this.busy = true;
    while (!this.broken) {
      const plain = this.control.shift() ?? this.messages.shift()?.plain;
      if (plain === undefined) break;
      try {
        await this.write(plain);
      } catch {
        this.broken = true; // the reading side tells why
      }
    }
    this.busy = false;
  }
}
