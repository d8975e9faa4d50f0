// The server's protocol: see README.md beside the server's code.

const VERSION = 1, AUDIO = 1, END = 2, FLOAT32 = 0;
const REQUEST_BYTES = 16, REPLY_BYTES = 24;
const BEHIND_S = 1, CAUGHT_UP_S = 0.3; // sound without an answer: nothing more is sent, and is sent again

export class Stream {
  // on: { ready(facts), near(samples, facts), end(message, code) }
  constructor(rate, on) {
    this.sequence = 0;
    this.rate = rate;
    this.open = 0; // samples that have not been answered
    this.behind = false;
    this.left_out_s = 0;
    this.on = on;
    this.ready = false;
    this.told = null;
    const url = new URL(`v1/echo?sample_rate_hz=${rate}`, location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(data);
    this.socket.onclose = ({ code, reason }) => this.on.end(this.told ?? (reason || "The connection broke."), code);
  }

  // Where the server is behind, frames are left out and not numbered: both signals and the result lack that time.
  send(mic, reference) {
    if (!this.ready || this.socket.readyState !== WebSocket.OPEN) return false;
    this.behind = this.open > (this.behind ? CAUGHT_UP_S : BEHIND_S) * this.rate;
    if (this.behind) {
      this.left_out_s += mic.length / this.rate;
      return false;
    }
    this.open += mic.length;
    this.socket.send(frame(AUDIO, this.sequence++, mic, reference));
    return true;
  }

  close() {
    if (this.socket.readyState === WebSocket.OPEN && this.ready) {
      this.socket.send(frame(END, this.sequence++, new Float32Array(0), new Float32Array(0)));
    } else {
      this.socket.close();
    }
    this.ready = false;
  }

  receive(data) {
    if (typeof data === "string") {
      const told = JSON.parse(data);
      if (told.type === "ready") {
        this.ready = true;
        this.on.ready(told);
      } else {
        this.told = told.message;
      }
      return;
    }
    const view = new DataView(data);
    const facts = {
      delay_ms: view.getFloat32(12, true),
      voice: view.getFloat32(16, true),
      took_ms: view.getFloat32(20, true),
    };
    const near = new Float32Array(data, REPLY_BYTES);
    this.open -= near.length;
    this.on.near(near, facts);
  }
}

function frame(kind, sequence, mic, reference) {
  const data = new ArrayBuffer(REQUEST_BYTES + 4 * (mic.length + reference.length));
  const view = new DataView(data);
  view.setUint8(0, VERSION);
  view.setUint8(1, kind);
  view.setUint8(2, FLOAT32);
  view.setUint32(4, sequence, true);
  view.setUint32(8, mic.length, true);
  view.setUint32(12, reference.length, true);
  new Float32Array(data, REQUEST_BYTES, mic.length).set(mic); // every browser's machine is little-endian
  new Float32Array(data, REQUEST_BYTES + 4 * mic.length).set(reference);
  return data;
}
