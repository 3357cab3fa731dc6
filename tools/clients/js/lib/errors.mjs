// Whose fault it is, in the type.

/** The peer broke the protocol: its connection ends with GOAWAY(`code`). */
export class ProtocolError extends Error {
  /** @param {string} text @param {number} [code] a GOAWAY code */
  constructor(text, code = GOAWAY.protocol) {
    super(text);
    this.name = "ProtocolError";
    this.code = code;
  }
}

/** The handshake failed; the connection is closed without a word. */
export class HandshakeError extends Error {
  /** @param {string} text */
  constructor(text) {
    super(text);
    this.name = "HandshakeError";
  }
}

/** One request failed: the peer answered ERR, or its reply broke a rule. */
export class RequestError extends Error {
  /**
   * @param {number} code an ERR code; an unknown one is internal (PT-ERR-004)
   * @param {string} text
   * @param {Map<string, any>} [detail]
   */
  constructor(code, text, detail = new Map()) {
    super(readable(text));
    this.name = "RequestError";
    this.code = code >= 1 && code <= LAST_CODE ? code : ERR.internal;
    this.detail = detail;
  }
}

/** The connection ended; what was asked may or may not have been done. */
export class PeerLost extends Error {
  /** @param {string} text */
  constructor(text) {
    super(text);
    this.name = "PeerLost";
  }
}

/** Codes of GOAWAY. */
export const GOAWAY = Object.freeze({ normal: 0, protocol: 1, frame: 2, decrypt: 3 });

/** Codes of ERR that this client acts on or sends. */
export const ERR = Object.freeze({ badRequest: 1, unsupported: 2, cancelled: 12, internal: 15, tensor: 16 });
const LAST_CODE = 18;

/** A peer's text for people: cut, and what steers a terminal shown as an escape (PT-FRM-013). @param {string} text */
export const readable = (text) =>
  text
    .slice(0, 1_024)
    .replace(/[\p{C}\u2028\u2029]/gu, (char) => `\\u{${/** @type {number} */ (char.codePointAt(0)).toString(16)}}`);
